"""`dagster job launch` from a clean shell, without a daemon: the run runs, the waiter is honest."""

import os
import subprocess
import sys
import uuid
from pathlib import Path

import dagster as dg
import pytest

from pipelines.instance import CHECKOUT, ensure_home
from pipelines.wait import FAILED, NOT_STARTED, STILL_GOING, SUCCEEDED, wait

BIN = Path(sys.executable).parent


def shell(command, chain, *changes):
    """Runs a command as a shell with nothing but PATH and the chain's variables would."""
    done = subprocess.run(
        command,
        env={"PATH": f"{BIN}:/usr/bin:/bin", **chain.environment(*changes)},
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=420,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


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
