"""Every asset check fails on an artifact that is really damaged, and stops what would follow.

Most damages are repaired in the artifact's inventory, as if the build itself had gone wrong: then
only what the check knows about its stage can find them.
"""

import dataclasses
import json
import re
import shutil

import dagster as dg
import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import load_file, save_file

from modeling.artifacts import write_durably
from modeling.data.shards import map_shard, write_shard
from modeling.inventory import INVENTORY, file_sha256

RAW_CORPUS, TOKENIZER = ("tales", "raw_corpus"), ("tales", "tokenizer")
TOKENIZED, CACHE = ("tales", "tokenized_corpus"), ("tales", "token_cache", "L32")
CHECKPOINT, REPORT, MODEL = ("tiny", "checkpoint"), ("tiny", "eval_report"), ("tiny", "hf_model")
CHECKS = {
    RAW_CORPUS: ("counts_add_up", "documents.arrow"),
    TOKENIZER: ("round_trips", "tokenizer.json"),
    TOKENIZED: ("shards_are_whole", "train-00000.arrow"),
    CACHE: ("rows_are_the_stream", "index.json"),
    CHECKPOINT: ("leaves_verify", "losses.json"),
    REPORT: ("figures_agree", "report.html"),
    MODEL: ("files_are_whole", "README.md"),
}


@pytest.fixture
def copied(chain, first_run, tmp_path):
    """The built chain, copied with its instance: it may be damaged, and its checks may fail."""
    copy = chain.under(tmp_path)
    for name in ("home", "store_directory"):
        shutil.copytree(getattr(chain, name), getattr(copy, name))
    return copy


def files_of(chain, key):
    artifact = chain.artifact(*key)
    return chain.store_directory / "objects" / artifact.kind / artifact.content_id


def publish_as_if_built(directory):
    """Makes the inventory tell of the files as they are now."""

    def tell(inventory):
        for entry in inventory["files"]:
            path = directory / entry["path"]
            entry |= {"size": path.stat().st_size, "sha256": file_sha256(path)}

    edit_inventory(directory, tell)


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_inventory(directory, change):
    content = json.loads((directory / INVENTORY).read_text())
    change(content)
    write_durably(directory / INVENTORY, content)


def check(chain, key, name):
    """Runs one check, as its job would, and returns its evaluation."""
    selection = dg.AssetSelection.checks(dg.AssetCheckKey(dg.AssetKey(list(key)), name))
    defs = dg.Definitions.merge(
        chain.defs(), dg.Definitions(jobs=[dg.define_asset_job("one_check", selection)])
    )
    with chain.instance() as instance:
        result = defs.resolve_job_def("one_check").execute_in_process(
            instance=instance, raise_on_error=False
        )
    (evaluation,) = result.get_asset_check_evaluations()
    return evaluation


def assert_fails(chain, key, name, *expected):
    evaluation = check(chain, key, name)
    assert not evaluation.passed
    assert evaluation.severity == dg.AssetCheckSeverity.ERROR
    assert evaluation.blocking
    for words in expected:
        assert words in evaluation.description


@pytest.mark.parametrize("key", CHECKS, ids=lambda key: key[1])
def test_a_flipped_byte_fails_the_check(copied, key):
    name, file = CHECKS[key]
    path = files_of(copied, key) / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert_fails(copied, key, name, f"{file} has other bytes than were published")


@pytest.mark.parametrize("key", CHECKS, ids=lambda key: key[1])
def test_an_intact_artifact_passes(chain, first_run, key):
    assert check(chain, key, CHECKS[key][0]).passed


def lose_a_document(files):
    table = pa.ipc.open_file((files / "documents.arrow").read_bytes()).read_all()
    with pa.ipc.new_file(str(files / "documents.arrow"), table.schema) as writer:
        writer.write_table(table.slice(1))
    publish_as_if_built(files)


def test_a_lost_document_fails(copied):
    lose_a_document(files_of(copied, RAW_CORPUS))
    assert_fails(copied, RAW_CORPUS, "counts_add_up", "54 documents read back, 55 counted")


def test_a_tokenizer_that_loses_case_fails(copied):
    files = files_of(copied, TOKENIZER)
    edit_json(files / "tokenizer.json", lambda content: content.update(
        normalizer={"type": "Lowercase"}))  # fmt: skip
    publish_as_if_built(files)
    assert_fails(copied, TOKENIZER, "round_trips", "encodes", "when it was built with")
    edit_json(files / "probe.json", lambda content: content.update(texts=[], ids=[]))
    publish_as_if_built(files)
    assert_fails(copied, TOKENIZER, "round_trips", "comes back as", "hello, world!")


