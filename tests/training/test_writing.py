"""Chunks are written as TensorStore writes them, digested on the way, and told apart when lost."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import operator
import os
import re
from pathlib import Path
from typing import Any

import google_crc32c
import ml_dtypes
import numpy as np
import pytest
import tensorstore

from modeling.training import manifest, reading, writing
from modeling.training.checkpoint import Writers, write
from modeling.training.leaves import HostLeaf
from modeling.training.manifest import CheckpointError, DamagedCheckpointError
from modeling.training.reading import read_leaf, read_manifest, verify
from modeling.training.retention import open_checkpoints

WITH: dict[str, Any] = {"step": 1, "cursor": {}, "config": {}, "files": {}}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Pieces that end within rows, and within numbers."""
    for module in (manifest, reading, writing):
        monkeypatch.setattr(module, "PIECE_BYTES", 50)


def leaf_of(path, whole, chunk_shape):
    starts = itertools.product(
        *(range(0, n, max(m, 1)) for n, m in zip(whole.shape, chunk_shape, strict=True))
    )
    chunks = {
        start: np.ascontiguousarray(whole[manifest.cells(start, chunk_shape)]) for start in starts
    }
    return HostLeaf(path, whole.dtype, whole.shape, None, chunk_shape, chunks)


def numbers(shape, dtype):
    return np.random.default_rng(0).integers(0, 2, shape).astype(dtype)


