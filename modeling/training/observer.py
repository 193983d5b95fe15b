"""What a run tells while it goes: plain data, for a terminal, a tracker or an orchestrator."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from modeling.optim.groups import Groups
from modeling.training.program import Memory


@dataclasses.dataclass(frozen=True)
class RunStart:
    """Told once, after compilation and before the first step of this process."""

    num_steps: int
    first_step: int
    """The number of the next update; above 1 if the run resumes."""
    num_parameters: int
    num_devices: int
    device_kind: str
    compile_s: float
    parameter_groups: Groups
    """What weight decay and multipliers act on."""
    memory: Memory | None
    """What the compiled update needs on each device, if XLA says."""


@dataclasses.dataclass(frozen=True)
class StepReport:
    """Told for the first, every `log_every_steps`-th and the last update."""

    step: int
    num_steps: int
    loss: float
    """In nats per token."""
    gradient_norm: float
    learning_rate: float
    figures: Mapping[str, float]
    """What else the update tells, by name."""
    tokens: int
    """Consumed since the run's first step."""
    tokens_per_second: float
    """Since the last report, over the time of steps and of waiting for batches."""
    seconds_per_step: float
    """Of the same time."""
    mfu: float | None
    """Model FLOPs utilization since then, if the devices' peak is known."""
    loader_share: float
    """Of that time, the share in which the device waited for a batch."""
    goodput: float
    """The share of all time since the run's first launch that went into useful steps."""
    bytes_in_use: int | None
    """The most that a device has held so far, where the backend counts it."""
    eta_s: float

    def __str__(self) -> str:
        mfu = "" if self.mfu is None else f", MFU {self.mfu:.1%}"
        return (
            f"step {self.step:,} of {self.num_steps:,}: loss {self.loss:.4f}, "
            f"{self.tokens_per_second:,.0f} tokens/s, {self.seconds_per_step:.3g} s a step{mfu}, "
            f"goodput {self.goodput:.0%}, "
            f"{self.eta_s:.0f} s left"
            + "".join(f", {name} {value:g}" for name, value in self.figures.items())
        )


@runtime_checkable
class Observer(Protocol):
    """Hears of a run, always in the thread that trains; what it raises ends the run."""

    def resumed(self, step: int, directory: str) -> None:
        """Training goes on from the state after `step` updates."""
        ...

    def refused(self, reason: str) -> None:
        """Earlier work is not gone on with, and is removed."""
        ...

    def warned(self, text: str) -> None:
        """Something that a person should know of."""
        ...

    def started(self, start: RunStart) -> None:
        """The program is compiled."""
        ...

    def step(self, report: StepReport) -> None:
        """An update was made."""
        ...

    def saved(self, step: int, directory: str) -> None:
        """A checkpoint is on disk and was read back."""
        ...

    def wrote(self, what: str, step: int, path: str) -> None:
        """A file for people was written; `what` is `profile` or `picture`."""
        ...

    def evaluated(self, step: int, losses: Mapping[str, float]) -> None:
        """The loss in nats per token of each validation split, after `step` updates."""
        ...

    def finished(self, facts: Mapping[str, Any]) -> None:
        """The last checkpoint is in the workspace's output."""
        ...


class Silent:
    """An observer that nobody listens to."""

    def resumed(self, step: int, directory: str) -> None:
        """Does nothing."""

    def refused(self, reason: str) -> None:
        """Does nothing."""

    def warned(self, text: str) -> None:
        """Does nothing."""

    def started(self, start: RunStart) -> None:
        """Does nothing."""

    def step(self, report: StepReport) -> None:
        """Does nothing."""

    def saved(self, step: int, directory: str) -> None:
        """Does nothing."""

    def wrote(self, what: str, step: int, path: str) -> None:
        """Does nothing."""

    def evaluated(self, step: int, losses: Mapping[str, float]) -> None:
        """Does nothing."""

    def finished(self, facts: Mapping[str, Any]) -> None:
        """Does nothing."""
