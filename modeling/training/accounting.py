"""How fast a run is and where its time goes: FLOPs, utilization, goodput.

Model FLOPs of training on one token (Chowdhery et al. 2022, "PaLM", appendix B), for N weights that
take part in products, L layers of H heads of size Q, and rows of T tokens:

    6 N + 12 L H Q T           every position attends to all T
    6 N +  6 L H Q (T + 1)     causal: what the mask throws away is not counted

Both leave out what is computed twice to save memory. *Model FLOPs utilization* (MFU) is tokens/s x
model FLOPs / peak of all devices, with the first formula, as papers report it; *hardware* FLOPs
utilization (HFU) counts the products that the compiled program makes instead (`program`).

*Goodput* is the share of the time since the run's first launch that went into steps which are part
of the result. Where the rest went is kept in a ledger beside the checkpoints, one JSON line for
each stretch of time, appended in one write, so that it outlives kill -9:

    {"began": 100.0, "resumed_from": 40}                         a process began, at this Unix time
    {"until": 112.5, "step": 50, "spent": {"steps": 9.0, ...}}   seconds since the line before, by
                                                                 cause; `step` updates were made

Steps made after the checkpoint that a later process went on from were made again: they count as
`redone`. No JAX is imported here.
"""

import contextlib
import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from modeling.models.config import Gpt2Config, LlamaConfig

_log = logging.getLogger(__name__)

CAUSES: Sequence[str] = (
    "steps",  # useful ones
    "redone",  # steps that a later process had to make again
    "compile",
    "restore",  # finding, checking and reading the checkpoint, or making the initial state
    "loader",  # the device had nothing to do but wait for a batch
    "evaluation",
    "pictures",
    "profile",  # writing the trace
    "checkpoint",  # until the state was copied; writing goes on beside the steps
    "down",  # from the last sign of life of one process to the next one's start
    "other",
)
"""What time can go into; the seconds of all of them add up to the time since the first launch."""


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """What the FLOPs of a decoder-only transformer depend on."""

    num_parameters: int
    """Weights that take part in products: no table that is only looked up, a tied head once."""
    num_layers: int
    num_heads: int
    head_size: int
    sequence_length: int

    @staticmethod
    def of(
        config: Gpt2Config | LlamaConfig,
        *,
        num_parameters: int,
        sequence_length: int,
        vocab_size: int,
    ) -> "ModelShape":
        """Returns the shape of a model of which all `num_parameters` are trained."""
        if isinstance(config, Gpt2Config):
            looked_up = sequence_length
        else:
            looked_up = 0 if config.tie_word_embeddings else vocab_size
        return ModelShape(
            num_parameters - looked_up * config.hidden_dim,
            config.num_layers,
            config.num_heads,
            config.head_size,
            sequence_length,
        )

    def flops_per_token(self, *, causal: bool = False) -> float:
        """Returns the FLOPs of one token's forward and backward pass."""
        length = self.sequence_length
        seen = (length + 1) / 2 if causal else length
        attention = 12 * self.num_layers * self.num_heads * self.head_size * seen
        return 6.0 * self.num_parameters + attention


