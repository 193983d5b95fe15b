"""Sources: patterns, file systems, compression and formats; the same documents from all."""

import bz2
import gzip
import http.server
import itertools
import json
import lzma
import os
import threading
import uuid
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from modeling.data import corpus
from modeling.data.sources import SourceError, StorageError, find_files
from modeling.data.sources_config import FilesSource, ValidationConfig
from modeling.urls import public_url

TEXTS = [f"document {i}, naïve 日本語\nsecond line\n" * (i + 1) for i in range(30)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
HALF = ValidationConfig(fraction=0.5)
ALL_TRAIN = ValidationConfig(fraction=0.0)
COMPRESSIONS = {
    ".gz": partial(gzip.compress, mtime=0),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": partial(pa.compress, codec="zstd", asbytes=True),
}


def source(*paths: object, **fields) -> FilesSource:
    return FilesSource(type="files", paths=tuple(map(str, paths)), **fields)


def logical_paths(*paths: object) -> list[str]:
    return [file.logical_path for file in find_files(source(*paths))]


def build(config, workspace, validation=HALF):
    return corpus.build(config, corpus.scan(config, validation=validation), workspace)


def texts_of(config, workspace) -> list[str]:
    build(config, workspace, ValidationConfig(fraction=0.0))
    return [document.text for document in corpus.documents(workspace.output)]


def touch(directory: Path, *names: str) -> Path:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(name)
    return directory


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_compressing_a_file_changes_the_corpus_but_no_document(suffix, tmp_path, make_workspace):
    for name in ("plain", "packed"):
        (tmp_path / name).mkdir()
    (tmp_path / "plain" / "a.jsonl").write_bytes(LINES)
    (tmp_path / "packed" / f"a.jsonl{suffix}").write_bytes(COMPRESSIONS[suffix](LINES))
    workspace = make_workspace("packed-corpus")
    plain = build(source(tmp_path / "plain", format="jsonl"), make_workspace("plain-corpus"))
    packed = build(source(tmp_path / "packed", format="jsonl"), workspace)
    assert packed.roots == plain.roots
    assert packed.content_id != plain.content_id
    assert [document.text for document in corpus.documents(workspace.output)] == TEXTS


def test_the_listing_knows_the_split_of_each_compressed_text(tmp_path, make_workspace):
    for index, text in enumerate(TEXTS):
        (tmp_path / f"{index}.txt.gz").write_bytes(gzip.compress(text.encode()))
    config, workspace = source(tmp_path), make_workspace("c")
    listing = corpus.scan(config, validation=HALF)
    corpus.build(config, listing, workspace)
    splits = {d.doc_id + ".gz": d.split for d in corpus.documents(workspace.output)}
    assert {file.logical_path: file.split for file in listing.files} == splits


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_streams_one_after_another_are_one_file(suffix, tmp_path, make_workspace):
    compress = COMPRESSIONS[suffix]
    (tmp_path / "a.txt").write_bytes(compress(b"first, ") + compress(b"second"))
    assert texts_of(source(tmp_path / "a.txt"), make_workspace("c")) == ["first, second"]


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_nothing_behind_a_stream_is_taken_for_its_end(suffix, tmp_path, make_workspace):
    whole = COMPRESSIONS[suffix](b"first")
    damaged = bytearray(COMPRESSIONS[suffix](b"second"))
    damaged[1] ^= 0xFF
    config = source(tmp_path / "a.txt")
    for index, behind in enumerate([b"noise", b"x", bytes(damaged), whole[:3], whole[:-1]]):
        (tmp_path / "a.txt").write_bytes(whole + behind)
        with pytest.raises(SourceError, match=r"a\.txt: damaged, or not text"):
            build(config, make_workspace(f"c{index}"))
    if suffix in (".gz", ".xz"):  # which may be padded
        (tmp_path / "a.txt").write_bytes(whole + b"\0" * 8 + whole + b"\0" * 4)
        assert texts_of(config, make_workspace("padded")) == ["firstfirst"]


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_a_truncated_file_is_an_error_that_names_it(suffix, tmp_path, make_workspace):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESSIONS[suffix](LINES)[:-20])
    with pytest.raises(SourceError, match=rf"a\.jsonl{suffix}: damaged, or not jsonl: ") as error:
        build(source(path, format="jsonl"), make_workspace("c"))
    assert ".." not in str(error.value)
    assert "`source.on_error: skip`" in str(error.value)


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_an_empty_file_is_an_error_compressed_or_not(suffix, tmp_path, make_workspace):
    for name, content in {"full": LINES, f"a.jsonl{suffix}": COMPRESSIONS[suffix](b"")}.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=rf"a\.jsonl{suffix}: empty once decompressed; take it"):
        build(source(tmp_path, format="jsonl"), make_workspace("c"))
    skipping = source(tmp_path, format="jsonl", on_error="skip")
    assert build(skipping, make_workspace("d")).facts["skipped"]["empty file"] == 1


