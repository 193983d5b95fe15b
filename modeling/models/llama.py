"""Llama (Touvron et al. 2023, arXiv:2302.13971; 2307.09288) by axis names.

    h      = token[ids]                                 token: Vocab x Embed
    h     += o(attention(rotate(q), rotate(k), v))      q, k, v = projections of attn_norm(h)
    h     += down(silu(gate(x)) * up(x))                x = mlp_norm(h); for each of `Layers`
    logits = norm(h) . head                             head: Vocab x Embed, or the embedding

Normalization divides by the root of the mean square (Zhang & Sennrich 2019, arXiv:1910.07467), and
no product has a bias. Queries have `Heads` x `Group` heads, keys and values `Heads` (grouped-query
attention, arXiv:2305.13245). Positions turn pairs of features of queries and keys (Su et al. 2021,
"RoFormer", arXiv:2104.09864): the pair (j, j + size / 2) by the angle

    position * theta^(-2 j / size)

as `transformers` pairs them. The paper pairs neighbours; the two differ by the order of a head's
features. Like `gpt2`, the model speaks of one row, and other axes are carried along.
"""

import math
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

import haliax as hax
from haliax import Axis, AxisSpec, NamedArray
from haliax.jax_utils import named_call
from haliax.nn import Embedding, Linear, RmsNorm, Stacked
from modeling.models.attention import attend
from modeling.models.config import LlamaConfig
from modeling.models.segments import positions
from modeling.models.vocabulary import logits_of_ids, row_axis, with_rows


class LlamaAxes(NamedTuple):
    """The axes that a configuration decides; `Vocab` and `Pos` come from the data."""

    Layers: Axis
    Embed: Axis
    Heads: Axis
    """Of keys and values."""
    Group: Axis
    """Heads of queries that share one of keys."""
    HeadSize: Axis
    Mlp: Axis


