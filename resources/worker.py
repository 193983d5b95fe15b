"""The child's side of `launcher`: `python -m resources.worker JOB.json`.

Order matters here. First the ties to the parent (death signal, watchdog), then the lock on the
workspace, then the imports that take seconds. No Dagster is imported, only its small Pipes client.

Of several processes on one mesh the first has the lock, the channel and the result; the others have
a `seat` beside it.
"""

import contextlib
import ctypes
import fcntl
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster_pipes

from modeling.artifacts import WORKER_LOCK, Progress, Workspace, write_durably
from resources.secrets import scrub

_PR_SET_PDEATHSIG = 1


class Channel:
    """Where an entry tells how it is getting on: the terminal and the run's event log, live."""

    def __init__(self, log: Callable[[str], None], *, is_first: bool = True) -> None:
        """Sends each message to `log` too.

        Args:
            log: takes each message.
            is_first: of the processes of the job; the one that has a tracker.
        """
        self._log = log
        self.is_first = is_first

    def say(self, message: object) -> None:
        """Shows one message, without secrets."""
        text = scrub(str(message))
        try:
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()
        except BrokenPipeError:
            # The parent has died and this process is saving: nobody reads, and nothing may stop it.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.dup2(nowhere, sys.stderr.fileno())
        self._log(text)


Entry = Callable[[Mapping[str, Any], Workspace | None, Channel], Mapping[str, Any]]


def main(job_path: str) -> int:
    """Runs the job and returns the exit code."""
    job = json.loads(Path(job_path).read_text())
    tie_to_parent(job["parent"], job["grace_s"])
    workspace = job["workspace"] and _workspace(**job["workspace"])
    seat = job.get("seat")
    is_first = seat is None or seat["index"] == 0
    with _exclusive(workspace if is_first else None), _channel(is_first) as channel:
        from modeling.training.preemption import EXIT_CODE, Preempted

        module, _, function = job["entry"].partition(":")
        entry: Entry = getattr(importlib.import_module(module), function)
        if seat is not None:
            from modeling.training import processes

            processes.join(seat)
        try:
            result = entry(job["arguments"], workspace, channel)
        except Preempted as stop:
            channel.say(f"Stopped: {stop}")
            return EXIT_CODE
        if is_first:
            write_durably(Path(job["result"]), result)
    return 0


def tie_to_parent(parent: int, grace_s: float) -> None:
    """Makes this process end when `parent` does: TERM from the kernel, KILL from our thread.

    One that was asked to end before, and saves, is not asked again: it would end at once.
    """
    is_tied = threading.Event()
    threading.Thread(target=_watch, args=(parent, grace_s, is_tied), daemon=True).start()
    is_tied.wait()
    if os.getppid() != parent:  # It died before it was tied to.
        raise SystemExit("The process that started this one is gone.")


def _watch(parent: int, grace_s: float, is_tied: threading.Event) -> None:
    from modeling.training.preemption import asked

    _send_at_death_of_parent(signal.SIGTERM)
    is_tied.set()
    while os.getppid() == parent and not asked.wait(0.5):
        pass
    if asked.is_set():
        _send_at_death_of_parent(0)
    elif sys.platform != "linux":
        os.kill(os.getpid(), signal.SIGTERM)
    while os.getppid() == parent:
        time.sleep(0.5)
    time.sleep(grace_s)
    # Still here: saving takes too long, or native code never returns to the interpreter.
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _send_at_death_of_parent(number: int) -> None:
    """Has the kernel send this process a signal, or none (0), for as long as this thread lives."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)


def _workspace(
    progress: str,
    output: str,
    remote: str | None = None,
    elsewhere: Sequence[tuple[str, str | None]] = (),
) -> Workspace:
    others = tuple(Progress(Path(local), url) for local, url in elsewhere)
    return Workspace(Path(progress), Path(output), remote, others)


@contextlib.contextmanager
def _exclusive(workspace: Workspace | None) -> Iterator[None]:
    """Holds the workspace: a child that is still saving after its parent's death has it first."""
    if workspace is None:
        yield
        return
    with (workspace.progress.parent / WORKER_LOCK).open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.stderr.write("Waiting for the previous process in this workspace to end.\n")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _channel(is_first: bool) -> Iterator[Channel]:
    if not is_first or dagster_pipes.DAGSTER_PIPES_CONTEXT_ENV_VAR not in os.environ:
        yield Channel(lambda message: None, is_first=is_first)
        return
    with dagster_pipes.open_dagster_pipes() as pipes:
        yield Channel(pipes.log.info)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
