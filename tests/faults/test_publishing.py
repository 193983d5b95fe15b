"""An artifact is published whole or not at all, wherever its process is killed or its disk fails.

The oracle is an artifact that nobody disturbed: whoever builds again must end with its content id,
nothing half is ever found, and a check of the whole store has nothing to say.
"""

import datetime
import errno
import itertools
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from modeling import faults
from modeling.artifacts import ArtifactStore
from modeling.collection import delete, garbage
from modeling.inventory import INVENTORY, DamagedArtifactError, verify_files
from modeling.training import checkpoint
from modeling.training.leaves import HostLeaf
from modeling.training.pins import attempt_name
from modeling.training.reading import verify
from modeling.training.remote import RemoteCheckpoints
from modeling.upkeep import check

sys.path.insert(0, str(Path(__file__).parent))
import bucket
import publisher
from catalogue import BUCKET, CATALOGUE, FILE_DAMAGES, KINDS, STORE, trial
from damage import harm
from machine import as_nobody, small_disk
from power import power_may_go, what_may_be_left

bucket.register()
KILLS = [
    (point, where)
    for point in faults.PUBLISHING
    for where in CATALOGUE["Killed with SIGKILL"][f"at `{point}`"]
]
SOAK = range(int(os.environ.get("SOAK_SEEDS", "20")))


class Publisher:
    """A process that forks others which publish."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, publisher.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def killed(self, store, kind, fault):
        order = {"store": store.url, "scratch": str(store.scratch), "kind": kind, "fault": fault}
        assert self._code(order) == -9, f"not killed at {fault}"

    def killed_sending(self, checkpoint, url, visit):
        order = {"checkpoint": str(checkpoint), "url": url, "visit": visit}
        assert self._code(order) == -9, f"not killed after file {visit}"

    def _code(self, order):
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self):
        self._process.stdin.close()
        self._process.stdout.close()
        assert self._process.wait() == 0


@pytest.fixture(scope="module")
def processes():
    made = Publisher()
    yield made
    made.close()


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The content ids of an undisturbed store, by kind."""
    store = ArtifactStore(str(tmp_path_factory.mktemp("undisturbed")))
    return {kind: publisher.publish(store, kind) for kind in KINDS}


def new_store(where, root):
    if where == STORE:
        return ArtifactStore(str(root / "store"))
    return ArtifactStore(f"bucket://{root}/bucket", scratch=root / "scratch")


def assert_whole(store, kind, content_id):
    assert publisher.publish(store, kind) == content_id
    assert (store.local(kind, content_id) / "part" / "a.txt").read_text() == kind * 100
    assert check(store) == []


@pytest.mark.parametrize(("point", "where"), KILLS)
def test_a_publisher_that_is_killed_leaves_no_trace(tmp_path, processes, expected, point, where):
    for kind in KINDS:
        store = new_store(where, tmp_path / kind)
        with trial(f"at `{point}`", where):
            processes.killed(store, kind, f"{point}@{kind}")
            is_found = store.find(publisher.recipe(kind)) is not None
            assert is_found == (point == "after-record")
            assert_whole(store, kind, expected[kind])


def made_checkpoint(directory, step):
    """Writes a step checkpoint of two arrays, without JAX."""
    path = directory / attempt_name(step, "0" * 12)
    draw, leaves = np.random.default_rng(step), []
    for name in ("up", "down"):
        array = draw.normal(size=(4, 3))
        leaves.append(HostLeaf(name, array.dtype, array.shape, None, (4, 3), {(0, 0): array}))
    checkpoint.write(path, leaves, step=step, cursor={}, config={}, files={})
    return path


def test_a_sender_killed_after_any_file_leaves_what_counts_whole(tmp_path, processes):
    """Of a checkpoint on its way to the store; it is sent again by whoever goes on."""
    older, newer = (made_checkpoint(tmp_path, step) for step in (1, 2))
    there = RemoteCheckpoints(f"bucket://{tmp_path}/bucket")
    there.send(older)
    num_files = sum(path.is_file() for path in newer.rglob("*"))
    assert num_files == 6, "two arrays, their metadata, manifest and commit"
    for visit in range(1, num_files):
        with trial("at `during-send`", BUCKET):
            processes.killed_sending(newer, there.url, visit)
            assert there.names() == [older.name]
            fetched = there.fetch(older.name, fresh(tmp_path / f"before-{visit}"))
            assert fetched == verify(older)
            there.send(newer)
            assert there.names() == [newer.name, older.name]
            fetched = there.fetch(newer.name, fresh(tmp_path / f"after-{visit}"))
            assert fetched == verify(newer)
        shutil.rmtree(tmp_path / "bucket" / newer.name)


def fresh(directory):
    directory.mkdir()
    return directory


