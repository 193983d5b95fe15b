"""The raw corpus: listings, splits, decoding, digests, and what it refuses."""

import hashlib
import json
import os
import sys
import sysconfig
from pathlib import Path

import pyarrow as pa
import pytest

from modeling.data import corpus
from modeling.data.reading import is_held_out
from modeling.data.sources import SourceError
from modeling.data.sources_config import FilesSource, PyStdlibSource, ValidationConfig

HALF = ValidationConfig(fraction=0.5)
ALL_TRAIN = ValidationConfig(fraction=0.0)
STDLIB = PyStdlibSource(type="pystdlib")


def text_source(*paths: object) -> FilesSource:
    return FilesSource(type="files", paths=tuple(map(str, paths)))


def jsonl_source(path: object, text_field: str = "text") -> FilesSource:
    return FilesSource(type="files", paths=(str(path),), format="jsonl", text_field=text_field)


def write(directory: Path, **files: str) -> Path:
    directory.mkdir(exist_ok=True)
    for name, text in files.items():
        (directory / f"{name}.txt").write_text(text, encoding="utf-8")
    return directory


def build(source, workspace, validation=ALL_TRAIN):
    return corpus.build(source, corpus.scan(source, validation=validation), workspace)


def test_the_running_interpreters_library_is_listed_without_installed_packages():
    listing = corpus.scan(STDLIB, validation=HALF)
    by_path = {file.logical_path: file for file in listing.files}
    assert list(by_path) == sorted(by_path)
    assert {"os.py", "json/decoder.py", "this.py"} <= set(by_path)
    installed = {"site-packages", "dist-packages", "__pycache__"}
    assert not [path for path in by_path if installed & set(path.split("/"))]
    assert all(path.endswith(".py") for path in by_path)
    data = Path(os.__file__).read_bytes()
    assert by_path["os.py"].size == len(data)
    assert by_path["os.py"].sha256 == hashlib.sha256(data).hexdigest()
    assert {file.split for file in listing.files} == {"train", "validation"}
    if sys.prefix != sys.base_prefix:
        assert not by_path["os.py"].location.startswith(sys.prefix + os.sep)


def test_stdlib_files_decode_by_their_coding_line_and_undecodable_ones_are_counted(
    tmp_path, monkeypatch, make_workspace
):
    library = tmp_path / "lib"
    for directory in ("pkg", "site-packages", "dist-packages", "pkg/__pycache__"):
        (library / directory).mkdir(parents=True)
        (library / directory / "x.py").write_bytes(b"x = 1\n")
    (library / "latin.py").write_bytes("# coding: latin-1\ns = 'é'\n".encode("latin-1"))
    (library / "marked.py").write_bytes(b"\xef\xbb\xbfs = '\xc3\xa9'\r\n")
    (library / "bad_bytes.py").write_bytes(b"s = '\xe9'\n")
    (library / "bad_cookie.py").write_bytes(b"# coding: no-such-codec\n")
    (library / "empty.py").write_bytes(b"")
    (library / "notes.txt").write_bytes(b"not Python")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(library))
    workspace = make_workspace("corpus")
    built = build(STDLIB, workspace)
    assert {d.doc_id: d.text for d in corpus.documents(workspace.output)} == {
        "latin.py": "# coding: latin-1\ns = 'é'\n",
        "marked.py": "s = 'é'\r\n",
        "pkg/x.py": "x = 1\n",
    }
    assert built.facts["files"] == 6
    assert built.facts["skipped"] == {
        "empty": 1,
        "undecodable": 2,
    }
    bad_bytes, bad_cookie = built.facts["first_skipped"]
    assert "bad_bytes.py: " in bad_bytes
    assert "bad_cookie.py: unknown encoding: no-such-codec" in bad_cookie
    assert built.facts["documents"] == {"train": 3, "validation": 0}
    assert built.facts["bytes"]["train"] == 27 + 10 + 6


