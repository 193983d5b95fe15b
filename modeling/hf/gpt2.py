"""Our GPT-2 and `transformers`' `GPT2LMHeadModel`, each written in the other's terms.

Modules have the same names on both sides; what differs is the shape. Ours keeps every axis apart
and stacks the layers, theirs is a matrix a layer in Conv1D layout, `[in, out]`, the transpose of
`torch.nn.Linear`:

    transformer.blocks.stacked.attn.c_attn.weight [layers, embed, qkv, heads, head_size]
    transformer.h.7.attn.c_attn.weight            [embed, 3 * embed]
"""

import re
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import numpy as np

from haliax import Axis
from modeling.hf import tables
from modeling.hf.tables import Groups, Row, Table, require_assumed
from modeling.models.config import Gpt2Config
from modeling.models.gpt2 import Gpt2LmHeadModel, with_vocab_rows

_MASK = re.compile(r"(.*\.)?attn\.(bias|masked_bias)")
"""Buffers that `transformers` before 4.30 saved among the weights."""

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


def table_of(model: Gpt2LmHeadModel) -> Table:
    """Returns how the arrays of a GPT-2 correspond; `model` may be abstract."""
    tokens, at = ((model.Vocab.name,), ("embed",)), ((model.Pos.name,), ("embed",))
    return Table(
        title="GPT-2",
        outside=(
            Row("transformer.wte.weight", "embeddings.token_embeddings.weight", tokens),
            Row("transformer.wpe.weight", "embeddings.position_embeddings.weight", at),
            Row("transformer.ln_f.weight", "transformer.ln_f.weight", _NORM),
            Row("transformer.ln_f.bias", "transformer.ln_f.bias", _NORM),
        ),
        layer_prefix="transformer.h.{}.",
        blocks="transformer.blocks.stacked",
        inside=tuple(Row(name, name, groups) for name, groups in _BLOCK.items()),
    )


def to_tensors(model: Gpt2LmHeadModel) -> dict[str, np.ndarray]:
    """Returns the model's weights by Hugging Face name, in the dtype that they have.

    The head is tied to the embedding, so it is not among them; of its rows, those that are no ids
    (`vocab_pad_multiple`) are left out.
    """
    model = with_vocab_rows(model, model.Vocab.size)
    return tables.to_tensors(model, table_of(model))


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
    model = tables.from_tensors(given, template, table_of(template))
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
    require_assumed(fields, _ASSUMED)
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
