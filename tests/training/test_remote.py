"""Checkpoints on object stores: whole and verified there, or they do not count."""

import concurrent.futures
import logging
import sys
import threading
import time
import uuid
from pathlib import Path

import fsspec
import pytest

from modeling.artifacts import ArtifactStore, Built, Progress, Recipe, Workspace
from modeling.training import checkpoint
from modeling.training.manifest import CheckpointError
from modeling.training.pins import mark, pin, pinned, unpin
from modeling.training.reading import read_manifest
from modeling.training.remote import RemoteCheckpoints
from modeling.training.restoring import restore
from modeling.training.retention import open_checkpoints
from modeling.training.trainer import train

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
import driver
from bucket import Bucket, register
from test_checkpoint import assert_same_bits, make_state, save, save_all, save_one
from test_trainer import Recorder

register()


@pytest.fixture(params=["gs", "memory"])
def url(request) -> str:
    if request.param == "gs":
        return request.getfixturevalue("gcs") + "/store/work/checkpoints"
    return f"memory://{uuid.uuid4().hex}"


def steps_there(url):
    return [int(name[5:11]) for name in RemoteCheckpoints(url).names()]


def files_there(url, step):
    fs, root = fsspec.url_to_fs(url)
    fs.invalidate_cache()
    return fs, sorted(path for path in fs.find(root) if f"/step-{step:06d}." in path)


def test_another_machine_goes_on_from_the_newest_with_the_same_bits_and_id(url, tmp_path):
    with open_checkpoints(tmp_path / "a", keep=2, remote=url) as here:
        save_all(here, [1, 2])
        pin(url, 1, "the paper shows it")
        save_all(here, [3, 4, 5])
    assert steps_there(url) == [5, 4, 1]
    with open_checkpoints(tmp_path / "b", keep=2, remote=url) as there:
        newest = there.newest()
        assert_same_bits(restore(newest, make_state()), make_state(5))
        local = save(tmp_path / "local", make_state(5), step=5, cursor={"rows": 5})
        assert there.manifest(newest).content_id == local.content_id
        unpin(url, 1)
        save_all(there, [6])
    assert steps_there(url) == [6, 5]
    assert [read_manifest(p).step for p in sorted((tmp_path / "b").glob("step-*"))] == [5, 6]


