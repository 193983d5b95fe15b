"""Documents that are too long for memory: the same bytes, ids and errors as if they were not."""

import errno
import gzip
import json
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from modeling.artifacts import DiskFullError
from modeling.data import (
    cache,
    compute,
    corpus,
    encoding,
    long_records,
    long_texts,
    pieces,
    text_files,
    tokenized,
    tokenizer,
)
from modeling.data.config import TokenCacheConfig, TokenizationConfig
from modeling.data.formats_config import SupervisedFormat
from modeling.data.long_records import RecordScan, parsed
from modeling.data.long_texts import LongText, ScratchFile, SpilledText
from modeling.data.shards import SpilledIds, map_shard, read_shard, write_shard
from modeling.data.sources import BadContentError, SourceError
from modeling.data.sources_config import (
    DuplicatesFilter,
    FilesSource,
    LengthFilter,
    RegexFilter,
    ValidationConfig,
)
from modeling.data.tokenizers_config import BpeTokenizerConfig
from tests.data.conftest import HOSTILE, words

HALF = ValidationConfig(fraction=0.5)
NONE_HELD_OUT = ValidationConfig(fraction=0.0)


@pytest.fixture
def tiny(monkeypatch):
    """Makes documents of a few bytes long ones, read in pieces of a few."""

    def make_tiny(piece=7):
        monkeypatch.setattr(long_records, "LONG_BYTES", 50)
        monkeypatch.setattr(text_files, "_PIECE_BYTES", piece)
        monkeypatch.setattr(long_texts, "PART_BYTES", 40)
        monkeypatch.setattr(corpus, "_BATCH_TEXT_BYTES", 100)
        monkeypatch.setattr(compute, "PIECE_BYTES", 60)
        monkeypatch.setattr(encoding, "_LIBRARY_PIECE_BYTES", 60)
        cut = pieces.pieces
        monkeypatch.setattr(encoding, "pieces", lambda text, size=60, *at: cut(text, size, *at))

    return make_tiny


def files(path, kind: Any = "jsonl", **options: Any) -> FilesSource:
    return FilesSource(type="files", paths=(str(path),), format=kind, **options)


def build_corpus(source, workspace, validation=HALF):
    return corpus.build(source, corpus.scan(source, validation=validation), workspace)


def documents_of(workspace):
    return [(d.doc_id, d.split, d.text) for d in corpus.documents(workspace.output)]


def long_and_short(seed, count=30):
    """Returns texts of which some have several parts, hostile to whoever cuts them."""
    draw = random.Random(seed)
    return [
        words(seed + index, draw.choice([1, 3, 20, 60])) + draw.choice(HOSTILE) * draw.randint(0, 2)
        for index in range(count)
    ]


def write_lines(path, texts, seed=0):
    """Writes records in which the text stands anywhere, escaped or not, once twice."""
    draw, lines = random.Random(seed), []
    for number, text in enumerate(texts):
        record = {"n": number, "text": text, "more": {"text": ["x" * 60, None]}, "k" * 70: "v"}
        fields = draw.sample(list(record.items()), len(record))
        line = json.dumps(dict(fields), ensure_ascii=draw.random() < 0.5)
        lines.append('{"text": "another ' + "y" * 60 + '", ' + line[1:])
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="")


# What is read


ATOMS = ["a", "é", "日", "🎉", "\\n", '\\"', "\\\\", "\\/", "\\u0041", "\\ud83d\\ude00", "\\ud83d",
         "\\ude00", "\\ud800", "\\uD800", "{", "}", ":", ",", " "]  # fmt: skip
BAD_ATOMS = ["\\x", "\\u12", "\\u12G4", "\x01", "\n", "\t", '"', "\\", "\\ud83d\\udcZZ"]