def test_compression_is_known_by_content_not_by_name(tmp_path, make_workspace):
    (tmp_path / "packed.txt").write_bytes(gzip.compress(b"packed"))
    (tmp_path / "plain.txt.gz").write_bytes(b"BZh is how this text begins")
    texts = texts_of(source(tmp_path), make_workspace("c"))
    assert texts == ["packed", "BZh is how this text begins"]


def test_a_plain_and_a_compressed_file_of_one_name_are_one_too_many(tmp_path):
    directory = touch(tmp_path, "a.txt", "a.txt.gz")
    with pytest.raises(SourceError, match=r"would both be called 'a\.txt'"):
        find_files(source(directory))


def test_a_document_that_is_too_long_is_refused(tmp_path, make_workspace):
    (tmp_path / "bomb.txt").write_bytes(gzip.compress(b"a" * 100_000))
    (tmp_path / "bomb.jsonl").write_bytes(gzip.compress(b'\n{"text": "' + b"a" * 100_000 + b'"}'))
    for name, where, kind in [("bomb.txt", "", "text"), ("bomb.jsonl", ":2", "jsonl")]:
        config = source(tmp_path / name, format=kind, max_document_bytes=1000)
        with pytest.raises(SourceError, match=rf"{name}{where}: a document of over 1000 bytes"):
            build(config, make_workspace(f"{name}-corpus"))


class HalfGone:
    """An open file of a store that gives its first half and then fails."""

    closed = False

    def __init__(self, opened, size: int, error: Exception) -> None:
        self._opened, self._half, self._error = opened, size // 2, error
        self.seek, self.tell, self.close = opened.seek, opened.tell, opened.close

    def read(self, size: int = -1) -> bytes:
        if size < 0 or self.tell() + size > self._half:
            raise self._error
        return self._opened.read(size)

    def readinto(self, buffer) -> int:
        if self.tell() >= self._half:
            raise self._error
        return self._opened.readinto(memoryview(buffer)[: self._half - self.tell()])


class StoreIsGone(Exception):  # of a client that derives it from nothing of use
    pass


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), StoreIsGone("HTTP 503")])
@pytest.mark.parametrize("kind", ["jsonl", *COMPRESSIONS, "text", "parquet", "arrow"])
def test_what_a_store_does_not_give_is_never_left_out(
    kind, error, tmp_path, make_workspace, monkeypatch
):
    place = touch(tmp_path / "place", "a", "b")
    for path in place.iterdir():
        table = pa.table({"text": TEXTS * 9})
        write_table(path, "parquet" if kind == "parquet" else "arrow file", table)
        if kind not in ("parquet", "arrow"):
            path.write_bytes(COMPRESSIONS.get(kind, lambda lines: lines)(LINES * 9))
    file_format = "jsonl" if kind in COMPRESSIONS else kind
    config = source(place, format=file_format, on_error="skip", max_expansion=1000)
    listing = corpus.scan(config, validation=HALF)
    whole = Path.open

    def half_gone(path, *args, **kwargs):
        opened = whole(path, *args, **kwargs)
        return HalfGone(opened, path.stat().st_size, error) if path.name == "a" else opened

    monkeypatch.setattr(Path, "open", half_gone)
    with pytest.raises(StorageError, match=f"place/a: cannot be read: .*{error.args[-1]}"):
        corpus.build(config, listing, make_workspace("c"))
    with pytest.raises(StorageError, match=f"place/a: cannot be read: .*{error.args[-1]}"):
        corpus.scan(config, validation=HALF)