@pytest.mark.parametrize("file", ["arrays/model.up/c.0.0", "losses.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "lose"])
def test_a_damaged_copy_is_named_passed_over_and_never_loaded(tmp_path, caplog, file, damage):
    url = f"memory://{uuid.uuid4().hex}"
    with open_checkpoints(tmp_path / "a", keep=2, remote=url) as here:
        for step in (1, 2):
            here.save(
                snapshot_of(step), step=step, cursor={}, config={},
                files={"losses.json": {"losses": [1.0]}}, done=lambda _: None,
            )  # fmt: skip
    fs, files = files_there(url, 2)
    path = next(path for path in files if path.endswith(file))
    raw = bytearray(fs.cat_file(path))
    if damage == "lose":
        fs.rm_file(path)
    else:
        raw[len(raw) // 2] ^= 1
        fs.pipe_file(path, bytes(raw) if damage == "flip" else bytes(raw[:-1]))
    with (
        caplog.at_level(logging.WARNING),
        open_checkpoints(tmp_path / "b", keep=2, remote=url) as there,
    ):
        assert there.manifest(there.newest()).step == 1
    assert "DAMAGED CHECKPOINT" in caplog.text
    assert f"{url}/{path.split('/')[-len(file.split('/')) - 1]}" in caplog.text
    assert file.replace("/c.0.0", "") in caplog.text
    assert len(list((tmp_path / "b").glob("*step-*"))) == 1


def snapshot_of(step):
    from modeling.training.leaves import snapshot

    return snapshot(make_state(step))


def test_a_damaged_local_one_comes_back_from_the_store(tmp_path, caplog):
    url = f"memory://{uuid.uuid4().hex}"
    with open_checkpoints(tmp_path, keep=2, remote=url) as here:
        save_all(here, [1, 2])
    damaged = next(tmp_path.glob("step-000002.*"))
    (damaged / "arrays/model.up/c.0.0").write_bytes(b"")
    with open_checkpoints(tmp_path, keep=2, remote=url) as here:
        assert here.manifest(here.newest()).step == 2
        assert_same_bits(restore(here.newest(), make_state()), make_state(2))
    assert "DAMAGED CHECKPOINT" in caplog.text


def test_one_that_was_cut_off_on_its_way_does_not_count(url, tmp_path, monkeypatch):
    monkeypatch.setenv("LEVANTER_FAULT", "during-send@2:EIO")
    with (
        pytest.raises(OSError, match="Input/output error"),
        open_checkpoints(tmp_path / "a", keep=2, remote=url) as here,
    ):
        save_all(here, [1, 2])
    assert files_there(url, 2)[1]
    monkeypatch.delenv("LEVANTER_FAULT")
    with open_checkpoints(tmp_path / "b", keep=2, remote=url) as there:
        assert there.manifest(there.newest()).step == 1
        save_all(there, [2])
    assert steps_there(url) == [2, 1]
    assert len({path.split("/step-")[1].split("/")[0] for path in files_there(url, 2)[1]}) == 1


def test_the_next_save_does_not_wait_until_one_is_sent(tmp_path, monkeypatch):
    """One is sent at a time: a slow store has no queue, and what is being sent stays."""
    url, may_go, begun = f"memory://{uuid.uuid4().hex}", threading.Event(), []
    send = RemoteCheckpoints.send

    def slow(self, directory):
        begun.append(directory.name)
        assert may_go.wait(60)
        assert (directory / "COMMIT").exists()
        send(self, directory)

    monkeypatch.setattr(RemoteCheckpoints, "send", slow)
    with open_checkpoints(tmp_path, keep=2, remote=url) as here:
        save_one(here, 1)
        save_one(here, 2)  # returns, although the first is not there yet
        deadline = time.monotonic() + 60
        while not any(tmp_path.glob("step-000002.*/COMMIT")):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert (steps_there(url), len(begun)) == ([], 1)
        may_go.set()
        save_one(here, 3)
    assert steps_there(url) == [3, 2]


def test_what_cannot_be_sent_is_told_at_the_next_look(tmp_path, monkeypatch):
    monkeypatch.setenv("LEVANTER_FAULT", "during-send@1:EIO")
    url, told = f"memory://{uuid.uuid4().hex}", r"Input/output error"
    at_the_end = pytest.raises(OSError, match=told)
    with at_the_end, open_checkpoints(tmp_path, keep=2, remote=url) as here:
        save_one(here, 1)
        here.wait_for_disk()
        concurrent.futures.wait([here._sending])
        with pytest.raises(OSError, match=told):
            here.raise_failure()


def test_what_arrives_as_something_else_is_refused_by_name(tmp_path, monkeypatch):
    remote = RemoteCheckpoints(f"memory://{uuid.uuid4().hex}")
    save(tmp_path / "step-000003.aaaaaaaaaaaa", make_state())
    put_file = type(remote._filesystem).put_file

    def lossy(self, source, target, **kwargs):
        put_file(self, source, target, **kwargs)
        if target.endswith("c.0.0"):
            self.pipe_file(target, self.cat_file(target)[:-1] + b"?")

    monkeypatch.setattr(type(remote._filesystem), "put_file", lossy)
    with pytest.raises(CheckpointError, match=r"memory://.*/c\.0\.0 arrived with other bytes"):
        remote.send(tmp_path / "step-000003.aaaaaaaaaaaa")
    assert remote.names() == []


def test_a_disk_that_spoils_what_is_copied_makes_it_passed_over_not_copied_for_ever(
    tmp_path, caplog
):
    url = f"memory://{uuid.uuid4().hex}"
    with open_checkpoints(tmp_path / "a", keep=2, remote=url) as here:
        save_all(here, [1, 2])

    def spoiled(path):
        if "step-000002." in path.name:
            (path / "arrays/model.up/c.0.0").write_bytes(b"")
        return restore(path, make_state())

    with open_checkpoints(tmp_path / "b", keep=2, remote=url) as there:
        path, found = there.resume(spoiled)
    assert path.name.startswith("step-000001.")
    assert_same_bits(found, make_state(1))
    assert caplog.text.count("was copied from") == 2


def test_a_pin_that_comes_while_its_remote_step_is_being_retired_is_heeded(tmp_path, monkeypatch):
    url = f"memory://{uuid.uuid4().hex}"
    with open_checkpoints(tmp_path, keep=2, remote=url) as held:
        save_all(held, [1, 2])
        rm_file = fsspec.get_filesystem_class("memory").rm_file

        def removed_and_pinned(self, path):
            rm_file(self, path)
            if path.endswith("COMMIT"):
                mark(url, 1, "just now")

        monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "rm_file", removed_and_pinned)
        save_all(held, [3])
    assert steps_there(url) == [3, 2, 1]
    assert (
        RemoteCheckpoints(url).fetch(RemoteCheckpoints(url).names()[-1], tmp_path / "b").step == 1
    )


def test_what_another_numerics_class_has_sent_is_taken_in(tmp_path, caplog):
    url = f"memory://{uuid.uuid4().hex}"
    with open_checkpoints(tmp_path / "a", keep=2, remote=f"{url}/checkpoints/aaaa") as here:
        save_all(here, [1, 2])
    with open_checkpoints(tmp_path / "b", keep=2) as there:
        others = [Progress(tmp_path / "no such"), Progress(tmp_path / "nor here", url)]
        refusals = {2: "of other rows"}
        assert there.adopt(others, lambda path, manifest: refusals.get(manifest.step))
        path, found = there.resume(lambda path: restore(path, make_state()))
    assert "is of no use here: of other rows" in caplog.text
    assert path.name.startswith("step-000001.")
    assert_same_bits(found, make_state(1))


def test_a_training_goes_on_elsewhere_and_ends_with_the_same_bits(tmp_path, monkeypatch):
    remote = f"memory://{uuid.uuid4().hex}/progress"

    def trained(machine, observer):
        space = driver.workspace(tmp_path / machine)
        space = Workspace(space.progress, space.output, remote)
        return train(driver.experiment(), driver.counting_cache(), space, observer=observer)

    monkeypatch.setenv("LEVANTER_FAULT", "before-write@6:EIO")
    with pytest.raises(OSError, match="Input/output error"):
        trained("a", Recorder())
    monkeypatch.delenv("LEVANTER_FAULT")
    observer = Recorder()
    built = trained("b", observer)
    assert observer.named("resumed") == [4]
    alone = driver.workspace(tmp_path / "alone")
    whole = train(driver.experiment(), driver.counting_cache(), alone)
    assert built.content_id == whole.content_id


def test_a_finished_build_leaves_in_the_store_what_is_pinned(tmp_path):
    url = f"memory://{uuid.uuid4().hex}"
    store, recipe = ArtifactStore(url, scratch=tmp_path), Recipe("checkpoint", 1, {"n": 1})
    stand_in = Recipe("checkpoint", 1, {"n": "not known yet"})

    def build(space):
        assert space.remote is not None
        (space.output / "x").write_text("x")
        directory = space.progress / "checkpoints"
        with open_checkpoints(directory, keep=2, remote=space.remote_path(directory)) as held:
            before = held.newest()
            save_all(held, [1, 2])
        pin(f"{space.remote}/checkpoints", 1)
        return Built("0" * 64, facts={"before": before and held.manifest(before).step})

    with store.begin(stand_in) as space:
        build(space)
    elsewhere = ArtifactStore(url, scratch=tmp_path / "elsewhere")
    made, _ = elsewhere.materialize(recipe, build, begun_as=[stand_in])
    assert made.facts == {"before": 2}
    place = f"{url}/work/{recipe.id}/exact/progress/checkpoints"
    assert (steps_there(place), list(pinned(place))) == ([1, 1], [1])
    fs, root = fsspec.url_to_fs(f"{url}/work/{stand_in.id}")
    fs.invalidate_cache()
    assert fs.find(root) == []


def test_retirement_counts_what_verifies_in_the_store_not_what_has_a_commit(tmp_path, caplog):
    url = f"memory://{uuid.uuid4().hex}"
    with open_checkpoints(tmp_path / "a", keep=2, remote=url) as here:
        save_all(here, [1, 2, 3])
    fs, files = files_there(url, 3)
    (path,) = (path for path in files if path.endswith("model.up/c.0.0"))
    fs.pipe_file(path, bytes(len(fs.cat_file(path))))
    with open_checkpoints(tmp_path / "b", keep=2, remote=url) as there:
        assert there.manifest(there.newest()).step == 2
        save_all(there, [4])
        assert steps_there(url) == [4, 3, 2], "4 and 2 are the two that are whole"
        assert "model.up/c.0.0 holds other bytes than were written" in caplog.text
        save_all(there, [5])
    assert steps_there(url) == [5, 4]


def test_what_is_beyond_the_step_that_was_sent_is_not_retired(tmp_path):
    """Another machine may have come further; there are but too many of them."""
    url = f"memory://{uuid.uuid4().hex}"
    with open_checkpoints(tmp_path / "a", keep=4, remote=url) as here:
        save_all(here, [1, 2, 5, 6, 7])
    RemoteCheckpoints(url).retire(2, 4, is_pinned=lambda step: False)
    assert steps_there(url) == [7, 6, 5]


def test_what_the_local_disk_spoils_is_not_sent(tmp_path, monkeypatch):
    url, write = f"memory://{uuid.uuid4().hex}", checkpoint.write

    def spoiled(path, *args, **how):
        manifest = write(path, *args, **how)
        (path / "arrays/model.up/c.0.0").write_bytes(bytes(8 * 4 * 4 + 4))
        return manifest

    monkeypatch.setattr(checkpoint, "write", spoiled)
    with (
        pytest.raises(CheckpointError, match=r"model\.up/c\.0\.0"),
        open_checkpoints(tmp_path, keep=2, remote=url) as here,
    ):
        save_all(here, [1])
    assert files_there(url, 1)[1] == []


def test_a_listing_that_comes_late_costs_no_checkpoint(tmp_path):
    """It lacks the commits of the newest, and still has what was removed."""
    url = f"bucket://{tmp_path}/there"
    with open_checkpoints(tmp_path / "a", keep=2, remote=url) as here:
        save_all(here, [1, 2, 3])
        fs, root = fsspec.url_to_fs(url)
        commits = [path for path in fs.find(root) if path.endswith("COMMIT")]
        kept = {path: fs.cat_file(path) for path in commits}
        for path in commits:
            fs.rm_file(path)
        Bucket.list_late(root)
        try:
            for path, content in kept.items():
                fs.pipe_file(path, content)
            save_all(here, [4])
            fs.rm_file(next(path for path in kept if "/step-000002." in path))
            save_all(here, [5])
        finally:
            Bucket.late = False
    assert steps_there(url) == [5, 4, 3]
    for name in RemoteCheckpoints(url).names():
        RemoteCheckpoints(url).verify(name)


def test_what_cannot_be_fetched_does_not_cost_the_local_copy(tmp_path):
    url = f"memory://{uuid.uuid4().hex}"
    with open_checkpoints(tmp_path, keep=2, remote=url) as here:
        save_all(here, [1, 2])
    fs, files = files_there(url, 2)
    (path,) = (path for path in files if path.endswith("model.up/c.0.0"))
    fs.pipe_file(path, b"")
    (local,) = tmp_path.glob("step-000002.*")
    raw = (local / "losses.json").read_bytes() if (local / "losses.json").exists() else None
    (local / "arrays/half/c.0").write_bytes(b"")
    with open_checkpoints(tmp_path, keep=2, remote=url) as here:
        assert here.manifest(here.newest()).step == 1
    assert (local / "arrays/model.up/c.0.0").exists(), "the only good copy of this array"
    assert raw is None or (local / "losses.json").read_bytes() == raw


@pytest.mark.parametrize("where", ["here", "in the store"])
def test_a_pin_in_one_place_keeps_the_step_in_both(tmp_path, where):
    url = f"memory://{uuid.uuid4().hex}"
    with open_checkpoints(tmp_path, keep=2, remote=url) as here:
        save_all(here, [1, 2])
        pin(tmp_path if where == "here" else url, 1)
        save_all(here, [3, 4])
    assert steps_there(url) == [4, 3, 1]
    assert sorted(read_manifest(path).step for path in tmp_path.glob("step-*")) == [1, 3, 4]


def test_what_was_pinned_by_hand_outlives_a_run_that_begins_anew(tmp_path):
    url, directory = f"memory://{uuid.uuid4().hex}", tmp_path / "class"
    with open_checkpoints(directory, keep=2, remote=url) as here:
        save_all(here, [1, 2])
        pin(directory, 1)
        mark(url, 2, "trainer.keep")
        here.clear()
        assert here.newest() is None
        assert (steps_there(url), pinned(url), pinned(directory)) == ([], {}, {})
    assert steps_there(f"{url}.refused") == [1]
    RemoteCheckpoints(f"{url}.refused").verify(RemoteCheckpoints(f"{url}.refused").names()[0])
    (kept,) = (tmp_path / "class.refused").glob("step-*")
    assert_same_bits(restore(kept, make_state()), make_state(1))
    assert list(pinned(f"{url}.refused")) == list(pinned(tmp_path / "class.refused")) == [1]
