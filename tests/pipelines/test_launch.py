"""`dagster job launch` from a clean shell, without a daemon: the run runs, the waiter is honest."""

import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import dagster as dg
import pytest
import yaml

from pipelines.cli import main, make_parser
from pipelines.instance import CHECKOUT, ensure_home
from pipelines.wait import FAILED, NOT_STARTED, STILL_GOING, SUCCEEDED, wait

BIN = Path(sys.executable).parent
CLEAN = {"PATH": f"{BIN}:/usr/bin:/bin"} | {
    name: os.environ[name] for name in ["PYTHONPATH"] if name in os.environ
}
"""What a clean shell has; a path to other sources, if that is how these tests are run."""


def shell(command, chain, *changes):
    """Runs a command as a shell with nothing but PATH and the chain's variables would."""
    with tempfile.TemporaryFile("w+") as output:
        # A file and no pipe: the run that a launch leaves behind would hold a pipe open.
        done = subprocess.run(
            command,
            env={**CLEAN, **chain.environment(*changes)},
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
    code, output = shell(
        ["levanter", "launch", "tales__data"], settled, "dataset.source.paths=[/nowhere/*.txt]"
    )
    assert code == FAILED, output
    assert "/nowhere" in output, "and says why"
    assert "### tales__data: FAILURE" in output


def test_a_run_that_a_daemon_starts(settled, tmp_path):
    config = settled.home / "dagster.yaml"
    config.write_text(config.read_text().replace("DefaultRunCoord", "QueuedRunCoord"))
    with (tmp_path / "daemon").open("w") as log:
        daemon = subprocess.Popen(
            [BIN / "dagster-daemon", "run", "-w", CHECKOUT / "workspace.yaml"],
            env={**CLEAN, **settled.environment()},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        code, output = shell(["levanter", "launch", "tales__data"], settled)
    finally:
        daemon.terminate()
        daemon.wait(timeout=60)
    assert code == SUCCEEDED, output
    assert "### tales__data: SUCCESS" in output
    assert "| tales/tokenizer | reused | `" in output


def test_the_example_for_ci_launches_as_the_command_line_has_it(capsys):
    workflow = yaml.safe_load((CHECKOUT / ".github/workflows/train.yml").read_text())
    (step,) = [one for one in workflow["jobs"]["train"]["steps"] if "launch" in one.get("run", "")]
    filled = step["run"].replace("${CHANGE:+--set", "--set").replace('"$CHANGE"}', "a.b=1")
    program, *words = shlex.split(filled.removeprefix("exec "))
    assert Path(program).name == "levanter"
    arguments = make_parser().parse_args(words)
    assert (arguments.job, arguments.overrides) == ("$EXPERIMENT", ["a.b=1"])
    assert arguments.tags == ["commit=$GITHUB_SHA"]


def test_a_change_that_a_daemon_would_not_see_is_refused(settled, capfd):
    config = settled.home / "dagster.yaml"
    config.write_text(config.read_text().replace("DefaultRunCoord", "QueuedRunCoord"))
    with settled.instance():
        assert main(["launch", "tiny", "--set", "trainer.seed=1"]) == 2
    assert "queues runs for its daemon" in capfd.readouterr().err


def test_a_tag_without_a_value_is_refused(settled, capfd):
    with settled.instance():
        assert main(["launch", "tiny", "--tag", "commit"]) == 2
    assert "--tag commit: expected NAME=VALUE" in capfd.readouterr().err


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


def test_a_cancelled_launch_saves_and_leaves_no_process(settled, tmp_path):
    """What a cancelled CI job does, and the UI's Terminate, on a training that never ends."""
    page = tmp_path / "summary.md"
    command = [
        BIN / "levanter", "launch", "tiny", "--tag", "commit=c0ffee",
        "--set", "trainer.num_train_steps=1000000", "--set", "trainer.save_every_steps=1000000",
    ]  # fmt: skip
    environment = {**CLEAN, **settled.environment()}
    with (tmp_path / "output").open("w+") as output:
        launched = subprocess.Popen(
            command,
            env=environment | {"GITHUB_STEP_SUMMARY": str(page)},
            cwd=tmp_path,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        said = (tmp_path / "output").read_text
        wait_for(lambda: "step 4 of" in said() or launched.poll() is not None)
        pids = workers(settled)
        launched.send_signal(signal.SIGTERM)
        code = launched.wait(timeout=240)
    assert code == 128 + signal.SIGTERM, said()
    assert len(pids) == 1, said()
    assert "Stopped: preempted after step" in said()
    assert workers(settled) == []
    commits = list(settled.store_directory.glob("work/**/COMMIT"))
    assert len(commits) == 1, "the state at the time is kept for the next run"

    (run_id,) = re.findall(r"Launching tiny as run ([0-9a-f-]+)", said())
    with settled.instance() as instance:
        run = instance.get_run_by_id(run_id)
    assert run.status == dg.DagsterRunStatus.CANCELED
    assert run.tags["commit"] == "c0ffee"
    summary = page.read_text()
    assert "### tiny: CANCELED" in summary
    assert "| tales/tokenizer | reused | `" in summary
    assert f"/runs/{run_id}" in summary
    assert "tiny/checkpoint" not in summary


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


def wait_for(condition, timeout_s=400):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "this took too long"
        time.sleep(0.3)
