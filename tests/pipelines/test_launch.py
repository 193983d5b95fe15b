"""`dagster job launch` from a clean shell, without a daemon: the run runs, the waiter is honest."""

import contextlib
import dataclasses
import functools
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import dagster as dg
import pytest
import yaml
from dagster._daemon.auto_run_reexecution.auto_run_reexecution import should_retry

from pipelines.automation import NEW_FILES, RERUN
from pipelines.cli import main, make_parser
from pipelines.instance import CHECKOUT, ensure_home
from pipelines.wait import FAILED, NOT_STARTED, STILL_GOING, SUCCEEDED, wait
from resources import abandoned, materializations
from tests.pipelines.conftest import REMADE, VOCABULARY

BIN = Path(sys.executable).parent
DATA = [("tales", "raw_corpus"), ("tales", "tokenizer"), ("tales", "tokenized_corpus"),
        ("tales", "token_cache", "L32")]  # fmt: skip
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


def test_a_launched_run_of_a_changed_tokenizer_goes_down_to_the_exported_model(
    changed, changed_run
):
    code, output = launch_and_wait(changed, "tiny", VOCABULARY)
    assert code == SUCCEEDED, output
    assert "tales__tokenizer: " in output, "progress is shown"
    assert "SUCCESS" in output.splitlines()[-1]
    with changed.instance() as instance:
        run = instance.get_runs(limit=1)[0]
        made = materializations.of_run(instance, run.run_id)
    models = ["tiny/checkpoint", "tiny/eval_report", "tiny/hf_model"]
    assert {one.key.to_user_string(): one.metadata["was"] for one in made} == {
        "tales/raw_corpus": "reused"
    } | dict.fromkeys(REMADE, "built") | dict.fromkeys(models, "reused")
    exported = changed_run.asset_value(dg.AssetKey(["tiny", "hf_model"]))
    (model,) = (one for one in made if one.kind == "hf_model")
    assert model.content_id == exported.content_id
    for one in made:
        assert run.tags[f"content/{one.key.to_user_string()}"] == one.content_id


def test_a_job_that_there_is_not_is_told_with_those_there_are(settled):
    code, output = shell(["levanter", "launch", "tales__date"], settled)
    assert code == NOT_STARTED, output
    assert "'tales__data'" in output


def test_a_launched_run_that_fails(settled):
    code, output = shell(
        ["levanter", "launch", "tales__data"], settled, "dataset.source.paths=[/nowhere/*.txt]"
    )
    assert code == FAILED, output
    assert "/nowhere" in output, "and says why"
    assert output.count("Started execution of run") == 1, "each event once"
    assert "### tales__data: FAILURE" in output


def test_what_a_daemon_starts(settled, tmp_path):
    """One daemon for three ways, since its start takes as long as what it does here."""
    chain = settled.with_own_texts(tmp_path / "texts")
    assert chain.run(select=DATA).success
    config = chain.home / "dagster.yaml"
    config.write_text(config.read_text().replace("DefaultRunCoord", "QueuedRunCoord"))
    change = "dataset.tokenizer.vocab_size=311"
    switches = ["dagster", "sensor", "start", "--start-all", "-w", "workspace.yaml"]
    assert shell(switches, chain, change)[0] == 0
    with a_daemon(chain, tmp_path / "daemon", change) as daemon, chain.instance() as instance:

        def started_by(sensor):
            """Returns the runs that a sensor has started, once they are there and over."""
            wanted = dg.RunsFilter(tags={"dagster/sensor_name": sensor})

            def are_there():
                runs = instance.get_runs(wanted)
                return runs and all(run.is_finished for run in runs)

            wait_for(are_there, daemon)
            return instance.get_runs(wanted)

        (rerun,) = started_by(RERUN)
        code, output = shell(["levanter", "launch", "tales__data"], chain)
        (new_files,) = started_by(f"tales{NEW_FILES}")
        made = materializations.of_run(instance, rerun.run_id)
    assert rerun.is_success
    assert {one.key.to_user_string(): one.metadata["was"] for one in made} == {
        "tales/tokenizer": "built",
        "tales/tokenized_corpus": "built",
        "tales/token_cache/L32": "built",
    }
    assert code == SUCCEEDED, output
    assert "### tales__data: SUCCESS" in output
    assert "| tales/tokenizer | reused | `" in output
    assert (new_files.job_name, new_files.is_success) == ("tales__data", True)


