"""The launcher keeps its promises about results, failures, retries, and processes left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import dagster as dg
import pytest

from modeling.artifacts import Workspace
from resources.launcher import Job, LauncherResource

HERE = Path(__file__).parent
RUN_WORKER = """
import json, sys
from pathlib import Path
import dagster as dg
from modeling.artifacts import Workspace
from resources.launcher import Job, LauncherResource

@dg.asset
def trained(context: dg.AssetExecutionContext, launcher: LauncherResource) -> dg.MaterializeResult:
    arguments = json.loads(sys.argv[1])
    space = Workspace(*map(Path, sys.argv[4:])) if sys.argv[4:] else None
    job = Job(f"children:{arguments['entry']}", arguments, {"PYTHONPATH": sys.argv[2]}, space)
    launcher.run(context, job)
    return dg.MaterializeResult()

with dg.DagsterInstance.ephemeral() as instance:
    launcher = LauncherResource(grace_s=float(sys.argv[3]), max_retries=2)
    done = dg.materialize(
        [trained], resources={"launcher": launcher}, instance=instance, raise_on_error=False
    )
    run = instance.get_run_by_id(done.run_id)
    Path(json.loads(sys.argv[1])["notes"], "status").write_text(run.status.value)
"""


@pytest.fixture
def workspace(tmp_path):
    made = Workspace(tmp_path / "work" / "progress", tmp_path / "work" / "attempt")
    made.progress.mkdir(parents=True)
    made.output.mkdir()
    return made


def launch(entry, workspace=None, arguments=None, job=None, **options):
    """Runs `entry` in an asset; returns the run's result, its log messages, and what `run` gave."""
    results = []

    @dg.asset
    def trained(
        context: dg.AssetExecutionContext, launcher: LauncherResource
    ) -> dg.MaterializeResult:
        launched = Job(
            f"children:{entry}",
            arguments or {},
            {"PYTHONPATH": str(HERE), "NPROC": "3"},
            workspace,
            **(job or {}),
        )
        results.append(launcher.run(context, launched))
        return dg.MaterializeResult()

    with dg.DagsterInstance.ephemeral() as instance:
        done = dg.materialize(
            [trained],
            resources={"launcher": LauncherResource(**options)},
            instance=instance,
            raise_on_error=False,
        )
        logs = [record.user_message for record in instance.all_logs(done.run_id)]
    return done, logs, results


def failure_of(done):
    (event,) = done.get_step_failure_events()
    error = event.event_specific_data.error
    return error.to_string(), error


def test_the_result_is_read_from_what_the_child_wrote(workspace, capfd):
    done, logs, [built] = launch("write_and_return", workspace, {"text": "hello"})
    assert done.success
    assert built["content_id"] == "ab" * 32
    assert built["facts"] == {"nproc": "3", "group": True}
    assert (workspace.output / "data.txt").read_text() == "hello"
    assert "working on it" in logs, "messages of the child reach the event log"
    assert "working on it" in capfd.readouterr().out, "and the terminal"


def test_a_failing_child_is_not_retried_and_its_code_and_last_lines_are_told(workspace):
    done, _, results = launch("exit_17", workspace)
    text, _ = failure_of(done)
    assert not done.success
    assert results == []
    assert "exit code 17" in text
    assert "the last words" in text
    assert not [e for e in done.all_events if e.is_step_up_for_retry]


def test_an_exception_in_the_child_is_told_in_full(workspace):
    done, _, _ = launch("fail", workspace)
    text, _ = failure_of(done)
    assert "exit code 1" in text
    assert "hidden_dim 7 is not a multiple of num_heads 2" in text


def test_exit_0_without_a_result_is_a_failure(workspace):
    done, _, results = launch("exit_0_early", workspace)
    text, _ = failure_of(done)
    assert "without a result" in text
    assert results == []


def test_a_crashed_child_is_started_again_in_the_same_workspace(workspace):
    done, _, [built] = launch("crash_once", workspace)
    assert done.success
    assert built["facts"] == {"resumed": 5}
    assert len([e for e in done.all_events if e.is_step_up_for_retry]) == 1


def test_a_crash_is_a_failure_that_names_the_signal_when_retries_are_off(workspace):
    done, _, _ = launch("crash_once", workspace, max_retries=0)
    text, _ = failure_of(done)
    assert "SIGKILL" in text
    assert "-9" in text


def test_a_preempted_child_is_not_started_again(workspace):
    done, _, _ = launch("preempted", workspace)
    text, _ = failure_of(done)
    assert "was asked to stop (exit code 75)" in text
    assert "preempted after step 7" in text
    assert not [e for e in done.all_events if e.is_step_up_for_retry]


def test_a_crash_in_native_code_tells_where_python_stood(workspace):
    done, _, _ = launch("segfault", workspace, max_retries=0)
    text, _ = failure_of(done)
    assert "SIGSEGV" in text
    assert "in segfault" in text