class Ledger:
    """The time of one run over all its processes; held by the one that trains now."""

    def __init__(
        self,
        path: Path | None,
        *,
        wall: Callable[[], float] = time.time,
        tick: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begins the clock of this process.

        Args:
            path: the file, perhaps of earlier processes; None to keep it in memory alone.
            wall: the time of day, in seconds; compared between processes only.
            tick: seconds that never go back.
        """
        self._path = path
        self._tick = tick
        self._began_tick = tick()
        self._began = wall()
        self._earlier: Sequence[Mapping[str, Any]] = [] if path is None else _recovered(path)
        self._before = time_spent(self._earlier)
        self._step: int | None = None
        self._spent: dict[str, float] = {}
        self.spent_here: dict[str, float] = dict.fromkeys(CAUSES, 0.0)
        """Seconds of this process, by cause."""
        self._written_at = self._began
        self._stepping_since: float | None = None

    def launched(self, resumed_from: int) -> None:
        """Says which step this process goes on from; comes first."""
        self._step = resumed_from
        line = {"began": self._began, "resumed_from": resumed_from}
        self._before = time_spent([*self._earlier, line])
        self._earlier = []
        self._append(line)
        self.sync()

    @contextlib.contextmanager
    def spending(self, cause: str) -> Iterator[None]:
        """Counts the time of the block for `cause`; it is no time of steps."""
        was_stepping = self._stepping_since is not None
        self._pause()
        began = self._now()
        try:
            yield
        finally:
            self.add(cause, self._now() - began)
            if was_stepping:
                self._stepping_since = self._now()

    def add(self, cause: str, seconds: float) -> None:
        """Counts time that was measured elsewhere, outside of steps."""
        if cause not in CAUSES:
            raise ValueError(f"cause: {cause!r} is not one of {list(CAUSES)}.")
        self._spent[cause] = self._spent.get(cause, 0.0) + seconds
        self.spent_here[cause] += seconds

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """Counts all time of the block as steps, but what `spending` and `stalled` take."""
        self._stepping_since = self._now()
        try:
            yield
        finally:
            self._pause()

    def stalled(self, cause: str, seconds: float) -> None:
        """Moves time that has just passed from steps to `cause`."""
        assert self._stepping_since is not None
        self._stepping_since += seconds
        self.add(cause, seconds)

    def write(self, step: int) -> None:
        """Puts on record what time went into since the last line; `step` updates are made."""
        if self._stepping_since is not None:
            self._pause()
            self._stepping_since = self._now()
        now = self._now()
        self.add("other", max(now - self._written_at - sum(self._spent.values()), 0.0))
        self._append({"until": now, "step": step, "spent": self._spent})
        self._spent, self._written_at, self._step = {}, now, step

    def sync(self) -> None:
        """Makes what is on record durable; may come from any thread."""
        if self._path is not None:
            with self._path.open("rb") as file:
                os.fsync(file.fileno())

    @property
    def time(self) -> "TimeSpent":
        """Where all time since the first launch went, this process included."""
        before = self._before.by_cause
        together = {cause: before[cause] + self.spent_here[cause] for cause in CAUSES}
        return TimeSpent(together, self._before.launches)

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._step is not None:
            self.write(self._step)
            self.sync()

    @property
    def elapsed_s(self) -> float:
        """Since this process began."""
        return self._tick() - self._began_tick

    def _now(self) -> float:
        return self._began + self._tick() - self._began_tick

    def _pause(self) -> None:
        if self._stepping_since is not None:
            self.add("steps", self._now() - self._stepping_since)
            self._stepping_since = None

    def _append(self, line: dict[str, Any]) -> None:
        if self._path is None:
            return
        handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(handle, json.dumps(line).encode() + b"\n")
        finally:
            os.close(handle)


@dataclasses.dataclass(frozen=True)
class Lap:
    """How fast the steps since the lap before were."""

    tokens_per_second: float
    """Over the time of steps and of waiting for batches."""
    seconds_per_step: float
    """Of that time."""
    mfu: float | None
    """Model FLOPs utilization, if the devices' peak is known."""
    loader_share: float
    """Of that time, the share in which the device waited for a batch."""


class Meter:
    """Speed since the last lap and over this process, by a ledger's account of time."""

    def __init__(self, ledger: Ledger, *, flops_per_token: float, peak_flops: float | None) -> None:
        """Measures against `peak_flops`, of all devices together."""
        self._ledger = ledger
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._lap_s, self._lap_loader_s = 0.0, 0.0
        self.tokens = 0
        """Trained on by this process."""
        self._updates = 0

    def lap(self, tokens: int, updates: int) -> Lap:
        """Returns the speed of so many more tokens and updates, whose time the ledger has."""
        self.tokens += tokens
        self._updates += updates
        seconds, loader_s = self._seconds()
        lap = self._speed(tokens, updates, seconds - self._lap_s, loader_s - self._lap_loader_s)
        self._lap_s, self._lap_loader_s = seconds, loader_s
        return lap

    @property
    def overall(self) -> Lap:
        """The speed of all steps of this process."""
        return self._speed(self.tokens, self._updates, *self._seconds())

    def _seconds(self) -> tuple[float, float]:
        spent = self._ledger.spent_here
        return spent["steps"] + spent["loader"], spent["loader"]

    def _speed(self, tokens: int, updates: int, seconds: float, loader_s: float) -> Lap:
        rate = tokens / seconds if seconds > 0 else 0.0
        peak = self._peak_flops
        return Lap(
            tokens_per_second=rate,
            seconds_per_step=seconds / updates if updates else 0.0,
            mfu=None if peak is None else rate * self._flops_per_token / peak,
            loader_share=loader_s / seconds if seconds > 0 else 0.0,
        )


@dataclasses.dataclass(frozen=True)
class TimeSpent:
    """Seconds by cause, all causes named."""

    by_cause: Mapping[str, float]
    launches: int

    @property
    def total_s(self) -> float:
        """Since the first launch."""
        return sum(self.by_cause.values())

    @property
    def goodput(self) -> float:
        """The share of useful steps; 0 if no time has passed."""
        return self.by_cause["steps"] / self.total_s if self.total_s > 0 else 0.0


def time_spent(lines: Sequence[Mapping[str, Any]]) -> TimeSpent:
    """Returns where the time that the lines of a ledger tell of went."""
    found = dict.fromkeys(CAUSES, 0.0)
    launches = [index for index, line in enumerate(lines) if "began" in line]
    until: float | None = None
    for number, start in enumerate(launches):
        end = launches[number + 1] if number + 1 < len(launches) else len(lines)
        kept = lines[end]["resumed_from"] if end < len(lines) else float("inf")
        if until is not None:
            found["down"] += max(lines[start]["began"] - until, 0.0)
        until = lines[start]["began"]
        for line in lines[start + 1 : end]:
            until = line["until"]
            for cause, seconds in line["spent"].items():
                redone = cause == "steps" and line["step"] > kept
                found["redone" if redone else cause] += seconds
    return TimeSpent(found, len(launches))


def read_ledger(path: Path) -> TimeSpent:
    """Returns where the time of a run went, from its ledger."""
    return time_spent(_parsed(path.read_bytes())[0])


def _recovered(path: Path) -> list[dict[str, Any]]:
    """Returns the whole lines of a ledger and cuts off what a crash left after them."""
    if not path.exists():
        return []
    content = path.read_bytes()
    lines, size = _parsed(content)
    if size < len(content):
        _log.warning(
            "%s: the last %d bytes are no whole line, as after a crash of the machine; they are "
            "cut off. Only the account of time is affected.", path, len(content) - size,
        )  # fmt: skip
        os.truncate(path, size)
    return lines


def _parsed(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """Returns the lines up to the first that is not whole, and how many bytes they are."""
    lines: list[dict[str, Any]] = []
    size = 0
    for text in content.splitlines(keepends=True):
        try:
            line = json.loads(text) if text.endswith(b"\n") else None
        except ValueError:
            line = None
        if not isinstance(line, dict) or not ("began" in line or ("until" in line and lines)):
            break
        lines.append(line)
        size += len(text)
    return lines, size
