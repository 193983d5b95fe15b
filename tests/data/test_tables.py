"""Tables in pieces of few bytes: all rows, in order, and never many bytes at once."""

import io

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from modeling.data import tables

TEXTS = ["x" * (i * 37 % 400) for i in range(300)]
COLUMNS = {
    "text": pa.array(TEXTS),
    "large": pa.array([None, *TEXTS[1:]], pa.large_string()),
    "dictionary": pa.array(TEXTS).dictionary_encode(),
    "messages": pa.array([[{"role": "u", "content": text}] * (i % 3)
                          for i, text in enumerate(TEXTS)]),
    "ids": pa.array([list(range(i % 50)) for i in range(300)]),
}  # fmt: skip
BATCH = pa.record_batch(COLUMNS)


def value_bytes(value) -> int:
    match value:
        case str():
            return len(value)
        case list():
            return sum(map(value_bytes, value))
        case dict():
            return sum(map(value_bytes, value.values()))
        case _:
            return 0 if value is None else 8


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize(("start", "count"), [(0, 300), (17, 200), (299, 1), (5, 0)])
def test_pieces_are_all_rows_and_few_bytes(name, start, count, monkeypatch):
    monkeypatch.setattr(tables, "_BYTES_AT_ONCE", 1000)
    monkeypatch.setattr(tables, "ROWS_AT_ONCE", 20)
    batch = BATCH.select([name]).slice(start, count)
    pieces = list(tables.bounded(batch))
    rows = [row for piece in pieces for row in piece.to_pylist()]
    assert rows == BATCH.select([name]).to_pylist()[start : start + count]
    for piece, after in zip(pieces, [*pieces, None][1:], strict=True):
        held = sum(map(value_bytes, piece.column(0).to_pylist()))
        assert held <= 1000 or piece.num_rows == 1
        if after is not None and piece.num_rows < 20:
            assert held + value_bytes(after.column(0)[0].as_py()) > 1000


def test_rows_of_a_type_of_unknown_size_come_one_by_one():
    run_ends = pa.RunEndEncodedArray.from_arrays(pa.array([3], pa.int32()), pa.array(["x"]))
    pieces = list(tables.bounded(pa.record_batch({"text": run_ends})))
    assert [piece.num_rows for piece in pieces] == [1, 1, 1]


@pytest.mark.parametrize("compression", [None, "zstd", "lz4"])
@pytest.mark.parametrize("new", [pa.ipc.new_file, pa.ipc.new_stream])
def test_a_file_says_its_bytes_in_memory_before_they_are_there(new, compression):
    stream = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with new(stream, BATCH.schema, options=options) as writer:
        writer.write_batch(BATCH)
        writer.write_batch(BATCH)
    plain = io.BytesIO()
    with pa.ipc.new_stream(plain, BATCH.schema) as writer:
        writer.write_batch(BATCH)
        writer.write_batch(BATCH)
    told = tables.inflated_bytes(stream)
    assert stream.tell() == 0
    assert told <= len(plain.getvalue()) < told + 10_000
    if compression is not None:
        assert len(stream.getvalue()) < told / 2


@pytest.mark.parametrize("new", [pa.ipc.new_file, pa.ipc.new_stream])
def test_damaged_messages_are_told(new):
    stream = io.BytesIO()
    with new(stream, BATCH.schema) as writer:
        writer.write_batch(BATCH)
    whole = stream.getvalue()
    draw = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole[: draw.integers(8, len(whole))])
        for place in draw.integers(6, len(damaged), 8):
            damaged[place] = draw.integers(256)
        try:
            assert tables.inflated_bytes(io.BytesIO(damaged)) >= 0
        except EOFError as error:
            assert "messages are damaged" in str(error)  # noqa: PT017


def test_of_a_parquet_file_as_many_rows_are_decoded_as_are_few_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_BYTES_AT_ONCE", 100_000)
    path = tmp_path / "t"
    groups = {
        "repeated": ["x" * 30_000] * 50,  # a dictionary of one: three at a time
        "short": [f"text {i}" for i in range(900)],
        "long": [f"{i}" * 9_000 for i in range(1000, 1020)],  # 36 kB each, 720 kB in all
    }
    with parquet.ParquetWriter(path, pa.schema([("text", pa.string())])) as writer:
        for texts in groups.values():
            writer.write_table(pa.table({"text": texts}))
    with path.open("rb") as handle, path.open("rb") as headers:
        opened = parquet.ParquetFile(handle)
        batches = list(tables.parquet_batches(opened, headers, ["text"]))
    found = [text for batch in batches for text in batch.column("text").to_pylist()]
    assert found == [text for texts in groups.values() for text in texts]
    assert all(batch.nbytes <= 110_000 for batch in batches)
    assert len(batches) < 150
