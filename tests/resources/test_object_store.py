"""The artifact store on object stores: Cloud Storage by its emulator, and memory."""

import uuid

import fsspec
import pytest

from modeling.artifacts import (
    INVENTORY,
    ArtifactStore,
    Built,
    DamagedArtifactError,
    Recipe,
    Workspace,
)

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
