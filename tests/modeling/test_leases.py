"""Builders of one recipe wait for each other and take over from the dead, on one host and many.

Another host is another `scratch`: what two hosts have in common is the store alone.
"""

import contextlib
import dataclasses
import json
import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
import uuid
from pathlib import Path

import pytest

from modeling import leases
from modeling.artifacts import EXACT, ArtifactStore, Built, Recipe, Workspace
from modeling.canonical import digest
from modeling.leases import Holder, Terms, Watch, holder_of
from modeling.notes import Note
from modeling.upkeep import check

SPAWN = multiprocessing.get_context("spawn")
RECIPE = Recipe("tokenizer", 1, {"text": "a"})
PATIENCE_S = 120.0
FOR_EVER = Terms(renew_s=0.05, expire_s=1e9, poll_s=0.01)
SOON = Terms(renew_s=0.05, expire_s=0.5, poll_s=0.01)


def build(workspace: Workspace) -> Built:
    (workspace.output / "text.txt").write_text("a")
    return Built(digest("test", "a"))


def must_not_run(workspace: Workspace) -> Built:
    raise AssertionError("another process has built this")


def build_when_told(url: str, scratch: str, go: str) -> None:
    """A builder in a process of its own: commits something, and ends once `go` is there."""

    def slowly(workspace: Workspace) -> Built:
        (workspace.progress / "shard-0").write_text("done")
        wait_until(Path(go).exists)
        return build(workspace)

    ArtifactStore(url, scratch=Path(scratch), terms=FOR_EVER).materialize(RECIPE, slowly)


def wait_until(is_so) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def lease_in(store: ArtifactStore) -> Note:
    return Note(store.filesystem, f"{store.root}/leases/{RECIPE.id}/{EXACT}.json")


@dataclasses.dataclass
class Builder:
    process: multiprocessing.Process
    store: ArtifactStore
    go: Path

    def wait_for_beats(self, count: int) -> Holder:
        def beats() -> bool:
            assert self.process.is_alive()
            found = holder_of(lease_in(self.store))
            return found is not None and found.beat >= count

        wait_until(beats)
        found = holder_of(lease_in(self.store))
        assert found is not None
        return found

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()


@pytest.fixture(params=["one host", "two hosts"])
def url(request, tmp_path):
    """A store on a disk, whose builders share a work directory, and a bucket, where they do not."""
    return (
        str(tmp_path / "store") if request.param == "one host" else request.getfixturevalue("gcs")
    )


@pytest.fixture
def builder(url, tmp_path):
    """Another process that is building the recipe."""
    go, scratch = tmp_path / "go", tmp_path / "there"
    process = SPAWN.Process(target=build_when_told, args=(url, str(scratch), str(go)))
    process.start()
    try:
        yield Builder(process, ArtifactStore(url, scratch=scratch), go)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        process.join()


def test_a_second_builder_is_told_who_builds_and_takes_what_comes_of_it(url, builder, tmp_path):
    holder = builder.wait_for_beats(1)
    assert (holder.host, holder.pid) == (socket.gethostname(), builder.process.pid)
    assert holder.doing == "4 bytes committed, last shard-0"
    told = []

    def hear(said):
        told.append(str(said))
        builder.go.touch()

    store = ArtifactStore(url, scratch=tmp_path / "here", terms=FOR_EVER)
    _, is_new = store.materialize(RECIPE, must_not_run, report=hear)
    assert not is_new
    assert f"process {builder.process.pid} on {socket.gethostname()}, since 20" in told[0]
    builder.process.join(PATIENCE_S)
    assert builder.process.exitcode == 0
    wait_until(lambda: lease_in(store).read() is None)
    assert check(store) == []


def test_what_a_killed_builder_held_is_taken_over(url, builder, tmp_path):
    """On its own host at once; elsewhere, where it may just be slow, when it has been silent."""
    builder.wait_for_beats(1)
    builder.kill()
    is_one_host = "://" not in url
    terms = FOR_EVER if is_one_host else SOON
    store, told = ArtifactStore(url, scratch=tmp_path / "here", terms=terms), []

    def go_on(workspace: Workspace) -> Built:
        assert (workspace.progress / "shard-0").exists() == is_one_host
        return build(workspace)

    _, is_new = store.materialize(RECIPE, go_on, report=lambda said: told.append(str(said)))
    assert is_new
    assert f"process {builder.process.pid}" in told[-1]
    assert told[-1].endswith("it has died." if is_one_host else "it has fallen silent.")
    assert lease_in(store).read() is None


