"""A training run: from an experiment and a token cache to the checkpoint after the last step.

Work in progress is in `workspace.progress/checkpoints/<numerics class>`, so that calling `train`
again with the same workspace, after whatever kind of death, goes on from the newest checkpoint that
verifies and ends with the same bits. Another numerics class would round otherwise and begins anew.
The result in `workspace.output` is that last checkpoint (`checkpoint` tells its files, `history`
its `losses.json`) and

    experiment.json    the resolved experiment
    model.json         `model`, its configuration, `vocab_size` and `sequence_length`

The loop never waits for the device within a step: losses are read one step late, while the next
step computes, and checkpoints are written by another thread from a copy.
"""

import dataclasses
import logging
import math
import shutil
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from haliax import Axis
from modeling import canonical, recipes
from modeling.artifacts import Built, Workspace, numerics_digest, write_durably
from modeling.data.cache import TokenCache
from modeling.data.loader import TrainLoader
from modeling.experiment import ExperimentConfig
from modeling.models.lm import build_model
from modeling.numerics import numerics_class
from modeling.optim.build import build_optimizer, decayed_parameters
from modeling.training import checkpoint, faults, history
from modeling.training.manifest import CheckpointError
from modeling.training.mesh import Layout, build_layout
from modeling.training.observer import Observer, RunStart, Silent, StepReport
from modeling.training.precision import Policy
from modeling.training.preemption import Preempted, PreemptionNotice
from modeling.training.retention import Checkpoints, open_checkpoints
from modeling.training.state import Blueprint, initial_state, trainable
from modeling.training.step import Metrics, Step, compile_step

_log = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """A loss, gradient or weight is infinite or not a number; nothing of it was saved."""


def train(
    experiment: ExperimentConfig,
    cache: TokenCache,
    workspace: Workspace,
    *,
    observer: Observer | None = None,
    compile_cache: Path | None = None,
) -> Built:
    """Trains `experiment` on the training rows of `cache` to its last step.

    Args:
        experiment: what to train and how.
        cache: rows of `experiment.sequence_length` tokens.
        workspace: where progress is kept and the result goes.
        observer: hears of each step.
        compile_cache: directory of compiled programs, to start faster the next time.

    Raises:
        Preempted: the process was asked to end; everything up to `.step` is saved.
        NonFiniteError: naming the step and the first leaf.
        CheckpointError: another trainer is at work on this workspace.
    """
    if compile_cache is not None:
        _use_compile_cache(compile_cache)
    plan = make_plan(experiment, cache)
    keep = experiment.trainer.keep_checkpoints
    with (
        PreemptionNotice() as notice,
        open_checkpoints(checkpoint_directory(workspace, experiment), keep=keep) as checkpoints,
    ):
        run = _Run(plan, TrainLoader(cache, experiment.trainer.data_order, plan.Batch.size),
                   checkpoints, observer or Silent(), notice)  # fmt: skip
        last = run.to_the_end()
        built = _publish(plan, last, workspace.output, run)
    if observer is not None:
        observer.finished(built.facts)
    return built


@dataclasses.dataclass(frozen=True)
class Plan:
    """What follows from the experiment and the cache alone."""

    experiment: ExperimentConfig
    vocab_size: int
    science: str
    """Digest of all that decides the result but the numerics class."""
    layout: Layout
    make: Callable[[Any], Any]
    blueprint: Blueprint
    Batch: Axis
    Pos: Axis

    @property
    def num_steps(self) -> int:
        """Updates in all."""
        return self.experiment.trainer.num_train_steps

    @property
    def tokens_per_step(self) -> int:
        """Those of one batch."""
        return self.Batch.size * self.Pos.size


def make_plan(experiment: ExperimentConfig, cache: TokenCache) -> Plan:
    """Returns the plan of a run; nothing is computed yet."""
    if cache.sequence_length != experiment.sequence_length:
        raise ValueError(
            f"sequence_length: the experiment asks for {experiment.sequence_length}, but the token "
            f"cache has rows of {cache.sequence_length}; give the cache of that length."
        )
    trainer = experiment.trainer
    layout, policy = build_layout(trainer), Policy.parse(trainer.mp)
    optimizer = build_optimizer(experiment.optimizer, trainer.num_train_steps)
    Vocab, Pos = Axis("vocab", cache.vocab_size), Axis("position", cache.sequence_length)

    def make_model(key: Any) -> Any:
        return build_model(experiment.model, Vocab, Pos, key=key)

    make = partial(initial_state, make_model, optimizer, policy)
    science = [recipes.checkpoint_params(experiment), cache.content_id]
    return Plan(
        experiment=experiment,
        vocab_size=cache.vocab_size,
        science=canonical.digest("training/1", science),
        layout=layout,
        make=make,
        blueprint=Blueprint.of(make, layout),
        Batch=Axis("batch", trainer.train_batch_size),
        Pos=Pos,
    )


