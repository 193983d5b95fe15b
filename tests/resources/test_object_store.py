"""The artifact store on object stores: Cloud Storage by its emulator, and memory."""

import datetime
import multiprocessing
import uuid
from pathlib import Path

import fsspec
import pytest

from modeling.artifacts import ArtifactStore, Built, Recipe, ReproducibilityError, Workspace
from modeling.collection import delete, garbage
from modeling.inventory import INVENTORY, DamagedArtifactError
from modeling.upkeep import check

RECIPE = Recipe("raw_corpus", 1, {"n": 1})
CONTENT = "0" * 64


def build(workspace: Workspace) -> Built:
    (workspace.output / "part").mkdir()
    (workspace.output / "part" / "a.bin").write_bytes(b"a" * 1000)
    (workspace.output / "b.txt").write_text("b")
    return Built(CONTENT, facts={"size": 1001})


@pytest.fixture(params=["gs", "memory"])
def url(request) -> str:
    if request.param == "gs":
        return request.getfixturevalue("gcs") + "/store"
    return f"memory://{uuid.uuid4().hex}"


def test_an_artifact_goes_there_and_comes_back(url, tmp_path):
    made, is_new = ArtifactStore(url, scratch=tmp_path / "a").materialize(RECIPE, build)
    assert is_new
    elsewhere = ArtifactStore(url, scratch=tmp_path / "b")
    found, is_new = elsewhere.materialize(RECIPE, build)
    assert (found, is_new) == (made, False)
    files = elsewhere.local("raw_corpus", CONTENT)
    assert (files / "part" / "a.bin").read_bytes() == b"a" * 1000
    assert (files / "b.txt").read_text() == "b"
    assert [record["content_id"] for record in elsewhere.records()] == [CONTENT]


def test_a_damaged_copy_is_found_and_copied_again(url, tmp_path, caplog):
    store = ArtifactStore(url, scratch=tmp_path)
    store.materialize(RECIPE, build)
    files = store.local("raw_corpus", CONTENT)
    for name, damage in [("b.txt", b"B"), ("part/a.bin", b"a" * 999), (INVENTORY, b"{}")]:
        (files / name).write_bytes(damage)
        assert store.local("raw_corpus", CONTENT) == files
        assert (files / "b.txt").read_bytes() == b"b"
        assert (files / "part" / "a.bin").read_bytes() == b"a" * 1000
        assert "copied again" in caplog.text
        assert name in caplog.text
        caplog.clear()
    (files / "part" / "a.bin").unlink()
    assert (store.local("raw_corpus", CONTENT) / "part" / "a.bin").exists()
    assert "part/a.bin is missing" in caplog.text
    assert [path.name for path in files.parent.iterdir()] == [CONTENT]


def test_a_damaged_object_is_an_error_and_leaves_no_copy(url, tmp_path):
    ArtifactStore(url, scratch=tmp_path / "a").materialize(RECIPE, build)
    store = ArtifactStore(url, scratch=tmp_path / "b")
    damaged = f"{store.files_path('raw_corpus', CONTENT)}/part/a.bin"
    store.filesystem.pipe_file(damaged, b"a" * 999 + b"b")
    with pytest.raises(
        DamagedArtifactError, match=r"object stored at .*part/a\.bin has other bytes"
    ):
        store.local("raw_corpus", CONTENT)
    assert list((tmp_path / "b").rglob("*.bin")) == []
    store.filesystem.rm_file(damaged)
    with pytest.raises(DamagedArtifactError, match=r"part/a\.bin is missing"):
        store.local("raw_corpus", CONTENT)


def test_an_upload_that_was_cut_off_is_no_artifact(url, tmp_path):
    ArtifactStore(url, scratch=tmp_path / "a").materialize(RECIPE, build)
    fs, root = fsspec.url_to_fs(url)
    fs.rm_file(f"{root}/objects/raw_corpus/{CONTENT}/{INVENTORY}")
    store = ArtifactStore(url, scratch=tmp_path / "b")
    assert store.find(RECIPE) is None
    _, is_new = store.materialize(RECIPE, build)
    assert is_new
    assert (store.local("raw_corpus", CONTENT) / "b.txt").exists()


class Interrupted:
    """A file system that lets something else happen just before its n-th write."""

    def __init__(self, filesystem, count, event):
        self._filesystem, self._count, self._event = filesystem, count, event
        self.has_happened = False

    def __getattr__(self, name):
        method = getattr(self._filesystem, name)
        if name not in ("put_file", "pipe_file"):
            return method

        def write(*arguments, **options):
            self._count -= 1
            if self._count == 0:
                self._event()
                self.has_happened = True
            return method(*arguments, **options)

        return write