def test_ids_depend_on_contents_and_logical_paths_alone(tmp_path, make_workspace):
    here = write(tmp_path / "here", a="one", b="two")
    there = write(tmp_path / "there", b="two", a="one")
    other = write(tmp_path / "other", a="one", b="twO")
    sources = [text_source(here / "*.txt"), text_source(there), text_source(other)]
    listings = [corpus.scan(source, validation=ALL_TRAIN) for source in sources]
    built = [build(source, make_workspace(f"{i}")) for i, source in enumerate(sources)]
    assert listings[0] == listings[1]
    assert listings[0].root == listings[1].root != listings[2].root
    assert built[0].content_id == built[1].content_id != built[2].content_id
    assert built[0].roots == built[1].roots != built[2].roots
    changed = [k for k in built[0].leaves if built[0].leaves[k] != built[2].leaves[k]]
    assert changed == ["files/b.txt", "documents"]


def test_documents_root_is_the_merkle_root_of_framed_documents(tmp_path, make_workspace):
    source = text_source(write(tmp_path / "src", a="é", b="two"))
    built = build(source, make_workspace("c"))
    stream = b""
    for part in ["a.txt", "train", "é", "b.txt", "train", "two"]:
        stream += len(part.encode()).to_bytes(8, "big") + part.encode()
    leaf = hashlib.sha256(b"\x00" + stream).digest()
    root = hashlib.sha256(b"\x02" + len(stream).to_bytes(8, "big") + leaf).hexdigest()
    assert built.roots == {"documents": root}


def test_documents_of_one_file_read_through_another_field_are_other_content(
    tmp_path, make_workspace
):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x", "body": "y"}\n')
    by_text = build(jsonl_source(path), make_workspace("text"))
    by_body = build(jsonl_source(path, "body"), make_workspace("body"))
    assert by_text.content_id != by_body.content_id


def test_a_new_document_moves_no_other_between_splits():
    names = [f"dir/file-{i}.py" for i in range(4000)]
    tenth = ValidationConfig(fraction=0.1)
    held_out = [name for name in names if is_held_out(name, tenth)]
    assert 320 <= len(held_out) <= 480  # 400 expected, 4 standard deviations of 19
    more = {name for name in names if is_held_out(name, ValidationConfig(fraction=0.2))}
    assert set(held_out) < more
    assert not is_held_out("os.py", tenth)
    assert is_held_out("re.py", tenth)
    assert not any(is_held_out(name, ALL_TRAIN) for name in names)


def test_each_json_line_is_a_document_split_on_its_own(tmp_path, make_workspace):
    lines = [json.dumps({"id": i, "text": f"line {i} \u2028 é"}) for i in range(100)]
    path = tmp_path / "docs.jsonl"
    path.write_text("\n".join([*lines[:50], "", *lines[50:]]) + "\n", encoding="utf-8")
    workspace = make_workspace("c")
    built = build(jsonl_source(path), workspace, HALF)
    found = list(corpus.documents(workspace.output))
    assert [d.text for d in found] == [f"line {i} \u2028 é" for i in range(100)]
    assert [d.doc_id for d in found[48:52]] == [f"docs.jsonl#{n}" for n in (49, 50, 52, 53)]
    assert 30 <= built.facts["documents"]["validation"] <= 70
    train = list(corpus.documents(workspace.output, "train"))
    assert train == [d for d in found if d.split == "train"]
    assert corpus.num_documents(workspace.output, "train") == len(train)


