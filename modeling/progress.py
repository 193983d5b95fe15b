"""How far a stage has come, told about once a second, for a terminal line or an orchestrator's log.

A builder takes `report: Report` and drives a `Meter`; whoever shows progress only reads `Progress`.
The clock decides when to tell, never what is built.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping


@dataclasses.dataclass(frozen=True)
class Progress:
    """One report of one stage."""

    stage: str
    done: int | float
    """Units done, those of an earlier, interrupted attempt included."""
    total: int | float
    unit: str
    rate: float
    """Units per second of this attempt; 0 before anything was measured."""
    eta_s: float | None
    """Seconds left at this rate; None while there is no rate."""
    other_rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """What else is done per second, by unit."""

    def __str__(self) -> str:
        share = f" ({100 * self.done / self.total:.0f}%)" if self.total else ""
        rates = {self.unit: self.rate} | dict(self.other_rates)
        told = "".join(f", {rate:,.0f} {unit}/s" for unit, rate in rates.items())
        left = "" if self.eta_s is None else f", {self.eta_s:.0f} s left"
        return f"{self.stage}: {self.done:,.0f} of {self.total:,.0f} {self.unit}{share}{told}{left}"


Report = Callable[[Progress | str], None]
"""Takes progress, and in between sentences on what happened."""


def ignore(progress: Progress | str) -> None:
    """Takes reports that nobody asked for."""


class Meter:
    """Counts units of one stage and reports at most once per `interval_s`, and once at the end."""

    def __init__(
        self,
        report: Report,
        stage: str,
        total: int | float,
        unit: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        interval_s: float = 1.0,
    ) -> None:
        self._report = report
        self._stage = stage
        self._total = total
        self._unit = unit
        self._skipped: int | float = 0
        self._others: dict[str, int | float] = {}
        self._clock = clock
        self._interval_s = interval_s
        self._started = self._last_told = clock()
        self.done: int | float = 0

    def advance(self, count: int | float, **others: int | float) -> None:
        """Adds `count` units, and reports if the last report is old enough.

        Args:
            count: units of the stage.
            others: what else was done, by unit, for its rate.
        """
        self.done += count
        for unit, other in others.items():
            self._others[unit] = self._others.get(unit, 0) + other
        now = self._clock()
        if now - self._last_told >= self._interval_s:
            self._tell(now)

    def skip(self, count: int | float) -> None:
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
        others = {unit: count / seconds for unit, count in self._others.items() if seconds > 0}
        self._report(Progress(self._stage, self.done, self._total, self._unit, rate, eta_s, others))
