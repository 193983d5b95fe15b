"""Our Llama and `transformers`' `LlamaForCausalLM`, each written in the other's terms.

Theirs are matrices of `torch.nn.Linear`, `[out, in]`, one a layer; ours keep every axis apart:

    blocks.stacked.attn.q_proj.weight      [layers, embed, heads, group, head_size]
    model.layers.7.self_attn.q_proj.weight [heads * group * head_size, embed]
"""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import numpy as np

from haliax import Axis
from modeling.hf import tables
from modeling.hf.tables import Groups, Row, Table, require_assumed
from modeling.models.config import LlamaConfig
from modeling.models.llama import LlamaLmHeadModel, with_vocab_rows

_EMBED, _MLP = ("embed",), ("mlp",)
_QUERIES, _KEYS = ("heads", "group", "head_size"), ("heads", "head_size")
_NORM: Groups = (_EMBED,)
_INSIDE = (
    Row("input_layernorm.weight", "attn_norm.weight", _NORM),
    Row("self_attn.q_proj.weight", "attn.q_proj.weight", (_QUERIES, _EMBED)),
    Row("self_attn.k_proj.weight", "attn.k_proj.weight", (_KEYS, _EMBED)),
    Row("self_attn.v_proj.weight", "attn.v_proj.weight", (_KEYS, _EMBED)),
    Row("self_attn.o_proj.weight", "attn.o_proj.weight", (_EMBED, _QUERIES)),
    Row("post_attention_layernorm.weight", "mlp_norm.weight", _NORM),
    Row("mlp.gate_proj.weight", "mlp.gate_proj.weight", (_MLP, _EMBED)),
    Row("mlp.up_proj.weight", "mlp.up_proj.weight", (_MLP, _EMBED)),
    Row("mlp.down_proj.weight", "mlp.down_proj.weight", (_EMBED, _MLP)),
)
HEAD = "lm_head.weight"


def table_of(model: LlamaLmHeadModel) -> Table:
    """Returns how the arrays of a Llama correspond; `model` may be abstract."""
    tokens: Groups = ((model.Vocab.name,), _EMBED)
    head = () if model.lm_head is None else (Row(HEAD, "lm_head.weight", tokens),)
    return Table(
        title="Llama",
        outside=(
            Row("model.embed_tokens.weight", "embeddings.weight", tokens),
            Row("model.norm.weight", "norm.weight", _NORM),
            *head,
        ),
        layer_prefix="model.layers.{}.",
        blocks="blocks.stacked",
        inside=_INSIDE,
    )


def to_tensors(model: LlamaLmHeadModel) -> dict[str, np.ndarray]:
    """Returns the model's weights by Hugging Face name, in the dtype that they have.

    A head that is tied to the embedding is not among them, nor are rows that are no ids.
    """
    model = with_vocab_rows(model, model.Vocab.size)
    return tables.to_tensors(model, table_of(model))


def from_tensors(
    tensors: Mapping[str, np.ndarray], config: LlamaConfig, Vocab: Axis, Pos: Axis
) -> LlamaLmHeadModel:
    """Returns a model of these weights, in the dtype that they have.

    The tensors have a row for each id of `Vocab`; `config` may ask for more (`vocab_pad_multiple`).

    Raises:
        ValueError: naming each tensor that is missing, unknown, or of another shape.
    """

    def unpadded() -> LlamaLmHeadModel:
        model = LlamaLmHeadModel.init(Vocab, Pos, config, key=jax.random.key(0))
        return with_vocab_rows(model, Vocab.size)

    template: LlamaLmHeadModel = eqx.filter_eval_shape(unpadded)
    given = dict(tensors)
    head, table = given.get(HEAD), given.get("model.embed_tokens.weight")
    if config.tie_word_embeddings and head is not None:
        if not np.array_equal(head, np.asarray(table)):
            raise ValueError(
                f"`{HEAD}` differs from `model.embed_tokens.weight`, but config.json ties them "
                f"(tie_word_embeddings). Set it to false."
            )
        del given[HEAD]
    model = tables.from_tensors(given, template, table_of(template))
    return with_vocab_rows(model, config.vocab_rows(Vocab.size))


def to_hf_config(
    model: LlamaLmHeadModel, *, dtype: str, bos_token_id: int | None, eos_token_id: int
) -> dict[str, Any]:
    """Returns `config.json`: every field of `LlamaConfig` that decides what the model computes.

    The rotation is written both as `transformers` 5 reads it and as earlier versions do.
    """
    config = model.config
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.Vocab.size,
        "max_position_embeddings": model.Pos.size,
        "hidden_size": config.hidden_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "initializer_range": config.initializer_range,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_cache": True,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "dtype": dtype,
    }


_ASSUMED: Mapping[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0.0,),
    "rope_type": ("default",),
    "rope_scaling": (None,),
    "partial_rotary_factor": (1.0,),
}
"""What our Llama takes for granted: field and the values that mean just that."""

_DEFAULTS: Mapping[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_parameters": None,
    "rope_theta": 10000.0,
    "rope_type": "default",
    "rope_scaling": None,
    "partial_rotary_factor": 1.0,
    "initializer_range": 0.02,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
"""What `transformers`' `LlamaConfig` documents for a field that `config.json` leaves out."""


def from_hf_config(hf_config: Mapping[str, Any]) -> tuple[LlamaConfig, Axis, Axis]:
    """Returns configuration, vocabulary and positions of the model that a `config.json` describes.

    Raises:
        ValueError: it describes something that our Llama is not.
    """
    fields = {**_DEFAULTS, **hf_config}
    fields |= fields["rope_parameters"] or {}
    require_assumed(fields, _ASSUMED)
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    if (fields["head_dim"] or width // heads) * heads != width:
        raise ValueError(
            f"config.json: head_dim: {fields['head_dim']} x {heads} heads is not hidden_size "
            f"{width}, but the heads here share the width of the model evenly."
        )
    config = LlamaConfig(
        type="llama",
        hidden_dim=width,
        num_layers=fields["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=fields["num_key_value_heads"] or heads,
        mlp_dim=fields["intermediate_size"],
        rms_norm_epsilon=fields["rms_norm_eps"],
        rope_theta=fields["rope_theta"],
        initializer_range=fields["initializer_range"],
        tie_word_embeddings=fields["tie_word_embeddings"],
    )
    Pos = Axis("position", fields["max_position_embeddings"])
    return config, Axis("vocab", fields["vocab_size"]), Pos