def random_json(draw: random.Random) -> str:
    """Returns JSON, or what is nearly so."""
    share_of_bad = draw.choice([0, 0, 0.02])

    def string():
        some = (BAD_ATOMS if draw.random() < share_of_bad else ATOMS for _ in range(99))
        return f'"{"".join(map(draw.choice, list(some)[: draw.choice([0, 1, 5, 20, 60])]))}"'

    def value(depth):
        kind = draw.random()
        if depth and kind < 0.12:
            return f"[{', '.join(value(depth - 1) for _ in range(draw.randint(0, 3)))}]"
        if depth and kind < 0.25:
            return record(depth - 1)
        numbers = ["1", "-2.5e3", "true", "null", "NaN", "1" * 30, '"text"']
        return string() if kind < 0.6 else draw.choice(numbers)

    def record(depth):
        keys = [draw.choice(['"text"', '"lang"', string()]) for _ in range(draw.randint(0, 4))]
        return f"{{{', '.join(key + draw.choice([':', ' : ']) + value(depth) for key in keys)}}}"

    text = draw.choice([record, value])(2)
    if draw.random() < 0.3:
        place = draw.randrange(len(text))
        rest = draw.choice(
            ["", text[place + 1 :], draw.choice('"{}[]:,\\ \n\ufeff') + text[place:]]
        )
        text = text[:place] + rest
    return text + draw.choice(["\n", " \n", "", "x\n"])


def value_or_error(text: str):
    try:
        return parsed(text, "here"), None
    except BadContentError as error:
        return None, str(error)


@pytest.mark.parametrize("seed", range(2))
def test_a_record_in_pieces_is_the_one_that_json_reads_or_has_its_error(seed, tmp_path):
    draw = random.Random(seed)
    num_long = num_bad = 0
    for _ in range(600):
        text, size = random_json(draw), draw.choice([1, 2, 3, 5, 8, 13, 40])
        scan = RecordScan(tmp_path)
        for start in range(0, len(text), size):
            scan.feed(text[start : start + size])
        scan.feed("", is_last=True)
        expected, error = value_or_error(text)
        if error is not None:
            with pytest.raises(BadContentError) as raised:
                scan.record("text", ["lang"], "here")
            assert str(raised.value) == error
            num_bad += 1
            continue
        found = scan.record("text", ["lang"], "here")
        assert type(found) is type(expected)
        if isinstance(expected, dict):
            assert list(found) == list(expected)
            if isinstance(string := found.get("text"), SpilledText):
                halves = [c for c in expected["text"] if "\ud800" <= c <= "\udfff"]
                assert string.half_pair == (halves[0] if halves else "")
                assert len(string) == len(expected["text"].encode("utf-8", "surrogatepass"))
                found["text"] = long_texts.spelled(string)
                num_long += 1
            assert repr(found.get("text")) == repr(expected.get("text"))
            assert repr(found.get("lang")) == repr(expected.get("lang"))
    assert num_long > 10
    assert num_bad > 100


def source_of_texts(directory: Path, kind: str, seed: int, **options) -> FilesSource:
    directory.mkdir(exist_ok=True)
    texts = long_and_short(seed)
    if kind == "jsonl":
        write_lines(directory / "a", texts, seed)
    else:
        blank = "\n" + " " * 70 + "\r\n"
        (directory / "a").write_text(blank.join(texts), encoding="utf-8", newline="")
        (directory / "b").write_text("short, and the last", encoding="utf-8")
    return files(directory / "*", kind, **options)


def built_both_ways(source, make_workspace, tiny, piece):
    """Builds a corpus with documents in memory, then with long ones in pieces: the same.

    Returns what was built, its documents, and where those are that were read in pieces.
    """
    spaces = {name: make_workspace(name) for name in ("whole", "tiny")}
    expected = build_corpus(source, spaces["whole"], NONE_HELD_OUT)
    documents = documents_of(spaces["whole"])
    tiny(piece)
    assert build_corpus(source, spaces["tiny"], NONE_HELD_OUT) == expected
    assert documents_of(spaces["tiny"]) == documents
    return expected, documents, spaces["tiny"]


@pytest.mark.parametrize("piece", [5, 6, 64])
@pytest.mark.parametrize("kind", ["jsonl", "text", "paragraphs"])
def test_a_corpus_does_not_depend_on_what_is_long(kind, piece, tmp_path, make_workspace, tiny):
    source = source_of_texts(tmp_path / "in", kind, piece)
    _, documents, space = built_both_ways(source, make_workspace, tiny, piece)
    assert not list(space.progress.iterdir())
    stored = list(corpus.stored_documents(space.output))
    assert sum(isinstance(document.text, LongText) for document in stored) >= 2 - (kind == "text")
    for document, (doc_id, _, text) in zip(stored, documents, strict=True):
        assert (document.doc_id, len(document.text)) == (doc_id, len(text.encode()))
        if isinstance(document.text, LongText):
            parts = [bytes(part) for part in document.text.parts()]
            assert b"".join(parts).decode() == text
            assert all(37 <= len(part) <= 40 for part in parts[:-1])
            assert all(part.decode() for part in parts)


