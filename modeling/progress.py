"""How far a stage has come, told about once a second, for a terminal line or an orchestrator's log.

A builder takes `report: Report` and drives a `Meter`; whoever shows progress only reads `Progress`.
The clock decides when to tell, never what is built.
"""

import dataclasses
import time
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Progress:
    """One report of one stage."""

    stage: str
    done: int
    """Units done, those of an earlier, interrupted attempt included."""
    total: int
    unit: str
    rate: float
    """Units per second of this attempt; 0 before anything was measured."""
    eta_s: float | None
    """Seconds left at this rate; None while there is no rate."""

    def __str__(self) -> str:
        share = f" ({100 * self.done / self.total:.0f}%)" if self.total else ""
        left = "" if self.eta_s is None else f", {self.eta_s:.0f} s left"
        return (
            f"{self.stage}: {self.done:,} of {self.total:,} {self.unit}{share}, "
            f"{self.rate:,.0f} {self.unit}/s{left}"
        )


Report = Callable[[Progress], None]


def ignore(progress: Progress) -> None:
    """Takes reports that nobody asked for."""


class Meter:
    """Counts units of one stage and reports at most once per `interval_s`, and once at the end."""

    def __init__(
        self,
        report: Report,
        stage: str,
        total: int,
        unit: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        interval_s: float = 1.0,
    ) -> None:
        self._report = report
        self._stage = stage
        self._total = total
        self._unit = unit
        self._skipped = 0
        self._clock = clock
        self._interval_s = interval_s
        self._started = self._last_told = clock()
        self.done = 0

    def advance(self, count: int) -> None:
        """Adds `count` units, and reports if the last report is old enough."""
        self.done += count
        now = self._clock()
        if now - self._last_told >= self._interval_s:
            self._tell(now)

    def skip(self, count: int) -> None:
        """Adds `count` units that an earlier attempt did: done, but no part of the rate."""
        self._skipped += count
        self.done += count

    def finish(self) -> None:
        """Reports the last state, whenever the one before it was."""
        self._tell(self._clock())

    def _tell(self, now: float) -> None:
        self._last_told = now
        seconds = now - self._started
        rate = (self.done - self._skipped) / seconds if seconds > 0 else 0.0
        eta_s = max(self._total - self.done, 0) / rate if rate > 0 else None
        self._report(Progress(self._stage, self.done, self._total, self._unit, rate, eta_s))