ARRAYS = {
    "one chunk": (numbers((6, 16), np.float32), (6, 16)),
    "rows": (np.arange(96, dtype=np.int32).reshape(6, 16), (2, 16)),
    "blocks": (np.arange(192, dtype=np.float64).reshape(8, 4, 6), (4, 2, 3)),
    "long rows": (np.arange(200, dtype=np.uint16).reshape(2, 100), (1, 50)),
    "a number": (numbers((), np.uint32), ()),
    "none": (numbers((0, 3), np.float32), (0, 3)),
    "zeros": (np.zeros((4, 4), np.float32), (2, 4)),
    "half": (np.linspace(-1, 1, 40).astype(ml_dtypes.bfloat16), (20,)),
    "truths": (numbers((5, 5), np.bool_), (5, 5)),
    "complex": (np.arange(12, dtype=np.complex64) * 1j, (4,)),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_files_are_those_that_tensorstore_writes_and_digests_those_of_memory(tmp_path, name):
    whole, chunk_shape = ARRAYS[name]
    leaf = leaf_of("leaf", whole, chunk_shape)
    (record,) = write(tmp_path / "ours", [leaf], **WITH).leaves
    assert record.sha256 == hashlib.sha256(whole.tobytes()).hexdigest()
    at = {"driver": "file", "path": f"{tmp_path}/theirs/"}
    spec = writing._spec(leaf.shape, leaf.chunk_shape, leaf.dtype.name) | {
        "kvstore": at,
        "store_data_equal_to_fill_value": True,
    }
    tensorstore.open(spec, create=True).result().write(whole).result()
    ours, theirs = tmp_path / "ours" / "arrays" / "leaf", tmp_path / "theirs"
    assert {path.name: path.read_bytes() for path in ours.iterdir()} == {
        path.name: path.read_bytes() for path in theirs.iterdir()
    }
    read = tensorstore.open({"driver": "zarr3", "kvstore": f"file://{ours}/"}).result()
    assert read.read().result().tobytes() == whole.tobytes()
    verify(tmp_path / "ours")
    assert read_leaf(tmp_path / "ours", record).tobytes() == whole.tobytes()


def test_what_zarr_has_no_name_for_is_refused(tmp_path):
    leaf = leaf_of("leaf", np.zeros(3, "datetime64[s]"), (3,))
    with pytest.raises(ValueError, match="datetime64"):
        write(tmp_path / "c", [leaf], **WITH)
    assert not (tmp_path / "c" / "COMMIT").exists()


def test_an_error_names_the_file_and_ends_all_threads(tmp_path):
    leaves = [leaf_of(f"leaf{n}", np.arange(n + 1.0), (n + 1,)) for n in range(9)]
    # What is in the way is a file that is there already.
    (tmp_path / "c" / "arrays" / "leaf7").mkdir(parents=True)
    (tmp_path / "c" / "arrays" / "leaf7" / "c.0").touch()
    with pytest.raises(FileExistsError, match=r"leaf7/c\.0"):
        reading.in_threads(lambda leaf: writing.write_chunk(tmp_path / "c", leaf, (0,)), leaves[7:])


TWO = {"rows": ARRAYS["rows"], "half": ARRAYS["half"], "zeros": ARRAYS["zeros"]}
LOSSES = {"losses.json": {"losses": [2.5, 2.25]}}


def leaves():
    return [leaf_of(path, whole, chunk_shape) for path, (whole, chunk_shape) in TWO.items()]


def recorded(content, path=()):
    """Yields where in a manifest a digest or a size is."""
    pairs = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in pairs:
        if isinstance(value, dict | list):
            yield from recorded(value, (*path, key))
        elif key in ("sha256", "crc32c", "size"):
            yield (*path, key)


def read_array(directory, number):
    return read_leaf(directory, read_manifest(directory).leaves[number])


def test_every_digest_and_size_is_compared_to_its_last_digit(tmp_path):
    """What was recorded is changed where a comparison of a part would not see it."""
    directory = tmp_path / "c"
    write(directory, leaves(), **WITH | {"files": LOSSES})
    raw = (directory / "manifest.json").read_text()
    places = list(recorded(json.loads(raw)))
    assert len(places) == 3 * (1 + 2) + 7 * 3 + 2, "arrays, metadata, chunks, a file"
    for place in places:
        content = json.loads(raw)
        *above, key = place
        record = functools.reduce(operator.getitem, above, content)
        old = record[key]
        record[key] = old + 1 if key == "size" else f"{old[:-1]}{'10'[old[-1] == '1']}"
        (directory / "manifest.json").write_text(json.dumps(content))
        digest = hashlib.sha256((directory / "manifest.json").read_bytes()).hexdigest()
        (directory / "COMMIT").write_text(f"{digest}\n")
        named = re.escape(record.get("file", record)["path"])
        is_of_array = place[0] == "leaves" and place[2:] == ("sha256",)
        with pytest.raises(DamagedCheckpointError, match=named):
            read_array(directory, place[1]) if is_of_array else verify(directory)
    (directory / "manifest.json").write_text(raw)
    digest = hashlib.sha256(raw.encode()).hexdigest()
    (directory / "COMMIT").write_text(f"{digest[:-1]}{'10'[digest[-1] == '1']}\n")
    with pytest.raises(DamagedCheckpointError, match="COMMIT promises"):
        verify(directory)


def other_end(raw):
    return raw[:-1] + b"?"


def other_values_of_the_same_checksum(raw):
    body, trailer = raw[:-4], raw[-4:]
    begin = bytes([body[0] ^ 1]) + body[1:-4]
    # A CRC is linear: its last four bytes make up for whatever came before.
    change = google_crc32c.value(body[:-4]) ^ google_crc32c.value(begin)
    forged = begin + (int.from_bytes(body[-4:], "little") ^ change).to_bytes(4, "little")
    assert forged != body
    assert google_crc32c.value(forged) == google_crc32c.value(body)
    return forged + trailer


@contextlib.contextmanager
def spoiling(monkeypatch, name, spoiled=other_end):
    """A disk that says that it has written a file, and has written another."""
    sync = os.fsync

    def spoiling_sync(descriptor):
        sync(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.is_file() and name in path.name:
            path.write_bytes(spoiled(path.read_bytes()))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", spoiling_sync)
        yield


@pytest.mark.parametrize(
    "name", ["c.0", "c.1.0", "zarr.json", "losses.json", "manifest.json", "COMMIT"]
)
def test_a_save_that_the_disk_spoils_is_refused_by_the_files_name(tmp_path, monkeypatch, name):
    done = []
    how = WITH | {"files": LOSSES, "done": done.append}
    with open_checkpoints(tmp_path, keep=2) as held:
        held.save(leaves(), **how)
        held.wait()
        with spoiling(monkeypatch, name):
            held.save(leaves(), **how | {"step": 2})
            with pytest.raises(CheckpointError, match=re.escape(name)):
                held.wait()
    with open_checkpoints(tmp_path, keep=2) as held:
        assert held.newest() == done[0]
    assert len(done) == 1, "a damaged checkpoint is not promised"


def test_what_is_read_back_after_a_save_is_compared_with_memory_not_by_checksum_alone(
    tmp_path, monkeypatch
):
    with (
        pytest.raises(CheckpointError, match=r"rows/c\.1\.0 holds other values"),
        spoiling(monkeypatch, "c.1.0", other_values_of_the_same_checksum),
        open_checkpoints(tmp_path, keep=2) as held,
    ):
        held.save(leaves(), **WITH, done=lambda path: None)


def test_a_chunk_of_another_process_that_the_disk_spoils_is_refused_by_name(tmp_path, monkeypatch):
    """The digest of an array that several hold is of what they held, not of what is on disk."""
    whole = np.arange(96, dtype=np.int32).reshape(6, 16)
    parts = []
    for starts in ([(0, 0), (2, 0)], [(4, 0)]):
        leaf = leaf_of("rows", whole, (2, 16))
        chunks = {start: leaf.chunks[start] for start in starts}
        parts.append(dataclasses.replace(leaf, chunks=chunks))

    def one(index, directory):
        return write(directory, [parts[index]], **WITH, writers=Writers(index, 2))

    with concurrent.futures.ThreadPoolExecutor(1) as other:
        second = other.submit(one, 1, tmp_path / "whole")
        manifest_of_two = one(0, tmp_path / "whole")
        assert second.result() == manifest_of_two == verify(tmp_path / "whole")
        assert manifest_of_two.leaves[0].sha256 == hashlib.sha256(whole.tobytes()).hexdigest()
        with spoiling(monkeypatch, "c.2.0"):
            second = other.submit(one, 1, tmp_path / "spoiled")
            with pytest.raises(DamagedCheckpointError, match=r"c\.2\.0"):
                one(0, tmp_path / "spoiled")
            (tmp_path / "spoiled" / "COMMIT").touch()  # ends the other's waiting
            assert second.exception() is not None
