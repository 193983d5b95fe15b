"""Models in plain NumPy, read from an exported directory alone: the second opinion on an export.

It shares no code with the models it checks: it knows the Hugging Face names and layouts and the
equations, as `transformers` documents them, and it computes in float64. A disagreement is thus the
other side's rounding (about 1e-6 for float32) or a mistake in the export.

GPT-2 (`GPT2LMHeadModel`; Conv1D, weights are `[in, out]`):

    h_0     = wte[ids] + wpe[:n]
    h      += c_proj(softmax(causal(q k^T / sqrt(d) [/ (layer + 1)])) v)   q, k, v = c_attn(ln_1(h))
    h      += mlp.c_proj(gelu(mlp.c_fc(ln_2(h))))
    logits  = ln_f(h) wte^T

Llama (`LlamaForCausalLM`; weights are `[out, in]`), R turning the halves of a head by position:

    h_0     = embed[ids]
    h      += o(softmax(causal(R(q) R(k)^T / sqrt(d))) v)     q, k, v of input_layernorm(h)
    h      += down(silu(gate(x)) up(x))                       x = post_attention_layernorm(h)
    logits  = norm(h) head^T
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

Tensors = Mapping[str, np.ndarray]


def read_tensors(export_dir: Path, dtype: Any = None) -> dict[str, np.ndarray]:
    """Returns every tensor of `model.safetensors` by name, cast to `dtype` if one is given."""
    with safe_open(export_dir / "model.safetensors", framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors if dtype is None else {n: t.astype(dtype) for n, t in tensors.items()}


def logits(export_dir: Path, token_rows: np.ndarray) -> np.ndarray:
    """Returns the float64 logits `[rows, positions, vocab]` of integer `token_rows`."""
    config = json.loads((export_dir / "config.json").read_text(encoding="utf-8"))
    tensors = read_tensors(export_dir, np.float64)
    return _LOGITS[config["model_type"]](config, tensors, token_rows)


def _gpt2(config: Mapping[str, Any], tensors: Tensors, token_rows: np.ndarray) -> np.ndarray:
    wte = tensors["transformer.wte.weight"]
    head = wte if config["tie_word_embeddings"] else tensors["lm_head.weight"]
    hidden = wte[token_rows] + tensors["transformer.wpe.weight"][: token_rows.shape[-1]]
    for layer in range(config["n_layer"]):
        block = _below(tensors, f"transformer.h.{layer}.")
        hidden = hidden + _attention(
            _layer_norm(hidden, block, "ln_1", config), block, config, layer
        )
        hidden = hidden + _mlp(_layer_norm(hidden, block, "ln_2", config), block)
    return _layer_norm(hidden, tensors, "transformer.ln_f", config) @ head.T


def max_abs_logit_difference(
    export_dir: Path, token_rows: np.ndarray, our_logits: np.ndarray
) -> float:
    """Returns the largest |difference| over all rows, positions and ids (the maximum norm).

    `our_logits` should be float32 made with the highest matmul precision; what is left is then
    float32's own rounding, since the reference works in float64.
    """
    theirs = logits(export_dir, token_rows)
    if our_logits.shape != theirs.shape:
        raise ValueError(
            f"{export_dir}: the export gives logits of shape {theirs.shape}, ours have "
            f"{our_logits.shape}. Compare the same rows, and a model of the same vocabulary."
        )
    return float(np.max(np.abs(theirs - our_logits.astype(np.float64))))


def _attention(x: np.ndarray, block: Tensors, config: Mapping[str, Any], layer: int) -> np.ndarray:
    rows, length, width = x.shape
    heads = config["n_head"]

    def split(part: np.ndarray) -> np.ndarray:
        return part.reshape(rows, length, heads, width // heads).transpose(0, 2, 1, 3)

    query, key, value = map(split, np.split(_conv1d(x, block, "attn.c_attn"), 3, axis=-1))
    scores = query @ key.transpose(0, 1, 3, 2)
    if config["scale_attn_weights"]:
        scores = scores / math.sqrt(width // heads)
    if config["scale_attn_by_inverse_layer_idx"]:
        scores = scores / (layer + 1)
    mixed = _causal_mean(scores, value).reshape(rows, length, width)
    return _conv1d(mixed, block, "attn.c_proj")


def _mlp(x: np.ndarray, block: Tensors) -> np.ndarray:
    return _conv1d(_gelu_new(_conv1d(x, block, "mlp.c_fc")), block, "mlp.c_proj")


def _gelu_new(x: np.ndarray) -> np.ndarray:
    """The tanh approximation of Hendrycks & Gimpel (2016), which GPT-2 was trained with."""
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def _conv1d(x: np.ndarray, tensors: Tensors, name: str) -> np.ndarray:
    return x @ tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def _layer_norm(
    x: np.ndarray, tensors: Tensors, name: str, config: Mapping[str, Any]
) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred**2).mean(-1, keepdims=True)
    scaled = centred / np.sqrt(variance + config["layer_norm_epsilon"])
    return scaled * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def _llama(config: Mapping[str, Any], tensors: Tensors, token_rows: np.ndarray) -> np.ndarray:
    table, epsilon = tensors["model.embed_tokens.weight"], config["rms_norm_eps"]
    head = table if config["tie_word_embeddings"] else tensors["lm_head.weight"]
    hidden = table[token_rows]
    for layer in range(config["num_hidden_layers"]):
        block = _below(tensors, f"model.layers.{layer}.")
        x = _rms_norm(hidden, block["input_layernorm.weight"], epsilon)
        hidden = hidden + _grouped_attention(x, _below(block, "self_attn."), config)
        x = _rms_norm(hidden, block["post_attention_layernorm.weight"], epsilon)
        gate, up = (x @ block[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        hidden = hidden + (gate / (1.0 + np.exp(-gate)) * up) @ block["mlp.down_proj.weight"].T
    return _rms_norm(hidden, tensors["model.norm.weight"], epsilon) @ head.T


def _grouped_attention(x: np.ndarray, block: Tensors, config: Mapping[str, Any]) -> np.ndarray:
    rows, length, width = x.shape
    size = width // config["num_attention_heads"]

    def heads(name: str) -> np.ndarray:
        flat = x @ block[f"{name}_proj.weight"].T
        return flat.reshape(rows, length, -1, size).transpose(0, 2, 1, 3)

    theta = config["rope_parameters"]["rope_theta"]
    angles = np.arange(length)[:, None] / theta ** (np.arange(0, size, 2) / size)

    def turned(part: np.ndarray) -> np.ndarray:
        turned = (part[..., : size // 2] + 1j * part[..., size // 2 :]) * np.exp(1j * angles)
        return np.concatenate([turned.real, turned.imag], axis=-1)

    query, key, value = turned(heads("q")), turned(heads("k")), heads("v")
    key, value = (np.repeat(part, query.shape[1] // part.shape[1], axis=1) for part in (key, value))
    mixed = _causal_mean(query @ key.transpose(0, 1, 3, 2) / math.sqrt(size), value)
    return mixed.reshape(rows, length, width) @ block["o_proj.weight"].T


def _causal_mean(scores: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Returns `[rows, positions, heads, size]`: values weighed by the softmax of what is past."""
    scores = np.where(np.tri(scores.shape[-1], dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
    return (weights @ value).transpose(0, 2, 1, 3)


def _rms_norm(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * weight


def _below(tensors: Tensors, prefix: str) -> Tensors:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


_LOGITS = {"gpt2": _gpt2, "llama": _llama}
