"""The NumPy reference against `transformers` in float64, where only mistakes differ."""

import json

import numpy as np
import pytest

from modeling.hf import reference

torch = pytest.importorskip("torch", reason="the `parity` extra is not installed")
transformers = pytest.importorskip("transformers", reason="the `parity` extra is not installed")


def save_random_gpt2(directory, **changes):
    """Writes a GPT-2 whose every parameter, biases and norms too, is far from its initial value."""
    shape = {"vocab_size": 61, "n_positions": 16, "n_embd": 24, "n_layer": 3, "n_head": 4}
    config = transformers.GPT2Config(
        **{**shape, "attn_implementation": "eager", "bos_token_id": 0, "eos_token_id": 0, **changes}
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(directory)
    return model.double().eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scale_attn_by_inverse_layer_idx": True},
        {"n_inner": 40, "layer_norm_epsilon": 1e-3},
        {"scale_attn_weights": False},
        {"tie_word_embeddings": False},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_reference_equals_transformers_in_float64(tmp_path, changes):
    model = save_random_gpt2(tmp_path, **changes)
    rows = np.random.default_rng(1).integers(0, 61, (3, 13))
    with torch.no_grad():
        expected = model(torch.from_numpy(rows)).logits.numpy()
    assert expected.std() > 0.5
    np.testing.assert_allclose(reference.logits(tmp_path, rows), expected, rtol=0, atol=1e-12)


def test_difference_is_the_largest_one_anywhere(tmp_path):
    save_random_gpt2(tmp_path)
    rows = np.arange(10).reshape(2, 5)
    ours = reference.logits(tmp_path, rows).astype(np.float32)
    assert reference.max_abs_logit_difference(tmp_path, rows, ours) < 1e-5
    ours[1, 3, 7] += 0.25
    assert reference.max_abs_logit_difference(tmp_path, rows, ours) == pytest.approx(0.25, rel=1e-4)


def test_logits_of_another_shape_are_refused(tmp_path):
    save_random_gpt2(tmp_path)
    rows = np.zeros((1, 5), int)
    with pytest.raises(ValueError, match=r"\(1, 5, 61\), ours have \(1, 5, 60\)"):
        reference.max_abs_logit_difference(tmp_path, rows, np.zeros((1, 5, 60), np.float32))


def test_bfloat16_tensors_are_read(tmp_path):
    model = save_random_gpt2(tmp_path)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    read = reference.read_tensors(tmp_path, np.float64)["transformer.wte.weight"]
    expected = model.to(torch.bfloat16).double().transformer.wte.weight.detach().numpy()
    np.testing.assert_array_equal(read, expected)