class _Run:
    """This process's share of a run."""

    def __init__(
        self,
        plan: Plan,
        loader: TrainLoader,
        checkpoints: Checkpoints,
        observer: Observer,
        notice: PreemptionNotice,
    ) -> None:
        self._plan = plan
        self._loader = loader
        self._checkpoints = checkpoints
        self._observer = observer
        self._notice = notice
        self._written: deque[tuple[int, Path]] = deque()
        self._newest: Path | None = None
        self._clock = _Clock(plan.tokens_per_step)
        self.losses: list[float] = []
        self.resumed_from = 0
        self.compile_s = 0.0

    def to_the_end(self) -> Path:
        """Makes all updates that are left and returns the directory of the last checkpoint."""
        self._newest = self._checkpoints.newest()
        if self._newest is not None:
            self._recall(self._newest)
        if self.resumed_from < self._plan.num_steps:
            arrays = self._arrays()
            step = self._compile()
            self._loop(step, arrays)
        assert self._newest is not None
        faults.reach("before-finish", self._plan.num_steps)
        return self._newest

    @property
    def tokens_per_second(self) -> float:
        """Over all updates of this process, compilation left out."""
        return self._clock.overall

    @property
    def train_s(self) -> float:
        """Seconds in the loop, saving included."""
        return self._clock.seconds

    @property
    def host_s(self) -> float:
        """CPU seconds of the loop's own thread: what a step costs besides the device's work."""
        return self._clock.host_s

    def _recall(self, directory: Path) -> None:
        manifest = self._checkpoints.manifest(directory)
        if manifest.config["science"] != self._plan.science:
            raise CheckpointError(
                f"{directory} belongs to another experiment or other data; give each its own "
                f"workspace, or remove it to begin anew."
            )
        self.resumed_from = manifest.step
        self.losses = history.read_losses(directory)
        self._observer.resumed(manifest.step, str(directory))

    def _arrays(self) -> list[Any]:
        blueprint, layout = self._plan.blueprint, self._plan.layout
        if self._newest is None:
            trainer = self._plan.experiment.trainer
            return blueprint.initialize(
                self._plan.make,
                jax.random.PRNGKey(trainer.seed),
                elastic=trainer.elastic_shards is not None,
            )
        restored = checkpoint.restore(
            self._newest, blueprint.template, mesh=layout.mesh, mapping=layout.parameters
        )
        return blueprint.flatten(restored)

    def _compile(self) -> Step:
        plan, began = self._plan, time.monotonic()
        step = compile_step(
            plan.blueprint,
            plan.experiment.optimizer,
            plan.experiment.trainer,
            plan.layout,
            Pos=plan.Pos,
            columns=self._loader.columns,
        )
        self.compile_s = time.monotonic() - began
        devices = plan.layout.mesh.devices
        params = trainable(plan.blueprint.template.model)[0]
        self._observer.started(
            RunStart(
                num_steps=plan.num_steps,
                first_step=self.resumed_from + 1,
                num_parameters=num_parameters(plan.blueprint),
                num_devices=devices.size,
                device_kind=devices.flat[0].device_kind,
                compile_s=self.compile_s,
                decayed_parameters=tuple(decayed_parameters(params)),
            )
        )
        return step

    def _loop(self, step: Step, arrays: list[Any]) -> None:
        trainer, first = self._plan.experiment.trainer, self.resumed_from
        unread: Metrics | None = None
        with self._loader.stream(first) as batches:
            self._clock.start(first)
            for update in range(first + 1, self._plan.num_steps + 1):
                rows = jax.device_put(next(batches), step.batch_sharding)
                arrays, metrics = step.run(arrays, rows)
                faults.reach("after-step", update)
                # The device is busy with this update while the host looks at the one before.
                if unread is not None:
                    self._read(step, unread)
                unread = metrics
                is_last = update == self._plan.num_steps
                # Asked once: a notice that comes later is acted on after the next update.
                is_stopping = self._notice.given and not is_last
                if is_last or is_stopping or update % trainer.save_every_steps == 0:
                    self._read(step, unread)
                    unread = None
                    self._save(update, arrays)
                self._tell_saved()
                if is_stopping:
                    self._settle()
                    raise Preempted(update)
        self._settle()

    def _read(self, step: Step, metrics: Metrics) -> None:
        """Waits for an update's figures, refuses those that are no numbers, and tells the rest."""
        update = len(self.losses) + 1
        found: Metrics = jax.device_get(metrics)
        require_finite(update, found, step.parameter_names)
        self.losses.append(float(found.loss))
        every, last = self._plan.experiment.trainer.log_every_steps, self._plan.num_steps
        if update in (self.resumed_from + 1, last) or update % every == 0:
            rate = self._clock.lap(update)
            left = (last - update) * self._plan.tokens_per_step
            self._observer.step(
                StepReport(
                    step=update,
                    num_steps=last,
                    loss=float(found.loss),
                    gradient_norm=math.sqrt(float(np.sum(found.gradient_squares))),
                    learning_rate=float(found.learning_rate),
                    tokens=update * self._plan.tokens_per_step,
                    tokens_per_second=rate,
                    eta_s=left / self._clock.overall,
                )
            )

    def _save(self, update: int, arrays: list[Any]) -> None:
        # Two copies of the state would not fit where one just does.
        self._checkpoints.wait()
        leaves = checkpoint.snapshot(self._plan.blueprint.unflatten(arrays))
        for leaf in leaves:
            if not all(np.isfinite(chunk).all() for chunk in leaf.chunks.values()):
                raise NonFiniteError(
                    f"step {update}: `{leaf.path}` is not finite after the update; it was not "
                    f"saved. Lower optimizer.learning_rate, or compute in float32."
                )
        experiment = dataclasses.asdict(self._plan.experiment)
        self._checkpoints.save(
            leaves,
            step=update,
            cursor={"rows": self._loader.cursor(update)},
            config={"experiment": experiment, "science": self._plan.science},
            files={history.LOSSES: history.to_json(self.losses)},
            done=lambda path: self._written.append((update, path)),
        )

    def _settle(self) -> None:
        self._checkpoints.wait()
        self._tell_saved()
        self._clock.stop(len(self.losses))

    def _tell_saved(self) -> None:
        """Observers hear of it here, not in the thread that writes."""
        while self._written:
            update, self._newest = self._written.popleft()
            self._observer.saved(update, str(self._newest))


