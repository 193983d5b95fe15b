"""Datasets of `datasets`: of a local directory, streamed or copied, and saved to disk."""

import json
import os
import subprocess
import sys

import pytest

from modeling.data import corpus, tokenizer
from modeling.data.config import DatasetConfig
from modeling.data.sources import SourceError
from modeling.data.sources_config import (
    HuggingFaceSource,
    RegexFilter,
    SavedDatasetSource,
    ValidationConfig,
    ValidationSplit,
)
from modeling.data.tokenizers_config import PretrainedTokenizerConfig
from modeling.experiment import ConfigError, validate
from tests.data.fake_hub import FakeHub

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


CANARY = "hf_canarycanarycanarycanarycanary"
ASKS = """
import json, sys, time
from pathlib import Path
from modeling.artifacts import Workspace
from modeling.data import corpus, tokenizer
from modeling.data.config import DatasetConfig
from modeling.data.sources_config import ValidationConfig
from modeling.experiment import validate

time.sleep = lambda seconds: None  # between tries, for half a minute in all
root, cases, found = Path(sys.argv[1]), json.loads(sys.argv[2]), {}
for name, fields in cases.items():
    space = Workspace(root / name / "progress", root / name / "output")
    space.progress.mkdir(parents=True)
    space.output.mkdir()
    dataset = validate(DatasetConfig, fields | {"sequence_lengths": [16]}, "d.yaml")
    try:
        if dataset.tokenizer.type == "pretrained":
            built = tokenizer.build(dataset.tokenizer, None, space)
        else:
            source, validation = dataset.source, ValidationConfig(fraction=0.0)
            built = corpus.build(source, corpus.scan(source, validation=validation), space)
        found[name] = built.content_id
    except ValueError as error:
        found[name] = str(error)
print(json.dumps(found))
"""


def ask(hub, root, cases):
    """Builds what a process that knows of this hub alone makes of each case."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(root / "hf"),
        "HF_TOKEN": CANARY,
        "HF_HUB_OFFLINE": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", ASKS, str(root), json.dumps(cases)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert CANARY not in done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_hub_gives_the_bytes_of_a_commit_and_the_token_goes_nowhere_else(
    chain, places, tmp_path, make_workspace
):
    bpe = {"type": "bpe", "vocab_size": 300}

    def texts(name, revision=COMMIT, **fields):
        source = {"type": "huggingface", "id": f"owner/{name}", "revision": revision}
        return {"source": source | fields, "tokenizer": bpe}

    def vocabulary(name, revision=COMMIT):
        taken = {"type": "pretrained", "hub": f"owner/{name}", "revision": revision}
        anything = {"type": "files", "paths": ["a.txt"]}
        return {"source": anything, "tokenizer": taken | {"eos_token": "<|endoftext|>"}}

    hub = FakeHub()
    of_tokenizer = {path.name: path.read_bytes() for path in chain.tokenizer_dir.iterdir()}
    hub.repositories["models", "owner/vocabulary", COMMIT] = of_tokenizer | {"big.bin": b"0"}
    lines = (places / "dir" / "train.jsonl").read_bytes()
    for name in ("texts", "odd"):
        hub.repositories["datasets", f"owner/{name}", COMMIT] = {"train.jsonl": lines}
    hub.answers_with["owner/odd"] = COMMIT[::-1]
    hub.gone.add("owner/gone")
    with hub.serving():
        found = ask(hub, tmp_path, {
            "copied": texts("texts"),
            "streamed": texts("texts", streaming=True),
            "other commit": texts("texts", COMMIT[::-1]),
            "odd": texts("odd"),
            "gone": texts("gone"),
            "vocabulary": vocabulary("vocabulary"),
            "vocabulary of another commit": vocabulary("vocabulary", COMMIT[::-1]),
            "no vocabulary": vocabulary("nothing"),
            "gone vocabulary": vocabulary("gone"),
        })  # fmt: skip

    assert found["copied"] == found["streamed"]
    documents = [d.text for d in corpus.documents(tmp_path / "copied" / "output")]
    assert documents == [record["text"] for record in RECORDS]
    for name in ("other commit", "odd"):  # it answers with another commit than the one pinned
        assert found[name].startswith(f"owner/{'odd' if name == 'odd' else 'texts'}@")
        assert "doesn't exist" in found[name]
    assert found["gone"].startswith(f"owner/gone@{COMMIT[:12]}, split train: cannot be opened")

    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "tokenizer.json").write_bytes(of_tokenizer["tokenizer.json"])
    local = PretrainedTokenizerConfig(
        type="pretrained", path=str(tmp_path / "here"), eos_token="<|endoftext|>"
    )
    assert found["vocabulary"] == tokenizer.build(local, None, make_workspace("local")).content_id
    for name in ("vocabulary of another commit", "no vocabulary"):
        assert "tokenizer.hub: owner/" in found[name]
        assert "cannot be fetched: 404" in found[name]
    assert found["gone vocabulary"].startswith(
        f"tokenizer.hub: owner/gone at {COMMIT} cannot be fetched: "
    )
    asked = [path for path, _ in hub.asked]
    assert sum("api/models/owner/gone" in path for path in asked) > 1, "it is tried again"
    assert not [path for path in asked if "big.bin" in path], "only what is needed is fetched"
    assert CANARY in {token.removeprefix("Bearer ") for _, token in hub.asked}
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in kept if CANARY.encode() in path.read_bytes()]