@pytest.mark.slow
def test_a_daemon_starts_a_killed_run_again_and_never_one_that_was_terminated(settled, tmp_path):
    """The second run goes on from where the first was killed, and has a retry left that it is not
    given: what was asked to stop is no crash.
    """
    config = settled.home / "dagster.yaml"
    config.write_text(
        config.read_text().replace("poll_interval_seconds: 20", "poll_interval_seconds: 1")
    )
    endless = "trainer.seed=9", "trainer.num_train_steps=1000000"
    before, run_id = saved(settled), str(uuid.uuid4())
    launched = ["dagster", "job", "launch", "-w", "workspace.yaml", "-j", "tiny__pretrain",
                "--run-id", run_id, "--tags", '{"dagster/max_retries": "2"}']  # fmt: skip
    with (
        a_daemon(settled, tmp_path / "daemon", *endless) as daemon,
        settled.instance() as instance,
    ):
        assert shell(launched, settled, *endless)[0] == 0
        wait_for(lambda: saved(settled) - before, daemon)
        process = instance.get_run_by_id(run_id).tags[abandoned.PROCESS].split()[2]
        os.kill(int(process), signal.SIGKILL)
        retries = dg.RunsFilter(tags={"dagster/parent_run_id": run_id})
        wait_for(lambda: instance.get_runs(retries), daemon)
        (again,) = instance.get_runs(retries)
        wait_for(lambda: "Going on from step" in told_in(instance, again.run_id), daemon)

        instance.run_coordinator.cancel_run(again.run_id)
        wait_for(lambda: instance.get_run_by_id(again.run_id).is_finished, daemon)
        # It looks for runs that have ended once a round: after two it has seen this one.
        rounds = set()
        wait_for(lambda: rounds.add(heartbeat(instance)) or len(rounds) > 2, daemon)
        runs = {run.run_id: run.status for run in instance.get_runs()}
    assert runs == {
        run_id: dg.DagsterRunStatus.FAILURE,
        again.run_id: dg.DagsterRunStatus.CANCELED,
    }
    assert workers(settled) == []


