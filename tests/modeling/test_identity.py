"""The ids of every stage, frozen: one that changes without its version raised is found here.

An id may change on purpose. Then `recipes.VERSIONS`, or the identity tag of what has another
meaning now, is raised in the same commit, and the new value is put here. Configuration that only
grows leaves all of them alone (`added_later`).
"""

import importlib
import pkgutil

import jax
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from tokenizers.models import WordLevel

import modeling
from haliax import Axis
from modeling import recipes
from modeling.artifacts import Artifact, Workspace
from modeling.data import tokenizer
from modeling.data.config import DatasetConfig, TokenCacheConfig
from modeling.data.tokenizers_config import PretrainedTokenizerConfig
from modeling.evaluation.heat_map import TokenView
from modeling.evaluation.results import Results, Sample, content_id, write
from modeling.experiment import ExperimentConfig, validate
from modeling.hf import export
from modeling.hf.gpt2 import from_tensors, to_tensors
from modeling.hf.model_card import LINEAGE
from modeling.models.gpt2 import Gpt2Config, Gpt2LmHeadModel
from modeling.training.manifest import (
    ChunkRecord,
    FileRecord,
    LeafRecord,
    Manifest,
    array_sha256,
)

DATASET = {
    "source": {"type": "files", "paths": ["a/*.txt"]},
    "tokenizer": {"type": "bpe", "vocab_size": 512},
    "sequence_lengths": [64],
}
EXPERIMENT = {
    "dataset": "some",
    "sequence_length": 64,
    "trainer": {"num_train_steps": 10, "train_batch_size": 4},
}
RECIPES = {
    "raw_corpus/1": "32836f0ec870c73aeedff8b4cbcc459db3f2817f9ba796a2bf2d73d7efd83ee9",
    "tokenizer/1": "93acc0c426ec2b348d412a6a99a7208ea9253067c955bf930a2090e782ede33b",
    "tokenized_corpus/2": "73f13617ffbc2669f2432619a186a08a01a95dab80c25acf99ee04eca84c5f1b",
    "token_cache/3": "1ff5c74ebf11d762937668b5a09057e7469a7052c790bf5dfdbd1ff5054a278f",
    "token_cache_copy/1": "6fd5c02a3d96424d18d69cb8cef0d9c567cd185f03ea1238a6817616a3056af5",
    "checkpoint/2": "e861e4532a08cedc06e8f50735c4ae2a5d0926c3b64872d1f4e4d77bdbef1b15",
    "eval_report/1": "af3b0e2acec188a7671986f45f64b90ae2b735243e3824f7792c0a01a56584da",
    "hf_model/1": "e22bfb283c517be3104caff5e3bbf2ddcf4dd374739b23521f8aaa87b32bf94e",
}
LEAVES = {
    "model.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "model.half": np.array([1.0, -0.0], ml_dtypes.bfloat16),
    "opt_state.count": np.array(3, np.int32),
    "averages.ema.weight": np.zeros((2, 3), np.float32),
}
CHECKPOINT = {
    "content_id": "7ab62c517b251f8ca0e54869946678d63509e324d46c6549aabc202623aa7cfb",
    "parameters": "e404073f21a6b0962b5a8a1f9aae3b4793f87dd76dfcc306f41d210cd97b8b02",
    "parameters.ema": "f1b5fded2def54d116024d4a6d2441ec067af4011c838975a4273b71ba3d7124",
}


RESULTS = Results(
    loss=0.1 + 0.2,
    perplexity=1.5,
    bits_per_byte=None,
    num_rows=1,
    num_tokens=3,
    num_bytes=7,
    loss_by_position=(1e-07, None, 2.0),
    samples=(Sample("a", "e\u0301\n", 2, "limit"),),
    row=(TokenView("a", None), TokenView("b", 0.25, (("c", 0.5),))),
)
REPORT = "35f1d7e75acef1c26ee326967136dcb25978f51c332f3311a815c216a98941a3"
EXPORT = {
    "bfloat16": "e468b8222645c55cba4638b5cddb1c31344249351d0336bf88b1660d198f20bb",
    "float32": "d5e17aaf4bb7c1c596927b783e4c8d49379ce6072caf165d281fa660800c7f58",
}


def artifact(kind: str, **roots: str) -> Artifact:
    content_id = f"{list(recipes.VERSIONS).index(kind):x}" * 64
    return Artifact(kind, content_id, "e" * 64, "exact", "file:///nowhere", roots, {})


