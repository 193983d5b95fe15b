"""An export without PyTorch: same bytes twice, the checkpoint's logits, an honest model card."""

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors import safe_open
from safetensors.numpy import save_file

from modeling.artifacts import Workspace
from modeling.data import tokenizer
from modeling.data.cache import TokenCache
from modeling.data.tokenizers_config import PassthroughTokenizerConfig
from modeling.hf import export, reference
from modeling.hf.config import ExportConfig
from modeling.hf.gpt2 import from_hf_config, from_tensors, to_tensors
from modeling.hf.model_card import LINEAGE, model_card
from modeling.models.trained import load_model

IDS = {kind: hashlib.sha256(kind.encode()).hexdigest() for kind, _ in LINEAGE}
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def build(trained, output, experiment=None, **options):
    output.mkdir()
    workspace = Workspace(output.parent / "progress", output)
    return export.build(
        experiment or trained.experiment,
        trained.checkpoint_dir,
        trained.tokenizer_dir,
        IDS,
        workspace,
        **options,
    )


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    output = tmp_path_factory.mktemp("export") / "output"
    return output, build(trained, output)


@pytest.fixture(scope="module")
def rows(trained):
    cache = TokenCache.open(trained.cache_dir, trained.tokenized_dir)
    return cache.rows("validation", np.arange(4)).tokens


def test_the_export_has_the_files_that_transformers_reads(exported):
    assert {path.name for path in exported[0].iterdir()} == FILES