@contextlib.contextmanager
def a_daemon(chain, log, *changes):
    """Runs a daemon; yields what tells how it is, and fails if it has ended."""
    with log.open("w") as output:
        daemon = subprocess.Popen(
            [BIN / "dagster-daemon", "run", "-w", CHECKOUT / "workspace.yaml"],
            env={**CLEAN, **chain.environment(*changes)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )

    def tell():
        assert daemon.poll() is None, log.read_text()
        return log.read_text()

    try:
        yield tell
    finally:
        daemon.terminate()
        daemon.wait(timeout=120)


def told_in(instance, run_id):
    return "\n".join(entry.user_message for entry in instance.all_logs(run_id))


def heartbeat(instance):
    """Returns when the daemon that starts runs again was last seen at work."""
    return instance.get_daemon_heartbeats()["EVENT_LOG_CONSUMER"].timestamp


@pytest.mark.parametrize("name", ["train.yml", "train-queued.yml"])
def test_the_examples_for_ci_launch_as_the_command_line_has_it(name):
    workflow = yaml.safe_load((CHECKOUT / ".github/workflows" / name).read_text())
    (step,) = [one for one in workflow["jobs"]["train"]["steps"] if "launch" in one.get("run", "")]
    filled = step["run"].replace("${CHANGE:+--set", "--set").replace('"$CHANGE"}', "a.b=1")
    program, *words = shlex.split(filled.removeprefix("exec "))
    assert Path(program).name == "levanter"
    arguments = make_parser().parse_args(words)
    assert (arguments.job, arguments.overrides) == ("$EXPERIMENT", ["a.b=1"])
    assert arguments.tags == ["commit=$GITHUB_SHA"]


def test_a_change_that_a_daemon_would_not_see_starts_its_run_past_the_queue(settled, capfd):
    """No daemon is there, so that whatever is queued stays queued."""
    config = settled.home / "dagster.yaml"
    config.write_text(config.read_text().replace("DefaultRunCoord", "QueuedRunCoord"))
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    change = "dataset.tokenizer.vocab_size=312"
    with settled.instance() as instance:
        assert main(["launch", "tiny__tokenize", "--set", change, "--tag", "ci=1"]) == SUCCEEDED
        (run,) = instance.get_runs()
        made = materializations.of_run(instance, run.run_id)
    assert run.tags["ci"] == "1"
    assert made[1].metadata["config"]["tokenizer"]["vocab_size"] == 312
    after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert after == handlers
    assert "Past the queue" in capfd.readouterr().out


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
    page, before = tmp_path / "summary.md", saved(settled)
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
    (log,) = (settled.home / "logs").glob("launch-*.log")
    assert "Stopped: preempted after step" in log.read_text()
    assert workers(settled) == []
    assert len(saved(settled) - before) == 1, "the state at the time is kept for the next run"

    (run_id,) = re.findall(r"Launching tiny as run ([0-9a-f-]+);", said())
    with settled.instance() as instance:
        run = instance.get_run_by_id(run_id)
        retries = instance.all_logs(run_id, of_type=dg.DagsterEventType.STEP_UP_FOR_RETRY)
    assert run.status == dg.DagsterRunStatus.CANCELED
    assert retries == [], "it was no crash"
    assert run.tags["commit"] == "c0ffee"
    summary = page.read_text()
    assert "### tiny: CANCELED" in summary
    assert "| tales/tokenizer | reused | `" in summary
    assert f"/runs/{run_id}" in summary
    assert "tiny/checkpoint" not in summary


def test_two_trainings_never_share_the_accelerator_also_when_a_run_is_killed(
    settled, tmp_path, monkeypatch, capfd
):
    """No daemon runs. The second command waits for the slot, until what the first left is gone."""
    monkeypatch.setattr(abandoned, "POLL_S", 0.5)
    before = saved(settled)
    command = [
        BIN / "levanter", "launch", "tiny__pretrain", "--set", "trainer.seed=7",
        "--set", "trainer.num_train_steps=1000000", "--set", "trainer.save_every_steps=1000000",
    ]  # fmt: skip
    said = (tmp_path / "output").read_text
    with (tmp_path / "output").open("w") as output:
        launched = subprocess.Popen(
            command, env={**CLEAN, **settled.environment()}, stdout=output, stderr=output
        )
    wait_for(lambda: "step 4 of" in said() or launched.poll() is not None)
    (training,) = workers(settled)

    def kill_the_first_run(instance):
        slots = functools.partial(instance.event_log_storage.get_concurrency_info, "accelerator")
        (first,) = instance.get_runs(dg.RunsFilter(job_name="tiny__pretrain"))
        process = int(first.tags[abandoned.PROCESS].split()[2])
        try:
            wait_for(lambda: slots().pending_step_count or second.done())
            assert workers(settled) == [training]
            os.kill(training, signal.SIGSTOP)
            os.kill(process, signal.SIGKILL)
            wait_for(lambda: instance.get_run_by_id(first.run_id).is_finished)
            assert abandoned.end_abandoned_runs(instance) == []
            assert slots().active_run_ids == {first.run_id}, "its training still has the device"
        finally:  # also where this has failed: the second one waits
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            os.kill(training, signal.SIGCONT)

    second = Future()
    try:
        with settled.instance() as instance, ThreadPoolExecutor() as threads:
            killing = threads.submit(kill_the_first_run, instance)
            second.set_result(main(["run", "tiny"]))
            killing.result()
    finally:
        code = launched.wait(timeout=240)
    assert second.result() == 0
    assert code == FAILED, said()
    assert workers(settled) == []
    assert len(saved(settled) - before) == 1, "it has saved, though nobody hears of it"
    assert "3 of 7 assets to make" in capfd.readouterr().out


def saved(chain):
    """Returns the checkpoints of unfinished trainings that count."""
    return set(chain.store_directory.glob("work/**/COMMIT"))


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


def wait_for(condition, tell=lambda: "this took too long", timeout_s=400):
    deadline = time.monotonic() + timeout_s
    while not condition():
        told = tell()
        assert time.monotonic() < deadline, f"not within {timeout_s} s\n{told}"
        time.sleep(0.3)


def test_a_launch_that_is_cancelled_while_it_submits_leaves_no_run_and_no_process(
    chain, tmp_path, monkeypatch, capsys
):
    """In place of Dagster's command stands one that has made the run, and never comes back."""
    run_id = "7" * 8 + "-0000-4000-8000-" + "0" * 12
    stub = tmp_path / "stub" / "dagster" / "__main__.py"
    stub.parent.mkdir(parents=True)
    stub.write_text("import pathlib, time\n" + f"pathlib.Path({str(tmp_path)!r}, 'up').touch()\n"
                    "time.sleep(600)\n")  # fmt: skip
    (stub.parent / "__init__.py").touch()
    own = dataclasses.replace(chain, home=tmp_path / "home", store_directory=tmp_path / "store")
    monkeypatch.setattr("pipelines.launch.uuid.uuid4", lambda: run_id)
    before = os.environ.get("PYTHONPATH", "")
    with own.instance(PYTHONPATH=f"{stub.parent.parent}:{before}") as instance:
        run = dg.DagsterRun(job_name="tiny", run_id=run_id)
        instance.add_run(run)

        def cancel():
            wait_for((tmp_path / "up").exists, timeout_s=60)
            os.kill(os.getpid(), signal.SIGTERM)

        with ThreadPoolExecutor() as threads:
            cancelling = threads.submit(cancel)
            assert main(["launch", "tiny"]) == 128 + signal.SIGTERM
            cancelling.result()
        assert instance.get_run_by_id(run_id).status == dg.DagsterRunStatus.CANCELED
    assert "was cancelled before it started" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("end", "is_retried"),
    [("killed", True), ("failed", False), ("checked", False), ("terminated", False)],
)
def test_a_daemon_retries_what_was_killed_and_nothing_else(empty_chain, end, is_retried):
    """What it asks of each run that has ended, over the shipped settings."""

    @dg.asset
    def stage():
        if end == "failed":
            raise ValueError("no such field")

    @dg.asset_check(asset=stage, blocking=True)
    def check():
        return dg.AssetCheckResult(passed=False, severity=dg.AssetCheckSeverity.ERROR)

    tags = {"dagster/max_retries": "2"}
    with empty_chain.instance() as instance:
        if end in ("killed", "terminated"):
            run_id = str(uuid.uuid4())
            status = dg.DagsterRunStatus.STARTED
            dead = {abandoned.PROCESS: f"{run_id}: {platform.node()} 999999999 1 boot"}
            run = dg.DagsterRun("job", run_id, status=status, tags=tags | dead)
            instance.add_run(run)
            if end == "terminated":
                instance.report_run_canceling(run)
            assert abandoned.end_abandoned_runs(instance) == [run_id]
        else:
            checks = [check] if end == "checked" else []
            done = dg.materialize(
                [stage, *checks], instance=instance, tags=tags, raise_on_error=False
            )
            assert not done.success
            run_id = done.run_id
        assert should_retry(instance.get_run_by_id(run_id), instance) == is_retried
