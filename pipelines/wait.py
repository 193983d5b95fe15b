"""Waits for a run and exits with its status: `python -m pipelines.wait RUN_ID`.

`dagster job launch` exits 0 whatever becomes of its run, so CI chooses the run's id, launches and
waits:

    run=$(python -c 'import uuid; print(uuid.uuid4())')
    dagster job launch -w workspace.yaml -j nano --run-id "$run" && python -m pipelines.wait "$run"

(Any `levanter` command, such as `levanter status`, first puts the shipped `dagster.yaml` into
DAGSTER_HOME: with Dagster's own defaults the run would wait for a daemon.)

Exit codes: 0 the run succeeded; 1 it failed or was canceled; 2 there is no such run, or nobody took
it out of the queue; 3 it was still going when the time was up (it goes on).
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence

import dagster as dg

from resources.secrets import scrub

SUCCEEDED, FAILED, NOT_STARTED, STILL_GOING = range(4)
_POLL_S = 1.0
_SHOWN = {
    dg.DagsterEventType.RUN_START,
    dg.DagsterEventType.STEP_START,
    dg.DagsterEventType.STEP_FAILURE,
    dg.DagsterEventType.STEP_UP_FOR_RETRY,
    dg.DagsterEventType.ASSET_MATERIALIZATION,
    dg.DagsterEventType.ASSET_CHECK_EVALUATION,
    dg.DagsterEventType.RUN_SUCCESS,
    dg.DagsterEventType.RUN_FAILURE,
    dg.DagsterEventType.RUN_CANCELED,
}
_QUEUED = {dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.NOT_STARTED}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.wait", description="Waits for a run.", allow_abbrev=False
    )
    parser.add_argument("run_id")
    parser.add_argument("--timeout", type=float, default=86400, help="seconds in all")
    parser.add_argument("--queue-timeout", type=float, default=300, help="seconds until it starts")
    options = parser.parse_args(argv)
    with dg.DagsterInstance.get() as instance:
        return wait(instance, options.run_id, options.timeout, options.queue_timeout)


def wait(
    instance: dg.DagsterInstance, run_id: str, timeout_s: float, queue_timeout_s: float
) -> int:
    """Prints what happens in the run until it ends, and returns the exit code."""
    began = time.monotonic()
    cursor: str | None = None
    while True:
        run = instance.get_run_by_id(run_id)
        if run is None:
            _say(f"There is no run {run_id} in {instance.storage_directory()}.")
            return NOT_STARTED
        # Asked before the events are read, so that none is missed between the two.
        status = run.status
        cursor = _print_events(instance, run_id, cursor)
        if run.is_finished:
            _say(f"Run {run_id}: {status.value}.")
            return SUCCEEDED if run.is_success else FAILED
        waited = time.monotonic() - began
        if status in _QUEUED and waited > queue_timeout_s:
            _say(
                f"Run {run_id} is {status.value} after {waited:.0f} s. Is `dagster-daemon run` up? "
                f"The `dagster.yaml` of this repository needs none."
            )
            return NOT_STARTED
        if waited > timeout_s:
            _say(f"Run {run_id} is {status.value} after {waited:.0f} s; it goes on.")
            return STILL_GOING
        time.sleep(_POLL_S)


def _print_events(instance: dg.DagsterInstance, run_id: str, cursor: str | None) -> str | None:
    while True:
        connection = instance.get_records_for_run(run_id, cursor=cursor)
        for record in connection.records:
            entry = record.event_log_entry
            event = entry.dagster_event
            if event is None or event.event_type in _SHOWN:
                stamp = time.strftime("%H:%M:%S", time.localtime(entry.timestamp))
                step = f"{entry.step_key}: " if entry.step_key else ""
                _say(f"{stamp} {step}{entry.user_message}")
                for message in _error_messages(event):
                    _say(message.rstrip())
        cursor = connection.cursor
        if not connection.has_more:
            return cursor


def _error_messages(event: dg.DagsterEvent | None) -> Iterator[str]:
    """Yields what a failed step raised, and what caused that, without the stacks."""
    error = getattr(event.event_specific_data, "error", None) if event else None
    while error is not None:
        yield error.message
        error = error.cause


def _say(line: str) -> None:
    sys.stdout.write(f"{scrub(line)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
