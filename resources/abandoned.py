"""Runs whose process was killed: ended on record, so that what they held is free again.

After `kill -9` of its process a run keeps the accelerator's only slot, and one of `levanter run`
stays STARTED for ever. Only a daemon would see to that, and CI has none. So each run is tagged with
its process, and with those that it has launched:

    levanter/process    RUN: HOST PID START BOOT   which no later process shares
    levanter/launched   RUN: the same of each that trains, evaluates or exports for it, by commas

(Dagster gives a run that is executed again the tags of the first one, hence the run.)
A slot is taken from a run that has ended, or that can never end, when all of these are gone: what
was launched outlives a killed run for as long as it saves, and has the accelerator meanwhile. Who
looks: `levanter run` before it starts, and every run while it lasts, as it may be the one that
waits. Processes of other hosts are left to the daemon.
"""

import contextlib
import logging
import os
import platform
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import dagster as dg

PROCESS, LAUNCHED = "levanter/process", "levanter/launched"
POLL_S = 10.0
_LOG = logging.getLogger("dagster.levanter")
_UNFINISHED = dg.RunsFilter(
    statuses=[
        dg.DagsterRunStatus.STARTING,
        dg.DagsterRunStatus.STARTED,
        dg.DagsterRunStatus.CANCELING,
    ]
)


def process_tags(run_id: str, tag: str, pids: Iterable[int]) -> dict[str, str]:
    """Returns the tag of a run by which others know whether these processes of it still live."""
    alive = [one for pid in pids if (one := _identity(pid)) is not None]
    return {tag: f"{run_id}: {', '.join(alive)}"}


def end_abandoned_runs(instance: dg.DagsterInstance) -> list[str]:
    """Ends every unfinished run whose processes are gone, and frees the slots of the dead.

    Returns:
        The ids of the runs that were ended.
    """
    ended = []
    for run in instance.get_runs(_UNFINISHED):
        if _processes(run, PROCESS) and not _is_anyone_alive(run):
            what = "Its process was killed; what it had committed is kept."
            if run.status == dg.DagsterRunStatus.CANCELING:
                instance.report_run_canceled(run, what)
            else:
                instance.report_run_failed(run, what)
            ended.append(run.run_id)
    events = instance.event_log_storage
    for run_id in events.get_concurrency_run_ids():
        run = instance.get_run_by_id(run_id)
        if run is None or (run.is_finished and not _is_anyone_alive(run)):
            events.free_concurrency_slots_for_run(run_id)
    return ended


@contextlib.contextmanager
def watching(instance: dg.DagsterInstance, run_id: str) -> Iterator[None]:
    """Tags a run with this process, and looks after other runs while it lasts."""
    instance.add_run_tags(run_id, process_tags(run_id, PROCESS, [os.getpid()]))
    if instance.is_ephemeral:
        yield
        return
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(POLL_S):
            try:
                end_abandoned_runs(instance)
            except Exception:  # noqa: BLE001 (a busy database, say: the next look may succeed)
                _LOG.exception("Looking for runs whose process was killed has failed.")

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()


def _is_anyone_alive(run: dg.DagsterRun) -> bool:
    return any(map(_is_alive, _processes(run, PROCESS) + _processes(run, LAUNCHED)))


def _processes(run: dg.DagsterRun, tag: str) -> list[str]:
    """Returns the processes that this very run has told of."""
    run_id, _, known = run.tags.get(tag, "").partition(": ")
    return known.split(", ") if known and run_id == run.run_id else []


def _is_alive(identity: str) -> bool:
    """Whether a process lives; one of another host is taken to."""
    host, pid, *_ = identity.split()
    return host != platform.node() or _identity(int(pid)) == identity


def _identity(pid: int) -> str | None:
    """Returns a process's host, number and start, which no later one shares; None if it is gone."""
    host = platform.node() or "localhost"
    stat = Path(f"/proc/{pid}/stat")
    if not Path("/proc/self/stat").exists():
        return f"{host} {pid}" if _exists(pid) else None
    try:
        # Field 3 of proc(5) is the state, 22 the start, in clock ticks since boot. The name, in
        # brackets, may hold anything, so fields are counted from behind it.
        state, *fields = stat.read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # One that nobody has waited for yet has ended too.
    return None if state in "ZX" else f"{host} {pid} {fields[18]} {_boot()}"


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
