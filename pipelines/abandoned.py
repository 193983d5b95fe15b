"""Runs whose process was killed: ended on record, so that what they held is free again.

A run of `levanter run` lives in that command's own process. After `kill -9` it would stay STARTED
for ever, and keep the accelerator's only slot, which the daemon alone gives back. So each run is
tagged with its process, and the next command ends those whose process is gone.
"""

import os
from pathlib import Path

import dagster as dg

TAG = "levanter/process"


def this_process() -> dict[str, str]:
    """Returns the tag by which a later command knows whether this process still lives."""
    return {TAG: _identity(os.getpid()) or str(os.getpid())}


def end_abandoned_runs(instance: dg.DagsterInstance) -> list[str]:
    """Ends every unfinished run whose process is gone, and returns their ids."""
    unfinished = dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED])
    ended = []
    for run in instance.get_runs(unfinished):
        process = run.tags.get(TAG)
        if process is None or _identity(int(process.split()[0])) == process:
            continue
        instance.report_run_failed(run, "Its process was killed; what it had committed is kept.")
        instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
        ended.append(run.run_id)
    return ended


def _identity(pid: int) -> str | None:
    """Returns a process's number and start, which no later process shares; None if it is gone."""
    stat = Path(f"/proc/{pid}/stat")
    if not Path("/proc/self/stat").exists():
        return str(pid) if _is_alive(pid) else None
    try:
        # Field 22 of proc(5): the start, in clock ticks since boot. The name, in brackets, may hold
        # anything, so fields are counted from behind it.
        return f"{pid} {stat.read_text().rpartition(')')[2].split()[19]} {_boot()}"
    except (FileNotFoundError, ProcessLookupError):
        return None


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
