"""A training run: from an experiment and a token cache to the checkpoint after the last step.

Work in progress is in `workspace.progress/checkpoints/<numerics class>`, so that calling `train`
again with the same workspace, after whatever kind of death, goes on from the newest checkpoint that
verifies and ends with the same bits. Where there is none, one of another numerics class is gone on
with, which is told: see `other_classes`.
The result in `workspace.output` is that last checkpoint (`checkpoint` tells its files, `history`
its `losses.json`) and

    experiment.json    the resolved experiment
    model.json         `model`, its configuration, `vocab_size` and `sequence_length`
    pictures/          pages drawn during training, see `hooks`, if any were asked for
    profiles/          traces of single updates, see `profiling`, if any were asked for

The loop never waits for the device within a step: losses are read one step late, while the next
step computes. Checkpoints are written by another thread, from a copy that the device makes behind
the update, so that the next update follows at once.
"""

import contextlib
import dataclasses
import math
import shutil
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from haliax import Axis
from modeling import faults
from modeling.artifacts import Built, Workspace, numerics_digest, write_durably
from modeling.data.loader import (
    BatchStream,
    RowsOfBatch,
    TrainingData,
    TrainLoader,
    rows_of_process,
)
from modeling.experiment import ExperimentConfig
from modeling.models.lm import build_model
from modeling.numerics import numerics_class
from modeling.optim.groups import Groups, parameter_groups
from modeling.training import history
from modeling.training.accounting import Lap, Ledger, Meter, ModelShape
from modeling.training.compile_cache import CompileCache
from modeling.training.config import BatchSchedule, LengthSchedule
from modeling.training.continuation import (
    require_same_class,
    require_same_science,
    science_of,
    verified_beginning,
)
from modeling.training.feasibility import profiled_steps
from modeling.training.hooks import Decode, Hooks, Setting
from modeling.training.leaves import HostLeaf, HostMemory, fetched, named_leaves, snapshot
from modeling.training.manifest import CheckpointError, Manifest, pieces
from modeling.training.memory import (
    DeviceMemoryError,
    StateMemory,
    bytes_limit,
    explanation,
    is_out_of_memory,
    require_room,
)
from modeling.training.mesh import (
    Layout,
    build_layout,
    idle_devices,
    require_divisible_vocabulary,
)
from modeling.training.observer import Observer, RunStart, Silent, StepReport
from modeling.training.other_classes import classes_before
from modeling.training.peak import Peak
from modeling.training.pins import COPIED, attempt_name
from modeling.training.preemption import Preempted, PreemptionNotice
from modeling.training.processes import Crew, placed_rows
from modeling.training.profiling import Profiler
from modeling.training.program import Memory, peak_bytes_in_use
from modeling.training.reading import copy_checkpoint, read_manifest, verify
from modeling.training.restoring import restore, restore_parameters
from modeling.training.retention import Checkpoints, open_checkpoints
from modeling.training.rule import Metrics
from modeling.training.saving import SaveSchedule
from modeling.training.state import Blueprint, initial_state, trainable
from modeling.training.step import Step, compile_step

PICTURES, PROFILES = "pictures", "profiles"
"""Directories of the progress, and of the result, for people to look into."""


class NonFiniteError(RuntimeError):
    """A loss, gradient or weight is infinite or not a number; nothing of it was saved."""


