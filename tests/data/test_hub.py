"""Datasets of `datasets`: of a local directory, streamed or copied, and saved to disk."""

import json
import subprocess
import sys

import pytest

from modeling.data import corpus
from modeling.data.config import (
    DatasetConfig,
    HuggingFaceSource,
    RegexFilter,
    SavedDatasetSource,
    ValidationConfig,
    ValidationSplit,
)
from modeling.data.sources import SourceError
from modeling.experiment import ConfigError, validate

ALL_TRAIN = ValidationConfig(fraction=0.0)
RECORDS = [{"id": i, "text": f"text {i}, naïve 日本語", "lang": "ab"[i % 2]} for i in range(2500)]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    import datasets

    root = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        (root / "dir").mkdir()
        for name, records in [("train", RECORDS), ("validation", RECORDS[:7])]:
            lines = "".join(json.dumps(record) + "\n" for record in records)
            (root / "dir" / f"{name}.jsonl").write_text(lines)
        saved = datasets.Dataset.from_list(RECORDS)
        saved.save_to_disk(root / "saved")
        both = datasets.DatasetDict(train=saved, validation=saved.select(range(7)))
        both.save_to_disk(root / "both")
        yield root


def build(source, workspace, validation=ALL_TRAIN):
    return corpus.build(source, corpus.scan(source, validation=validation), workspace)


def local(places, **fields):
    return HuggingFaceSource(type="huggingface", path=str(places / "dir"), **fields)


def saved(places, name, **fields):
    return SavedDatasetSource(type="saved_dataset", path=str(places / name), **fields)


def test_a_directory_gives_the_same_documents_streamed_and_copied(places, make_workspace):
    spaces = {streaming: make_workspace(str(streaming)) for streaming in (False, True)}
    built = {s: build(local(places, streaming=s), space) for s, space in spaces.items()}
    assert built[True].content_id == built[False].content_id
    found = list(corpus.documents(spaces[True].output))
    assert [d.text for d in found] == [r["text"] for r in RECORDS]
    assert [found[0].doc_id, found[-1].doc_id] == ["train#1", "train#2500"]


def test_a_split_can_be_held_out(places, make_workspace):
    held = ValidationSplit(type="split")
    for number, source in enumerate([local(places), saved(places, "both", split="train")]):
        built = build(source, make_workspace(f"{number}"), held)
        assert built.facts["documents"] == {"train": 2500, "validation": 7}
    with pytest.raises(SourceError, match="both trained on and held out"):
        build(local(places, split="validation"), make_workspace("same"), held)


def test_saved_datasets_are_read_filtered_and_named(places, make_workspace):
    workspace = make_workspace("c")
    regex = RegexFilter(type="regex", pattern="b", field="lang")
    build(saved(places, "saved", id_field="id", filters=(regex,)), workspace)
    found = list(corpus.documents(workspace.output))
    assert [d.doc_id for d in found] == [str(i) for i in range(1, 2500, 2)]


def test_what_is_not_there_is_an_error(places, tmp_path, make_workspace):
    for number, (source, complaint) in enumerate(
        [
            (local(places, split="test"), r"dir, split test: .*test"),
            (local(places, text_field="body"), r"no column 'body' \(found \['id', 'text', 'lang'"),
            (saved(places, "both"), r"`source\.split` is None, saved is: \['train', 'validation'"),
            (saved(places, "saved", split="x"), r"`source\.split` is 'x', saved is: \['the only"),
            (saved(places, "dir"), r"dir: "),
        ]
    ):
        with pytest.raises(SourceError, match=complaint):
            build(source, make_workspace(str(number)))
    with pytest.raises(SourceError, match="no such file or directory"):
        corpus.scan(saved(tmp_path, "none"), validation=ALL_TRAIN)


def test_a_directory_that_changes_meanwhile_is_an_error(places, tmp_path, make_workspace):
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n')
    source = HuggingFaceSource(type="huggingface", path=str(tmp_path), streaming=True)
    listing = corpus.scan(source, validation=ALL_TRAIN)
    (tmp_path / "train.jsonl").write_text('{"text": "two"}\n')
    with pytest.raises(SourceError, match=r"train\.jsonl: changed while"):
        corpus.build(source, listing, make_workspace("c"))


def dataset(**source):
    fields = {"source": {"type": "huggingface"} | source, "sequence_lengths": [16]}
    tokenizer = {"tokenizer": {"type": "bpe", "vocab_size": 300}}
    return validate(DatasetConfig, fields | tokenizer, "d.yaml")


def test_what_lies_on_the_hub_is_pinned_by_its_commit():
    source = dataset(id="owner/name", revision=COMMIT, name="en").source
    (file,) = corpus.scan(source, validation=ALL_TRAIN).files
    assert (file.logical_path, file.location) == ("owner/name/en/train", "")
    roots = {
        corpus.scan(dataset(**fields).source, validation=ALL_TRAIN).root
        for fields in [
            {"id": "owner/name", "revision": COMMIT},
            {"id": "owner/name", "revision": COMMIT[::-1]},
            {"id": "owner/name", "revision": COMMIT, "split": "test"},
            {"id": "owner/name", "revision": COMMIT, "name": "en"},
        ]
    }
    assert len(roots) == 4


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"id": "owner/name"}, "`revision` None is no commit.*git ls-remote .*owner/name"),
        ({"id": "owner/name", "revision": "main"}, "`revision` 'main' is no commit"),
        ({"id": "owner/name", "revision": COMMIT[:12]}, "40 hex digits"),
        ({"path": "/x", "revision": COMMIT}, "has no `revision`"),
        ({"id": "owner/name", "path": "/x"}, "either `id`"),
        ({}, "either `id`"),
        ({"id": "a/b", "revision": COMMIT, "trust_remote_code": True}, "no such field"),
    ],
)
def test_what_could_move_is_refused(fields, complaint):
    with pytest.raises(ConfigError, match=complaint):
        dataset(**fields)


def test_the_library_is_imported_only_to_read_such_a_source():
    code = "import sys, modeling.data.corpus; print('datasets' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