def test_filters_and_splits_see_a_long_document_as_any_other(tmp_path, make_workspace, tiny):
    filters = (
        RegexFilter(type="regex", pattern="return"),
        RegexFilter(type="regex", field="text", pattern="def"),
        RegexFilter(type="regex", field="more", pattern="xx, null|null"),
        LengthFilter(type="length", max_characters=900, min_bytes=20),
        DuplicatesFilter(type="duplicates"),
    )
    source = source_of_texts(tmp_path / "in", "jsonl", 3, filters=filters, id_field="n")
    (tmp_path / "in" / "b").write_bytes(
        (tmp_path / "in" / "a").read_bytes().replace(b'"n": ', b'"n": 5')
    )
    spaces = {name: make_workspace(name) for name in ("whole", "tiny")}
    expected = build_corpus(source, spaces["whole"])
    documents = documents_of(spaces["whole"])
    tiny()
    assert build_corpus(source, spaces["tiny"]) == expected
    for split in ("train", "validation"):
        of_split = [(doc_id, text) for doc_id, of, text in documents if of == split]
        stored = corpus.stored_documents(spaces["tiny"].output, split)
        assert [(d.doc_id, bytes(d.text).decode()) for d in stored] == of_split
    assert sum(count > 0 for count in expected.facts["filtered"].values()) >= 3


GOOD = b'{"text": "' + b"as good as it gets, " * 5 + b'"}\n'
LONG = b"too long for this memory, " * 6
BAD_LINES = {
    "cut off": b'{"text": "' + LONG,
    "cut off in an escape": b'{"text": "' + LONG + b"\\ud83",
    "control character": b'{"text": "' + LONG + b'\x01"}\n',
    "escape": b'{"text": "' + LONG + b"\\q" + LONG + b'"}\n',
    "no quote before": b'{"n": [1, 2, "text": "' + LONG + b'"}\n',
    "more behind": b'{"text": "' + LONG + b'"} {}\n',
    "comma at the end": b'{"text": "' + LONG + b'",\n',
    "no field": b'{"txt": "' + LONG + b'"}\n',
    "other type": b'{"text": ["' + LONG + b'"]}\n',
    "no object": b'["' + LONG + b'"]\n',
    "text alone": b'"' + LONG + b'"\n',
    "half a pair": b'{"text": "' + LONG + b"\\ud83d" + LONG + b'"}\n',
    "half a pair at last": b'{"text": "' + LONG + b'\\ud83d"}\n',
    "not UTF-8": b'{"text": "' + LONG + "é".encode()[:1] + LONG + b'"}\n',
    "not UTF-8 at the end": b'{"text": "' + LONG + b'"}\xf0\x9f',
    "not UTF-8 after an error": b'{"text" "' + LONG + b'\xff"}\n',
    "nested too deep": b'{"a": ' + b"[" * 5000 + b', "text": "' + LONG + b'"}\n',
    "a number too long": b'{"a": ' + b"1" * 5000 + b', "text": "' + LONG + b'"}\n',
    "byte order mark": b"\xef\xbb\xbf" + GOOD,
    "too long": b'{"text": "' + LONG * 100 + b'"}\n',
    "too long, and no JSON": b'{"text" "' + LONG * 100 + b'\xff"}\n',
    "blank": b" \t" * 100 + b"\n",
}


@pytest.mark.parametrize("name", BAD_LINES)
@pytest.mark.parametrize("piece", [6, 64])
def test_a_bad_line_has_the_error_of_a_short_one(name, piece, tmp_path, make_workspace, tiny):
    (tmp_path / "a").write_bytes(GOOD + BAD_LINES[name] + GOOD.replace(b"good", b"bad"))
    source = files(tmp_path / "a", on_error="skip", max_skipped=9, max_document_bytes=12_000)
    expected, *_ = built_both_ways(source, make_workspace, tiny, piece)
    if name != "blank":
        (told,) = expected.facts["first_skipped"]
        assert f"{tmp_path / 'a'}:2: " in told
        failing = files(tmp_path / "a", max_document_bytes=12_000)
        with pytest.raises(SourceError) as raised:
            build_corpus(failing, make_workspace("failing"), NONE_HELD_OUT)
        assert str(raised.value) == told