def test_terminate_waits_for_a_child_that_saves(tmp_path):
    run, notes = start_run(tmp_path, save_s=0.2, grace_s=30)
    run.send_signal(signal.SIGINT)
    run.wait(60)
    assert (notes / "saved").exists()
    assert_gone(notes)
    # Dagster calls an interrupted in-process run failed; what matters is that nothing was retried.
    assert (notes / "status").read_text() in ("FAILURE", "CANCELED")


def test_terminate_kills_a_child_that_saves_for_too_long(tmp_path):
    run, notes = start_run(tmp_path, save_s=600, grace_s=1)
    run.send_signal(signal.SIGINT)
    run.wait(60)
    assert (notes / "told").exists(), "TERM comes before KILL"
    assert not (notes / "saved").exists()
    assert_gone(notes)


@pytest.mark.parametrize(("save_s", "is_saved"), [(0.2, True), (600, False)])
def test_kill_9_of_the_run_worker_leaves_no_orphan(tmp_path, save_s, is_saved):
    run, notes = start_run(tmp_path, save_s=save_s, grace_s=1.5)
    run.kill()
    run.wait(30)
    wait_until(lambda: not alive(notes), 30)
    assert (notes / "told").exists()
    assert (notes / "saved").exists() == is_saved


def test_a_child_that_saves_is_not_asked_again_when_its_parent_is_killed(tmp_path):
    """As when CI cancels a job and kills it soon after."""
    run, notes = start_run(tmp_path, save_s=1, grace_s=30, entry="save_when_asked")
    run.send_signal(signal.SIGINT)
    wait_until((notes / "told").exists, 30)
    time.sleep(0.1)
    run.kill()
    run.wait(30)
    assert_gone(notes)
    assert (notes / "saved").exists()


def start_run(tmp_path, *, save_s, grace_s, workspace=None, entry="stop_when_asked"):
    """Starts a Dagster run in a process of its own and waits until its child works."""
    notes = tmp_path / "notes"
    notes.mkdir()
    arguments = json.dumps({"notes": str(notes), "save_s": save_s, "entry": entry})
    places = [str(workspace.progress), str(workspace.output)] if workspace else []
    run = subprocess.Popen(
        [sys.executable, "-c", RUN_WORKER, arguments, str(HERE), str(grace_s), *places],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_until((notes / "started").exists, 120)
    return run, notes


def alive(notes):
    return [pid for pid in map(int, (notes / "pids").read_text().split()) if _is_alive(pid)]


def assert_gone(notes):
    wait_until(lambda: not alive(notes), 10)


def _is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie that nobody reaps (no init in a container) has ended.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(condition, timeout_s):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "this took too long"
        time.sleep(0.05)


def test_a_worker_whose_parent_is_gone_does_nothing(tmp_path):
    job = {
        "entry": "children:write_and_return", "arguments": {}, "workspace": None,
        "result": str(tmp_path / "result.json"), "parent": os.getpid() + 1, "grace_s": 1.0,
    }  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, "-m", "resources.worker", str(tmp_path / "job.json")],
        env={**os.environ, "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert "The process that started this one is gone." in done.stderr
    assert not (tmp_path / "result.json").exists()


def test_a_second_worker_waits_for_the_first_in_the_same_workspace(workspace, tmp_path):
    """As when a run worker was killed and its child still saves."""
    run, notes = start_run(tmp_path, save_s=3, grace_s=30, workspace=workspace)
    run.kill()
    run.wait(30)
    done, _, _ = launch("write_and_return", workspace, {"text": "second"})
    assert done.success
    assert (notes / "saved").exists(), "the first was let finish"


def test_the_platform_is_what_is_asked_for(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    monkeypatch.delenv("LEVANTER_PLATFORM", raising=False)
    assert LauncherResource().platform_name() == "gpu"
    monkeypatch.setenv("LEVANTER_PLATFORM", "tpu")
    assert LauncherResource().platform_name() == "tpu"
    assert LauncherResource(platform="cpu").platform_name() == "cpu"
    monkeypatch.delenv("LEVANTER_PLATFORM")
    monkeypatch.delenv("JAX_PLATFORMS")
    assert LauncherResource().platform_name() == "cpu"
    with pytest.raises(ValueError, match="'abacus' is not one of"):
        LauncherResource(platform="abacus").platform_name()


def test_one_dying_process_ends_its_crew_at_once_and_both_are_started_again(workspace, capfd):
    """The first process sleeps for ten minutes when the second one is killed."""
    done, _, results = launch("crew_of_two", workspace, job={"processes": 2}, max_retries=1)
    assert done.success
    assert results == [{"ranks": [0, 1], "orphan": False}]
    printed = capfd.readouterr().out
    assert "process 0 of 2\n" in printed
    assert "[process 1] process 1 of 2\n" in printed