class _Clock:
    """Tokens per second, since the last lap and since the start."""

    def __init__(self, tokens_per_step: int) -> None:
        self._tokens_per_step = tokens_per_step
        self.seconds = 0.0
        self.host_s = 0.0
        self.overall = 0.0

    def start(self, update: int) -> None:
        self._first = self._lap_update = update
        self._began = self._lap_began = time.monotonic()
        self._host_began = time.thread_time()

    def lap(self, update: int) -> float:
        now = time.monotonic()
        rate = self._rate(update - self._lap_update, now - self._lap_began)
        self._lap_update, self._lap_began = update, now
        self.stop(update)
        return rate

    def stop(self, update: int) -> None:
        self.seconds = time.monotonic() - self._began
        self.host_s = time.thread_time() - self._host_began
        self.overall = self._rate(update - self._first, self.seconds)

    def _rate(self, updates: int, seconds: float) -> float:
        return updates * self._tokens_per_step / max(seconds, 1e-9)


def num_parameters(blueprint: Blueprint) -> int:
    """Returns how many numbers training adjusts."""
    return sum(
        math.prod(array.shape)
        for _, array, _ in checkpoint.named_leaves(trainable(blueprint.template.model)[0])
    )


def require_finite(update: int, metrics: Metrics, names: tuple[str, ...]) -> None:
    """Raises `NonFiniteError` unless the loss and all gradients of an update are finite."""
    bad = [
        name
        for name, square in zip(names, metrics.gradient_squares, strict=True)
        if not np.isfinite(square)
    ]
    if not bad and np.isfinite(metrics.loss):
        return
    where = f"; the gradient of `{bad[0]}` is the first of {len(bad)} that are not" if bad else ""
    raise NonFiniteError(
        f"step {update}: the loss is {float(metrics.loss)}{where} finite. Nothing after step "
        f"{update - 1} was saved. Lower optimizer.learning_rate, lengthen the warmup, or "
        f"compute in float32 (trainer.mp)."
    )


def _publish(plan: Plan, last: Path, output: Path, run: _Run) -> Built:
    """Copies the last checkpoint to `output` and says what it is."""
    shutil.copytree(last, output, dirs_exist_ok=True)
    experiment = dataclasses.asdict(plan.experiment)
    write_durably(output / "experiment.json", experiment)
    write_durably(
        output / "model.json",
        {
            "model": experiment["model"],
            "vocab_size": plan.vocab_size,
            "sequence_length": plan.Pos.size,
        },
    )
    manifest = checkpoint.verify(output)
    facts = {
        "steps": manifest.step,
        "loss_first": run.losses[0],
        "loss_last": run.losses[-1],
        "loss_curve": history.curve(run.losses),
        "tokens": manifest.step * plan.tokens_per_step,
        "tokens_per_second": run.tokens_per_second,
        "train_s": run.train_s,
        "host_s": run.host_s,
        "compile_s": run.compile_s,
        "resumed_from": run.resumed_from,
        "num_parameters": num_parameters(plan.blueprint),
        "num_devices": plan.layout.mesh.size,
    }
    roots = {"parameters": manifest.parameters}
    return Built(manifest.content_id, roots, facts, manifest.digests)


def checkpoint_directory(workspace: Workspace, experiment: ExperimentConfig) -> Path:
    """Returns where the checkpoints of this experiment in this numerics class are."""
    device = jax.devices()[0]
    kind = None if device.platform == "cpu" else device.device_kind
    numerics = numerics_class(experiment.trainer, platform=device.platform, device_kind=kind)
    directory = workspace.progress / "checkpoints" / numerics_digest(numerics)[:16]
    others = sorted(p.name for p in directory.parent.glob("*") if p.name != directory.name)
    if others and not directory.exists():
        _log.warning(
            "%s: the checkpoints there are of other numerics classes (%s), with other rounding; "
            "training begins anew.", directory.parent, ", ".join(others),
        )  # fmt: skip
    return directory


def _use_compile_cache(directory: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