def test_whenever_the_power_goes_what_is_on_record_is_whole(tmp_path, expected):
    store, promised = new_store(STORE, tmp_path), ["tokenizer"]
    publisher.publish(store, "tokenizer")
    with power_may_go(Path(store.root), told=lambda: tuple(promised)) as moments:
        publisher.publish(store, "raw_corpus")
        promised.append("raw_corpus")
    assert len(moments) > 10
    for number, (moment, left) in enumerate(what_may_be_left(moments)):
        with trial("power goes", STORE):
            root = left(tmp_path / str(number))
            shutil.rmtree(root / "leases", ignore_errors=True)  # nobody has survived
            found = ArtifactStore(str(root))
            for kind in ("tokenizer", "raw_corpus"):
                if found.find(publisher.recipe(kind)) is not None:
                    found.local(kind, expected[kind])  # reads every byte
                else:
                    assert kind not in moment.told
            assert_whole(found, "raw_corpus", expected["raw_corpus"])


def test_whenever_the_power_goes_while_garbage_is_deleted_what_has_a_name_is_whole(
    tmp_path, expected
):
    store = new_store(STORE, tmp_path)
    now = datetime.datetime.now(datetime.UTC)
    for kind in ("tokenizer", "raw_corpus"):
        publisher.publish(store, kind, ended=now.isoformat())
    store.set_alias("kept", expected["tokenizer"])
    later = now + datetime.timedelta(days=100)
    with power_may_go(Path(store.root), told=lambda: None) as moments:
        gone = delete(store, garbage(store, now=later, expire_records_after_days=30.0))
    assert {one.object[0] for one in gone if one.object} == {"raw_corpus"}
    assert len(moments) > 2, "the record's directory, the object's, and the end"
    for number, (_, left) in enumerate(what_may_be_left(moments)):
        with trial("power goes", STORE):
            found = ArtifactStore(str(left(tmp_path / str(number))))
            assert check(found) == [], "no record of an object, and no object, that is not whole"
            assert_whole(found, "tokenizer", expected["tokenizer"])
            assert_whole(found, "raw_corpus", expected["raw_corpus"])


@pytest.mark.slow
@pytest.mark.parametrize("seed", SOAK)
def test_publishers_killed_over_and_over_in_one_store(tmp_path, processes, expected, seed):
    """All kinds share a store, each is killed at several points in a random order."""
    draw = random.Random(seed)
    for where in (STORE, BUCKET):
        store = new_store(where, tmp_path)
        points = [point for point, at in KILLS if at == where and point != "after-record"]
        lives = list(itertools.product(points, KINDS))
        draw.shuffle(lives)
        stored = set()
        for point, kind in lives:
            if kind in stored and point in ("before-store", "during-upload"):
                continue  # it never comes there again
            stored |= {kind} if point == "before-record" else set()
            with trial(f"at `{point}`", where):
                processes.killed(store, kind, f"{point}@{kind}")
                assert store.find(publisher.recipe(kind)) is None
        for kind in KINDS:
            with trial("at `after-record`", where):
                processes.killed(store, kind, f"after-record@{kind}")
                assert_whole(store, kind, expected[kind])


@pytest.mark.parametrize("error", ["ENOSPC", "EIO", "EROFS"])
@pytest.mark.parametrize("point", [point for point, where in KILLS if where == STORE])
def test_an_error_while_publishing_is_raised_and_a_retry_is_whole(
    tmp_path, expected, monkeypatch, point, error
):
    store = new_store(STORE, tmp_path)
    with trial("I/O error at any point", STORE):
        monkeypatch.setenv(faults.VARIABLE, f"{point}@tokenizer:{error}")
        with pytest.raises(OSError, match=os.strerror(getattr(errno, error))) as raised:
            publisher.publish(store, "tokenizer")
        assert ("no space for files of tokenizer" in str(raised.value)) == (error == "ENOSPC")
        monkeypatch.delenv(faults.VARIABLE)
        assert_whole(store, "tokenizer", expected["tokenizer"])


def test_a_full_disk_is_told_and_what_was_there_is_kept(tmp_path, expected):
    with trial("full disk", STORE), small_disk(tmp_path, 64 * 1024) as (directory, fill):
        store = ArtifactStore(str(directory))
        assert_whole(store, "tokenizer", expected["tokenizer"])
        with fill(), pytest.raises(OSError, match=r"space|too large|quota"):
            publisher.publish(store, "raw_corpus")
        assert store.find(publisher.recipe("raw_corpus")) is None
        assert_whole(store, "tokenizer", expected["tokenizer"])
        assert_whole(store, "raw_corpus", expected["raw_corpus"])


def test_a_read_only_store_can_be_read_and_refuses_to_be_written(expected):
    with trial("read-only directory", STORE), as_nobody() as directory:
        store = ArtifactStore(str(directory))
        assert_whole(store, "tokenizer", expected["tokenizer"])
        made_read_only = [path for path in [directory, *directory.rglob("*")] if path.is_dir()]
        for path in made_read_only:
            path.chmod(0o555)
        assert_whole(store, "tokenizer", expected["tokenizer"])
        with pytest.raises(PermissionError, match=str(directory)):
            publisher.publish(store, "raw_corpus")
        for path in made_read_only:
            path.chmod(0o755)
        assert_whole(store, "raw_corpus", expected["raw_corpus"])