def test_paragraphs_of_one_text_are_documents_of_both_splits(tmp_path, make_workspace):
    paragraphs = [f"Act {n}.\nEnter a ghost." for n in range(50)]
    path = tmp_path / "play.txt"
    path.write_text("\n" + "\n \n\n".join(paragraphs) + "\n\n", encoding="utf-8")
    source = FilesSource(type="files", paths=(str(path),), format="paragraphs")
    workspace = make_workspace("play")
    built = build(source, workspace, HALF)
    found = list(corpus.documents(workspace.output))
    assert [d.text.rstrip("\n") for d in found] == paragraphs
    assert [d.doc_id for d in found[:3]] == ["play.txt#2", "play.txt#6", "play.txt#10"]
    assert sum(built.facts["documents"].values()) == 50
    assert min(built.facts["documents"].values()) > 10


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"text": "x"', "not JSON"),
        (b'{"text": nix}', "not JSON: Expecting value (column 10). Repair it"),
        (b'{"txt": "x"}', "no field 'text'"),
        (b'["text"]', "no field 'text'"),
        (b'{"text": 1}', "is int 1, expected a string"),
        (b'{"text": "\xff"}', "not UTF-8 at byte 10"),
        (b'{"text": "\\ud800"}', "half a surrogate pair"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_json_line_is_an_error_that_names_it(line, complaint, tmp_path, make_workspace):
    path = tmp_path / "docs.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(SourceError, match=r"docs\.jsonl:3: ") as error:
        build(jsonl_source(path), make_workspace("c"))
    assert complaint in str(error.value)


def test_a_text_file_that_is_not_utf8_is_an_error(tmp_path, make_workspace):
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(SourceError, match=r"a\.txt: not UTF-8 at byte 3 \(0xe9\)"):
        build(text_source(path), make_workspace("c"))


def test_what_cannot_be_listed_is_an_error(tmp_path):
    write(tmp_path / "a", x="1", empty="")
    write(tmp_path / "b", x="2")
    (tmp_path / "c").mkdir()
    for paths, complaint in [
        ([tmp_path / "nothing.txt"], "no such file"),
        ([tmp_path / "*.none"], "matches no file"),
        ([tmp_path / "c"], "matches no file"),
        ([tmp_path / "a" / "empty.txt"], "empty"),
        ([tmp_path / "a" / "x.txt", tmp_path / "b"], "would both be called 'x.txt'"),
    ]:
        with pytest.raises(SourceError, match=complaint):
            corpus.scan(text_source(*paths), validation=ALL_TRAIN)


def test_a_dangling_link_is_unreadable(tmp_path):
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SourceError, match=r"gone\.txt"):
        corpus.scan(text_source(tmp_path / "*.txt"), validation=ALL_TRAIN)


def test_a_file_named_twice_counts_once(tmp_path):
    directory = write(tmp_path / "a", x="1", y="2")
    listing = corpus.scan(text_source(directory, directory / "x.txt"), validation=ALL_TRAIN)
    assert [file.logical_path for file in listing.files] == ["x.txt", "y.txt"]


def test_hidden_files_are_no_part_of_a_directory(tmp_path):
    directory = write(tmp_path / "a", x="1")
    (directory / ".git").mkdir()
    (directory / ".git" / "config").write_text("y")
    listing = corpus.scan(text_source(directory), validation=ALL_TRAIN)
    assert [file.logical_path for file in listing.files] == ["x.txt"]


def test_a_file_that_changed_since_the_scan_is_an_error(tmp_path, make_workspace):
    directory = write(tmp_path / "a", x="1", y="2")
    source = text_source(directory)
    listing = corpus.scan(source, validation=ALL_TRAIN)
    (directory / "y.txt").write_text("3")
    with pytest.raises(SourceError, match=r"y\.txt: changed while"):
        corpus.build(source, listing, make_workspace("c"))


def test_a_corpus_without_a_document_for_a_split_is_an_error(tmp_path, make_workspace):
    path = write(tmp_path / "a", x="1") / "x.txt"
    barely = ValidationConfig(fraction=1e-9)
    with pytest.raises(SourceError, match="holds out none"):
        build(text_source(path), make_workspace("v"), barely)
    nearly_all = ValidationConfig(fraction=1 - 1e-9)
    with pytest.raises(SourceError, match="none to train on"):
        build(text_source(path), make_workspace("t"), nearly_all)
    (tmp_path / "bad.jsonl").write_text("{")
    all_bad = FilesSource(
        type="files", paths=(str(tmp_path / "bad.jsonl"),), format="jsonl", on_error="skip"
    )
    with pytest.raises(SourceError, match=r"Left out: \{'not JSON': 1\}, .*bad\.jsonl:1: not JSON"):
        build(all_bad, make_workspace("b"))


def test_documents_come_back_in_order_over_many_record_batches(
    tmp_path, make_workspace, monkeypatch
):
    source = text_source(write(tmp_path / "a", **{f"f{i:02d}": "x" * i + "." for i in range(40)}))
    whole = build(source, make_workspace("whole"))
    monkeypatch.setattr(corpus, "_BATCH_TEXT_BYTES", 50)
    workspace = make_workspace("pieces")
    pieces = build(source, workspace)
    with pa.ipc.open_file(workspace.output / corpus.DOCUMENTS_FILE) as reader:
        assert reader.num_record_batches > 5
    assert [len(d.text) for d in corpus.documents(workspace.output)] == list(range(1, 41))
    assert pieces.content_id == whole.content_id
