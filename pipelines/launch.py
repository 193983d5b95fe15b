"""`levanter launch`: a job through `dagster job launch`, waited for, with an honest exit code.

What CI needs of a run and Dagster's own command does not give: that command prints no run id, never
waits, and exits 0 whatever becomes of the run. Here the run id is chosen first, progress is
streamed, a table sums up, and a cancelled CI job (SIGINT or SIGTERM) cancels the run, which saves a
checkpoint before it ends.

    GITHUB_STEP_SUMMARY   a file that the table is added to as Markdown, as GitHub Actions shows it
    LEVANTER_UI_URL       where the Dagster UI is, for the link to the run

Exit codes are those of `pipelines.wait`; 130 and 143 after SIGINT and SIGTERM.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

import dagster as dg

from pipelines.build import with_overrides
from pipelines.instance import CHECKOUT
from pipelines.jobs import experiment_of
from pipelines.wait import NOT_STARTED, wait
from resources import materializations
from resources.secrets import scrub

_POLL_S = 0.5


class _Cancelled(BaseException):
    """A signal asked this command to end; no `except Exception` may take it for a failure."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def launch(
    job: str,
    overrides: Sequence[str],
    tags: Mapping[str, str],
    *,
    timeout_s: float,
    queue_timeout_s: float,
    cancel_timeout_s: float,
) -> int:
    """Launches `job`, waits for it, and returns the exit code.

    Args:
        job: an experiment, or another job of the code location.
        overrides: assignments to fields of the experiment that the job makes.
        tags: of the run.
        timeout_s: how long to wait in all; the run goes on after that.
        queue_timeout_s: how long to wait for a start.
        cancel_timeout_s: how long a cancelled run may take to save and end.
    """
    environment = dict(os.environ)
    if overrides:
        environment["LEVANTER_OVERRIDES"] = with_overrides(
            os.environ, experiment_of(job), overrides
        )
    run_id = str(uuid.uuid4())
    with dg.DagsterInstance.get() as instance, _signals_cancel():
        has_queue = _starts_through_daemon(instance)
        passes_queue = has_queue and bool(overrides)
        if passes_queue:
            _say("Past the queue: the daemon's own checkout and environment see no --set.")
        begun: list[subprocess.Popen[bytes]] = []
        is_submitted = False
        try:
            if not _submit(job, run_id, tags, environment, begun, passes_queue=passes_queue):
                return NOT_STARTED
            is_submitted = True
            code = wait(instance, run_id, timeout_s, queue_timeout_s)
        except _Cancelled as cancelled:
            code = 128 + cancelled.number
            if not is_submitted:
                _break_off(begun)
            if is_submitted or (has_queue and not passes_queue):
                _terminate(instance, run_id, cancel_timeout_s)
            else:
                _report_canceled(instance, run_id)
        _summarize(instance, job, run_id)
    return code


@contextlib.contextmanager
def _signals_cancel() -> Iterator[None]:
    """Has the first SIGINT or SIGTERM raise `_Cancelled`; the handlers are put back at the end."""

    def cancel(number: int, frame: FrameType | None) -> None:
        # GitHub sends one after the other. Only a second Ctrl-C ends the wait for the run's end.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        raise _Cancelled(number)

    before = {number: signal.signal(number, cancel) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _starts_through_daemon(instance: dg.DagsterInstance) -> bool:
    return type(instance.run_coordinator).__name__ == "QueuedRunCoordinator"


def _submit(
    job: str,
    run_id: str,
    tags: Mapping[str, str],
    environment: dict[str, str],
    begun: list[subprocess.Popen[bytes]],
    *,
    passes_queue: bool,
) -> bool:
    """Hands the run to Dagster in a process of its own.

    What that prints goes to a file, and so does what the run prints, which inherits its output and
    outlives it: each event twice, and a pipe that stays open. Here the events are streamed.
    """
    log = Path(os.environ["DAGSTER_HOME"]) / "logs" / f"launch-{run_id}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    _say(f"Launching {job} as run {run_id}; what it prints is in {log}.")
    command = [
        sys.executable, "-m", "pipelines.at_once" if passes_queue else "dagster", "job", "launch",
        "--workspace", str(CHECKOUT / "workspace.yaml"), "--job", job, "--run-id", run_id,
        "--tags", json.dumps({"levanter/command": "launch", **tags}),
    ]  # fmt: skip
    # Signals of the terminal are for this process, which then cancels the run in good order.
    with log.open("ab") as output:
        begun.append(
            subprocess.Popen(
                command, env=environment, process_group=0, stdout=output, stderr=output
            )
        )
    if code := begun[0].wait():
        _say(scrub(log.read_text(encoding="utf-8", errors="replace")))
    return code == 0


def _terminate(instance: dg.DagsterInstance, run_id: str, timeout_s: float) -> None:
    """Cancels the run, and waits until it has ended."""
    _say(f"Cancelling run {run_id}: it saves a checkpoint and ends.")
    run = instance.get_run_by_id(run_id)
    if run is None or run.is_finished:
        return
    if run.status == dg.DagsterRunStatus.NOT_STARTED:
        _report_canceled(instance, run_id)
        return
    instance.run_coordinator.cancel_run(run_id)
    deadline = time.monotonic() + timeout_s
    while not (run := instance.get_run_by_id(run_id)) or not run.is_finished:
        if time.monotonic() > deadline:
            _say(f"Run {run_id} has not ended after {timeout_s:.0f} s; it goes on ending.")
            return
        time.sleep(_POLL_S)
    _say(f"Run {run_id}: {run.status.value}.")


def _break_off(begun: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ends what was submitting, with the code server that it has started.

    And with the run, if it is there by now: nobody would end one that was asked to end before its
    process was there to hear it. What that has launched saves, and ends.
    """
    for launched in begun:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launched.pid, signal.SIGKILL)
        launched.wait()


def _report_canceled(instance: dg.DagsterInstance, run_id: str) -> None:
    """Ends a run on record that no process works for: its submission was broken off."""
    run = instance.get_run_by_id(run_id)
    if run is not None and not run.is_finished:
        instance.report_run_canceled(run, "It was cancelled while it was being submitted.")
    _say(f"Run {run_id} was cancelled before it started.")


def _summarize(instance: dg.DagsterInstance, job: str, run_id: str) -> None:
    """Prints what was made, as Markdown, and adds it to the page of the CI job."""
    run = instance.get_run_by_id(run_id)
    status = run.status.value if run else "never started"
    rows = [["asset", "was", "content id", "seconds"], ["---", "---", "---", "---:"]]
    for made in materializations.of_run(instance, run_id):
        shown = made.metadata
        name, seconds = made.key.to_user_string(), str(shown["seconds"])
        rows.append([name, str(shown["was"]), f"`{shown['id']}`", seconds])
    lines = [f"### {job}: {status}", ""] + [f"| {' | '.join(row)} |" for row in rows]
    url = os.environ.get("LEVANTER_UI_URL", "http://127.0.0.1:3000").rstrip("/")
    lines += ["", f"Run: {url}/runs/{run_id}"]
    text = "\n".join(lines)
    _say(f"\n{text}")
    if page := os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(page).open("a", encoding="utf-8") as out:
            out.write(f"{text}\n")


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
