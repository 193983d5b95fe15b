"""Several sources in one corpus, each with filters, validation, pins and a policy on errors."""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import random
import re
import resource
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from modeling import canonical, recipes
from modeling.artifacts import ArtifactStore, DiskFullError, Recipe
from modeling.data import cache, corpus, formats, tokenized, tokenizer
from modeling.data.config import DatasetConfig, TokenCacheConfig, TokenizationConfig
from modeling.data.digests import DigestMemo
from modeling.data.reading import is_held_out
from modeling.data.sources import FoundFile, SourceError, StorageError, find_files
from modeling.data.sources_config import (
    DuplicatesFilter,
    FilesSource,
    LengthFilter,
    PackageSource,
    RegexFilter,
    ValidationConfig,
    ValidationFiles,
)
from modeling.data.token_files import Manifest
from modeling.data.tokenizers_config import BpeTokenizerConfig
from modeling.experiment import ConfigError, validate
from modeling.inventory import verify_files

ALL_TRAIN = ValidationConfig(fraction=0.0)
HALF = ValidationConfig(fraction=0.5)
FIFTH = ValidationConfig(fraction=0.2)


def files(*paths: object, **fields) -> FilesSource:
    return FilesSource(type="files", paths=tuple(map(str, paths)), **fields)


def write_lines(path: Path, *records: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def build(sources, workspace, validation=ALL_TRAIN):
    return corpus.build(sources, corpus.scan(sources, validation=validation), workspace)


def ids_of(workspace, split=None) -> list[str]:
    return [document.doc_id for document in corpus.documents(workspace.output, split)]


def texts_of(workspace, split=None) -> list[str]:
    return [document.text for document in corpus.documents(workspace.output, split)]


def dataset(**fields) -> DatasetConfig:
    given = {"tokenizer": {"type": "bpe", "vocab_size": 300}, "sequence_lengths": [16]}
    return validate(DatasetConfig, given | fields, "d.yaml")


class TestSeveralSources:
    @pytest.fixture
    def sources(self, tmp_path):
        web = [{"body": f"page {i} of the web, and so on"} for i in range(40)]
        write_lines(tmp_path / "web" / "a.jsonl", *web)
        for index in range(30):
            path = tmp_path / "notes" / f"{index}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"note {index}, with words in it")
        return {
            "web": files(tmp_path / "web", format="jsonl", text_field="body"),
            "notes": files(tmp_path / "notes", validation=FIFTH),
        }

    def test_each_has_splits_of_its_own_and_ids_with_its_name(self, sources, make_workspace):
        workspace = make_workspace("c")
        built = build(sources, workspace, HALF)
        splits = ["train/notes", "train/web", "validation/notes", "validation/web"]
        assert list(corpus.splits(workspace.output)) == splits
        assert list(built.facts["documents"]) == splits
        for name, fraction in (("notes", FIFTH), ("web", HALF)):
            ids = [i for i in ids_of(workspace) if i.startswith(f"{name}/")]
            held_out = [i for i in ids if is_held_out(i, fraction)]
            assert ids_of(workspace, f"validation/{name}") == held_out
            assert 0 < len(held_out) < len(ids)
        assert ids_of(workspace)[0] == "notes/0.txt"
        assert ids_of(workspace)[30] == "web/a.jsonl#1"
        assert corpus.num_documents(workspace.output, "train") == len(ids_of(workspace, "train"))
        sizes = [len(text) for text in texts_of(workspace, "train/web")]
        assert corpus.num_bytes(workspace.output, "train/web") == sum(sizes)

    def test_their_order_in_the_file_does_not_matter(self, sources, make_workspace):
        there = build(sources, make_workspace("a"))
        back = build(dict(reversed(list(sources.items()))), make_workspace("b"))
        assert there.content_id == back.content_id

    def test_they_go_through_to_the_cache(self, sources, make_workspace):
        spaces = {name: make_workspace(name) for name in ("c", "tokenizer", "tokenized", "cache")}
        corpus_dir, tokenizer_dir = spaces["c"].output, spaces["tokenizer"].output
        build(sources, spaces["c"], HALF)
        config = BpeTokenizerConfig(type="bpe", vocab_size=280)
        tokenizer.build(config, corpus_dir, spaces["tokenizer"])
        policy = TokenizationConfig()
        built = tokenized.build(policy, corpus_dir, tokenizer_dir, spaces["tokenized"])
        manifest = Manifest.read(spaces["tokenized"].output)
        counts = {name: split.documents for name, split in manifest.splits.items()}
        assert counts == {
            split: corpus.num_documents(corpus_dir, split) for split in corpus.splits(corpus_dir)
        }
        cache.build(
            TokenCacheConfig(length=16),
            spaces["tokenized"].output,
            spaces["cache"],
            tokenized_id=built.content_id,
            tokenizer_id="0" * 64,
        )
        opened = cache.TokenCache.open(spaces["cache"].output, spaces["tokenized"].output)
        backend = tokenizer.Tokenizer.load(tokenizer_dir)
        ids = [
            token
            for text in texts_of(spaces["c"], "train/web")
            for token in [*backend.encode(text), backend.eos_id]
        ]
        assert opened.num_rows("train/web") == len(ids) // 16
        rows = opened.rows("train/web", np.arange(2)).tokens
        assert rows.ravel().tolist() == ids[:32]

    def test_a_dataset_has_one_source_or_several(self):
        one = {"type": "files", "paths": ["x"]}
        assert dict(dataset(source=one).named_sources).keys() == {""}
        assert dict(dataset(sources={"web": one, "a_b": one}).named_sources).keys() == {
            "web", "a_b"
        }  # fmt: skip
        for fields, complaint in [
            ({}, "either `source`"),
            ({"source": one, "sources": {"web": one}}, "either `source`"),
            ({"sources": {"Web": one}}, r"sources\.Web"),
            ({"sources": {"w": one | {"id_field": "id"}}}, r"sources\.w: its documents are texts"),
            ({"source": {"type": "files", "paths": [""]}}, r"paths.*at least 1 character"),
            ({"source": one, "validation": {"type": "split"}}, "goes with datasets"),
            ({"source": one, "validation": {"type": "file"}}, "validation"),
            ({"source": {"type": "pystdlib"}, "validation": {"type": "files", "paths": ["x"]}},
             "goes with `type: files` alone"),
            ({"source": one | {"filters": [{"type": "regex", "pattern": "("}]}},
             "no regular expression"),
        ]:  # fmt: skip
            with pytest.raises(ConfigError, match=complaint):
                dataset(**fields)

    def test_fields_that_are_at_their_defaults_leave_the_recipe_as_it_was(self):
        plain = dataset(source={"type": "files", "paths": ["x"]})
        assert recipes.corpus_recipe(plain, "0" * 64).id == canonical.digest(
            "recipe/raw_corpus/1",
            [
                {
                    "source": plain.source,
                    "validation": ValidationConfig(),
                    "listing": "0" * 64,
                },
                {},
            ],
        )
        fields = {"format": "text", "text_field": "text"}
        encoded = canonical.plain(plain.source)
        assert encoded == {"$type": "source.files/1", "type": "files"} | fields


class TestValidationByFiles:
    def test_files_are_held_out_whole_even_if_the_paths_name_them_too(
        self, tmp_path, make_workspace
    ):
        for name in ("a", "b", "held"):
            write_lines(tmp_path / f"{name}.jsonl", {"text": f"1 {name}"}, {"text": f"2 {name}"})
        held = ValidationFiles(type="files", paths=(str(tmp_path / "held.jsonl"),))
        source = files(tmp_path / "*.jsonl", format="jsonl", validation=held)
        workspace = make_workspace("c")
        built = build(source, workspace)
        assert texts_of(workspace, "train") == ["1 a", "2 a", "1 b", "2 b"]
        assert ids_of(workspace, "validation") == [
            "validation/held.jsonl#1",
            "validation/held.jsonl#2",
        ]
        assert built.facts["documents"] == {"train": 4, "validation": 2}

    def test_which_files_are_held_out_is_part_of_the_listing(self, tmp_path):
        for name in ("a", "b"):
            (tmp_path / f"{name}.txt").write_text(name)
        held = {
            name: ValidationFiles(type="files", paths=(str(tmp_path / f"{name}.txt"),))
            for name in ("a", "b")
        }
        source = files(tmp_path)
        roots = {corpus.scan(source, validation=way).root for way in (*held.values(), HALF)}
        assert len(roots) == 3

    def test_moving_both_changes_nothing(self, tmp_path):
        roots = set()
        for place in ("here", "there"):
            write_lines(tmp_path / place / "train" / "x.jsonl", {"text": "x"})
            write_lines(tmp_path / place / "held" / "x.jsonl", {"text": "y"})
            held = ValidationFiles(type="files", paths=(str(tmp_path / place / "held"),))
            source = files(tmp_path / place / "train", format="jsonl")
            roots.add(corpus.scan(source, validation=held).root)
        assert len(roots) == 1


class TestIds:
    def test_documents_with_ids_of_their_own_move_between_files_unmoved(
        self, tmp_path, make_workspace
    ):
        records = [{"id": f"doc-{i}", "text": f"text {i}"} for i in range(60)]
        write_lines(tmp_path / "one" / "a.jsonl", *records)
        write_lines(tmp_path / "two" / "b.jsonl", *records[40:])
        write_lines(tmp_path / "two" / "c.jsonl", *records[:40])
        kept = []
        for name in ("one", "two"):
            workspace = make_workspace(name)
            build(files(tmp_path / name, format="jsonl", id_field="id"), workspace, HALF)
            kept.append({d.doc_id: (d.split, d.text) for d in corpus.documents(workspace.output)})
        assert kept[0] == kept[1]
        assert {f"doc-{i}" for i in range(60)} == set(kept[0])

    def test_an_id_must_be_there_and_a_text_or_number(self, tmp_path, make_workspace):
        for index, (record, complaint) in enumerate([
            ({"text": "x"}, "no field 'id'"),
            ({"text": "x", "id": None}, "field 'id' is None"),
            ({"text": "x", "id": ""}, "field 'id' is ''"),
            ({"text": "x", "id": " \n"}, r"field 'id' is ' \\n'"),
            ({"text": "x", "id": True}, "field 'id' is True"),
            ({"text": "x", "id": 1.5}, "field 'id' is 1.5"),
            ({"text": "x", "id": "\ud83d"}, r"field 'id' holds half a surrogate pair"),
            ({"text": "y", "id": 7}, r"field 'id' is that of an earlier document, '7'; make"),
            ({"text": "y", "id": "7"}, r"field 'id' is that of an earlier document, '7'; make"),
        ]):  # fmt: skip
            path = write_lines(tmp_path / "a.jsonl", {"text": "x", "id": 7}, json.dumps(record))
            with pytest.raises(SourceError, match=rf"a\.jsonl:2: {complaint}"):
                build(files(path, format="jsonl", id_field="id"), make_workspace(str(index)))

    def test_documents_of_one_id_are_left_out_but_for_the_first_that_is_kept(
        self, tmp_path, make_workspace
    ):
        texts = [("a", "short"), ("a", "long enough"), ("b", "long enough too"), ("a", "x" * 20)]
        path = write_lines(tmp_path / "a.jsonl", *({"id": i, "text": text} for i, text in texts))
        long = (LengthFilter(type="length", min_characters=8),)
        source = files(path, format="jsonl", id_field="id", filters=long, on_error="skip")
        workspace = make_workspace("c")
        built = build(source, workspace)
        assert texts_of(workspace) == ["long enough", "long enough too"]
        assert built.facts["skipped"] == {"empty": 0, "duplicate id": 1}
        assert "a.jsonl:4: field 'id'" in built.facts["first_skipped"][0]


class TestFilters:
    def run(self, tmp_path, workspace, *filters, records):
        path = write_lines(tmp_path / "a.jsonl", *records)
        built = build(files(path, format="jsonl", filters=filters), workspace)
        return texts_of(workspace), built.facts["filtered"]

    def test_lengths_in_characters_and_bytes(self, tmp_path, make_workspace):
        records = [{"text": text} for text in ("é", "éé", "ééé", "éééé")]
        for bounds, kept in [
            ({"min_characters": 2}, ["éé", "ééé", "éééé"]),
            ({"max_characters": 2}, ["é", "éé"]),
            ({"min_bytes": 4, "max_bytes": 6}, ["éé", "ééé"]),
            ({"min_bytes": 5, "max_characters": 3}, ["ééé"]),
            ({}, ["é", "éé", "ééé", "éééé"]),
        ]:
            length = LengthFilter(type="length", **bounds)
            found = self.run(tmp_path, make_workspace(str(bounds)), length, records=records)
            assert found == (kept, {"1 length": 4 - len(kept)})

    def test_patterns_in_texts_and_fields(self, tmp_path, make_workspace):
        records = [
            {"text": "a cat", "lang": "en", "tags": ["x"]},
            {"text": "une chatte", "lang": "fr", "tags": []},
            {"text": "a dog", "lang": "en-GB", "tags": ["y", "x"]},
        ]
        for fields, kept in [
            ({"pattern": "cat|dog"}, ["a cat", "a dog"]),
            ({"pattern": "(?i)CHAT", "keep": "others"}, ["a cat", "a dog"]),
            ({"pattern": r"^en\b", "field": "lang"}, ["a cat", "a dog"]),
            ({"pattern": r"^en$", "field": "lang", "keep": "others"}, ["une chatte", "a dog"]),
            ({"pattern": r'"y"', "field": "tags"}, ["a dog"]),
        ]:
            regex = RegexFilter(type="regex", **fields)
            found = self.run(tmp_path, make_workspace(str(fields)), regex, records=records)
            assert found == (kept, {"1 regex": 3 - len(kept)})

    def test_a_field_that_a_record_lacks_is_an_error(self, tmp_path, make_workspace):
        regex = RegexFilter(type="regex", pattern="x", field="lang")
        with pytest.raises(SourceError, match=r"a\.jsonl:1: no field 'lang' .*source\.filters"):
            self.run(tmp_path, make_workspace("c"), regex, records=[{"text": "x"}])
        parquet.write_table(pa.table({"text": ["x"]}), tmp_path / "a.parquet")
        source = files(tmp_path / "a.parquet", format="parquet", filters=(regex,))
        with pytest.raises(SourceError, match=r"a\.parquet: no column 'lang'"):
            build(source, make_workspace("p"))

    def test_tables_are_filtered_by_their_columns(self, tmp_path, make_workspace):
        table = pa.table({"text": ["one", "two", "three"], "lang": ["en", "fr", "en"]})
        parquet.write_table(table, tmp_path / "a.parquet")
        regex = RegexFilter(type="regex", pattern="en", field="lang")
        workspace = make_workspace("c")
        build(files(tmp_path / "a.parquet", format="parquet", filters=(regex,)), workspace)
        assert texts_of(workspace) == ["one", "three"]
        assert ids_of(workspace) == ["a.parquet#1", "a.parquet#3"]

    def test_each_filter_counts_what_passed_those_before(self, tmp_path, make_workspace):
        records = [{"text": text} for text in ("abc", "abc", "xyz", "b", "abcd")]
        filters = (
            LengthFilter(type="length", min_characters=2),
            RegexFilter(type="regex", pattern="b"),
            DuplicatesFilter(type="duplicates"),
        )
        found = self.run(tmp_path, make_workspace("c"), *filters, records=records)
        assert found == (["abc", "abcd"], {"1 length": 1, "2 regex": 1, "3 duplicates": 1})

    def test_duplicates_are_found_over_sources_that_look_for_them(self, tmp_path, make_workspace):
        only_new = (DuplicatesFilter(type="duplicates"),)
        texts = {"a": ["x", "y"], "b": ["y", "z"], "c": ["z", "x", "w"]}
        for name, lines in texts.items():
            write_lines(tmp_path / f"{name}.jsonl", *({"text": line} for line in lines))
        sources = {
            name: files(tmp_path / f"{name}.jsonl", format="jsonl", filters=filters)
            for name, filters in (("a", only_new), ("b", ()), ("c", only_new))
        }
        workspace = make_workspace("c")
        built = build(sources, workspace)
        assert texts_of(workspace) == ["x", "y", "y", "z", "z", "w"]
        assert built.facts["filtered"] == {"a 1 duplicates": 0, "c 1 duplicates": 1}

    def test_filters_are_part_of_the_recipe(self):
        one = {"type": "files", "paths": ["x"]}
        changes = [
            {},
            {"filters": [{"type": "duplicates"}]},
            {"filters": [{"type": "length", "min_bytes": 3}]},
            {"filters": [{"type": "length", "min_characters": 3}]},
            {"on_error": "skip"},
            {"validation": {"fraction": 0.5}},
            {"max_expansion": 50},
        ]
        ids = {recipes.corpus_recipe(dataset(source=one | c), "0" * 64).id for c in changes}
        assert len(ids) == len(changes)
        pinned = dataset(source=one | {"listing_sha256": "0" * 64})
        assert recipes.corpus_recipe(pinned, "0" * 64).id in ids


class TestSkipping:
    BAD = (
        '{"text": "fine"}',
        '{"text": "cut off',
        '{"txt": 1}',
        '{"text": 3}',
        "[1]",
        '{"text": "\\ud800"}',
        '{"text": "also fine"}',
    )

    def test_bad_records_are_left_out_counted_and_listed(self, tmp_path, make_workspace):
        path = write_lines(tmp_path / "a.jsonl", *self.BAD)
        path.write_bytes(path.read_bytes() + b'{"text": "\xff"}\n' + b'{"text": "last"}\n')
        workspace = make_workspace("c")
        built = build(files(path, format="jsonl", on_error="skip"), workspace)
        assert texts_of(workspace) == ["fine", "also fine", "last"]
        assert ids_of(workspace) == ["a.jsonl#1", "a.jsonl#7", "a.jsonl#9"]
        assert built.facts["skipped"] == {
            "empty": 0, "not JSON": 1, "field": 3, "no object": 1, "undecodable": 1
        }  # fmt: skip
        listed = built.facts["first_skipped"]
        assert [line.split("a.jsonl:")[1].split(":")[0] for line in listed] == list("234568")

    def test_by_default_the_first_is_an_error(self, tmp_path, make_workspace):
        path = write_lines(tmp_path / "a.jsonl", *self.BAD)
        with pytest.raises(SourceError, match=r"a\.jsonl:2: not JSON"):
            build(files(path, format="jsonl"), make_workspace("c"))

    def test_more_than_the_cap_is_an_error(self, tmp_path, make_workspace):
        path = write_lines(tmp_path / "a.jsonl", *self.BAD)
        build(files(path, format="jsonl", on_error="skip", max_skipped=5), make_workspace("five"))
        source = files(path, format="jsonl", on_error="skip", max_skipped=4)
        with pytest.raises(SourceError, match=r"a\.jsonl:6.*`source\.max_skipped` \(4\)"):
            build(source, make_workspace("four"))

    def test_a_line_that_is_too_long_is_passed_over(self, tmp_path, make_workspace):
        long = {"text": "x" * 5000}
        path = write_lines(tmp_path / "a.jsonl", {"text": "1"}, long, {"text": "3"}, long)
        source = files(path, format="jsonl", on_error="skip", max_document_bytes=1000)
        workspace = make_workspace("c")
        built = build(source, workspace)
        assert ids_of(workspace) == ["a.jsonl#1", "a.jsonl#3"]
        assert built.facts["skipped"] == {"empty": 0, "too long": 2}

    def test_a_damaged_file_is_left_out_as_a_whole(self, tmp_path, make_workspace):
        lines = "".join(f'{{"text": "line {i}"}}\n' for i in range(5000)).encode()
        whole = gzip.compress(lines, mtime=0)
        (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
        (tmp_path / "b.jsonl").write_bytes(b"")
        write_lines(tmp_path / "c.jsonl", {"text": "whole"})
        workspace = make_workspace("c")
        built = build(files(tmp_path, format="jsonl", on_error="skip"), workspace)
        assert texts_of(workspace) == ["whole"]
        assert built.facts["skipped"] == {"empty": 0, "damaged file": 1, "empty file": 1}
        assert "a.jsonl.gz: damaged, or not jsonl" in built.facts["first_skipped"][0]

    def test_rows_and_texts_too(self, tmp_path, make_workspace):
        table = pa.table({"text": ["fine", None, "good"]})
        parquet.write_table(table, tmp_path / "a.parquet")
        workspace = make_workspace("c")
        source = files(tmp_path / "a.parquet", format="parquet", on_error="skip")
        assert build(source, workspace).facts["skipped"] == {"empty": 0, "field": 1}
        assert ids_of(workspace) == ["a.parquet#1", "a.parquet#3"]
        (tmp_path / "t").mkdir()
        (tmp_path / "t" / "1.txt").write_bytes(b"caf\xe9")
        (tmp_path / "t" / "2.txt").write_text("café")
        texts = make_workspace("t")
        assert build(files(tmp_path / "t", on_error="skip"), texts).facts["skipped"] == {
            "empty": 0,
            "undecodable": 1,
        }
        assert ids_of(texts) == ["2.txt"]


COMPRESS = {
    "gz": partial(gzip.compress, mtime=0),
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": partial(pa.compress, codec="zstd", asbytes=True),
}


class TestBombs:
    @pytest.mark.parametrize("suffix", COMPRESS)
    @pytest.mark.parametrize("kind", ["text", "jsonl", "paragraphs"])
    def test_a_bomb_is_an_error_before_it_is_read(self, suffix, kind, tmp_path, make_workspace):
        line = b'{"text": "' + b"a" * 200_000 + b'"}\n'
        path = tmp_path / f"bomb.{suffix}"
        path.write_bytes(COMPRESS[suffix](line * 100))
        complaint = rf"bomb\.{suffix}: \d+ stored bytes hold (\d+) bytes .*over 100 times"
        with pytest.raises(SourceError, match=complaint) as error:
            build(files(path, format=kind), make_workspace("c"))
        read = int(re.search(complaint, str(error.value))[1])
        assert read < 100 * path.stat().st_size + 4_000_000 < 20_000_000

    def test_what_is_right_can_be_allowed_and_what_is_small_is(self, tmp_path, make_workspace):
        line = b'{"text": "' + b"again and " * 2000 + b'"}\n'
        path = tmp_path / "a.jsonl.gz"
        path.write_bytes(gzip.compress(line * 200))
        with pytest.raises(SourceError, match=r"raise `source\.max_expansion`"):
            build(files(path, format="jsonl"), make_workspace("a"))
        build(files(path, format="jsonl", max_expansion=1000), make_workspace("b"))
        path.write_bytes(gzip.compress(line * 50))
        build(files(path, format="jsonl"), make_workspace("small"))

    def test_tables_that_repeat_themselves_are_bombs_too(self, tmp_path, make_workspace):
        words = pa.array(["x" * 10_000] * 2000).dictionary_encode()
        parquet.write_table(pa.table({"text": words}), tmp_path / "a.parquet")
        with pytest.raises(SourceError, match=r"a\.parquet: \d+ stored .*over 100 times"):
            build(files(tmp_path / "a.parquet", format="parquet"), make_workspace("c"))

    @pytest.mark.parametrize("kind", ["file", "stream"])
    @pytest.mark.parametrize("codec", ["zstd", "lz4"])
    def test_compressed_buffers_are_bombs_before_they_are_decompressed(
        self, kind, codec, tmp_path, make_workspace, monkeypatch
    ):
        place = tmp_path / "place"
        place.mkdir()
        table = pa.table({"text": ["x" * 1_000_000] * 5, "other": ["y" * 9_000_000] * 5})
        options = pa.ipc.IpcWriteOptions(compression=codec)
        new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
        with new(str(place / "bomb"), table.schema, options=options) as writer:
            writer.write_table(table, max_chunksize=2)
        with new(str(place / "fine"), table.schema, options=options) as writer:
            writer.write_table(pa.table({"text": ["fine"], "other": ["fine"]}))
        with monkeypatch.context() as patch:
            patch.setattr(formats, "table_documents", None)  # no row is asked for
            with pytest.raises(SourceError, match=r"bomb: \d+ stored bytes hold 500\d{5} bytes"):
                build(files(place / "bomb", format="arrow"), make_workspace("c"))
        workspace = make_workspace("d")
        built = build(files(place, format="arrow", on_error="skip"), workspace)
        assert built.facts["skipped"] == {"empty": 0, "expands too much": 1}
        assert texts_of(workspace) == ["fine"]
        workspace = make_workspace("e")
        build(files(place, format="arrow", max_expansion=100_000), workspace)
        assert sorted(map(len, texts_of(workspace))) == [4, *[1_000_000] * 5]

    @pytest.mark.parametrize("kind", ["parquet", "arrow"])
    def test_no_more_is_decoded_of_a_repeated_text_than_stops_the_bomb(
        self, kind, tmp_path, make_workspace
    ):
        place = tmp_path / "place"
        place.mkdir()
        text = pa.DictionaryArray.from_arrays(
            pa.array(np.zeros(20_000, np.int32)), pa.array(["x" * 2_000_000])
        )  # 40 GB
        table = pa.table({"text": text, "id": pa.array(np.arange(20_000))})
        if kind == "parquet":
            parquet.write_table(table, place / "bomb", compression="zstd")
        else:
            with pa.ipc.new_file(str(place / "bomb"), table.schema) as writer:
                writer.write_table(table)
        for fields in ({}, {"id_field": "id"}):
            source = files(place / "bomb", format=kind, **fields)
            peak = pa.total_allocated_bytes()
            with pytest.raises(SourceError, match=r"bomb: \d+ stored .*over 100 times"):
                build(source, make_workspace(f"{kind}-{len(fields)}"))
            assert pa.total_allocated_bytes() - peak < 10_000_000
        skipping = files(place, format=kind, on_error="skip")
        with pytest.raises(SourceError, match=r"none to train on.*'expands too much': 1"):
            build(skipping, make_workspace("d"))

    def test_a_bomb_can_be_left_out(self, tmp_path, make_workspace):
        (tmp_path / "bomb.gz").write_bytes(gzip.compress(b"\n" * 5_000_000))
        (tmp_path / "fine.txt").write_text("fine")
        workspace = make_workspace("c")
        built = build(files(tmp_path, on_error="skip"), workspace)
        assert built.facts["skipped"] == {"empty": 0, "expands too much": 1}
        assert texts_of(workspace) == ["fine"]


class TestPins:
    def test_files_and_listings_are_what_they_are_pinned_to(self, tmp_path):
        (tmp_path / "a.txt").write_text("one")
        (tmp_path / "b.txt").write_text("two")
        sha256 = hashlib.sha256(b"one").hexdigest()
        root = corpus.scan(files(tmp_path), validation=HALF).root
        pinned = files(tmp_path, sha256={"a.txt": sha256}, listing_sha256=root)
        assert corpus.scan(pinned, validation=HALF).root == root
        (tmp_path / "b.txt").write_text("twO")
        with pytest.raises(SourceError, match=rf"2 files have the listing .* pins it to {root}"):
            corpus.scan(pinned, validation=HALF)
        (tmp_path / "a.txt").write_text("onE")
        with pytest.raises(SourceError, match=rf"a\.txt: has SHA-256 .* pins it to {sha256}"):
            corpus.scan(pinned, validation=HALF)
        (tmp_path / "a.txt").unlink()
        with pytest.raises(SourceError, match=r"pins 'a\.txt', which is not among the files"):
            corpus.scan(pinned, validation=HALF)

    def test_the_asset_shows_what_to_pin(self, tmp_path, make_workspace):
        path = tmp_path / "a.txt"
        path.write_text("one")
        alone = build(files(path), make_workspace("alone")).facts["listing"]
        assert corpus.scan(files(path, listing_sha256=alone), validation=HALF).roots == alone
        named = build({"here": files(path)}, make_workspace("named")).facts["listing"]
        pinned = {"here": files(path, listing_sha256=named["here"])}
        assert corpus.scan(pinned, validation=HALF).roots == named


def rest(path: Path) -> None:
    """Lets a file look as if it had not been touched for a while."""
    past = path.stat().st_mtime_ns - 10**12
    os.utime(path, ns=(past, past))


class TestMemo:
    @pytest.fixture
    def memo(self, tmp_path, monkeypatch):
        monkeypatch.setattr("modeling.data.digests._REST_NS", -1)
        return DigestMemo(tmp_path / "memo" / "digests.sqlite")

    def reads(self, monkeypatch):
        """Returns a list that grows by each file that is opened."""
        opened = []
        real = FoundFile.open

        def spy(file):
            opened.append(file.logical_path)
            return real(file)

        monkeypatch.setattr("modeling.data.sources.FoundFile.open", spy)
        return opened

    def test_unchanged_files_are_not_read_again(self, tmp_path, memo, monkeypatch):
        source = files(tmp_path / "src")
        for name in "ab":
            (tmp_path / "src").mkdir(exist_ok=True)
            (tmp_path / "src" / name).write_text(name)
        opened = self.reads(monkeypatch)
        first = corpus.scan(source, validation=HALF, memo=memo)
        assert opened == ["a", "b"]
        opened.clear()
        assert corpus.scan(source, validation=HALF, memo=memo) == first
        assert opened == []
        assert corpus.scan(source, validation=HALF) == first
        assert opened == ["a", "b"]

    def test_a_changed_file_of_the_same_size_is_seen_even_with_its_time_restored(
        self, tmp_path, memo, monkeypatch
    ):
        path = tmp_path / "a.txt"
        path.write_text("one")
        before = path.stat()
        first = corpus.scan(files(path), validation=HALF, memo=memo)
        opened = self.reads(monkeypatch)
        path.write_text("two")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        second = corpus.scan(files(path), validation=HALF, memo=memo)
        assert opened == ["a.txt"]
        assert second.files[0].sha256 == hashlib.sha256(b"two").hexdigest()
        assert first.root != second.root

    def test_what_a_scan_has_read_before_it_fails_is_remembered(self, tmp_path, memo, monkeypatch):
        (tmp_path / "src").mkdir()
        for name, text in (("a", "one"), ("b", "")):
            (tmp_path / "src" / name).write_text(text)
        opened = self.reads(monkeypatch)
        for _ in range(2):
            with pytest.raises(SourceError, match="b: empty"):
                corpus.scan(files(tmp_path / "src"), validation=HALF, memo=memo)
        assert opened == ["a", "b"]

    def test_scans_do_not_wait_for_each_other(self, tmp_path, memo):
        path = tmp_path / "a.txt"
        path.write_text("one")
        (file,) = find_files(files(path))
        with memo.session() as one, memo.session() as other:
            for session, size in ((one, 3), (other, 4), (one, 5)):
                session.keep(file, file.stamp(), size, "x")
                session.write()
                assert session.find(file) == (size, "x")
            other.keep(file, file.stamp(), 6, "y")
        with memo.session() as later:
            assert later.find(file) == (6, "y")

    def test_a_file_that_was_just_written_is_not_trusted(self, tmp_path, monkeypatch):
        monkeypatch.setattr("modeling.data.digests._REST_NS", 3600 * 10**9)
        memo = DigestMemo(tmp_path / "digests.sqlite")
        (tmp_path / "a.txt").write_text("one")
        opened = self.reads(monkeypatch)
        for _ in range(2):
            corpus.scan(files(tmp_path / "a.txt"), validation=HALF, memo=memo)
        assert opened == ["a.txt", "a.txt"]

    def test_a_damaged_memory_is_told_with_its_remedy(self, tmp_path):
        path = tmp_path / "x"
        path.write_text("x")
        memo = DigestMemo(tmp_path / "digests.sqlite")
        corpus.scan(files(path), validation=HALF, memo=memo)
        (tmp_path / "digests.sqlite").write_bytes(b"SQLite format 3\0" + b"noise" * 999)
        with pytest.raises(StorageError, match=r"digests\.sqlite: .*delete it: files are"):
            corpus.scan(files(path), validation=HALF, memo=memo)
        (tmp_path / "digests.sqlite").unlink()
        corpus.scan(files(path), validation=HALF, memo=memo)

    def test_only_files_with_a_stamp_are_remembered(self, tmp_path, memo, monkeypatch):
        import fsspec

        fsspec.filesystem("memory").pipe_file("/memo/a.txt", b"one")
        opened = self.reads(monkeypatch)
        for _ in range(2):
            corpus.scan(files("memory://memo/a.txt"), validation=HALF, memo=memo)
        assert opened == ["a.txt", "a.txt"]


def test_an_installed_package_is_a_source(make_workspace):
    source = PackageSource(type="package", package="json")
    workspace = make_workspace("c")
    build(source, workspace)
    assert ids_of(workspace) == [
        "json/__init__.py", "json/decoder.py", "json/encoder.py", "json/scanner.py",
        "json/tool.py",
    ]  # fmt: skip
    for package, complaint in [("no_such_package", "not installed"), ("this", "not a package")]:
        with pytest.raises(SourceError, match=complaint):
            find_files(PackageSource(type="package", package=package))


def test_a_full_disk_is_said_and_nothing_committed_is_lost(tmp_path):
    store = ArtifactStore(str(tmp_path / "store"))
    draw = random.Random(0)
    for index in range(3):
        write_lines(tmp_path / f"{index}.jsonl", {"text": draw.randbytes(40_000 * index).hex()})

    def make(name: str):
        source = files(tmp_path / f"{name}.jsonl", format="jsonl")
        listing = corpus.scan(source, validation=ALL_TRAIN)
        recipe = Recipe("raw_corpus", 1, listing.root)
        return store.materialize(recipe, lambda space: corpus.build(source, listing, space))

    made, _ = make("1")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(DiskFullError, match=r"no space for the documents .*File too large"):
            make("2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert make("1") == (made, False)
    verify_files(store.local(made.kind, made.content_id))
    assert make("2")[1]