def test_a_file_that_vanishes_or_is_cut_short_meanwhile_is_never_left_out(tmp_path, make_workspace):
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        (tmp_path / name).write_bytes(gzip.compress(LINES))
    config = source(tmp_path, format="jsonl", on_error="skip")
    listing = corpus.scan(config, validation=HALF)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(LINES)[:-20])
    with pytest.raises(SourceError, match=r"b\.jsonl\.gz: changed while the corpus"):
        corpus.build(config, listing, make_workspace("c"))
    (tmp_path / "b.jsonl.gz").unlink()
    with pytest.raises(StorageError, match=r"b\.jsonl\.gz: cannot be read: .*No such file"):
        corpus.build(config, listing, make_workspace("d"))


@pytest.mark.parametrize("pattern", ["", "/**/*.txt", "/*/*.txt"])
def test_a_directory_that_cannot_be_listed_is_not_an_empty_one(pattern, tmp_path, monkeypatch):
    touch(tmp_path, "a/x.txt", "b/y.txt")
    scandir = os.scandir

    def closed(path):
        if str(path).rstrip("/").endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(StorageError, match="/b: cannot be listed: Permission denied"):
        find_files(source(f"{tmp_path}{pattern}"))


def test_names_that_cannot_be_read_are_told(tmp_path):
    (tmp_path / "x").write_text("x")
    (tmp_path / "x").rename(tmp_path / "\udcff.txt")  # the byte 0xFF
    for path, complaint in [
        (tmp_path, r"udcff\.txt': its name is not UTF-8; rename"),
        ("nothing://x", "nothing://x: no file system is known for it .*correct `source.paths`"),
        (f"{tmp_path}/a\0b", "cannot be listed: ValueError: embedded null byte"),
    ]:
        with pytest.raises(SourceError, match=complaint):
            find_files(source(path))


def test_pipes_and_links_to_directories_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "deep").mkdir()
    (tmp_path / "link").symlink_to("deep")
    for name, kind in {"pipe": "pipe, socket or device", "link": "directory"}.items():
        with pytest.raises(StorageError, match=f"{name}: is a {kind}, expected a file"):
            corpus.scan(source(tmp_path / f"{name[:2]}*"), validation=HALF)


