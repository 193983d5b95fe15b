"""Our GPT-2 and `transformers`' `GPT2LMHeadModel`, each written in the other's terms.

Modules have the same names on both sides; what differs is the shape. Ours keeps every axis apart
and stacks the layers, theirs is a matrix a layer in Conv1D layout, `[in, out]`, the transpose of
`torch.nn.Linear`:

    transformer.blocks.stacked.attn.c_attn.weight [layers, embed, qkv, heads, head_size]
    transformer.h.7.attn.c_attn.weight            [embed, 3 * embed]

The table below says which axes make up which dimension. It is read in both directions, so export
and import cannot disagree.
"""

import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from haliax import Axis, NamedArray
from modeling.models.config import Gpt2Config
from modeling.models.gpt2 import Gpt2LmHeadModel, with_vocab_rows

_MASK = re.compile(r"(.*\.)?attn\.(bias|masked_bias)")
"""Buffers that `transformers` before 4.30 saved among the weights."""

Groups = tuple[tuple[str, ...], ...]
"""The dimensions of one of their tensors, each as the axes of ours that make it up, row-major."""

BLOCKS = "transformer.blocks.stacked"
LAYERS = "layers"

_NORM: Groups = (("embed",),)
_QKV, _HEADS = ("qkv", "heads", "head_size"), ("heads", "head_size")
_BLOCK: Mapping[str, Groups] = {
    "ln_1.weight": _NORM,
    "ln_1.bias": _NORM,
    "attn.c_attn.weight": (("embed",), _QKV),
    "attn.c_attn.bias": (_QKV,),
    "attn.c_proj.weight": (_HEADS, ("embed",)),
    "attn.c_proj.bias": (("embed",),),
    "ln_2.weight": _NORM,
    "ln_2.bias": _NORM,
    "mlp.c_fc.weight": (("embed",), ("mlp",)),
    "mlp.c_fc.bias": (("mlp",),),
    "mlp.c_proj.weight": (("mlp",), ("embed",)),
    "mlp.c_proj.bias": (("embed",),),
}


def _outer(model: Gpt2LmHeadModel) -> Iterator[tuple[str, str, Groups]]:
    """Yields their name, our path and the dimensions of what stands outside the blocks."""
    embeddings = "embeddings.token_embeddings.weight", "embeddings.position_embeddings.weight"
    yield "transformer.wte.weight", embeddings[0], ((model.Vocab.name,), ("embed",))
    yield "transformer.wpe.weight", embeddings[1], ((model.Pos.name,), ("embed",))
    yield "transformer.ln_f.weight", "transformer.ln_f.weight", _NORM
    yield "transformer.ln_f.bias", "transformer.ln_f.bias", _NORM


def to_tensors(model: Gpt2LmHeadModel) -> dict[str, np.ndarray]:
    """Returns the model's weights by Hugging Face name, in the dtype that they have.

    The head is tied to the embedding, so it is not among them; of its rows, those that are no ids
    (`vocab_pad_multiple`) are left out.
    """
    model = with_vocab_rows(model, model.Vocab.size)
    tensors = {name: _flat(_at(model, path), groups) for name, path, groups in _outer(model)}
    for name, groups in _BLOCK.items():
        stacked = _flat(_at(model, f"{BLOCKS}.{name}"), ((LAYERS,), *groups))
        tensors |= {f"transformer.h.{i}.{name}": layer for i, layer in enumerate(stacked)}
    return tensors


def _at(model: Gpt2LmHeadModel, path: str) -> NamedArray:
    return functools.reduce(getattr, path.split("."), model)  # pyright: ignore[reportReturnType]


def _flat(array: NamedArray, groups: Groups) -> np.ndarray:
    """Returns the raw array with one dimension a group; a view where the axes stand in order."""
    ordered = array.rearrange(tuple(axis for group in groups for axis in group))
    return np.asarray(ordered.array).reshape(_shape(array, groups))


def from_tensors(
    tensors: Mapping[str, np.ndarray], config: Gpt2Config, Vocab: Axis, Pos: Axis
) -> Gpt2LmHeadModel:
    """Returns a model of these weights, in the dtype that they have.

    The tensors have a row for each id of `Vocab`; `config` may ask for more (`vocab_pad_multiple`).
    Names may lack the prefix `transformer.`, as those of a `GPT2Model` do, and causal masks saved
    by older versions are passed over.

    Raises:
        ValueError: naming each tensor that is missing, unknown, or of another shape.
    """

    def unpadded() -> Gpt2LmHeadModel:
        model = Gpt2LmHeadModel.init(Vocab, Pos, config, key=jax.random.key(0))
        return with_vocab_rows(model, Vocab.size)

    template: Gpt2LmHeadModel = eqx.filter_eval_shape(unpadded)
    given = {_full_name(name): t for name, t in tensors.items() if not _MASK.fullmatch(name)}
    _drop_tied_head(given)
    _check_tensors(given, template)
    paths, arrays = [], []
    for name, path, groups in _outer(template):
        paths.append(path)
        arrays.append(_unflat(given[name], _at(template, path), groups))
    for name, groups in _BLOCK.items():
        path = f"{BLOCKS}.{name}"
        stacked = np.stack([given[f"transformer.h.{i}.{name}"] for i in range(config.num_layers)])
        paths.append(path)
        arrays.append(_unflat(stacked, _at(template, path), ((LAYERS,), *groups)))
    model = eqx.tree_at(lambda model: [_at(model, path) for path in paths], template, arrays)
    return with_vocab_rows(model, config.vocab_rows(Vocab.size))