def train(
    experiment: ExperimentConfig,
    cache: TrainingData,
    workspace: Workspace,
    *,
    observer: Observer | None = None,
    peak: Peak | None = None,
    compile_cache: CompileCache | None = None,
    decode: Decode | None = None,
    initial: Path | None = None,
) -> Built:
    """Trains `experiment` on the training rows of `cache` to its last step.

    Args:
        experiment: what to train and how.
        cache: rows of `experiment.sequence_length` tokens; it may still grow.
        workspace: where progress is kept and the result goes.
        observer: hears of each step.
        peak: what the devices could do at most, to tell utilization by.
        compile_cache: keeps what is compiled, to start faster the next time.
        decode: gives the text of ids, for pictures.
        initial: the files of the checkpoint that `trainer.initialize_from` names.

    Raises:
        Preempted: the process was asked to end; everything up to `.step` is saved.
        NonFiniteError: naming the step and the first leaf.
        CheckpointError: another trainer is at work on this workspace; or what is in it, or
            `initial`, is of another experiment, naming what differs.
        DeviceMemoryError: saying what fills the memory and what to change.
    """
    if (initial is None) != (experiment.trainer.initialize_from is None):
        raise ValueError("trainer.initialize_from and `initial` go together; give both or neither.")
    plan = make_plan(experiment, cache)
    order = experiment.trainer.data_order
    loader = TrainLoader(cache, order, plan.batches)
    if order.max_epochs is not None:
        from modeling.data.cache import TokenCache  # pyarrow

        if isinstance(cache, TokenCache):
            loader.require_epochs(plan.num_steps, order.max_epochs)
    keep = experiment.trainer.keep_checkpoints
    directory = checkpoint_directory(workspace, experiment)
    crew = Crew(plan.layout.mesh)
    if not crew.is_first:
        observer = None
    with (
        PreemptionNotice(experiment.trainer.preemption_grace_s) as notice,
        open_checkpoints(
            directory,
            keep=keep,
            crew=crew,
            remote=workspace.remote_path(directory),
            may_begin_anew=experiment.trainer.begin_anew_if_damaged,
        ) as checkpoints,
        Ledger(directory / "time.jsonl" if crew.is_first else None) as ledger,
    ):
        told = observer or Silent()
        means = _Means(workspace, cache, told, peak, compile_cache, decode, initial)
        run = _Run(plan, loader, checkpoints, notice, crew, ledger, means)
        last = run.to_the_end()
        if crew.is_first:
            _publish(plan, last, workspace)
        built = _built(plan, last, run)
        crew.wait_for_all("published")
    if observer is not None:
        observer.finished(built.facts)
    return built


@dataclasses.dataclass(frozen=True)
class Plan:
    """What follows from the experiment and the cache alone."""

    experiment: ExperimentConfig
    vocab_size: int
    science: Mapping[str, Any]
    """All that decides the result but the rows and the numerics class."""
    layout: Layout
    make: Callable[[Any], Any]
    blueprint: Blueprint
    groups: Groups
    """What weight decay and multipliers act on."""
    batches: BatchSchedule
    lengths: LengthSchedule
    Pos: Axis
    """Of whole rows."""

    @property
    def num_steps(self) -> int:
        """Updates in all."""
        return self.experiment.trainer.num_train_steps

    def tokens(self, updates: int) -> int:
        """Returns how many tokens the first `updates` updates take."""
        return self.lengths.tokens(updates, self.batches)

    def batch_axis(self, updates: int) -> Axis:
        """Returns the axis of the batch of the update after `updates`."""
        return Axis("batch", self.batches.size(updates))

    def row_axis(self, updates: int) -> Axis:
        """Returns the axis of what the update after `updates` takes of its rows."""
        return self.Pos.resize(self.lengths.length(updates))


def make_plan(experiment: ExperimentConfig, cache: TrainingData) -> Plan:
    """Returns the plan of a run; nothing is computed yet."""
    from modeling.optim.build import build_optimizer  # Optax, which takes long to import

    if cache.sequence_length != experiment.sequence_length:
        raise ValueError(
            f"sequence_length: the experiment asks for {experiment.sequence_length}, but the token "
            f"cache has rows of {cache.sequence_length}; give the cache of that length."
        )
    trainer = experiment.trainer
    layout = build_layout(trainer)
    optimizer = build_optimizer(experiment.optimizer, trainer.num_train_steps)
    require_divisible_vocabulary(layout, experiment.model, cache.vocab_size)
    Vocab, Pos = Axis("vocab", cache.vocab_size), Axis("position", cache.sequence_length)

    def make_model(key: Any) -> Any:
        return build_model(experiment.model, Vocab, Pos, key=key)

    make = partial(initial_state, make_model, optimizer.init, trainer)
    blueprint = Blueprint.of(make, layout)
    params = trainable(blueprint.template.model)[0]
    return Plan(
        experiment=experiment,
        vocab_size=cache.vocab_size,
        science=science_of(experiment),
        layout=layout,
        make=make,
        blueprint=blueprint,
        groups=parameter_groups(experiment.optimizer, params),
        batches=trainer.batches,
        lengths=trainer.lengths(Pos.size),
        Pos=Pos,
    )