BLANK = b" " * 200 + b"\n"


@pytest.mark.parametrize("kind", ["text", "paragraphs"])
@pytest.mark.parametrize(
    "end",
    [b"\xff" + LONG, b"\xe6\x97", b"\xe6\x97\n" + BLANK + LONG, LONG * 100],
    ids=["in the middle", "at the end", "before a blank line", "too long"],
)
def test_a_bad_text_has_the_error_of_a_short_one(kind, end, tmp_path, make_workspace, tiny):
    (tmp_path / "a").write_bytes(BLANK + LONG + b"\n" + LONG + end)
    source = files(tmp_path / "a", kind, max_document_bytes=2000)

    def error(name):
        with pytest.raises(BadContentError) as raised:
            build_corpus(source, make_workspace(name), NONE_HELD_OUT)
        return str(raised.value), raised.value.reason

    expected = error("whole")
    tiny()
    assert error("tiny") == expected


@pytest.mark.parametrize("damage", ["cut", "bomb"])
@pytest.mark.parametrize("kind", ["jsonl", "text"])
def test_a_bad_archive_has_the_error_of_a_short_one(kind, damage, tmp_path, make_workspace, tiny):
    text = LONG * (1 if damage == "cut" else 10_000)
    data = gzip.compress(b'{"text": "' + text + b'"}\n' if kind == "jsonl" else text)
    (tmp_path / "a").write_bytes(data[:-20] if damage == "cut" else data)
    source = files(tmp_path / "a", kind)

    def error(name):
        with pytest.raises(BadContentError) as raised:
            build_corpus(source, make_workspace(name), NONE_HELD_OUT)
        return str(raised.value).partition(" hold ")[0], raised.value.reason

    expected = error("whole")
    assert expected[1] == ("damaged file" if damage == "cut" else "expands too much")
    tiny(piece=4096)
    assert error("tiny") == expected


def test_no_space_for_a_long_document_is_no_damage(tmp_path, make_workspace, tiny, monkeypatch):
    (tmp_path / "a").write_bytes(GOOD)
    tiny()

    class Full:
        def write(self, data):
            raise OSError(errno.ENOSPC, "full")

        def close(self):
            pass

    monkeypatch.setattr(long_texts.tempfile, "TemporaryFile", lambda **_: Full())
    with pytest.raises(DiskFullError, match="no space for a long document"):
        build_corpus(files(tmp_path / "a"), make_workspace("c"), NONE_HELD_OUT)


def test_a_corpus_that_ends_within_a_document_is_refused(tmp_path, make_workspace, tiny):
    (tmp_path / "a").write_bytes(GOOD)
    tiny()
    workspace = make_workspace("c")
    build_corpus(files(tmp_path / "a"), workspace, NONE_HELD_OUT)
    path = workspace.output / corpus.DOCUMENTS_FILE
    table = pa.ipc.open_file(path.read_bytes()).read_all()
    assert table.column("doc_id").to_pylist() == [None, None, "a#1"]
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table.slice(0, 2))
    with pytest.raises(ValueError, match="ends within a document"):
        list(corpus.stored_documents(workspace.output))


# What is made of it


@pytest.mark.parametrize("seed", range(20))
def test_pieces_of_a_text_on_disk_are_those_of_one_in_memory(seed, tmp_path, tiny):
    draw = random.Random(seed)
    text = "".join(draw.choice([words(seed, 9), "日本語", "x" * 200, *HOSTILE]) for _ in range(9))
    tiny()
    data, scratch = text.encode(), ScratchFile(tmp_path, "a test")
    scratch.append(b"before " + data + b" behind")
    on_disk = SpilledText(scratch, 7, 7 + len(data))
    for size in (16, 64, 300):
        expected = list(pieces.pieces(data, size))
        assert list(pieces.pieces(on_disk, size)) == expected
    assert bytes(on_disk) == data