def _full_name(name: str) -> str:
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"


def _drop_tied_head(given: dict[str, np.ndarray]) -> None:
    head, embedding = given.pop("lm_head.weight", None), given.get("transformer.wte.weight")
    if head is not None and not np.array_equal(head, np.asarray(embedding)):
        raise ValueError(
            "`lm_head.weight` differs from `transformer.wte.weight`, but the head of this GPT-2 is "
            "tied to its embedding. Import a model with tied weights."
        )


def _unflat(tensor: np.ndarray, like: NamedArray, groups: Groups) -> NamedArray:
    axes = [like.resolve_axis(axis) for group in groups for axis in group]
    named = NamedArray(jnp.asarray(tensor.reshape([axis.size for axis in axes])), tuple(axes))
    return named.rearrange(like.axes)


def _check_tensors(given: Mapping[str, np.ndarray], template: Gpt2LmHeadModel) -> None:
    expected = tensor_shapes(template)
    faults = [f"`{name}` is missing" for name in expected if name not in given]
    faults += [f"`{name}` is not part of a GPT-2" for name in given if name not in expected]
    faults += [
        f"`{name}` has shape {given[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in given and given[name].shape != shape
    ]
    if faults:
        raise ValueError(
            f"{len(faults)} tensors do not fit: {'; '.join(faults[:8])}"
            f"{'; ...' if len(faults) > 8 else ''}. Check the sizes in `config.json`."
        )


def tensor_shapes(model: Gpt2LmHeadModel) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor by Hugging Face name; `model` may be abstract."""
    shapes = {name: _shape(_at(model, path), groups) for name, path, groups in _outer(model)}
    for i in range(model.config.num_layers):
        for name, groups in _BLOCK.items():
            block = _at(model, f"{BLOCKS}.{name}")
            shapes[f"transformer.h.{i}.{name}"] = _shape(block, groups)
    return shapes


def _shape(array: NamedArray, groups: Groups) -> tuple[int, ...]:
    return tuple(math.prod(array.axis_size(axis) for axis in group) for group in groups)


def to_hf_config(
    model: Gpt2LmHeadModel, *, dtype: str, bos_token_id: int | None, eos_token_id: int
) -> dict[str, Any]:
    """Returns `config.json`: every field of `GPT2Config` that decides what the model computes."""
    config = model.config
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": model.Vocab.size,
        "n_positions": model.Pos.size,
        "n_embd": config.hidden_dim,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.mlp_scale * config.hidden_dim,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "initializer_range": config.initializer_range,
        "embd_pdrop": config.embed_pdrop,
        "resid_pdrop": config.resid_pdrop,
        "attn_pdrop": config.attn_pdrop,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
        "reorder_and_upcast_attn": config.upcast_attn,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "dtype": dtype,
    }


_ASSUMED: Mapping[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "tie_word_embeddings": (True,),
    "add_cross_attention": (False,),
}
"""What our GPT-2 takes for granted: field and the values that mean just that."""

_DEFAULTS: Mapping[str, Any] = {
    "n_inner": None,
    "activation_function": "gelu_new",
    "scale_attn_weights": True,
    "tie_word_embeddings": True,
    "add_cross_attention": False,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "embd_pdrop": 0.1,
    "resid_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
}
"""What `GPT2Config` documents for a field that `config.json` leaves out."""


def from_hf_config(hf_config: Mapping[str, Any]) -> tuple[Gpt2Config, Axis, Axis]:
    """Returns configuration, vocabulary and positions of the model that a `config.json` describes.

    Raises:
        ValueError: it describes something that our GPT-2 is not.
    """
    fields = {**_DEFAULTS, **hf_config}
    for name, accepted in _ASSUMED.items():
        if fields.get(name) not in accepted:
            raise ValueError(
                f"config.json: {name}: {fields.get(name)!r} is not supported, only "
                f"{' or '.join(map(repr, accepted))}. Convert the model, or choose another."
            )
    width, inner = fields["n_embd"], fields["n_inner"] or 4 * fields["n_embd"]
    if inner % width:
        raise ValueError(
            f"config.json: n_inner: {inner} is not a multiple of n_embd {width}, but the MLP here "
            f"is a whole number (`mlp_scale`) of times as wide as the model."
        )
    config = Gpt2Config(
        hidden_dim=width,
        num_layers=fields["n_layer"],
        num_heads=fields["n_head"],
        mlp_scale=inner // width,
        layer_norm_epsilon=fields["layer_norm_epsilon"],
        initializer_range=fields["initializer_range"],
        embed_pdrop=fields["embd_pdrop"],
        resid_pdrop=fields["resid_pdrop"],
        attn_pdrop=fields["attn_pdrop"],
        scale_attn_by_inverse_layer_idx=fields["scale_attn_by_inverse_layer_idx"],
        upcast_attn=fields["reorder_and_upcast_attn"],
    )
    return config, Axis("vocab", fields["vocab_size"]), Axis("position", fields["n_positions"])