@dataclasses.dataclass(frozen=True)
class _Means:
    """What a caller gives besides the experiment."""

    workspace: Workspace
    cache: TrainingData
    observer: Observer
    peak: Peak | None
    compile_cache: CompileCache | None
    decode: Decode | None
    initial: Path | None


class _Run:
    """This process's share of a run."""

    def __init__(
        self,
        plan: Plan,
        loader: TrainLoader,
        checkpoints: Checkpoints,
        notice: PreemptionNotice,
        crew: Crew,
        ledger: Ledger,
        means: _Means,
    ) -> None:
        self._plan = plan
        self._cache = means.cache
        self._loader = loader
        self._checkpoints = checkpoints
        self._observer = means.observer
        self._notice = notice
        self._crew = crew
        self._written: deque[tuple[int, Path]] = deque()
        self._newest: Path | None = None
        self._ledger = ledger
        self._means = means
        self._meter = Meter(
            ledger,
            flops_per_token=model_shape(plan).flops_per_token(),
            peak_flops=means.peak and means.peak.flops,
        )
        self._reported = 0
        self._looping_since = 0.0
        self._steps: dict[tuple[Axis, Axis], Step] = {}
        self._saved = 0
        self._held: tuple[int, Callable[[], Sequence[HostLeaf]]] | None = None
        self._copies = jax.jit(
            lambda arrays: [jnp.copy(array) for array in arrays],
            out_shardings=list(plan.blueprint.shardings.values()),
        )
        self._host_memory = HostMemory()
        self._schedule = SaveSchedule(plan.experiment.trainer)
        self.losses: list[float] = []
        self.evaluations: list[dict[str, Any]] = []
        self.resumed_from = 0
        self._numerics = class_here(plan.experiment)
        self.numerics_before: list[dict[str, Any]] = []
        self.host_s = 0.0
        """CPU seconds of the loop's own thread: what a step costs besides the device's work."""
        self.program_flops: int | None = None
        self._memory: Memory | None = None

    def to_the_end(self) -> Path:
        """Makes all updates that are left and returns the directory of the last checkpoint."""
        try:
            with self._ledger.spending("restore"):
                arrays = self._resumed()
            self._ledger.launched(self.resumed_from)
            if self.resumed_from < self._plan.num_steps:
                self._train(arrays)
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise DeviceMemoryError(
                f"Out of memory after step {len(self.losses)}. {self._memory_explained()}"
            ) from error
        assert self._newest is not None
        faults.reach("before-finish", self._plan.num_steps)
        return self._newest

    def _resumed(self) -> list[Any] | None:
        """Returns the arrays of this run's own newest checkpoint; None if there are none yet."""
        found = self._checkpoints.resume(self._recalled)
        if found is None and self._may_adopt():
            found = self._checkpoints.resume(self._recalled)
        if found is not None and found[1] is None:
            self._checkpoints.clear()
            found = None
        if found is not None:
            self._newest, arrays = found
            manifest = self._checkpoints.manifest(self._newest)
            self.numerics_before = classes_before(manifest, self._numerics)
            self._tell_other_classes(self._newest)
            self._take_over(self._newest, manifest)
            return arrays
        if self._means.initial is not None:
            self._begin_with(self._means.initial)
        return None

    def _may_adopt(self) -> bool:
        """Takes in what was done in another numerics class, if there is any and if it may be."""
        others = self._means.workspace.elsewhere
        if self._plan.experiment.trainer.other_numerics == "continue":
            return self._checkpoints.adopt(others, self._refusal)
        if others:
            self._observer.warned(
                f"There is work of {len(others)} other numerics classes on this experiment, which "
                f"trainer.other_numerics: begin_anew leaves alone; training begins at step 0."
            )
        return False

    def _refusal(self, directory: Path, manifest: Manifest) -> str | None:
        try:
            require_same_science(directory, manifest, self._plan.science)
        except CheckpointError as error:
            return str(error)
        return self._cache.refusal(manifest.config["data"])

    def _tell_other_classes(self, directory: Path) -> None:
        if self.numerics_before:
            told = ", ".join(f"{x['class']} until step {x['until']}" for x in self.numerics_before)
            self._observer.warned(
                f"ANOTHER NUMERICS CLASS: this run goes on with work that was done in {told}, and "
                f"this is {self._numerics}. The experiment is the same, but its bits are those of "
                f"neither class alone, and the result is on record as of both. To keep to one, "
                f"set trainer.other_numerics: begin_anew and remove {directory.parent}."
            )

    def _train(self, arrays: list[Any] | None) -> None:
        if arrays is None:
            with self._ledger.spending("restore"):
                arrays = self._initial_arrays()
        with self._start() as hooks:
            self._loop(hooks, arrays)

    def _memory_explained(self) -> str:
        plan = self._plan
        return explanation(plan.experiment, StateMemory.of(plan.blueprint), self._memory)

    @property
    def figures(self) -> dict[str, Any]:
        """Speed, memory, and where the time of all processes went: plain facts."""
        spent, speed = self._ledger.time, self._meter.overall
        figures = {
            "tokens_per_second": speed.tokens_per_second,
            "seconds_per_step": speed.seconds_per_step,
            "goodput": spent.goodput,
            "launches": spent.launches,
            "seconds": {cause: round(s, 3) for cause, s in spent.by_cause.items() if s},
            "device_s": round(sum(spent.by_cause.values()) * self._plan.layout.mesh.size, 3),
            "host_s": self.host_s,
            "compile_s": self._ledger.spent_here["compile"],
            "model_flops_per_token": model_shape(self._plan).flops_per_token(),
        }
        optional = {
            "mfu": speed.mfu,
            "program_flops_per_step": self.program_flops,
            "peak_flops": self._means.peak and self._means.peak.flops,
            "peak_flops_source": self._means.peak and self._means.peak.source,
            "peak_bytes_in_use": peak_bytes_in_use(self._devices),
            "validation_loss": self.evaluations[-1]["losses"] if self.evaluations else None,
        }
        return figures | {name: value for name, value in optional.items() if value is not None}

    @property
    def _devices(self) -> list[Any]:
        return self._plan.layout.mesh.local_devices

    def _begin_with(self, directory: Path) -> None:
        """Goes on from another run's checkpoint, or begins with some of its arrays."""
        experiment = self._plan.experiment
        manifest = verified_beginning(directory, experiment, self._cache, class_here(experiment))
        wanted = experiment.trainer.initialize_from
        if wanted is not None and wanted.goes_on:
            self._take_over(directory, manifest)

    def _recalled(self, directory: Path) -> list[Any] | None:
        """Reads a checkpoint of this run's own, whole; None if it is of rows that are no more."""
        manifest = self._checkpoints.manifest(directory)
        require_same_science(directory, manifest, self._plan.science)
        is_told_to = directory.name == attempt_name(manifest.step, COPIED)
        if self._plan.experiment.trainer.other_numerics == "begin_anew" and not is_told_to:
            require_same_class(directory, manifest, self._numerics)
        seen = manifest.config["data"]
        if (why := self._cache.refusal(seen)) is not None:
            if "token_cache" in seen:
                raise CheckpointError(
                    f"{directory} belongs to other data: {why}. Give each its own workspace, or "
                    f"remove it to begin anew."
                )
            self._observer.refused(
                f"THE WORK IN {directory.parent} IS REFUSED, and training begins anew: it was done "
                f"on other data than there is now: {why}."
            )
            return None
        if manifest.step == self._plan.num_steps:
            verify(directory)  # all that is left is to publish it
            return []
        return self._restored(directory)

    def _restored(self, directory: Path) -> list[Any]:
        blueprint = self._plan.blueprint
        return blueprint.flatten(restore(directory, blueprint.template, **self._place))

    @property
    def _place(self) -> dict[str, Any]:
        return {"mesh": self._plan.layout.mesh, "mapping": self._plan.layout.parameters}

    def _take_over(self, directory: Path, manifest: Manifest) -> None:
        self.resumed_from = manifest.step
        self.losses = history.read_losses(directory)
        # A file that the manifest does not name is none of the checkpoint's.
        has_evaluations = history.EVALUATIONS in {file.path for file in manifest.files}
        self.evaluations = history.read_evaluations(directory) if has_evaluations else []
        self._observer.resumed(manifest.step, str(directory))

    def _initial_arrays(self) -> list[Any]:
        """Returns the arrays of a run that has no checkpoint of its own."""
        blueprint, initial = self._plan.blueprint, self._means.initial
        trainer = self._plan.experiment.trainer
        wanted = trainer.initialize_from
        is_partial = wanted is not None and (wanted.weights_only or wanted.only is not None)
        if initial is not None and not is_partial:
            return self._restored(initial)
        arrays = blueprint.initialize(
            self._plan.make,
            jax.random.PRNGKey(trainer.seed),
            elastic=trainer.reproducibility == "elastic",
        )
        if initial is None or wanted is None:
            return arrays
        if wanted.only is not None:
            state = blueprint.unflatten(arrays)
            return blueprint.flatten(restore(initial, state, only=wanted.only, **self._place))
        model = restore_parameters(initial, blueprint.template.model, **self._place)
        return blueprint.flatten(dataclasses.replace(blueprint.unflatten(arrays), model=model))

    def _step(self, updates: int) -> Step:
        """Returns the program of the update after `updates`; each size of batch has its own."""
        axes = self._plan.batch_axis(updates), self._plan.row_axis(updates)
        if axes not in self._steps:
            self._steps[axes] = self._compile(*axes)
        return self._steps[axes]

    def _compile(self, Batch: Axis, Pos: Axis) -> Step:
        plan = self._plan
        with self._ledger.spending("compile"):
            step = compile_step(
                plan.blueprint,
                plan.experiment.optimizer,
                plan.experiment.trainer,
                plan.layout,
                Batch=Batch,
                Pos=Pos,
                columns=self._loader.columns,
            )
            self._keep_programs()
            self._memory, self.program_flops = step.memory, step.product_flops
        return step

    def _start(self) -> Hooks:
        plan = self._plan
        self._step(self.resumed_from)
        limit = bytes_limit(self._devices)
        require_room(plan.experiment, StateMemory.of(plan.blueprint), self._memory, limit)
        with self._ledger.spending("compile"):
            hooks = self._hooks()
            self._keep_programs()
        devices = plan.layout.mesh.devices
        if (idle := idle_devices(plan.layout)) is not None:
            self._observer.warned(idle)
        self._observer.started(
            RunStart(
                num_steps=plan.num_steps,
                first_step=self.resumed_from + 1,
                num_parameters=num_parameters(plan.blueprint),
                num_devices=devices.size,
                device_kind=devices.flat[0].device_kind,
                compile_s=self._ledger.spent_here["compile"],
                memory=self._memory,
                parameter_groups=plan.groups,
            )
        )
        return hooks

    def _hooks(self) -> Hooks:
        plan, Batch = self._plan, self._plan.batch_axis(0)
        trainer = plan.experiment.trainer
        setting = Setting(
            trainer=trainer,
            blueprint=plan.blueprint,
            layout=plan.layout,
            Batch=Batch.resize(Batch.size // trainer.num_microbatches),
            Pos=plan.Pos,
            cache=self._means.cache,
            decode=self._means.decode,
            directory=self._means.workspace.progress / PICTURES,
        )
        return Hooks(setting, self._observer, self._ledger, self.evaluations)

    def _keep_programs(self) -> None:
        if self._means.compile_cache is not None:
            self._means.compile_cache.publish()

    def _loop(self, hooks: Hooks, arrays: list[Any]) -> None:
        trainer, first = self._plan.experiment.trainer, self.resumed_from
        unread: Metrics | None = None
        self._reported = first
        self._schedule.begin_interval()
        self._looping_since, host_began = self._ledger.elapsed_s, time.thread_time()
        steps = profiled_steps(trainer.profile_steps, self._plan.num_steps)
        # One process of a crew shows what all of them do.
        steps = steps if self._crew.is_first else range(0)
        profiler = Profiler(steps, self._means.workspace.progress / PROFILES, resumed_from=first)
        with (
            contextlib.closing(profiler),
            self._loader.stream(first, rows=self._own_rows()) as batches,
            self._ledger.stepping(),
        ):
            for update in range(first + 1, self._plan.num_steps + 1):
                step = self._step(update - 1)
                rows = self._awaited(batches, unread)
                if rows is None:  # Asked to end while the rows are still being written.
                    if unread is not None:
                        self._read(step, unread)
                    if update - 1 > max(first, self._saved):
                        self._hold(update - 1, arrays)
                    self._write_held()
                    self._settle()
                    raise Preempted(update - 1)
                rows = rows.first(self._plan.row_axis(update - 1).size)
                on_device = placed_rows(rows, self._loader.size(update - 1), step.batch_sharding)
                with profiler.step(update, arrays):
                    arrays, metrics = step.run(arrays, on_device)
                hooks.after(update, arrays)
                self._end_profile(update, arrays, profiler)
                faults.reach("after-step", update)
                # The device is busy with this update while the host looks at the one before.
                if unread is not None:
                    self._read(step, unread)
                hooks.collect(until=update - 1)
                self._write_held()
                unread = metrics
                is_last = update == self._plan.num_steps
                # Asked once: a notice that comes later is acted on after the next update.
                is_asked, is_time = self._crew.any_says(self._notice.given, self._save_is_timely())
                is_stopping = is_asked and not is_last
                if is_stopping or is_time or self._schedule.is_due(update):
                    self._hold(update, arrays)
                if is_last or is_stopping:
                    self._read(step, unread)
                    hooks.collect(until=update, finish=True)
                    self._write_held()
                self._tell_saved()
                if is_stopping:
                    self._settle()
                    raise Preempted(update)
            self._settle()
        self.host_s = time.thread_time() - host_began

    def _end_profile(self, update: int, arrays: list[Any], profiler: Profiler) -> None:
        began = time.monotonic()
        path = profiler.finish(update, arrays)
        if path is not None:
            self._ledger.stalled("profile", time.monotonic() - began)
            self._observer.wrote("profile", update, str(path))

    def _own_rows(self) -> RowsOfBatch | None:
        """Returns which rows of a batch this process needs; None: all of them."""
        if self._crew.count == 1:
            return None
        sharding, length = self._step(self.resumed_from).batch_sharding, self._plan.Pos.size
        return lambda size: rows_of_process(sharding, size, length)

    def _awaited(self, batches: BatchStream, running: Metrics | None) -> Any:
        """Returns the next batch; waiting for it costs nothing while the device is busy.

        None: the process was asked to end while it waited.
        """
        began = time.monotonic()
        # One of a crew cannot stop here: the others may have rows already.
        rows = batches.take(lambda: self._notice.given and self._crew.count == 1)
        loss: Any = running and running.loss
        if loss is None or loss.is_ready():
            self._ledger.stalled("loader", time.monotonic() - began)
        return rows

    def _read(self, step: Step, metrics: Metrics) -> None:
        """Waits for an update's figures, refuses those that are no numbers, and tells the rest."""
        update = len(self.losses) + 1
        found: Metrics = jax.device_get(metrics)
        require_finite(update, found, step.parameter_names)
        self.losses.append(float(found.loss))
        every, last = self._plan.experiment.trainer.log_every_steps, self._plan.num_steps
        if update in (self.resumed_from + 1, last) or update % every == 0:
            lap = self._lap(update)
            looping_s = self._ledger.elapsed_s - self._looping_since
            self._observer.step(
                StepReport(
                    step=update,
                    num_steps=last,
                    loss=float(found.loss),
                    gradient_norm=math.sqrt(float(np.sum(found.gradient_squares))),
                    learning_rate=float(found.learning_rate),
                    figures={name: float(x) for name, x in found.figures.items()},
                    tokens=self._plan.tokens(update),
                    tokens_per_second=lap.tokens_per_second,
                    seconds_per_step=lap.seconds_per_step,
                    mfu=lap.mfu,
                    loader_share=lap.loader_share,
                    goodput=self._ledger.time.goodput,
                    bytes_in_use=peak_bytes_in_use(self._devices),
                    eta_s=(last - update) * looping_s / (update - self.resumed_from),
                )
            )

    def _lap(self, update: int) -> Lap:
        """Returns the speed since the last one."""
        self._ledger.write(update)
        first, self._reported = self._reported, update
        tokens = self._plan.tokens(update) - self._plan.tokens(first)
        return self._meter.lap(tokens, update - first)

    def _hold(self, update: int, arrays: list[Any]) -> None:
        """Copies the state, whose memory the next update takes over."""
        with self._ledger.spending("checkpoint"):
            # Two copies of the state would not fit where one just does, and there is one set of
            # host memory: what is being written from it must not change.
            self._checkpoints.wait_for_disk()
        state = self._plan.blueprint.unflatten
        if self._copies_on_devices:
            with self._ledger.spending("checkpoint"):
                self._held = update, partial(fetched, state(self._copies(arrays)))
        else:
            jax.block_until_ready(arrays)  # the time of the update is not the checkpoint's
            with self._ledger.spending("checkpoint"):
                leaves = snapshot(state(arrays), self._host_memory)
                self._held = update, lambda: leaves
        self._saved = update
        self._schedule.begin_interval()

    @property
    def _copies_on_devices(self) -> bool:
        """Whether devices copy the state, behind the update; else it is waited for by the host.

        They have to have room for it. A processor that is the device would gain nothing: its next
        update waits for the copy all the same, and the copy would be in memory never used before.
        """
        if self._devices[0].platform == "cpu":
            return False
        limit = bytes_limit(self._devices)
        if limit is None or self._memory is None:
            return True
        return self._memory.total + StateMemory.of(self._plan.blueprint).total <= limit

    def _write_held(self) -> None:
        """Saves the state that is held, if one is; the losses up to it have been read."""
        if self._held is None:
            return
        (update, leaves), self._held = self._held, None
        with self._ledger.spending("checkpoint"):
            self._begin_save(update, leaves)
        self._keep_programs()
        self._ledger.write(update)

    def _save_is_timely(self) -> bool:
        # One clock counts, for no two agree; and the step does not wait for a disk that is slow.
        is_free = self._crew.is_first and not self._checkpoints.is_writing
        return is_free and self._schedule.time_is_up()

    def _begin_save(self, update: int, leaves: Callable[[], Sequence[HostLeaf]]) -> None:
        experiment = dataclasses.asdict(self._plan.experiment)
        self._checkpoints.save(
            leaves,
            step=update,
            cursor={"rows": self._loader.cursor(update)},
            config={
                "experiment": experiment,
                "science": self._plan.science,
                "data": self._cache.evidence(),
                "numerics": self._numerics,
            }
            | ({"numerics_before": self.numerics_before} if self.numerics_before else {}),
            files=self._files(),
            done=partial(self._note_written, update),
            check=partial(_require_finite_state, update),
            is_permanent=self._schedule.is_permanent(update),
        )

    def _note_written(self, update: int, path: Path) -> None:
        """Comes from the thread that writes: the steps do not wait for a disk."""
        self._ledger.sync()
        self._written.append((update, path))

    def _files(self) -> dict[str, dict[str, Any]]:
        files = {history.LOSSES: history.to_json(self.losses)}
        if self.evaluations:
            files[history.EVALUATIONS] = {"evaluations": list(self.evaluations)}
        return files

    def _settle(self) -> None:
        with self._ledger.spending("checkpoint"):
            self._checkpoints.wait()
        self._tell_saved()
        if self._reported < len(self.losses):
            self._lap(len(self.losses))

    def _tell_saved(self) -> None:
        """Observers hear of it here, not in the thread that writes, and failures are raised."""
        self._checkpoints.raise_failure()
        while self._written:
            update, self._newest = self._written.popleft()
            self._observer.saved(update, str(self._newest))


def model_shape(plan: Plan) -> ModelShape:
    """Returns what the FLOPs of the plan's model depend on."""
    return ModelShape.of(
        plan.experiment.model,
        num_parameters=num_parameters(plan.blueprint),
        sequence_length=plan.Pos.size,
        vocab_size=plan.vocab_size,
    )


def num_parameters(blueprint: Blueprint) -> int:
    """Returns how many numbers training adjusts; rows of the head that are no ids it does not."""
    model = blueprint.template.model
    arrays = [array for _, array, _ in named_leaves(trainable(model)[0])]
    padding = model.head.axis_size(model.Vocab.name) - model.Vocab.size
    row = math.prod(axis.size for axis in model.head.axes if axis.name != model.Vocab.name)
    return sum(math.prod(array.shape) for array in arrays) - padding * row


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


def _require_finite_state(update: int, leaves: Sequence[HostLeaf]) -> None:
    for leaf in leaves:
        # Piece by piece: the answers for all numbers at once would fill a quarter of their memory.
        parts = (part for chunk in leaf.chunks.values() for part in pieces(chunk))
        if not all(np.isfinite(part.view(leaf.dtype)).all() for part in parts):
            raise NonFiniteError(
                f"step {update}: `{leaf.path}` is not finite after the update; it was not saved. "
                f"Lower optimizer.learning_rate, or compute in float32."
            )


def _publish(plan: Plan, last: Path, workspace: Workspace) -> None:
    """Copies the last checkpoint, and files for people, to the output and says what it is."""
    output = workspace.output
    copy_checkpoint(last, output)
    for name in (PICTURES, PROFILES):
        if (workspace.progress / name).exists():
            shutil.copytree(workspace.progress / name, output / name)
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
    verify(output)


def _built(plan: Plan, last: Path, run: _Run) -> Built:
    manifest = read_manifest(last)
    facts = {
        "steps": manifest.step,
        "loss_first": run.losses[0],
        "loss_last": run.losses[-1],
        "loss_curve": history.curve(run.losses),
        "tokens": plan.tokens(manifest.step),
        "resumed_from": run.resumed_from,
        "num_parameters": num_parameters(plan.blueprint),
        "num_devices": plan.layout.mesh.size,
    } | run.figures
    before = run.numerics_before
    return Built(manifest.content_id, manifest.roots, facts, manifest.digests, before)


def class_here(experiment: ExperimentConfig) -> str:
    """Returns a short name of the numerics class of `experiment` on the devices of this process."""
    device = jax.devices()[0]
    kind = None if device.platform == "cpu" else device.device_kind
    numerics = numerics_class(
        experiment.trainer,
        platform=device.platform,
        device_kind=kind,
        execution=experiment.model.execution,
    )
    return numerics_digest(numerics)[:16]


def checkpoint_directory(workspace: Workspace, experiment: ExperimentConfig) -> Path:
    """Returns where the checkpoints of this experiment in this numerics class are."""
    return workspace.progress / "checkpoints" / class_here(experiment)