def test_a_lease_of_another_host_is_not_taken_for_a_dead_neighbours(tmp_path):
    """Locks of a network file system may not reach other hosts: a free one proves nothing."""
    store, told = ArtifactStore(str(tmp_path), terms=SOON), []
    elsewhere = Holder(uuid.uuid4().hex, "elsewhere", 7, "2001-01-01T00:00:00+00:00", 0, "")
    lock = tmp_path / "work" / RECIPE.id / f"{EXACT}.lock"
    lock.parent.mkdir(parents=True)
    lock.write_text(elsewhere.id)
    lease_in(store).create(json.dumps(dataclasses.asdict(elsewhere)).encode())
    _, is_new = store.materialize(RECIPE, build, report=lambda said: told.append(str(said)))
    assert is_new
    assert told[0].startswith("Waiting")
    assert told[-1].endswith("it has fallen silent.")


def test_who_is_overtaken_goes_on_and_both_have_the_same(tmp_path, caplog):
    url = f"memory://{uuid.uuid4().hex}"
    stores = [ArtifactStore(url, scratch=tmp_path / name, terms=SOON) for name in "ab"]
    is_building, may_end, made = threading.Event(), threading.Event(), []

    def slowly(workspace: Workspace) -> Built:
        is_building.set()
        assert may_end.wait(PATIENCE_S)
        return build(workspace)

    def build_first() -> None:
        made.append(stores[0].materialize(RECIPE, slowly))

    first = threading.Thread(target=build_first, daemon=True)
    first.start()
    assert is_building.wait(PATIENCE_S)
    # As by somebody to whom the first one has seemed silent for long enough.
    other = Holder(uuid.uuid4().hex, "elsewhere", 7, "2001-01-01T00:00:00+00:00", 0, "")
    lease_in(stores[1]).replace(json.dumps(dataclasses.asdict(other)).encode())
    with caplog.at_level(logging.WARNING):
        wait_until(lambda: "also done by process 7 on elsewhere" in caplog.text)
    made.append(stores[1].materialize(RECIPE, build))
    may_end.set()
    first.join(PATIENCE_S)
    found = stores[0].find(RECIPE)
    assert [artifact for artifact, _ in made] == [found, found]
    assert [is_new for _, is_new in made] == [True, True]
    assert check(stores[0]) == []


def test_a_lease_expires_by_what_was_seen_and_not_by_what_it_says():
    now = 1000.0
    watch = Watch(60.0, clock=lambda: now)
    holder = Holder("x", "elsewhere", 7, "1970-01-01T00:00:00+00:00", 5, "")
    assert not watch.has_expired(holder), "however old it says it is"
    now += 59
    assert not watch.has_expired(holder)
    holder = dataclasses.replace(holder, beat=6, since="2999-01-01T00:00:00+00:00")
    now += 59
    assert not watch.has_expired(holder), "it was renewed"
    now += 59
    assert not watch.has_expired(dataclasses.replace(holder, id="y")), "it is another's"
    assert not watch.has_expired(holder)
    now += 60
    assert watch.has_expired(holder)


def test_a_lease_that_cannot_be_read_expires_too(tmp_path):
    store = ArtifactStore(str(tmp_path), terms=SOON)
    lease_in(store).create(b"{")
    assert store.materialize(RECIPE, build)[1]


def test_a_store_that_fails_for_a_moment_ends_no_build(tmp_path, caplog, monkeypatch):
    store = ArtifactStore(str(tmp_path), terms=SOON)
    note, whole = lease_in(store), Note.replace

    def fail(self, content):
        if self.path == note.path:
            raise OSError("the network is unreachable")
        whole(self, content)

    def slowly(workspace: Workspace) -> Built:
        monkeypatch.setattr(leases.Note, "replace", fail)
        wait_until(lambda: "was not renewed (the network is unreachable)" in caplog.text)
        return build(workspace)

    assert store.materialize(RECIPE, slowly)[1]
    assert note.read() is None


def test_a_note_has_one_author(url):
    """Of several that create it at once, one does, and it says what he wrote."""
    store = ArtifactStore(url, scratch=Path("unused"))
    note, wrote = Note(store.filesystem, f"{store.root}/notes/one"), []
    start = threading.Barrier(8)

    def write(number: int) -> None:
        start.wait(PATIENCE_S)
        if note.create(f"author {number}".encode()):
            wrote.append(number)

    authors = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for author in authors:
        author.start()
    for author in authors:
        author.join(PATIENCE_S)
    (author,) = wrote
    assert note.read() == f"author {author}".encode()
    note.remove()
    note.remove()
    assert note.read() is None
