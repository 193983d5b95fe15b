"""What a launched process runs: each function is an entry of `worker`, a thin call into `modeling`.

Imports of JAX stand inside the functions, after the worker has tied itself to its parent.
"""

import contextlib
import dataclasses
import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeling.artifacts import Workspace
from modeling.experiment import ExperimentConfig, validate
from resources import provenance
from resources.scratch import programs_directory, scratch_directory
from resources.tracker import Tracker, open_tracker
from resources.worker import Channel

if TYPE_CHECKING:
    import numpy as np

    from modeling.data.cache import TokenCache
    from modeling.data.loader import TrainingData
    from modeling.training.compile_cache import CompileCache
    from modeling.training.hooks import Decode
    from modeling.training.observer import RunStart, StepReport
    from modeling.training.peak import Peak
    from modeling.training.program import Memory

Arguments = Mapping[str, Any]
PARITY_ROWS = 4


def train(arguments: Arguments, workspace: Workspace | None, channel: Channel) -> Mapping[str, Any]:
    """Trains, or goes on training, to the last step."""
    from modeling.training import trainer

    assert workspace is not None
    experiment = _experiment(arguments)
    config = {
        "experiment": arguments["experiment"],
        "numerics": arguments["numerics"],
        "git": provenance.git_state(provenance.CHECKOUT),
        "packages": provenance.package_versions(),
    }
    with (
        open_tracker(arguments["name"], config, is_kept=channel.is_first) as tracker,
        programs(experiment) as compile_cache,
    ):
        built = trainer.train(
            experiment,
            _training_data(arguments, channel),
            workspace,
            observer=TrainingObserver(channel, tracker),
            peak=_peak(experiment),
            compile_cache=compile_cache,
            decode=_decode(experiment, arguments),
            initial=Path(initial) if (initial := arguments.get("initial_checkpoint")) else None,
        )
    return dataclasses.asdict(built)


def replay(
    arguments: Arguments, workspace: Workspace | None, channel: Channel
) -> Mapping[str, Any]:
    """Trains until the checkpoint of step `until` is saved in the workspace's progress."""
    from modeling.training import trainer
    from modeling.training.preemption import Preempted

    assert workspace is not None
    experiment = _experiment(arguments)
    until, last = arguments["until"], experiment.trainer.num_train_steps

    def stop(step: int) -> None:
        # As preemption does it, which all processes of a mesh understand.
        if step == until < last:
            signal.raise_signal(signal.SIGTERM)

    with programs(experiment) as compile_cache:
        try:
            trainer.train(
                experiment,
                _training_data(arguments, channel),
                workspace,
                observer=TrainingObserver(channel, Tracker(None), stop),
                compile_cache=compile_cache,
                initial=Path(initial) if (initial := arguments.get("initial_checkpoint")) else None,
            )
        except Preempted as stopped:
            if stopped.step < until:
                raise  # Somebody else has asked.
    return {}


@contextlib.contextmanager
def programs(experiment: ExperimentConfig) -> "Iterator[CompileCache | None]":
    """Keeps what the block compiles for later processes of the same numerics class."""
    from modeling.training.compile_cache import open_compile_cache
    from modeling.training.trainer import class_here

    directory = programs_directory()
    if directory is None:
        yield None
        return
    with open_compile_cache(directory / class_here(experiment)) as cache:
        yield cache


def _decode(experiment: ExperimentConfig, arguments: Arguments) -> "Decode | None":
    """Returns what gives the text of ids, if pictures are drawn."""
    if experiment.trainer.pictures_every_steps is None:
        return None
    from modeling.data.tokenizer import load_tokenizer

    return load_tokenizer(Path(arguments["tokenizer"])).decode


