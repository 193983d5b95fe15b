"""A run whose process was killed is ended, and its slot freed when all it started are gone."""

import subprocess
import sys
import uuid

import dagster as dg
import pytest

from resources.abandoned import LAUNCHED, PROCESS, end_abandoned_runs, process_tags

POOL = "accelerator"


@pytest.fixture(scope="module")
def instance(tmp_path_factory):
    overrides = {
        "telemetry": {"enabled": False},
        "concurrency": {"pools": {"default_limit": 1, "granularity": "op"}},
    }
    home = str(tmp_path_factory.mktemp("home"))
    with dg.DagsterInstance.local_temp(home, overrides=overrides) as made:
        made.event_log_storage.initialize_concurrency_limit_to_default(POOL)
        yield made


@pytest.fixture
def process():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as started:
        yield started
        started.kill()


@pytest.fixture
def add_run(instance):
    """Adds a run that holds the slot."""
    added = []

    def add(status=dg.DagsterRunStatus.STARTED, **tags):
        run = dg.DagsterRun(job_name="tiny", run_id=str(uuid.uuid4()), status=status)
        instance.add_run(run)
        for tag, pid in tags.items():
            instance.add_run_tags(run.run_id, process_tags(run.run_id, TAGS[tag], [pid]))
        claim = instance.event_log_storage.claim_concurrency_slot(POOL, run.run_id, "train")
        assert claim.is_claimed
        added.append(run.run_id)
        return run.run_id

    yield add
    for run_id in added:
        instance.event_log_storage.free_concurrency_slots_for_run(run_id)
        instance.delete_run(run_id)


TAGS = {"process": PROCESS, "launched": LAUNCHED}


def holders(instance):
    return instance.event_log_storage.get_concurrency_info(POOL).active_run_ids


@pytest.mark.parametrize(
    ("status", "becomes"),
    [
        (dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.FAILURE),
        (dg.DagsterRunStatus.CANCELING, dg.DagsterRunStatus.CANCELED),
    ],
)
def test_a_run_is_ended_when_its_process_is_gone(instance, process, add_run, status, becomes):
    run_id = add_run(status, process=process.pid)
    assert end_abandoned_runs(instance) == []
    assert holders(instance) == {run_id}
    process.kill()
    process.wait()
    assert end_abandoned_runs(instance) == [run_id]
    assert instance.get_run_by_id(run_id).status == becomes
    assert holders(instance) == set()
    assert end_abandoned_runs(instance) == []


def test_what_a_run_has_launched_keeps_its_slot_until_it_is_gone(instance, process, add_run):
    """As when the launcher's process is killed, the code server says so, and training saves."""
    with subprocess.Popen([sys.executable, "-c", ""]) as worker:
        run_id = add_run(dg.DagsterRunStatus.FAILURE, process=worker.pid, launched=process.pid)
    assert end_abandoned_runs(instance) == []
    assert holders(instance) == {run_id}
    process.kill()
    process.wait()
    assert end_abandoned_runs(instance) == []
    assert holders(instance) == set()


def test_a_process_that_nobody_has_waited_for_is_gone(instance, process, add_run):
    run_id = add_run(process=process.pid)
    process.kill()
    while process.returncode is None and not end_abandoned_runs(instance):
        pass
    assert instance.get_run_by_id(run_id).status == dg.DagsterRunStatus.FAILURE


def test_a_run_that_has_told_of_no_process_is_left_alone(instance, add_run):
    run_id = add_run()
    assert end_abandoned_runs(instance) == []
    assert holders(instance) == {run_id}


def test_a_run_executed_again_has_not_the_process_of_the_first(instance, process, add_run):
    run_id = add_run()
    instance.add_run_tags(run_id, process_tags(str(uuid.uuid4()), PROCESS, [process.pid]))
    process.kill()
    process.wait()
    assert end_abandoned_runs(instance) == []
    assert holders(instance) == {run_id}


def test_a_process_of_another_host_is_left_to_the_daemon(instance, process, add_run):
    run_id = add_run(process=process.pid)
    before = instance.get_run_by_id(run_id).tags[PROCESS].split()
    elsewhere = " ".join([before[0], "another-host", *before[2:]])
    instance.add_run_tags(run_id, {PROCESS: elsewhere})
    process.kill()
    process.wait()
    assert end_abandoned_runs(instance) == []
    assert holders(instance) == {run_id}
