"""A place in one of Dagster's pools for work that is no step: verifying needs the accelerator too.

The place is held in the name of a run of its own, tagged with this process, so that the next
command gives it back if this process is killed (`abandoned`); the run is on record only as long.
"""

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterator

import dagster as dg

# Private, and the very thing by which steps wait for each other.
from dagster._core.execution.plan.instance_concurrency_context import InstanceConcurrencyContext

from resources.abandoned import PROCESS, end_abandoned_runs, process_tags

_STEP = "verify"
_POLL_S = 1.0


@contextlib.contextmanager
def held(instance: dg.DagsterInstance, pool: str, say: Callable[[str], None]) -> Iterator[None]:
    """Holds a place in a pool while the block runs; waits for one, and says so.

    Args:
        instance: whose pool it is.
        pool: its name.
        say: hears once that there is something to wait for.
    """
    end_abandoned_runs(instance)
    run_id = str(uuid.uuid4())
    run = dg.DagsterRun(
        job_name=_STEP,
        run_id=run_id,
        status=dg.DagsterRunStatus.STARTED,
        tags={"levanter/command": _STEP} | process_tags(run_id, PROCESS, [os.getpid()]),
    )
    instance.add_run(run)
    try:
        with InstanceConcurrencyContext(instance, run) as claims:
            is_told = False
            while not claims.claim(pool, _STEP):
                if not is_told:
                    say(f"Waiting for a place in the pool {pool}, which another run holds.")
                    is_told = True
                time.sleep(_POLL_S)
            try:
                yield
            finally:
                claims.free_step(_STEP)
    finally:
        instance.delete_run(run.run_id)
