"""`dagster job launch` from a clean shell, without a daemon: the run runs, the waiter is honest."""

import os
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import dagster as dg
import pytest

from pipelines.instance import CHECKOUT, ensure_home
from pipelines.wait import FAILED, NOT_STARTED, STILL_GOING, SUCCEEDED, wait

BIN = Path(sys.executable).parent


def shell(command, chain, *changes):
    """Runs a command as a shell with nothing but PATH and the chain's variables would."""
    with tempfile.TemporaryFile("w+") as output:
        # A file and no pipe: the run that a launch leaves behind would hold a pipe open.
        done = subprocess.run(
            command,
            env={"PATH": f"{BIN}:/usr/bin:/bin", **chain.environment(*changes)},
            cwd=CHECKOUT,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=420,
            check=False,
        )
        output.seek(0)
        return done.returncode, output.read()


def launch_and_wait(chain, job, *changes):
    run_id = str(uuid.uuid4())
    code, output = shell(
        ["dagster", "job", "launch", "-w", "workspace.yaml", "-j", job, "--run-id", run_id],
        chain,
        *changes,
    )
    assert code == 0, output
    return shell(["python", "-m", "pipelines.wait", run_id, "--timeout", "300"], chain, *changes)


@pytest.fixture
def settled(other_instance, monkeypatch):
    """An instance whose home has the shipped `dagster.yaml`."""
    monkeypatch.setenv("DAGSTER_HOME", str(other_instance.home))
    ensure_home()
    return other_instance


def test_a_launched_run_that_succeeds(settled):
    code, output = launch_and_wait(settled, "tales__data")
    assert code == SUCCEEDED, output
    assert "tales__tokenizer: " in output, "progress is shown"
    assert "SUCCESS" in output.splitlines()[-1]
    assert settled.artifact("tales", "token_cache", "L64").facts["train"]["rows"] > 0


def test_a_launched_run_that_fails(settled):
    code, output = launch_and_wait(settled, "tales__data", "dataset.source.paths=[/nowhere/*.txt]")
    assert code == FAILED, output
    assert "/nowhere" in output, "and says why"
    assert "FAILURE" in output.splitlines()[-1]


def test_a_run_that_does_not_exist(capsys):
    with dg.DagsterInstance.ephemeral() as instance:
        assert wait(instance, str(uuid.uuid4()), 1, 1) == NOT_STARTED
    assert "There is no run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (dg.DagsterRunStatus.NOT_STARTED, NOT_STARTED, "dagster-daemon"),
        (dg.DagsterRunStatus.STARTED, STILL_GOING, "it goes on"),
    ],
)
def test_a_run_that_does_not_end(status, code, words, capsys):
    run = dg.DagsterRun(job_name="tiny", run_id=str(uuid.uuid4()), status=status)
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_run(run)
        assert wait(instance, run.run_id, 0.1, 0.1) == code
    assert words in capsys.readouterr().out


def test_the_clean_shell_is_clean(chain):
    code, output = shell(["env"], chain)
    assert code == 0
    assert "XLA_FLAGS" not in output
    assert "XLA_FLAGS" in os.environ


def test_terminating_a_run_saves_and_leaves_no_process(settled):
    """What the UI's Terminate button does, on a training that would take for ever."""
    endless = ["trainer.num_train_steps=1000000", "trainer.save_every_steps=1000000"]
    run_id = str(uuid.uuid4())
    command = ["dagster", "job", "launch", "-w", "workspace.yaml", "-j", "tiny"]
    code, output = shell([*command, "--run-id", run_id], settled, *endless)
    assert code == 0, output
    with settled.instance() as instance:
        wait_for(lambda: any("step 4 of" in text for text in messages(instance, run_id)))
        pids = workers(settled)
        assert len(pids) == 1
        assert instance.run_launcher.terminate(run_id)
        wait_for(lambda: instance.get_run_by_id(run_id).is_finished)
        assert instance.get_run_by_id(run_id).status == dg.DagsterRunStatus.CANCELED
        assert any("Stopped: preempted after step" in text for text in messages(instance, run_id))
    assert workers(settled) == []
    commits = list(settled.store_directory.glob("work/**/COMMIT"))
    assert len(commits) == 1, "the state at the time is kept for the next run"


def messages(instance, run_id):
    return [record.user_message for record in instance.all_logs(run_id)]


def workers(chain):
    """Returns the launched processes that work for this chain, by what their environment says."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
            environment = (process / "environ").read_bytes()
        except OSError:  # It has ended, or is another user's.
            continue
        if b"resources.worker" in command and str(chain.home).encode() in environment:
            found.append(int(process.name))
    return found


def wait_for(condition, timeout_s=180):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "this took too long"
        time.sleep(0.3)