def test_every_stage_has_the_recipe_id_on_record(monkeypatch):
    monkeypatch.setattr(recipes.importlib.metadata, "version", lambda package: "0.22.0")
    dataset = validate(DatasetConfig, DATASET, "dataset")
    experiment = validate(ExperimentConfig, EXPERIMENT, "experiment")
    corpus = artifact("raw_corpus", documents="d" * 64)
    vocabulary, tokens = artifact("tokenizer"), artifact("tokenized_corpus")
    cache, checkpoint = artifact("token_cache"), artifact("checkpoint", parameters="f" * 64)
    made = [
        recipes.corpus_recipe(dataset, "b" * 64),
        recipes.tokenizer_recipe(dataset, corpus),
        recipes.tokenized_recipe(dataset, corpus, vocabulary),
        recipes.cache_recipe(TokenCacheConfig(length=64), tokens),
        recipes.cache_copy_recipe(cache),
        recipes.checkpoint_recipe(experiment, cache),
        recipes.evaluation_recipe(experiment, checkpoint, cache.as_input(), vocabulary.as_input()),
        recipes.export_recipe(experiment, checkpoint, vocabulary.as_input()),
    ]
    found = {f"{recipe.kind}/{recipe.version}": recipe.id for recipe in made}
    assert set(found) == {f"{kind}/{version}" for kind, version in recipes.VERSIONS.items()}
    assert found == RECIPES


def manifest(leaves: dict[str, np.ndarray], rows: int = 40) -> Manifest:
    file = FileRecord("f", 1, "0" * 64)
    records = [
        LeafRecord(
            path, array.dtype.name, array.shape, None, array_sha256(array), array.shape, file,
            (ChunkRecord(file, (0,) * array.ndim, "0" * 8),),
        )
        for path, array in leaves.items()
    ]  # fmt: skip
    return Manifest(10, {"rows": rows}, {}, tuple(records), ())


def test_a_state_has_the_ids_on_record():
    state = manifest(LEAVES)
    assert {"content_id": state.content_id, **state.roots} == CHECKPOINT


@pytest.mark.parametrize(
    "change",
    [
        {"model.weight": LEAVES["model.weight"].T.copy()},
        {"model.weight": LEAVES["model.weight"].view(np.int32)},
        {"model.half": np.array([1.0, 0.0], ml_dtypes.bfloat16)},
        {"opt_state.count": np.array([3], np.int32)},
        {"model.more": np.zeros(0, np.float32)},
    ],
    ids=["shape", "dtype", "sign of zero", "rank", "an empty array"],
)
def test_a_state_that_differs_in_anything_has_another_id(change):
    assert manifest(LEAVES | change).content_id != manifest(LEAVES).content_id


def test_the_order_of_arrays_is_nothing_and_the_place_in_the_data_is_something():
    assert manifest(dict(reversed(LEAVES.items()))).content_id == manifest(LEAVES).content_id
    assert manifest(LEAVES, rows=44).content_id != manifest(LEAVES).content_id
    assert manifest(LEAVES, rows=44).parameters == manifest(LEAVES).parameters


def test_a_report_has_the_id_on_record(tmp_path):
    write(RESULTS, tmp_path)
    assert content_id(tmp_path) == REPORT


@pytest.mark.parametrize("dtype", sorted(EXPORT))
def test_an_export_has_the_id_on_record(tmp_path, dtype):
    """Of weights and a tokenizer that no library has computed."""
    config = Gpt2Config(hidden_dim=4, num_layers=2, num_heads=2)
    Vocab, Pos = Axis("vocab", 3), Axis("position", 5)
    blueprint = to_tensors(Gpt2LmHeadModel.init(Vocab, Pos, config, key=jax.random.key(0)))
    tensors = {
        name: np.arange(tensor.size, dtype=np.float32).reshape(tensor.shape) / 7
        for name, tensor in blueprint.items()
    }
    places = {name: tmp_path / name for name in ("tokenizer", "export")}
    for place in places.values():
        place.mkdir()
    words = tokenizers.Tokenizer(WordLevel({"<end>": 0, "<unk>": 1, "word": 2}, "<unk>"))
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    taken = PretrainedTokenizerConfig(type="pretrained", path=str(tmp_path))
    tokenizer.build(taken, None, Workspace(tmp_path, places["tokenizer"]))
    made = export.write(
        from_tensors(tensors, config, Vocab, Pos),
        places["tokenizer"],
        {kind: kind[0] * 64 for kind, _ in LINEAGE},
        places["export"],
        dtype=dtype,
    )
    assert made.content_id == EXPORT[dtype]


def test_no_two_classes_share_an_identity_tag():
    """Two with equal fields would be one thing to every recipe."""
    owners: dict[str, set[str]] = {}
    for module in pkgutil.walk_packages(modeling.__path__, "modeling."):
        if module.name.endswith("__main__"):
            continue
        for value in vars(importlib.import_module(module.name)).values():
            tag = vars(value).get("identity_tag") if isinstance(value, type) else None
            if isinstance(tag, str):
                owners.setdefault(tag, set()).add(f"{value.__module__}.{value.__qualname__}")
    assert len(owners) > 20
    assert {tag: names for tag, names in owners.items() if len(names) > 1} == {}