def test_a_model_of_ids_is_exported_without_a_tokenizer(exported, trained, tmp_path):
    workspace = Workspace(tmp_path, tmp_path / "tokenizer")
    workspace.output.mkdir()
    declared = PassthroughTokenizerConfig(type="passthrough", vocab_size=280, eos_id=7)
    tokenizer.build(declared, None, workspace)
    of_ids = dataclasses.replace(trained, tokenizer_dir=workspace.output)
    built = build(of_ids, tmp_path / "output")
    assert {path.name for path in (tmp_path / "output").iterdir()} == FILES - {
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert built.leaves == exported[1].leaves
    config = json.loads((tmp_path / "output" / "config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"]) == (7, None)
    card = (tmp_path / "output" / "README.md").read_text()
    assert "AutoTokenizer" in (exported[0] / "README.md").read_text()
    assert "AutoTokenizer" not in card


def test_exporting_again_gives_the_same_bytes(exported, trained, tmp_path):
    again = build(trained, tmp_path / "elsewhere")
    assert again == exported[1]
    for name in FILES:
        assert (tmp_path / "elsewhere" / name).read_bytes() == (exported[0] / name).read_bytes()


def test_another_process_gives_the_same_weights_file(exported, tmp_path):
    # Hash seeds differ between processes, and with them the order of some containers.
    code = (
        "import sys, numpy as np\n"
        "from pathlib import Path\n"
        "from safetensors.numpy import save_file\n"
        "from modeling.hf.reference import read_tensors\n"
        "save_file(read_tensors(Path(sys.argv[1])), sys.argv[2], metadata={'format': 'pt'})\n"
    )
    copy = tmp_path / "model.safetensors"
    subprocess.run([sys.executable, "-c", code, str(exported[0]), str(copy)], check=True)
    assert copy.read_bytes() == (exported[0] / "model.safetensors").read_bytes()


def test_the_weights_file_has_one_metadata_key_and_every_tensor_once(exported):
    with safe_open(exported[0] / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        names = set(file.keys())
    per_layer = {name.split(".", 3)[3] for name in names if name.startswith("transformer.h.")}
    assert len(per_layer) == 12
    assert names == {f"transformer.h.{i}.{name}" for i in range(2) for name in per_layer} | {
        "transformer.wte.weight",
        "transformer.wpe.weight",
        "transformer.ln_f.weight",
        "transformer.ln_f.bias",
    }


def test_logits_equal_the_checkpoints(exported, trained, rows):
    found = export.logit_difference(exported[0], trained.checkpoint_dir, trained.experiment, rows)
    assert 0 < found.max_abs < 1e-5
    assert found.largest > found.max_abs


def test_larger_logits_may_round_in_proportion():
    assert export.LogitDifference(0.0, largest=1.0).limit == 1e-5
    assert export.LogitDifference(0.0, largest=100.0).limit == pytest.approx(9.54e-5, rel=1e-2)


@pytest.mark.parametrize("tensor", ["transformer.h.1.mlp.c_fc.bias", "transformer.wpe.weight"])
def test_one_wrong_weight_shows_in_the_logits(exported, trained, rows, tensor, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(exported[0], copy)
    tensors = reference.read_tensors(copy)
    tensors[tensor].flat[0] += 0.01
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    found = export.logit_difference(copy, trained.checkpoint_dir, trained.experiment, rows)
    assert found.max_abs > 1e-4 > found.limit


def test_tensors_and_back_give_the_same_model(trained):
    model = load_model(trained.checkpoint_dir, trained.experiment)
    again = from_tensors(to_tensors(model), model.config, model.Vocab, model.Pos)
    ours, theirs = (jax.tree.leaves_with_path(m) for m in (model, again))
    assert [path for path, _ in ours] == [path for path, _ in theirs]
    for (path, one), (_, other) in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other, err_msg=str(path))


def test_config_and_back_gives_the_same_model_config(exported, trained):
    config, Vocab, Pos = from_hf_config(json.loads((exported[0] / "config.json").read_text()))
    assert config == trained.experiment.model
    assert (Vocab.size, Pos.size) == (280, 24)


def test_bfloat16_rounds_each_weight_to_the_nearest(trained, exported, rows, tmp_path):
    experiment = dataclasses.replace(trained.experiment, export=ExportConfig(dtype="bfloat16"))
    built = build(trained, tmp_path / "rounded", experiment)
    rounded = reference.read_tensors(tmp_path / "rounded")
    for name, exact in reference.read_tensors(exported[0]).items():
        assert rounded[name].dtype == jnp.bfloat16
        np.testing.assert_array_equal(rounded[name], exact.astype(jnp.bfloat16))
    assert json.loads((tmp_path / "rounded" / "config.json").read_text())["dtype"] == "bfloat16"
    assert built.content_id != exported[1].content_id
    directories = tmp_path / "rounded", trained.checkpoint_dir
    assert export.logit_difference(*directories, experiment, rows).max_abs < 1e-5
    # The exact weights are another model, by more than rounding in the computation.
    assert export.logit_difference(*directories, trained.experiment, rows).max_abs > 1e-4


def test_the_content_id_covers_tensors_and_files(trained, exported, tmp_path):
    figures = build(trained, tmp_path / "figures", evaluation={"perplexity": 12.5})
    assert figures.leaves == exported[1].leaves
    assert figures.content_id != exported[1].content_id
    assert set(exported[1].leaves) == set(reference.read_tensors(exported[0]))


def test_the_card_lists_lineage_and_the_digest_of_every_other_file(exported):
    card = (exported[0] / "README.md").read_text()
    for _, content_id in IDS.items():
        assert f"`{content_id}`" in card
    for name in FILES - {"README.md"}:
        digest = hashlib.sha256((exported[0] / name).read_bytes()).hexdigest()
        assert f"| `{name}` | `{digest}` |" in card


def test_the_card_begins_with_front_matter_that_hubs_read(exported):
    _, front, rest = (exported[0] / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["pipeline_tag"] == "text-generation"
    assert rest.strip().startswith("# ")


def test_nothing_in_the_export_names_a_place(exported, trained):
    places = [str(exported[0]), str(trained.checkpoint_dir), str(trained.tokenizer_dir)]
    for name in FILES:
        content = (exported[0] / name).read_bytes()
        assert not [place for place in places if place.encode() in content], name


def test_evaluation_figures_stand_on_the_card_when_given(trained, tmp_path):
    build(trained, tmp_path / "figures", evaluation={"perplexity": 12.5})
    assert "| perplexity | 12.5 |" in (tmp_path / "figures" / "README.md").read_text()


def test_a_broken_chain_is_refused():
    lineage = {kind: i for kind, i in IDS.items() if kind != "tokenized_corpus"}
    with pytest.raises(ValueError, match=r"no content id of \['tokenized_corpus'\]"):
        model_card({}, num_parameters=1, lineage=lineage, digests={})


def test_another_tokenizer_is_refused(trained, tmp_path):
    other = tmp_path / "tokenizer"
    shutil.copytree(trained.tokenizer_dir, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    token = {"special": False, "single_word": False, "lstrip": False, "rstrip": False}
    tokenizer["added_tokens"].append(token | {"normalized": False, "id": 280, "content": "extra"})
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="tokenizer has 281 ids, but the checkpoint's model 280"):
        build(dataclasses.replace(trained, tokenizer_dir=other), tmp_path / "output")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_function": "relu"}, "activation_function: 'relu' is not supported"),
        ({"model_type": "llama"}, "model_type: 'llama'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings: False"),
        ({"scale_attn_weights": False}, "scale_attn_weights: False"),
        ({"n_inner": 33}, "n_inner: 33 is not a multiple of n_embd 32"),
    ],
)
def test_models_of_another_kind_are_refused(exported, change, message):
    config = json.loads((exported[0] / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        from_hf_config(config | change)


def test_tensors_that_do_not_fit_are_all_named(trained):
    model = load_model(trained.checkpoint_dir, trained.experiment)
    tensors = to_tensors(model)
    del tensors["transformer.h.0.ln_1.bias"]
    tensors["transformer.h.9.ln_1.bias"] = np.zeros(32)
    tensors["transformer.wpe.weight"] = np.zeros((24, 16))
    with pytest.raises(ValueError, match="3 tensors do not fit") as error:
        from_tensors(tensors, model.config, model.Vocab, model.Pos)
    assert "`transformer.h.0.ln_1.bias` is missing" in str(error.value)
    assert "`transformer.h.9.ln_1.bias` is not part of a GPT-2" in str(error.value)
    assert "`transformer.wpe.weight` has shape (24, 16), expected (24, 32)" in str(error.value)


def test_an_untied_head_is_refused_and_a_tied_copy_is_not(trained):
    model = load_model(trained.checkpoint_dir, trained.experiment)
    tensors = to_tensors(model)
    copy = tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}
    from_tensors(copy, model.config, model.Vocab, model.Pos)
    other = tensors | {"lm_head.weight": tensors["transformer.wte.weight"] + 1}
    with pytest.raises(ValueError, match=r"`lm_head.weight` differs"):
        from_tensors(other, model.config, model.Vocab, model.Pos)
