"""Ending a run in good order: the step is finished and saved, then `Preempted` is raised.

The first SIGTERM or SIGINT asks; a second one ends the process at once, by the signal's own action.
"""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

EXIT_CODE = 75
"""What a process exits with when it was preempted: `EX_TEMPFAIL` of sysexits.h, "try again"."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preempted(Exception):
    """Training stopped because it was asked to; the same call goes on from the step it saved."""

    def __init__(self, step: int) -> None:
        super().__init__(f"preempted after step {step}, which is saved; run again to go on.")
        self.step = step


class PreemptionNotice:
    """Whether the process was asked to end; signals are listened to inside its `with` block.

    Python gives signals to the main thread, so elsewhere there is nothing to hear.
    """

    def __init__(self) -> None:
        self.given = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "PreemptionNotice":
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.given = True
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)