@pytest.mark.parametrize(
    ("position", "token", "expected"),
    [(0, 320, "id 320; the vocabulary has 320"), (-1, 5, "1 documents do not end with id 0")],
    ids=["beyond-vocabulary", "no-end-of-text"],
)
def test_a_wrong_token_fails(copied, position, token, expected):
    files = files_of(copied, TOKENIZED)
    tokens, offsets, _ = map_shard(files / "train-00000.arrow", np.dtype(np.uint16))
    changed = tokens.copy()
    changed[position] = token
    write_shard(files / "train-00000.arrow", changed, np.diff(offsets))
    publish_as_if_built(files)
    assert_fails(copied, TOKENIZED, "shards_are_whole", expected)


def test_a_lost_document_of_tokens_fails(copied):
    files = files_of(copied, TOKENIZED)
    tokens, offsets, _ = map_shard(files / "train-00000.arrow", np.dtype(np.uint16))
    shorter = tokens[: offsets[-2]].copy()
    write_shard(files / "train-00000.arrow", shorter, np.diff(offsets)[:-1])
    publish_as_if_built(files)
    assert_fails(copied, TOKENIZED, "shards_are_whole", "54 documents read back, 55 in manifest")


def test_a_cache_with_a_row_too_few_fails(copied):
    files = files_of(copied, CACHE)

    def drop_a_row(content):
        content["splits"]["train"]["rows"] -= 1

    edit_json(files / "index.json", drop_a_row)
    publish_as_if_built(files)
    assert_fails(copied, CACHE, "rows_are_the_stream", "its train rows are not the tokens of")


def test_a_cache_with_ids_beyond_its_vocabulary_fails(copied):
    files = files_of(copied, CACHE)
    edit_json(files / "index.json", lambda content: content.update(vocab_size=200))
    publish_as_if_built(files)
    assert_fails(copied, CACHE, "rows_are_the_stream", "train: row 0 has id", "of 200")


def test_a_chunk_of_weights_that_changed_fails(copied):
    files = files_of(copied, CHECKPOINT)
    manifest = json.loads((files / "manifest.json").read_text())
    chunk = files / manifest["leaves"][0]["chunks"][0]["file"]["path"]
    content = bytearray(chunk.read_bytes())
    content[0] ^= 1
    chunk.write_bytes(content)
    publish_as_if_built(files)
    assert_fails(copied, CHECKPOINT, "leaves_verify", str(chunk.relative_to(files)))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda losses: losses.reverse(), "is not below the first"),
        (lambda losses: losses.__setitem__(3, float("nan")), "the loss of step 4 is nan"),
        (lambda losses: losses.pop(), "15 losses are on record for 16 steps"),
    ],
    ids=["rising", "nan", "short"],
)
def test_a_run_that_has_not_learned_fails(copied, change, expected):
    files = files_of(copied, CHECKPOINT)
    edit_json(files / "losses.json", lambda content: change(content["losses"]))
    publish_as_if_built(files)
    assert_fails(copied, CHECKPOINT, "has_learned", expected)


@pytest.mark.parametrize(
    ("figure", "value", "expected"),
    [("perplexity", 12.5, "is not exp("), ("loss", float("inf"), "loss is inf")],
)
def test_figures_that_do_not_agree_fail(copied, figure, value, expected):
    files = files_of(copied, REPORT)
    edit_json(files / "report.json", lambda content: content.update({figure: value}))
    publish_as_if_built(files)
    assert_fails(copied, REPORT, "figures_agree", expected)


def test_an_export_with_other_weights_fails(copied):
    files = files_of(copied, MODEL)
    tensors = load_file(files / "model.safetensors")
    tensors["transformer.ln_f.weight"] = tensors["transformer.ln_f.weight"] * np.float32(1.001)
    save_file(tensors, files / "model.safetensors", metadata={"format": "pt"})
    publish_as_if_built(files)
    assert_fails(copied, MODEL, "logits_match", "logits differ by", "> 1e-05")


def test_an_export_without_its_tokenizer_fails(copied):
    files = files_of(copied, MODEL)
    (files / "tokenizer.json").unlink()
    edit_inventory(files, lambda content: content.update(
        files=[e for e in content["files"] if e["path"] != "tokenizer.json"]))  # fmt: skip
    assert_fails(copied, MODEL, "files_are_whole", "tokenizer.json is missing")


def test_a_failed_check_stops_what_would_follow(copied, tmp_path):
    lose_a_document(files_of(copied, RAW_CORPUS))
    result = dataclasses.replace(copied, home=tmp_path / "home").run(job="tales__data")
    assert not result.success
    assert set(copied.was(result)) == {"tales/raw_corpus"}


def test_what_is_too_damaged_to_be_shown_is_named_by_file(copied, tmp_path):
    path = files_of(copied, TOKENIZER) / "tokenizer.json"
    path.write_text(path.read_text()[:-40])
    result = dataclasses.replace(copied, home=tmp_path / "home").run(job="tales__data")
    assert set(copied.was(result)) == {"tales/raw_corpus"}
    (failure,) = result.get_step_failure_events()
    told = failure.event_specific_data.error.to_string()
    assert re.search(r"DamagedArtifactError: .*tokenizer\.json has \d+ bytes, not \d+", told)