def _peak(experiment: ExperimentConfig) -> "Peak | None":
    """Returns what the devices could do at most; None if it is not known and nothing is kept."""
    import jax
    import numpy as np

    from modeling.training.peak import peak_of
    from modeling.training.precision import Policy
    from modeling.training.trainer import class_here

    scratch = scratch_directory()
    if scratch is None:
        return None
    devices = jax.devices()[: math.prod(experiment.trainer.mesh.values())]
    dtype = np.dtype(Policy.parse(experiment.trainer.mp).compute).name
    return peak_of(devices, dtype, scratch / "peaks" / f"{class_here(experiment)}.json")


class TrainingObserver:
    """Tells a training run's progress to the terminal, the run's event log, and the tracker."""

    def __init__(
        self,
        channel: Channel,
        tracker: Tracker,
        saved: Callable[[int], None] = lambda step: None,
    ) -> None:
        """Sends what it hears to both, and each step that was saved to `saved`."""
        self._channel = channel
        self._tracker = tracker
        self._saved = saved

    def resumed(self, step: int, directory: str) -> None:
        """Says that earlier work is gone on with."""
        self._channel.say(f"Going on from step {step}, found in {directory}.")

    def refused(self, reason: str) -> None:
        """Says, loudly, that earlier work was of no use."""
        self._channel.say(reason)

    def warned(self, text: str) -> None:
        """Shows it."""
        self._channel.say(f"WARNING: {text}")

    def started(self, start: "RunStart") -> None:
        """Says what begins."""
        self._channel.say(
            f"{start.num_parameters:,} parameters on {start.num_devices} {start.device_kind} "
            f"devices{_memory(start.memory)}; compiled in {start.compile_s:.1f} s; steps "
            f"{start.first_step:,} to {start.num_steps:,}."
        )
        groups = start.parameter_groups
        self._channel.say(f"Weight decay acts on {_listed(groups.decayed)}.")
        self._channel.say(f"It spares {_listed(groups.undecayed)}.")
        for path, multiplier in groups.multiplied.items():
            self._channel.say(f"The learning rate of {path} is multiplied by {multiplier:g}.")

    def step(self, report: "StepReport") -> None:
        """Shows the line and keeps the numbers."""
        self._channel.say(report)
        self._tracker.log(
            report.step,
            {
                "train/loss": report.loss,
                "train/gradient_norm": report.gradient_norm,
                "train/learning_rate": report.learning_rate,
                "train/tokens": report.tokens,
            }
            | {f"train/{name}": value for name, value in report.figures.items()}
            | throughput(report),
        )

    def saved(self, step: int, directory: str) -> None:
        """Says that nothing before this step can be lost any more."""
        self._channel.say(f"step {step:,} is saved.")
        self._saved(step)

    def wrote(self, what: str, step: int, path: str) -> None:
        """Says where a profile or picture is; the tracker shows pictures."""
        self._channel.say(f"step {step:,}: {what} at {path}")
        if what == "picture":
            self._tracker.show(step, "pictures/foreseen", Path(path))

    def evaluated(self, step: int, losses: Mapping[str, float]) -> None:
        """Shows the losses on validation rows and keeps them."""
        told = ", ".join(f"{split} {loss:.4f}" for split, loss in losses.items())
        self._channel.say(f"step {step:,}: loss on {told}")
        self._tracker.log(step, {f"eval/{split}/loss": loss for split, loss in losses.items()})

    def finished(self, facts: Mapping[str, Any]) -> None:
        """Keeps the plain facts as the run's summary."""
        spent = {f"seconds/{cause}": s for cause, s in facts.get("seconds", {}).items()}
        plain = {name: x for name, x in facts.items() if isinstance(x, int | float | str)}
        self._tracker.summarize(plain | spent)


def _memory(memory: "Memory | None") -> str:
    return "" if memory is None else f" ({memory.total / 2**20:,.0f} MiB of memory each)"