@pytest.mark.parametrize("with_loss_mask", [False, True])
@pytest.mark.parametrize("kind", [np.uint16, np.uint32])
def test_a_shard_of_spilled_ids_is_that_of_ids_in_memory(kind, with_loss_mask, tmp_path):
    ids = np.arange(100_003, dtype=kind)
    mask = (ids % 3 == 0).astype(np.uint8) if with_loss_mask else None

    def spilled(values):
        made = SpilledIds(tmp_path, values.dtype)
        for start, stop in pairwise([0, 1, 1, 5000, len(values)]):
            made.append(values[start:stop])
        return made

    lengths = np.array([len(ids)])
    write_shard(tmp_path / "memory", ids, lengths, mask)
    of_mask = None if mask is None else spilled(mask)
    write_shard(tmp_path / "disk", spilled(ids), lengths, of_mask)
    assert (tmp_path / "disk").read_bytes() == (tmp_path / "memory").read_bytes()
    mapped = map_shard(tmp_path / "disk", np.dtype(kind), with_loss_mask=with_loss_mask)
    read = read_shard(tmp_path / "disk", np.dtype(kind), with_loss_mask=with_loss_mask)
    assert read.num_tokens == len(ids)
    assert read.offsets.tolist() == mapped.offsets.tolist()
    assert np.concatenate(list(read.tokens)).tolist() == mapped.tokens.tolist() == ids.tolist()
    if mask is not None:
        assert np.concatenate(list(read.loss_mask or [])).tolist() == mask.tolist()


def chain_of(source, make_workspace, name, **options):
    """Builds all stages; returns what each is, and the files of tokens."""
    spaces = {stage: make_workspace(f"{name}-{stage}") for stage in ("c", "t", "i", "r")}
    built = {"c": build_corpus(source, spaces["c"])}
    config = BpeTokenizerConfig(type="bpe", vocab_size=300)
    built["t"] = tokenizer.build(config, spaces["c"].output, spaces["t"])
    inputs = spaces["c"].output, spaces["t"].output, spaces["i"]
    built["i"] = tokenized.build(TokenizationConfig(), *inputs, unit_bytes=200, **options)
    built["r"] = cache.build(
        TokenCacheConfig(length=16, packing="documents"),
        spaces["i"].output,
        spaces["r"],
        tokenized_id=built["i"].content_id,
        tokenizer_id=built["t"].content_id,
    )
    shards = {path.name: path.read_bytes() for path in spaces["i"].output.iterdir()}
    return {stage: one.content_id for stage, one in built.items()}, shards


def test_the_chain_makes_the_same_files_of_long_documents(
    tmp_path, make_workspace, tiny, monkeypatch
):
    source = source_of_texts(tmp_path / "in", "jsonl", 7)
    expected = chain_of(source, make_workspace, "whole")
    tiny()
    spilled, original = [], encoding.TextEncoder.spilled

    def counted(encoder, document, scratch):
        spilled.append(len(document))
        return original(encoder, document, scratch)

    monkeypatch.setattr(encoding.TextEncoder, "spilled", counted)
    monkeypatch.setattr(tokenizer, "_TRAIN_PIECE_BYTES", 64)
    assert chain_of(source, make_workspace, "tiny") == expected
    assert len(spilled) > 5
    assert min(spilled) > 200

    def backwards(_, left):
        return left[-1]

    assert chain_of(source, make_workspace, "paced", pace=backwards) == expected


def test_completions_that_are_long_have_the_ids_of_short_ones(tmp_path, make_workspace, tiny):
    texts = long_and_short(2, count=8)
    records = [{"prompt": text[:99], "completion": text} for text in texts]
    (tmp_path / "a").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    source = files(tmp_path / "a", record=SupervisedFormat(type="supervised"))
    expected = chain_of(source, make_workspace, "whole", document_format=source.record)
    tiny()
    assert chain_of(source, make_workspace, "tiny", document_format=source.record) == expected
    stored = corpus.stored_documents(tmp_path / "tiny-c" / "output")
    assert any(isinstance(document.text, LongText) for document in stored)