def write_table(path: Path, kind: str, table: pa.Table) -> None:
    if kind == "parquet":
        parquet.write_table(table, path, row_group_size=7)
        return
    new_writer = pa.ipc.new_file if kind == "arrow file" else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as sink, new_writer(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


TABLES = ["parquet", "arrow file", "arrow stream"]


def strings_of(offsets: list[int], data: bytes) -> pa.Array:
    bounds = pa.py_buffer(np.array(offsets, np.int32))
    return pa.Array.from_buffers(pa.string(), len(offsets) - 1, [None, bounds, pa.py_buffer(data)])


@pytest.mark.parametrize(
    "column",
    [
        strings_of([0, 900, 5], b"hello"),
        strings_of([0, -900, 5], b"hello"),
        pa.DictionaryArray.from_arrays(pa.array([0, 7], pa.int32()), pa.array(["x"]), safe=False),
        pa.DictionaryArray.from_arrays(pa.array([0, -7], pa.int32()), pa.array(["x"]), safe=False),
    ],
)
def test_offsets_that_lead_out_of_a_file_are_damage(column, tmp_path, make_workspace):
    write_table(tmp_path / "t", "arrow file", pa.table({"text": column}))
    with pytest.raises(SourceError, match="t: damaged, or not arrow: "):
        build(source(tmp_path / "t", format="arrow"), make_workspace("c"))


@pytest.mark.parametrize("kind", TABLES)
def test_a_row_that_is_not_utf_8_is_named_and_can_be_left_out(kind, tmp_path, make_workspace):
    strings = strings_of([0, 1, 2, 4], b"a\xffbc")
    fine = pa.array(["x", "y", "z"])
    for index, columns in enumerate([{"text": strings}, {"text": fine, "id": strings}]):
        path = tmp_path / f"{index}"
        write_table(path, kind, pa.table(columns))
        fields = {"format": kind.split()[0]} | ({"id_field": "id"} if index else {})
        with pytest.raises(SourceError, match=rf"/{index}, row 2: not UTF-8"):
            build(source(path, **fields), make_workspace(f"a{index}"))
        workspace = make_workspace(f"b{index}")
        built = build(source(path, on_error="skip", **fields), workspace, ALL_TRAIN)
        assert built.facts["skipped"] == {"empty": 0, "undecodable": 1}
        assert len(list(corpus.documents(workspace.output))) == 2


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize(
    "strings", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
)
def test_rows_of_a_table_are_documents(kind, strings, tmp_path, make_workspace):
    path = tmp_path / "table"
    numbers = pa.array(range(len(TEXTS)))
    body = pa.array(TEXTS).cast(strings)
    write_table(path, kind, pa.table({"id": numbers, "body": body}))
    workspace = make_workspace("c")
    build(source(path, format=kind.split()[0], text_field="body"), workspace)
    documents = list(corpus.documents(workspace.output))
    assert [document.text for document in documents] == TEXTS
    assert documents[29].doc_id == "table#30"
    assert {document.split for document in documents} == {"train", "validation"}


@pytest.mark.parametrize("kind", TABLES)
def test_a_bad_table_is_an_error_that_says_where(kind, tmp_path, make_workspace):
    cases = {
        "nocolumn": (pa.table({"body": ["x"]}), r"nocolumn: no column 'text' \(found \['body'\]\)"),
        "numbers": (pa.table({"text": [1, 2]}), "numbers: column 'text' holds int64"),
        "null": (
            pa.table({"text": ["x", None]}),
            "null, row 2: field 'text' is NoneType None, expected a string",
        ),
        "bytes": (
            pa.table({"text": pa.array([b"x", b"\xff"]).view(pa.string())}),
            "bytes, row 2: not UTF-8 at byte 0",
        ),
    }
    for name, (table, complaint) in cases.items():
        write_table(tmp_path / name, kind, table)
        with pytest.raises(SourceError, match=complaint):
            build(source(tmp_path / name, format=kind.split()[0]), make_workspace(f"{name}-corpus"))
    (tmp_path / "noise").write_bytes(b"neither of them" * 10)
    with pytest.raises(SourceError, match="noise: damaged, or not"):
        build(source(tmp_path / "noise", format=kind.split()[0]), make_workspace("noise-corpus"))


def test_a_table_that_changed_since_the_scan_is_an_error(tmp_path, make_workspace):
    write_table(tmp_path / "t", "parquet", pa.table({"text": ["x"]}))
    config = source(tmp_path / "t", format="parquet")
    listing = corpus.scan(config, validation=ValidationConfig(fraction=0.0))
    write_table(tmp_path / "t", "parquet", pa.table({"text": ["y"]}))
    with pytest.raises(SourceError, match="t: changed while"):
        corpus.build(config, listing, make_workspace("c"))


def test_objects_of_a_json_array_are_documents(tmp_path, make_workspace):
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(json.dumps([{"text": text} for text in TEXTS]).encode()))
    workspace = make_workspace("c")
    assert texts_of(source(path, format="json"), workspace) == TEXTS
    assert next(corpus.documents(workspace.output)).doc_id == "a.json#1"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (LINES, r"a\.json: not JSON: Extra data"),
        (b'{"text": "x"}', r"a\.json: holds a dict, expected an array.*format: jsonl"),
        (b'[{"text": "x"}, {"body": "y"}]', r"a\.json, object 2: no field 'text'"),
    ],
)
def test_a_bad_json_array_is_an_error(content, complaint, tmp_path, make_workspace):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(SourceError, match=complaint):
        build(source(tmp_path / "a.json", format="json"), make_workspace("c"))