def publishes(store, directory, text, content=CONTENT):
    """Publishes two files, of which the content id does not tell all."""
    directory.mkdir()
    (directory / "a.txt").write_text(text)
    (directory / "b.txt").write_text(text * 2)
    return store.publish(RECIPE, directory, Built(content, facts={"text": text}))


def test_of_two_publishers_one_is_first_wherever_the_other_stands(url, tmp_path):
    """Two objects of one content may differ in bytes that are no part of it; none is of both."""
    for count in range(1, 20):
        here = ArtifactStore(f"{url}/{count}", scratch=tmp_path / f"a{count}")
        there = ArtifactStore(f"{url}/{count}", scratch=tmp_path / f"b{count}")
        made = []
        here.filesystem = Interrupted(
            here.filesystem,
            count,
            lambda there=there, made=made, count=count: made.append(
                publishes(there, tmp_path / f"there-{count}", "there")
            ),
        )
        made.append(publishes(here, tmp_path / f"here-{count}", "here"))
        if not here.filesystem.has_happened:
            break
        assert made == [there.find(RECIPE)] * 2
        assert check(there) == []
        files = there.local("raw_corpus", CONTENT)
        text = "here" if count == 4 else "there"
        assert [(files / f"{name}.txt").read_text() for name in "ab"] == [text, text * 2]
    assert count == 5, "before each of two files, the inventory and the record"


def test_a_reader_sees_nothing_of_what_is_being_published_or_all(url, tmp_path):
    seen = []
    for count in range(1, 5):
        place = f"{url}/read-{count}"
        reader = ArtifactStore(place, scratch=tmp_path / f"b{count}")
        reader.content_ids("raw_corpus")  # what a listing has shown is not remembered

        def look(reader=reader):
            seen.append((reader.find(RECIPE), reader.content_ids("raw_corpus")))

        writer = ArtifactStore(place, scratch=tmp_path / f"a{count}")
        writer.filesystem = Interrupted(writer.filesystem, count, look)
        made = publishes(writer, tmp_path / f"output-{count}", "text")
        assert reader.find(RECIPE) == made
        assert (reader.local("raw_corpus", CONTENT) / "a.txt").read_text() == "text"
    assert seen == [(None, [])] * 3 + [(None, [CONTENT])], "the record is last"


def test_other_content_is_refused_also_by_who_was_not_told_before(url, tmp_path):
    here = ArtifactStore(f"{url}/race", scratch=tmp_path / "a")
    there = ArtifactStore(f"{url}/race", scratch=tmp_path / "b")
    here.filesystem = Interrupted(
        here.filesystem, 4, lambda: publishes(there, tmp_path / "there", "there")
    )
    with pytest.raises(ReproducibilityError, match="Nothing was overwritten"):
        publishes(here, tmp_path / "here", "here", content="1" * 64)
    assert there.find(RECIPE).content_id == CONTENT
    assert check(there) == []


def test_what_a_killed_publisher_has_uploaded_is_garbage(url, tmp_path):
    def die():
        raise KeyboardInterrupt

    dying = ArtifactStore(f"{url}/dies", scratch=tmp_path / "a")
    dying.filesystem = Interrupted(dying.filesystem, 2, die)
    with pytest.raises(KeyboardInterrupt):
        publishes(dying, tmp_path / "dying", "one")
    store = ArtifactStore(f"{url}/dies", scratch=tmp_path / "b")
    assert store.find(RECIPE) is None
    publishes(store, tmp_path / "next", "two")
    assert check(store) == []
    assert garbage(store) == [], "it may be on its way still"
    found = garbage(store, now=datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=2))
    assert [(one.num_bytes, one.why) for one in found] == [(3, "another upload was published")]
    delete(store, found)
    assert (store.local("raw_corpus", CONTENT) / "a.txt").read_text() == "two"
    assert check(store) == []


def publish_at_once(url, directory, text, start):
    store = ArtifactStore(url, scratch=Path(directory))
    start.wait(120)
    publishes(store, Path(directory) / "output", text)


def test_processes_that_publish_at_once_end_with_one_object(gcs, tmp_path):
    spawn = multiprocessing.get_context("spawn")
    start, racers = spawn.Barrier(2), []
    for name in "ab":
        (tmp_path / name).mkdir()
        arguments = (f"{gcs}/store", str(tmp_path / name), name, start)
        racers.append(spawn.Process(target=publish_at_once, args=arguments))
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(120)
    assert [racer.exitcode for racer in racers] == [0, 0]
    store = ArtifactStore(f"{gcs}/store", scratch=tmp_path)
    assert check(store) == []
    text = store.find(RECIPE).facts["text"]
    files = store.local("raw_corpus", CONTENT)
    # Who was first with the object may not have been with the record: they are of one content.
    assert (files / "b.txt").read_text() == (files / "a.txt").read_text() * 2
    assert {text, (files / "a.txt").read_text()} <= set("ab")