def throughput(report: "StepReport") -> dict[str, float]:
    """Returns a report's figures of speed that are known, as the tracker names them."""
    figures = {
        "tokens_per_second": report.tokens_per_second,
        "seconds_per_step": report.seconds_per_step,
        "mfu": report.mfu,
        "goodput": report.goodput,
        "loader_share": report.loader_share,
        "bytes_in_use": report.bytes_in_use,
    }
    return {f"throughput/{name}": x for name, x in figures.items() if x is not None}


def _listed(paths: Sequence[str]) -> str:
    return ", ".join(paths) or "nothing"


def evaluate(
    arguments: Arguments, workspace: Workspace | None, channel: Channel
) -> Mapping[str, Any]:
    """Builds an eval report."""
    from modeling.evaluation import report

    assert workspace is not None
    experiment = _experiment(arguments)
    with programs(experiment):
        built = report.build(
            experiment,
            Path(arguments["checkpoint"]),
            _cache(arguments),
            Path(arguments["tokenizer"]),
            workspace,
            report=channel.say,
        )
    return dataclasses.asdict(built)


def export(
    arguments: Arguments, workspace: Workspace | None, channel: Channel
) -> Mapping[str, Any]:
    """Builds a Hugging Face model."""
    from modeling.hf import export

    assert workspace is not None
    experiment = _experiment(arguments)
    with programs(experiment):
        built = export.build(
            experiment,
            Path(arguments["checkpoint"]),
            Path(arguments["tokenizer"]),
            arguments["lineage"],
            workspace,
            report=channel.say,
        )
    return dataclasses.asdict(built)


def parity(
    arguments: Arguments, workspace: Workspace | None, channel: Channel
) -> Mapping[str, Any]:
    """Compares the logits of an export, by NumPy from its files, with the checkpoint's own."""
    from modeling.hf import export

    cache = _cache(arguments)
    rows = parity_rows(cache)
    directories = Path(arguments["export"]), Path(arguments["checkpoint"])
    experiment = _experiment(arguments)
    with programs(experiment):
        found = export.logit_difference(*directories, experiment, rows)
    return {
        "max_abs_logit_difference": found.max_abs,
        "largest_logit": found.largest,
        "limit": found.limit,
        "num_logits": rows.size * cache.vocab_size,
    }


def parity_rows(cache: "TokenCache") -> "np.ndarray":
    """Returns a few rows of tokens: of the first split that is held out, if one has any."""
    import numpy as np

    from modeling.data.splits import VALIDATION, role_of

    held_out_first = sorted(cache.splits, key=lambda split: role_of(split) != VALIDATION)
    split = next(split for split in held_out_first if cache.num_rows(split))
    return cache.rows(split, np.arange(min(PARITY_ROWS, cache.num_rows(split)))).tokens


def _training_data(arguments: Arguments, channel: Channel) -> "TrainingData":
    """Returns the token cache; one that still grows if the job has it handed over."""
    from modeling.data.config import TokenCacheConfig
    from modeling.data.growing import GrowingCache, Vocabulary
    from modeling.data.tokenizer import load_tokenizer

    if "handoff" not in arguments:
        return _cache(arguments)
    tokenizer = load_tokenizer(Path(arguments["tokenizer"]))
    return GrowingCache(
        Path(arguments["tokens_in_progress"]),
        Path(arguments["handoff"]),
        arguments["shares"],
        config=validate(TokenCacheConfig, arguments["token_cache_config"], "token cache"),
        vocabulary=Vocabulary(
            tokenizer.vocab_size, tokenizer.eos_id, bool(arguments["has_loss_mask"])
        ),
        report=channel.say,
    )


def _cache(arguments: Arguments) -> "TokenCache":
    from modeling.data.cache import TokenCache

    return TokenCache.open(Path(arguments["token_cache"]), Path(arguments["tokenized_corpus"]))


def _experiment(arguments: Arguments) -> ExperimentConfig:
    return validate(ExperimentConfig, arguments["experiment"], f"experiment {arguments['name']}")