def axes_of(config: LlamaConfig) -> LlamaAxes:
    """Returns the axes of a Llama of these sizes."""
    return LlamaAxes(
        Layers=Axis("layers", config.num_layers),
        Embed=Axis("embed", config.hidden_dim),
        Heads=Axis("heads", config.num_kv_heads),
        Group=Axis("group", config.num_heads // config.num_kv_heads),
        HeadSize=Axis("head_size", config.head_size),
        Mlp=Axis("mlp", config.mlp_dim),
    )


class LlamaAttention(eqx.Module):
    """Causal self-attention of turned queries and keys."""

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    config: LlamaConfig = eqx.field(static=True)

    @classmethod
    def init(cls, config: LlamaConfig, *, key: PRNGKeyArray) -> "LlamaAttention":
        """Returns attention with random weights."""
        _, Embed, Heads, Group, HeadSize, _ = axes_of(config)
        q_key, k_key, v_key, o_key = jax.random.split(key, 4)
        std = config.initializer_range
        return cls(
            _linear(Embed, (Heads, Group, HeadSize), std, key=q_key),
            _linear(Embed, (Heads, HeadSize), std, key=k_key),
            _linear(Embed, (Heads, HeadSize), std, key=v_key),
            _linear((Heads, Group, HeadSize), Embed, config.residual_range, key=o_key),
            config,
        )

    @named_call
    def __call__(
        self, x: NamedArray, Pos: Axis, angles: NamedArray, segment_ids: NamedArray | None
    ) -> NamedArray:
        """Returns what attention adds to the residual stream; `angles` are those of `Pos`."""
        _, _, Heads, Group, HeadSize, _ = axes_of(self.config)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q = rotated(q / math.sqrt(HeadSize.size), angles, HeadSize)
        k = rotated(k, angles, HeadSize)
        mixed = attend(
            q, k, v, Pos, Heads, HeadSize, segment_ids, Group=Group, by=self.config.attention
        )
        return self.o_proj(mixed)


class LlamaMlp(eqx.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202): one product gates another."""

    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear

    @classmethod
    def init(cls, config: LlamaConfig, *, key: PRNGKeyArray) -> "LlamaMlp":
        """Returns the MLP with random weights."""
        axes = axes_of(config)
        gate_key, up_key, down_key = jax.random.split(key, 3)
        return cls(
            _linear(axes.Embed, axes.Mlp, config.initializer_range, key=gate_key),
            _linear(axes.Embed, axes.Mlp, config.initializer_range, key=up_key),
            _linear(axes.Mlp, axes.Embed, config.residual_range, key=down_key),
        )

    @named_call
    def __call__(self, x: NamedArray) -> NamedArray:
        """Returns what the MLP adds to the residual stream."""
        return self.down_proj(hax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(eqx.Module):
    """One layer: attention and MLP, each normalized before and added to the residual stream."""

    attn_norm: RmsNorm
    attn: LlamaAttention
    mlp_norm: RmsNorm
    mlp: LlamaMlp

    @classmethod
    def init(cls, config: LlamaConfig, *, key: PRNGKeyArray) -> "LlamaBlock":
        """Returns a block with random weights."""
        attn_key, mlp_key = jax.random.split(key)
        return cls(
            _norm(config),
            LlamaAttention.init(config, key=attn_key),
            _norm(config),
            LlamaMlp.init(config, key=mlp_key),
        )

    def __call__(
        self, x: NamedArray, Pos: Axis, angles: NamedArray, segment_ids: NamedArray | None
    ) -> NamedArray:
        """Returns the residual stream after this layer."""
        x = x + self.attn(self.attn_norm(x), Pos, angles, segment_ids)
        return x + self.mlp(self.mlp_norm(x))


class LlamaLmHeadModel(eqx.Module):
    """Llama with its language-modelling head. It has no dropout: keys change nothing."""

    embeddings: Embedding
    blocks: Stacked
    norm: RmsNorm
    lm_head: Embedding | None
    """None where the embedding is the head."""
    Vocab: Axis = eqx.field(static=True)
    Pos: Axis = eqx.field(static=True)
    config: LlamaConfig = eqx.field(static=True)

    @classmethod
    def init(
        cls, Vocab: Axis, Pos: Axis, config: LlamaConfig, *, key: PRNGKeyArray
    ) -> "LlamaLmHeadModel":
        """Returns a model with random weights, the same whatever mesh it is made on."""
        Layers = axes_of(config).Layers
        table_key, blocks_key, head_key = jax.random.split(key, 3)
        stack = Stacked.init(
            Layers, LlamaBlock, gradient_checkpointing=config.gradient_checkpointing
        )
        tied = config.tie_word_embeddings
        model = cls(
            _table(Vocab, config, key=table_key),
            stack(config, key=jax.random.split(blocks_key, Layers.size)),
            _norm(config),
            None if tied else _table(Vocab, config, key=head_key),
            Vocab,
            Pos,
            config,
        )
        return with_vocab_rows(model, config.vocab_rows(Vocab.size))

    @property
    def head(self) -> NamedArray:
        """The matrix whose product with an activation gives logits.

        Its axes are `Embed` and that of `Vocab`, of which it may have more rows than there are ids.
        """
        return (self.lm_head or self.embeddings).weight

    def activations(
        self,
        input_ids: NamedArray,
        *,
        segment_ids: NamedArray | None = None,
        key: PRNGKeyArray | None = None,
    ) -> NamedArray:
        """Returns what the head is applied to, for rows of at most `Pos.size` ids."""
        del key
        Pos = row_axis(input_ids, self.Pos)
        at = hax.arange(Pos) if segment_ids is None else positions(segment_ids, Pos)
        angles = rotary_angles(at, self.config)
        x = self.embeddings.embed(input_ids)
        unroll = self.config.unroll_layers
        return self.norm(self.blocks.fold(x, Pos, angles, segment_ids, unroll=unroll))

    def __call__(
        self,
        input_ids: NamedArray,
        *,
        segment_ids: NamedArray | None = None,
        key: PRNGKeyArray | None = None,
    ) -> NamedArray:
        """Returns float32 logits over `Vocab` for the id after each position."""
        activations = self.activations(input_ids, segment_ids=segment_ids, key=key)
        return logits_of_ids(activations, self.head, self.Vocab)


def with_vocab_rows(model: LlamaLmHeadModel, num_rows: int) -> LlamaLmHeadModel:
    """Returns the model with so many rows in its embedding and head; see `vocab_pad_multiple`."""
    if model.lm_head is not None:
        head = with_rows(model.lm_head, num_rows)
        model = eqx.tree_at(lambda model: model.lm_head, model, head)
    table = with_rows(model.embeddings, num_rows)
    return eqx.tree_at(lambda model: model.embeddings, model, table)


def rotary_angles(at: NamedArray, config: LlamaConfig) -> NamedArray:
    """Returns the float32 angle of each pair of features at the positions `at`, by axis `pair`."""
    Pair = Axis("pair", config.head_size // 2)
    # In float64 on the host: what is rounded is the frequency, not the steps towards it.
    exponents = [2.0 * j / config.head_size for j in range(Pair.size)]
    raw = jnp.asarray([config.rope_theta**-exponent for exponent in exponents], jnp.float32)
    return at.astype(jnp.float32).broadcast_axis(Pair) * hax.named(raw, Pair)


def rotated(x: NamedArray, angles: NamedArray, HeadSize: Axis) -> NamedArray:
    """Returns `x` with the pairs of its features turned by their angles, computed in float32."""
    Half, Pair = Axis("half", 2), angles.resolve_axis("pair")
    wide = hax.unflatten_axis(x.astype(jnp.float32), HeadSize, (Half, Pair))
    first, second = wide.unbind(Half)
    cos, sin = hax.cos(angles), hax.sin(angles)
    turned = hax.stack(Half, [first * cos - second * sin, second * cos + first * sin])
    return hax.flatten_axes(turned, (Half, Pair), HeadSize).rearrange(x.axes).astype(x.dtype)


def _linear(In: AxisSpec, Out: AxisSpec, std: float, *, key: PRNGKeyArray) -> Linear:
    """Returns a product with normal weights, stored `[In, Out]` as in `gpt2`, without a bias."""
    inputs, outputs = hax.axis_spec_to_tuple(In), hax.axis_spec_to_tuple(Out)
    return Linear(std * hax.random.normal(key, (*inputs, *outputs)), None, In, Out)


def _table(Vocab: Axis, config: LlamaConfig, *, key: PRNGKeyArray) -> Embedding:
    Embed = axes_of(config).Embed
    weight = config.initializer_range * hax.random.normal(key, (Vocab, Embed))
    return Embedding(weight, Vocab, Embed)


def _norm(config: LlamaConfig) -> RmsNorm:
    """Returns a normalization whose mean square is float32 whatever the compute dtype."""
    Embed = axes_of(config).Embed
    return RmsNorm.init(Embed, eps=config.rms_norm_epsilon, use_bias=False, dtype=jnp.float32)
