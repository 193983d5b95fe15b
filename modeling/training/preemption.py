"""Ending a run in good order: the step is finished and saved, then `Preempted` is raised.

    first SIGTERM or SIGINT     asks; the trainer saves and the process exits with 75
    a second one                ends the process at once with 76; what was saved before counts
    after `grace_s` seconds     likewise, when saving takes too long or a device never answers

A signal must be heard while the interpreter waits inside native code, so the C-level handler only
writes to a pipe (`signal.set_wakeup_fd`), and a thread reads it, counts, and keeps the time.
"""

import os
import select
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

EXIT_CODE = 75
"""What a process exits with when it was preempted: `EX_TEMPFAIL` of sysexits.h, "try again"."""
EXIT_AT_ONCE = 76
"""What it exits with when it had no time to save; the last checkpoint is where to go on from."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_STOP_LISTENING = b"\0"
asked = threading.Event()
"""Set when the process was asked to end: who else would ask must not, as that ends it at once."""


class Preempted(Exception):
    """Training stopped because it was asked to; the same call goes on from the step it saved."""

    def __init__(self, step: int) -> None:
        super().__init__(f"preempted after step {step}, which is saved; run again to go on.")
        self.step = step


class PreemptionNotice:
    """Whether the process was asked to end; signals are listened to inside its `with` block.

    Python gives signals to the main thread, so elsewhere there is nothing to hear.
    """

    def __init__(self, grace_s: float) -> None:
        """Gives the process `grace_s` seconds from the first signal to its end."""
        self.given = False
        self._grace_s = grace_s
        self._before: dict[signal.Signals, Any] = {}
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "PreemptionNotice":
        if threading.current_thread() is threading.main_thread():
            self._reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._listen, name="preemption", daemon=True)
            self._thread.start()
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, _to_the_pipe)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._thread is None:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.write(self._writer, _STOP_LISTENING)
        self._thread.join()
        os.close(self._reader)
        os.close(self._writer)

    def _listen(self) -> None:
        while True:
            wait_s = self._grace_s if self.given else None
            if not select.select([self._reader], [], [], wait_s)[0]:
                _exit_at_once(f"{self._grace_s:g} s after it was asked to end")
            byte = os.read(self._reader, 1)
            if byte == _STOP_LISTENING:
                return
            if byte[0] in _SIGNALS:
                if self.given:
                    _exit_at_once("at the second signal")
                self.given = True
                asked.set()


def _to_the_pipe(number: int, frame: FrameType | None) -> None:
    """Does nothing: a handler of Python's own is what makes the C-level one write to the pipe."""


def _exit_at_once(when: str) -> None:
    sys.stderr.write(f"This process ends {when}, without saving; run again to go on.\n")
    sys.stderr.flush()
    os._exit(EXIT_AT_ONCE)
