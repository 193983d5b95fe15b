"""An object is verified whenever it is opened; what has not changed is not read again."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem

from modeling.artifacts import ArtifactStore, Built, Recipe
from modeling.collection import delete, garbage
from modeling.inventory import INVENTORY, VERIFIED, DamagedArtifactError
from modeling.notes import json_bytes
from modeling.upkeep import check

KIND, CONTENT = "tokenizer", "0" * 64
NAMES = ["a.txt", "part/b.txt"]


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    def build(workspace):
        (workspace.output / "part").mkdir()
        for name in NAMES:
            (workspace.output / name).write_text(name)
        return Built(CONTENT)

    made = ArtifactStore(str(tmp_path))
    made.materialize(Recipe(KIND, 1, {}), build)
    return made


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The files of the object that were read, in order."""
    names: list[str] = []
    opened = LocalFileSystem.open

    def watched(self, path, *arguments, **options):
        if f"/{CONTENT}/" in str(path):
            names.append(str(path).rpartition(f"/{CONTENT}/")[2])
        return opened(self, path, *arguments, **options)

    monkeypatch.setattr(LocalFileSystem, "open", watched)
    return names


def note_of(store):
    (note,) = (store.scratch / VERIFIED).glob(f"*/{KIND}/{CONTENT}.json")
    return note


def later(path):
    """Waits until a file that is written now is told from `path` by its time."""
    probe = path.with_name("probe")
    while True:
        probe.touch()
        if probe.stat().st_ctime_ns > path.stat().st_ctime_ns:
            probe.unlink()
            return


@pytest.fixture
def opened(store, read) -> Path:
    """The object, once it was opened and noted whole."""
    later(Path(store.object_path(KIND, CONTENT), INVENTORY))
    store.local(KIND, CONTENT)
    files = store.local(KIND, CONTENT)
    read.clear()
    return files


def test_each_file_is_read_once_by_all_who_open_it_and_once_more_when_it_has_changed(
    store, opened, read
):
    assert ArtifactStore(store.url).local(KIND, CONTENT) == opened
    assert read == []
    (opened / "a.txt").touch()
    store.local(KIND, CONTENT)
    assert read == ["a.txt"]
    later(opened / "a.txt")
    for _ in range(3):
        store.local(KIND, CONTENT)
    assert read in (["a.txt"], ["a.txt"] * 2), "once more if it was touched in the same tick"


def test_a_change_that_puts_size_and_time_back_is_seen(store, opened):
    path = opened / "a.txt"
    before = path.stat()
    path.write_text("A.txt")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    for _ in range(2):
        with pytest.raises(DamagedArtifactError, match=rf"{opened}: a\.txt has other bytes.*fsck"):
            store.local(KIND, CONTENT)


def test_what_is_not_older_than_the_clock_is_not_believed(store, opened, read):
    """A clock that has gone back may give the next change the time of the last one."""
    ahead = (opened / "a.txt").stat().st_mtime + 3600
    os.utime(opened / "a.txt", (ahead, ahead))
    for _ in range(3):
        store.local(KIND, CONTENT)
    assert read == ["a.txt"] * 3
    (opened / "a.txt").unlink()
    with pytest.raises(DamagedArtifactError, match=r"a\.txt is missing"):
        store.local(KIND, CONTENT)


@pytest.mark.parametrize("left", [0, 1, 40, -2])
def test_a_note_that_was_torn_is_of_no_use_and_does_no_harm(store, opened, read, left):
    note = note_of(store)
    note.write_bytes(note.read_bytes()[:left])
    store.local(KIND, CONTENT)
    assert read == NAMES
    (opened / "part" / "b.txt").write_text("part/B.txt")
    note.write_bytes(note.read_bytes()[:left])
    with pytest.raises(DamagedArtifactError, match=r"part/b\.txt has other bytes"):
        store.local(KIND, CONTENT)


