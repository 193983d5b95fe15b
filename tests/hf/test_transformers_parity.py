"""Exports opened by `transformers` itself, and its own models opened by us."""

import dataclasses
import json

import numpy as np
import pytest

from modeling.artifacts import Workspace
from modeling.data.cache import TokenCache
from modeling.data.tokenizer import PROBE_TEXTS, Tokenizer
from modeling.evaluation.generate import greedy
from modeling.hf import export
from modeling.hf.gpt2 import from_hf_config, from_tensors, to_tensors
from modeling.hf.model_card import LINEAGE
from modeling.hf.reference import read_tensors
from modeling.models.trained import load_model

torch = pytest.importorskip("torch", reason="the `parity` extra is not installed")
transformers = pytest.importorskip("transformers", reason="the `parity` extra is not installed")

VARIANTS = {
    "plain": {},
    "inverse_layer": {"scale_attn_by_inverse_layer_idx": True},
    "upcast": {"upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
}


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS)
def exported(request, trained, tmp_path_factory):
    """An experiment and its export; parameters are the same, what is computed from them is not."""
    model = dataclasses.replace(trained.experiment.model, **request.param)
    experiment = dataclasses.replace(trained.experiment, model=model)
    output = tmp_path_factory.mktemp("export")
    lineage = {kind: "0" * 64 for kind, _ in LINEAGE}
    workspace = Workspace(output / "progress", output)
    directories = trained.checkpoint_dir, trained.tokenizer_dir
    export.build(experiment, *directories, lineage, workspace)
    return experiment, output


@pytest.fixture(scope="module")
def rows(trained):
    cache = TokenCache.open(trained.cache_dir, trained.tokenized_dir)
    return cache.rows("validation", np.arange(6)).tokens


def opened(directory):
    # Only the eager attention of `transformers` knows `reorder_and_upcast_attn`.
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", local_files_only=True
    ).eval()


def test_logits_agree_in_float32(exported, trained, rows):
    experiment, directory = exported
    ours = export.float32_logits(load_model(trained.checkpoint_dir, experiment), rows)
    with torch.no_grad():
        theirs = opened(directory)(torch.from_numpy(rows.astype(np.int64))).logits.numpy()
    assert ours.std() > 0.5
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_greedy_generation_gives_the_same_text(exported, trained):
    experiment, directory = exported
    tokenizer = Tokenizer.load(trained.tokenizer_dir)
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    model, hf_model = load_model(trained.checkpoint_dir, experiment), opened(directory)
    prompts = ["def f", "print('naïve", "# 日本"]
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    ours = greedy(model, ids, 10, end_id=tokenizer.eos_id)
    for prompt, prompt_ids, continuation in zip(prompts, ids, ours, strict=True):
        inputs = hf_tokenizer(prompt, return_tensors="pt")
        length = min(10, 24 - len(prompt_ids))
        made = hf_model.generate(**inputs, max_new_tokens=length, do_sample=False)[0]
        text = hf_tokenizer.decode(made[len(prompt_ids) :], skip_special_tokens=True)
        assert text == tokenizer.decode(continuation.tokens)


def test_the_tokenizer_encodes_and_decodes_the_same(exported, trained):
    tokenizer = Tokenizer.load(trained.tokenizer_dir)
    theirs = transformers.AutoTokenizer.from_pretrained(exported[1], local_files_only=True)
    assert (theirs.eos_token_id, theirs.bos_token_id) == (tokenizer.eos_id, tokenizer.bos_id)
    assert len(theirs) == tokenizer.vocab_size
    texts = [*PROBE_TEXTS, "<b>&amp;</b>\x00 \u202e x", "don't  won 't\r\n"]
    for text in texts:
        # Ours takes a special token's name for the text that it is; so must theirs, if told.
        ids = theirs(text, split_special_tokens=True)["input_ids"]
        assert ids == tokenizer.encode(text), repr(text)
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("variant", [{}, {"scale_attn_by_inverse_layer_idx": True}])
def test_a_model_of_transformers_computes_the_same_here(tmp_path, rows, variant):
    config = transformers.GPT2Config(
        vocab_size=280, n_positions=40, n_embd=36, n_layer=3, n_head=3, n_inner=72,
        attn_implementation="eager", bos_token_id=0, eos_token_id=0, **variant,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    theirs.save_pretrained(tmp_path)
    ours_config, Vocab, Pos = from_hf_config(json.loads((tmp_path / "config.json").read_text()))
    tensors = read_tensors(tmp_path)
    ours = from_tensors(tensors, ours_config, Vocab, Pos)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(rows.astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(export.float32_logits(ours, rows), expected, rtol=0, atol=1e-5)
    back = to_tensors(ours)
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)