@pytest.mark.parametrize("is_cut", [True, False])
def test_other_tokenizers_give_a_long_text_the_ids_of_the_whole(is_cut, tmp_path, tiny):
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    if is_cut:
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(special_tokens=["<unk>", "<s>"], show_progress=False)
    backend.train_from_iterator([" ".join(HOSTILE), words(0, 99)], trainer)
    text = words(3, 500)
    encoder = encoding.document_encoder(
        tokenizer.Tokenizer(backend, bos_token="<s>", eos_token="<s>"),
        TokenizationConfig(append_bos=True),
    )
    assert isinstance(encoder, encoding.TextEncoder)
    tiny()
    scratch = ScratchFile(tmp_path, "a test")
    scratch.append(text.encode())
    on_disk = SpilledText(scratch, 0, scratch.num_bytes)
    assert len(list(encoder._stretches(on_disk))) == 1 or is_cut
    found = encoder.spilled(on_disk, tmp_path).tokens
    expected = encoder.encode([text.encode()]).tokens
    assert b"".join(found.pieces()) == expected.tobytes()


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("has_loss_mask", [False, True])
def test_spilled_ids_are_those_of_the_whole(bos, eos, has_loss_mask, chain, tmp_path, tiny):
    tiny()
    encoder = encoding.document_encoder(
        tokenizer.Tokenizer.load(chain.tokenizer_dir),
        TokenizationConfig(append_bos=bos, append_eos=eos),
        has_loss_mask=has_loss_mask,
    )
    assert isinstance(encoder, encoding.TextEncoder)
    data, scratch = "".join(long_and_short(1)).encode(), ScratchFile(tmp_path, "a test")
    scratch.append(data)
    found = encoder.spilled(SpilledText(scratch, 0, len(data)), tmp_path)
    expected = encoder.encode([data])
    dtype = expected.tokens.dtype
    assert (
        np.frombuffer(b"".join(found.tokens.pieces()), dtype).tolist() == expected.tokens.tolist()
    )
    assert found.lengths.tolist() == expected.lengths.tolist()
    assert (found.loss_mask is None) == (not has_loss_mask)
    if found.loss_mask is not None and expected.loss_mask is not None:
        assert b"".join(found.loss_mask.pieces()) == expected.loss_mask.tobytes()


GIGABYTE = 10**9
STAGE = """
import re, sys
from pathlib import Path
from modeling.artifacts import Workspace
from modeling.data.config import TokenCacheConfig, TokenizationConfig
from modeling.data.sources_config import FilesSource, ValidationConfig
from modeling.data.tokenizers_config import BpeTokenizerConfig

root, stage, kind = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
space = Workspace(root / f"progress of {stage}", root / stage)
space.progress.mkdir()
space.output.mkdir()
match stage:
    case "corpus":
        from modeling.data import corpus
        source = FilesSource(type="files", paths=(str(root / "a"),), format=kind)
        listing = corpus.scan(source, validation=ValidationConfig(fraction=0.0))
        corpus.build(source, listing, space)
    case "tokenizer":
        from modeling.data import tokenizer
        tokenizer.build(BpeTokenizerConfig(type="bpe", vocab_size=280), root / "corpus", space)
    case "tokenized":
        from modeling.data import tokenized
        tokenized.build(TokenizationConfig(), root / "corpus", root / "tokenizer", space)
    case "cache":
        from modeling.data import cache
        config = TokenCacheConfig(length=1024, packing="documents")
        cache.build(config, root / "tokenized", space, tokenized_id="i", tokenizer_id="t")
# Not `ru_maxrss`, which begins with what the process had that started this one.
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["jsonl", "text", "paragraphs"])
def test_a_document_of_a_gigabyte_takes_no_more_memory_than_a_short_one(kind, tmp_path):
    piece = " ".join([words(1, 200_000), *HOSTILE]).replace("\n", " ")
    written = json.dumps(piece)[1:-1] if kind == "jsonl" else piece
    count = GIGABYTE // len(piece.encode())
    with (tmp_path / "a").open("wb") as file:
        file.write(b'{"text": "' * (kind == "jsonl"))
        for _ in range(count):
            file.write(written.encode())
        file.write(b'"}\n' * (kind == "jsonl"))
    stages = ["corpus", "tokenizer", "tokenized", "cache"] if kind == "jsonl" else ["corpus"]
    peaks = {}
    for stage in stages:
        command = [sys.executable, "-c", STAGE, str(tmp_path), stage, kind]
        peaks[stage] = (
            int(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout) // 1024
        )
    assert max(peaks.values()) < 1000, peaks  # MiB; 1.5 GB is what is promised
    assert corpus.num_bytes(tmp_path / "corpus", "train") == count * len(piece.encode())