def test_a_byte_of_the_inventory_that_says_nothing_may_not_change_either(store, opened):
    path = opened / INVENTORY
    for changed in (path.read_bytes()[:-1], path.read_bytes().replace(b"  ", b" ", 1)):
        path.write_bytes(changed)
        with pytest.raises(DamagedArtifactError, match=rf"{INVENTORY} is no inventory as it was"):
            store.local(KIND, CONTENT)


def test_who_asks_for_it_as_it_is_gets_it_damaged(store, opened):
    (opened / "a.txt").unlink()
    assert store.local(KIND, CONTENT, verified=False) == opened
    with pytest.raises(DamagedArtifactError, match=r"a\.txt is missing"):
        store.local(KIND, CONTENT)


def test_the_note_goes_with_its_object(store, opened):
    assert garbage(store) == []
    store.filesystem.rm(str(opened), recursive=True)
    found = [one for one in garbage(store) if f"/{VERIFIED}/" in one.path]
    assert [(one.path, one.why) for one in found] == [(str(note_of(store)), "its object is gone")]
    delete(store, found)
    assert list((store.scratch / VERIFIED).rglob("*.json")) == []


def test_remains_without_an_inventory_are_moved_away_when_it_is_made_again(store, opened, caplog):
    (opened / INVENTORY).unlink()
    with pytest.raises(DamagedArtifactError, match=rf"{opened}/{INVENTORY}: no such object"):
        store.local(KIND, CONTENT)

    def build(workspace):
        (workspace.output / "a.txt").write_text("again")
        return Built(CONTENT)

    _, is_new = store.materialize(Recipe(KIND, 1, {}), build)
    assert is_new
    assert [path.name for path in store.local(KIND, CONTENT).glob("*.txt")] == ["a.txt"]
    assert f"{opened} has no {INVENTORY}: moved to" in caplog.text
    (moved,) = (store.scratch / "set_aside" / KIND).iterdir()
    assert sorted(path.name for path in moved.rglob("*.txt")) == ["a.txt", "b.txt"]


@pytest.mark.parametrize("name", ["a.txt", "part"])
def test_a_link_instead_of_what_was_published_is_refused(store, opened, tmp_path, name):
    (tmp_path / "elsewhere").mkdir()
    (opened / name).rename(tmp_path / "elsewhere" / name)
    (opened / name).symlink_to(tmp_path / "elsewhere" / name)
    with pytest.raises(DamagedArtifactError, match=f"{name} is a symbolic link"):
        store.local(KIND, CONTENT)
    assert any("symbolic link" in one.what for one in check(store))


def test_a_link_is_not_published(tmp_path):
    def build(workspace):
        (workspace.output / "a.txt").symlink_to("/etc/hostname")
        return Built(CONTENT)

    store = ArtifactStore(str(tmp_path))
    with pytest.raises(ValueError, match=r"a\.txt is a symbolic link\. Write a copy"):
        store.materialize(Recipe(KIND, 1, {}), build)
    assert not store.contains(KIND, CONTENT)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "part/../../x", "a\0b", "", "a//b"])
@pytest.mark.parametrize("where", ["path", "at"])
def test_names_that_lead_out_of_the_object_are_refused(tmp_path, name, where):
    store = ArtifactStore(f"memory://{tmp_path.name}", scratch=tmp_path)
    store.materialize(Recipe(KIND, 1, {}), lambda space: Built(CONTENT))
    path = f"{store.object_path(KIND, CONTENT)}/{INVENTORY}"
    inventory = json.loads(store.filesystem.cat_file(path))
    if where == "at":
        inventory["at"] = name
    else:
        inventory["files"] = [{"path": name, "size": 0, "sha256": hashlib.sha256(b"").hexdigest()}]
    store.filesystem.pipe_file(path, json_bytes(inventory))
    with pytest.raises(DamagedArtifactError, match="names no file within the directory"):
        store.local(KIND, CONTENT)
    assert any("names no file" in one.what for one in check(store))
