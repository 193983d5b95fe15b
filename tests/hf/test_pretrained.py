"""Models read back from Hugging Face directories: our own exports, and sharded ones."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from modeling.artifacts import Workspace
from modeling.hf import export
from modeling.hf.model_card import LINEAGE
from modeling.hf.pretrained import load_pretrained
from modeling.hf.reference import read_tensors
from modeling.models.gpt2 import with_vocab_rows
from modeling.models.trained import load_model
from modeling.training import checkpoint
from modeling.training.leaves import snapshot


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    output = tmp_path_factory.mktemp("pretrained")
    export.build(
        trained.experiment,
        trained.checkpoint_dir,
        trained.tokenizer_dir,
        {kind: "0" * 64 for kind, _ in LINEAGE},
        Workspace(output / "progress", output),
    )
    return output


@pytest.fixture
def sharded(exported, tmp_path):
    """The export with its weights in three files, as large models come."""
    tensors = read_tensors(exported)
    files = {name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, tmp_path / file)
    index = {"metadata": {}, "weight_map": files}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(exported / "config.json", tmp_path)
    return tmp_path


def assert_same(one, other):
    leaves, others = (jax.tree.leaves_with_path(model) for model in (one, other))
    for (path, leaf), (other_path, other_leaf) in zip(leaves, others, strict=True):
        assert path == other_path
        assert leaf.dtype == other_leaf.dtype
        np.testing.assert_array_equal(leaf, other_leaf, err_msg=str(path))


def test_an_export_comes_back_bit_for_bit(exported, trained):
    model = load_model(trained.checkpoint_dir, trained.experiment)
    assert_same(load_pretrained(exported), model)
    assert load_pretrained(exported).config == model.config


def test_a_padded_vocabulary_is_left_out_and_comes_back(exported, trained, tmp_path):
    config = dataclasses.replace(trained.experiment.model, vocab_pad_multiple=64)
    experiment = dataclasses.replace(trained.experiment, model=config)
    plain = load_model(trained.checkpoint_dir, trained.experiment)
    leaves = snapshot({"model": with_vocab_rows(plain, 320)})
    padded_dir = tmp_path / "checkpoint"
    checkpoint.write(padded_dir, leaves, step=1, cursor={"rows": 2}, config={}, files={})
    shutil.copy(trained.checkpoint_dir / "model.json", padded_dir)
    padded = load_model(padded_dir, experiment)
    assert padded.Vocab.size == 280
    assert padded.head.axis_size("vocab") == 320

    output = tmp_path / "export"
    output.mkdir()
    lineage = {kind: "0" * 64 for kind, _ in LINEAGE}
    workspace = Workspace(tmp_path / "progress", output)
    export.build(experiment, padded_dir, trained.tokenizer_dir, lineage, workspace)
    for file in exported.iterdir():
        assert (output / file.name).read_bytes() == file.read_bytes(), file.name
    rows = np.arange(48).reshape(2, 24) % 280
    found = export.logit_difference(output, padded_dir, experiment, rows)
    assert 0 < found.max_abs < found.limit
    assert_same(load_pretrained(output, vocab_pad_multiple=64), padded)


def test_weights_in_several_files_are_joined(sharded, exported):
    assert_same(load_pretrained(sharded), load_pretrained(exported))


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00003\.safetensors: no such file"):
        load_pretrained(sharded)


def test_a_tensor_that_the_index_misplaces_is_named(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    index["weight_map"]["transformer.h.7.ln_1.bias"] = "model-00001-of-00003.safetensors"
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"places `transformer\.h\.7\.ln_1\.bias` in model-00001"):
        load_pretrained(sharded)


def test_an_index_cannot_lead_outside(sharded):
    index = {"weight_map": {"transformer.wte.weight": "../model.safetensors"}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="not the name of a file beside it"):
        load_pretrained(sharded)


def test_a_pickle_is_not_read(exported, tmp_path):
    shutil.copy(exported / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"Convert the `\.bin` files, pickles"):
        load_pretrained(tmp_path)


def test_what_is_no_model_directory_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        load_pretrained(tmp_path)


def test_names_without_the_prefix_and_old_masks_are_understood(exported, tmp_path):
    tensors = read_tensors(exported)
    short = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    masks = {f"h.{i}.attn.bias": np.tril(np.ones((1, 1, 24, 24), np.float32)) for i in range(2)}
    save_file(short | masks, tmp_path / "model.safetensors")
    shutil.copy(exported / "config.json", tmp_path)
    assert_same(load_pretrained(tmp_path), load_pretrained(exported))