def test_braces_stand_for_alternatives_below_their_fixed_part(tmp_path):
    directory = touch(tmp_path, "a/x.txt", "b/x.txt", "c/x.txt", "s-08.txt", "s-09.txt", "s-10.txt")
    assert logical_paths(directory / "{a,c}/*.txt") == ["a/x.txt", "c/x.txt"]
    assert logical_paths(directory / "{a,b}") == ["a/x.txt", "b/x.txt"]
    assert logical_paths(directory / "s-{08..10}.txt") == ["s-08.txt", "s-09.txt", "s-10.txt"]
    assert logical_paths(directory / "{s-{10..09}.txt,c/*}") == ["c/x.txt", "s-09.txt", "s-10.txt"]
    assert logical_paths(directory / "**/x.txt") == ["a/x.txt", "b/x.txt", "c/x.txt"]
    assert logical_paths(directory / "?/x.txt", directory / "[ab]/x.txt") == [
        "a/x.txt",
        "b/x.txt",
        "c/x.txt",
    ]
    with pytest.raises(SourceError, match=r"s-11\.txt: no such file"):
        find_files(source(directory / "s-{08..11}.txt"))
    with pytest.raises(SourceError, match="too many"):
        find_files(source(directory / "s-{0..99999999}.txt"))


def test_braces_without_a_choice_are_part_of_a_name(tmp_path):
    assert logical_paths(touch(tmp_path, "{x}.txt") / "{x}.txt") == ["{x}.txt"]


def test_any_file_system_gives_the_same_documents(tmp_path, make_workspace):
    memory, root = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}"
    for index, text in enumerate(TEXTS):
        memory.pipe_file(f"{root}/{index:02d}.txt", text.encode())
        (tmp_path / f"{index:02d}.txt").write_text(text, encoding="utf-8")
    local = build(source(tmp_path / "*.txt"), make_workspace("local"))
    for number, path in enumerate([f"memory:/{root}/*.txt", f"memory:/{root}"]):
        remote = build(source(path), make_workspace(f"remote{number}"))
        assert remote.content_id == local.content_id


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *arguments):
        pass


def test_web_addresses_are_read_and_their_queries_stay_secret(tmp_path, make_workspace):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"over the web"))
    handler = partial(_Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            address = f"http://127.0.0.1:{server.server_port}"
            path = f"{address}/a.txt.gz?token=canary"
            workspace = make_workspace("c")
            config = source(path)
            listing = corpus.scan(config, validation=ValidationConfig(fraction=0.0))
            corpus.build(config, listing, workspace)
            assert [d.doc_id for d in corpus.documents(workspace.output)] == ["a.txt"]
            with pytest.raises(SourceError, match="none: no such file") as error:
                find_files(source(f"{address}/none?token=canary"))
            assert "canary" not in str(error.value)
        finally:
            server.shutdown()
    kept = [path.read_bytes() for path in workspace.output.iterdir()]
    assert not [data for data in kept if b"canary" in data]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:pw@host:1/a/b?sig=x#y", "https://host:1/a/b"),
        ("https://us?er:p@w#1@host/a?sig=x@y", "https://host/a"),
        ("https://host/a?c0ffee", "https://host/a"),
        ("https://host/a#access_token=c0ffee", "https://host/a"),
        ("https://host/a#L7", "https://host/a#L7"),
        ("gs://bucket/part-?.txt", "gs://bucket/part-?.txt"),
        ("gs://bucket/part.txt?X-Goog-Signature=x", "gs://bucket/part.txt"),
        ("/local/a?b#c", "/local/a?b#c"),
    ],
)
def test_secrets_are_cut_from_what_is_shown(url, shown):
    assert public_url(url) == shown


def test_every_format_gives_the_same_documents(tmp_path, make_workspace):
    table = pa.table({"text": TEXTS})
    write_table(tmp_path / "d.parquet", "parquet", table)
    write_table(tmp_path / "d.arrow", "arrow stream", table)
    (tmp_path / "d.jsonl").write_bytes(LINES)
    (tmp_path / "d.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    found = [
        texts_of(source(tmp_path / f"d.{kind}", format=kind), make_workspace(kind))
        for kind in ("parquet", "arrow", "jsonl", "json")
    ]
    assert all(texts == TEXTS for texts in found)
    assert len(list(itertools.chain(*found))) == 120