def test_a_file_that_may_not_be_read_is_named(expected):
    with trial("file that may not be read", STORE), as_nobody() as directory:
        store = ArtifactStore(str(directory))
        content_id = publisher.publish(store, "tokenizer")
        path = Path(store.object_path("tokenizer", content_id)) / "b.txt"
        path.chmod(0)
        with pytest.raises(PermissionError, match=str(path)):
            verify_files(path.parent)
        path.chmod(0o644)
        assert_whole(store, "tokenizer", expected["tokenizer"])


def test_a_clock_that_goes_backwards_deletes_nothing(tmp_path, expected):
    store = new_store(STORE, tmp_path)
    assert_whole(store, "tokenizer", expected["tokenizer"])
    lost = publisher.publish(store, "raw_corpus")
    store.filesystem.rm(store.record_path(publisher.recipe("raw_corpus").id, "exact"))
    for days in (0, -1, -4000):
        with trial("clock going backwards", STORE):
            now = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
            assert garbage(store, now=now, expire_records_after_days=1.0) == []
            for path in Path(store.object_path("raw_corpus", lost)).rglob("*"):
                os.utime(path, (now.timestamp() + 86400,) * 2)  # written in what is now the future
            assert garbage(store, now=now) == []


def test_a_listing_that_comes_late_makes_nothing_wrong(tmp_path, expected):
    store = new_store(BUCKET, tmp_path)
    publisher.publish(store, "tokenizer")
    bucket.Bucket.list_late(store.root)
    try:
        with trial("listing that comes late", BUCKET):
            content_id = publisher.publish(store, "raw_corpus")
            assert content_id == expected["raw_corpus"]
            other = ArtifactStore(store.url, scratch=tmp_path / "elsewhere")
            assert other.find(publisher.recipe("raw_corpus")) is not None
            files = other.local("raw_corpus", content_id)
            assert (files / "b.txt").read_text() == "raw_corpus"
        with trial("listing that comes late", BUCKET):
            assert garbage(store) == [], "nothing is so old that its record must be listed"
    finally:
        bucket.Bucket.late = False
    assert check(store) == []


@pytest.mark.parametrize("name", [INVENTORY, "b.txt", "part/a.txt"])
def test_a_half_copied_object_is_not_taken_for_one(tmp_path, expected, name):
    """As `cp` leaves it that was interrupted: all but one file."""
    whole = new_store(STORE, tmp_path / "whole")
    content_id = publisher.publish(whole, "tokenizer")
    with trial("half-copied directory", STORE):
        store = new_store(STORE, tmp_path / "copy")
        shutil.copytree(whole.root, store.root)
        (Path(store.object_path("tokenizer", content_id)) / name).unlink()
        assert (store.find(publisher.recipe("tokenizer")) is None) == (name == INVENTORY)
        assert any(one.path.endswith(name) for one in check(store))


def publish_in_turn(url, barrier, answers):
    barrier.wait()
    answers.put(publisher.publish(ArtifactStore(url), "tokenizer"))


def test_two_that_publish_one_recipe_end_with_one_object(tmp_path, expected):
    with trial("two at work on one directory", STORE):
        spawn = multiprocessing.get_context("spawn")
        barrier, answers = spawn.Barrier(2), spawn.Queue()
        both = [
            spawn.Process(target=publish_in_turn, args=(str(tmp_path), barrier, answers))
            for _ in range(2)
        ]
        for process in both:
            process.start()
        found = {answers.get(timeout=300) for _ in both}
        for process in both:
            process.join()
        assert found == {expected["tokenizer"]}
        assert_whole(ArtifactStore(str(tmp_path)), "tokenizer", expected["tokenizer"])


@pytest.mark.parametrize("damage", FILE_DAMAGES)
def test_each_damage_to_each_file_of_each_kind_is_named_and_never_handed_out(tmp_path, damage):
    store, older = new_store(STORE, tmp_path / "new"), new_store(STORE, tmp_path / "old")
    for kind in KINDS:
        root = Path(store.object_path(kind, publisher.publish(store, kind)))
        old = Path(older.object_path(kind, publisher.publish(older, kind, version="older ")))
        for name in ("part/a.txt", "b.txt", INVENTORY):
            shutil.copytree(root, tmp_path / "kept")
            with trial(damage, kind):
                assert check(store) == []
                assert store.local(kind, root.name) == root, "noted as verified"
                sibling = root / ("b.txt" if name == "part/a.txt" else "part/a.txt")
                harm(
                    damage, root / name, sibling=sibling, older=old / name,
                    elsewhere=tmp_path / f"of-{kind}",
                )  # fmt: skip
                named = {Path(one.path).name for one in check(store)}
                assert {Path(name).name, sibling.name if "sibling" in damage else ""} & named
                with pytest.raises(DamagedArtifactError) as told:
                    store.local(kind, root.name)
                assert f"{root}/{INVENTORY}" in str(told.value) or f"{root}: " in str(told.value)
                assert Path(name).name in str(told.value)
            shutil.rmtree(root)
            (tmp_path / "kept").rename(root)
