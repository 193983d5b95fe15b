"""Formats: what a record becomes in the corpus, the same from any file, and what is refused."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from modeling.data import corpus
from modeling.data.formats_config import ChatFormat, IdsFormat, SupervisedFormat, TextFormat
from modeling.data.sources import SourceError
from modeling.data.sources_config import FilesSource, ValidationConfig

ALL_TRAIN = ValidationConfig(fraction=0.0)
CHAT = ChatFormat(type="chat", context_fields=("tools",))
IDS = IdsFormat(type="ids")


def build(path, document_format, workspace, file_format="jsonl"):
    source = FilesSource(type="files", paths=(str(path),), format=file_format)
    listing = corpus.scan(source, validation=ALL_TRAIN)
    return corpus.build(source, listing, workspace, document_format=document_format)


def documents(path, document_format, workspace, file_format="jsonl"):
    build(path, document_format, workspace, file_format)
    return [(d.doc_id, d.text) for d in corpus.documents(workspace.output)]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_a_chat_is_the_same_document_from_lines_and_from_a_table(tmp_path, make_workspace):
    chats = [
        {
            "messages": [
                {"role": "user", "content": "Ünï 🎉"},
                {"role": "assistant", "content": "x"},
            ]
        },
        {"messages": [{"content": None, "role": "assistant", "name": "f"}], "tools": "[1]"},
    ]
    lines = write_lines(tmp_path / "a.jsonl", [{**chats[0], "noise": 1}, chats[1]])
    kind = pa.list_(pa.struct({"role": pa.string(), "content": pa.string(), "name": pa.string()}))
    schema = pa.schema({"tools": pa.string(), "messages": kind, "noise": pa.int8()})
    pa.parquet.write_table(pa.Table.from_pylist(chats, schema), tmp_path / "a.parquet")
    expected = [
        '{"messages":[{"content":"Ünï 🎉","role":"user"},{"content":"x","role":"assistant"}]}',
        '{"tools":"[1]","messages":[{"name":"f","role":"assistant"}]}',
    ]
    found = documents(lines, CHAT, make_workspace("lines"))
    assert found == [("a.jsonl#1", expected[0]), ("a.jsonl#2", expected[1])]
    table = documents(tmp_path / "a.parquet", CHAT, make_workspace("table"), "parquet")
    assert [text for _, text in table] == expected


def test_a_prompt_and_its_completion_become_one_document(tmp_path, make_workspace):
    path = write_lines(tmp_path / "a.jsonl", [{"q": 'say "a"', "a": "a\n", "z": 0}])
    pairs = SupervisedFormat(type="supervised", prompt_field="q", completion_field="a")
    (found,) = documents(path, pairs, make_workspace("pairs"))
    assert found == ("a.jsonl#1", '{"prompt":"say \\"a\\"","completion":"a\\n"}')


def test_ids_come_from_lines_tables_and_flat_arrays_alike(tmp_path, make_workspace):
    ids = [[5, 0, 65000], [7], [8, 9]]
    write_lines(tmp_path / "a.jsonl", [{"input_ids": row} for row in ids])
    table = pa.table({"input_ids": pa.array(ids, pa.list_(pa.uint16()))})
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    flat = np.array([5, 0, 65000, 1, 7, 1, 8, 9], np.uint16)
    flat.astype("<u2").tofile(tmp_path / "a.bin")
    np.save(tmp_path / "a.npy", flat.astype(np.int64))
    expected = ["5 0 65000", "7", "8 9"]
    for name, kind in (("jsonl", "jsonl"), ("parquet", "parquet"), ("arrow", "arrow")):
        found = documents(tmp_path / f"a.{name}", IDS, make_workspace(name), kind)
        assert [text for _, text in found] == expected
    raw = IdsFormat(type="ids", separator_id=1, dtype="uint16")
    found = documents(tmp_path / "a.bin", raw, make_workspace("bin"), "ids")
    assert found == [(f"a.bin#{i + 1}", text) for i, text in enumerate(expected)]
    saved = IdsFormat(type="ids", separator_id=1)
    found = documents(tmp_path / "a.npy", saved, make_workspace("npy"), "ids")
    assert [text for _, text in found] == expected


def test_pieces_of_a_flat_array_are_no_bounds_of_documents(tmp_path, make_workspace, monkeypatch):
    from modeling.data import flat_ids

    draw = np.random.default_rng(0)
    flat = draw.integers(0, 12, 5000).astype("<u4")
    flat.tofile(tmp_path / "a.bin")
    raw = IdsFormat(type="ids", separator_id=3, dtype="uint32")
    whole = documents(tmp_path / "a.bin", raw, make_workspace("whole"), "ids")
    monkeypatch.setattr(flat_ids, "_IDS_AT_ONCE", 7)
    assert documents(tmp_path / "a.bin", raw, make_workspace("pieces"), "ids") == whole
    assert len(whole) > 300
    joined = " 3 ".join(text for _, text in whole)
    assert [i for i in flat.tolist() if i != 3] == [int(i) for i in joined.split() if i != "3"]


@pytest.mark.parametrize(
    ("record", "document_format", "complaint"),
    [
        ({"text": "x"}, CHAT, r"no field 'messages' \(found \['text'\]\).*correct `format`"),
        ({"messages": []}, CHAT, "'messages' is list \\[\\], expected a list of messages"),
        ({"messages": "hi"}, CHAT, "'messages' is str 'hi'"),
        ({"messages": [{"role": "user"}, "hi"]}, CHAT, "message 2: expected an object"),
        ({"messages": [{"content": "hi"}]}, CHAT, "message 1: .* string `role`"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, CHAT, "half a surrogate pair"),
        ({"messages": [{"role": "u", "content": float("nan")}]}, CHAT, "JSON has no word for"),
        (
            {"prompt": "a", "completion": 3},
            SupervisedFormat(type="supervised"),
            "'completion' is int 3, expected a string",
        ),
        (
            {"prompt": "a", "completion": ""},
            SupervisedFormat(type="supervised"),
            "'completion' is empty",
        ),
        ({"input_ids": [1, "2"]}, IDS, "id 2 is str '2', not an integer"),
        ({"input_ids": [1, True]}, IDS, "id 2 is bool True"),
        ({"input_ids": [1, -2]}, IDS, "id 2 is -2, expected 0 to 4294967295"),
        ({"input_ids": [2**32]}, IDS, "id 1 is 4294967296, expected"),
        ({"input_ids": [1, 2**64]}, IDS, "id 2 is 18446744073709551616, expected"),
        ({"input_ids": [1.0]}, IDS, r"id 1 is float 1\.0, not an integer"),
        ({"input_ids": "1 2"}, IDS, "'input_ids' is str '1 2', expected a list"),
        ([1, 2], IDS, "no field 'input_ids': found a list, expected an object"),
    ],
)
def test_a_record_of_another_shape_is_named_by_its_line(
    record, document_format, complaint, tmp_path, make_workspace
):
    path = tmp_path / "a.jsonl"
    path.write_text("\n" + json.dumps(record) + "\n")
    with pytest.raises(SourceError, match=rf"a\.jsonl:2: .*{complaint}"):
        build(path, document_format, make_workspace("c"))


def npy(array) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "document_format", "complaint"),
    [
        (b"\1\0\2\0", IDS, "set `format.separator_id`"),
        (b"\1\0\2\0", IdsFormat(type="ids", separator_id=1), "no `.npy` header; set"),
        (
            b"\1\0\2",
            IdsFormat(type="ids", separator_id=1, dtype="uint16"),
            "ends within an id of 2",
        ),
        (npy(np.ones((2, 2), int)), IdsFormat(type="ids", separator_id=1), "in one dimension"),
        (npy(np.ones(2)), IdsFormat(type="ids", separator_id=1), "holds float64 of shape"),
        (
            npy(np.array([5, 1, 4, -1])),
            IdsFormat(type="ids", separator_id=1),
            "document 2: id 2 is -1",
        ),
        (
            npy(np.array([4, 2**63], np.uint64)),
            IdsFormat(type="ids", separator_id=1),
            "document 1: id 2 is 9223372036854775808, expected 0 to 4294967295",
        ),
        (
            npy(np.arange(9))[:-8],
            IdsFormat(type="ids", separator_id=1),
            "holds 8 ids, but its header says 9",
        ),
        (npy(np.ones(2, int))[:6], IdsFormat(type="ids", separator_id=1), "of version"),
        (npy(np.ones(2, int))[:9], IdsFormat(type="ids", separator_id=1), "damaged `.npy` header"),
        (b"\1\0\2\0", TextFormat(), "holds ids, but `format` is text"),
    ],
)
def test_a_damaged_or_undeclared_flat_array_is_refused(
    content, document_format, complaint, tmp_path, make_workspace
):
    path = tmp_path / "a.npy"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=rf"a\.npy[:,] .*{complaint}"):
        build(path, document_format, make_workspace("c"), "ids")


def test_texts_are_no_records(tmp_path, make_workspace):
    (tmp_path / "a.txt").write_text("plain")
    with pytest.raises(SourceError, match=r"a\.txt: holds a text, but `format` takes records"):
        build(tmp_path / "a.txt", CHAT, make_workspace("c"), "text")


def test_a_table_without_the_formats_column_is_refused(tmp_path, make_workspace):
    pa.parquet.write_table(pa.table({"text": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match=r"no column 'messages' \(found \['text'\]\)"):
        build(tmp_path / "a.parquet", CHAT, make_workspace("c"), "parquet")
