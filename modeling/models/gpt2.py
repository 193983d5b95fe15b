"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners") by axis names.

    h      = token[ids] + position                     token: Vocab x Embed, position: Pos x Embed
    h     += attention(ln_1(h))                        for each of `Layers`
    h     += mlp(ln_2(h))
    logits = ln_f(h) . token                           the head is tied to the embedding

Normalization comes before each branch, gelu is the tanh approximation ("gelu_new"), every product
has a bias. Dropout acts when a `key` is given: on the embeddings, on the attention weights, and on
what each branch adds. Initial weights are normal with `initializer_range`; the two projections into
the residual stream get it over sqrt(2 Layers), as section 2.3 of the paper has it.

The model speaks of one row: `Pos` is the only axis that it asks of its input, so a batch, or any
other axes, are carried along. Where `segment_ids` part a row into documents, attention stays within
each and positions begin anew (`segments`). It knows nothing of devices; layouts refer to the names
of axes.
"""

import math
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

import haliax as hax
from haliax import Axis, AxisSpec, NamedArray
from haliax.jax_utils import maybe_rng_split, named_call
from haliax.nn import Embedding, LayerNorm, Linear, Stacked
from modeling.models.attention import attend
from modeling.models.config import Gpt2Config
from modeling.models.segments import positions
from modeling.models.vocabulary import logits_of_ids, row_axis, with_rows


class Gpt2Axes(NamedTuple):
    """The axes that a configuration decides; `Vocab` and `Pos` come from the data."""

    Layers: Axis
    Embed: Axis
    Qkv: Axis
    Heads: Axis
    HeadSize: Axis
    Mlp: Axis


def axes_of(config: Gpt2Config) -> Gpt2Axes:
    """Returns the axes of a GPT-2 of these sizes."""
    return Gpt2Axes(
        Layers=Axis("layers", config.num_layers),
        Embed=Axis("embed", config.hidden_dim),
        Qkv=Axis("qkv", 3),
        Heads=Axis("heads", config.num_heads),
        HeadSize=Axis("head_size", config.hidden_dim // config.num_heads),
        Mlp=Axis("mlp", config.mlp_scale * config.hidden_dim),
    )


class Gpt2Attention(eqx.Module):
    """Causal self-attention: each position mixes the values of itself and of those before it."""

    c_attn: Linear
    c_proj: Linear
    config: Gpt2Config = eqx.field(static=True)

    @classmethod
    def init(cls, config: Gpt2Config, *, key: PRNGKeyArray) -> "Gpt2Attention":
        """Returns attention with random weights and zero biases."""
        _, Embed, Qkv, Heads, HeadSize, _ = axes_of(config)
        attn_key, proj_key = jax.random.split(key)
        return cls(
            _linear(Embed, (Qkv, Heads, HeadSize), config.initializer_range, key=attn_key),
            _linear((Heads, HeadSize), Embed, config.residual_range, key=proj_key),
            config,
        )

    @named_call
    def __call__(
        self,
        x: NamedArray,
        Pos: Axis,
        layer: NamedArray,
        segment_ids: NamedArray | None = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> NamedArray:
        """Returns what attention adds to the residual stream; `layer` counts from 0."""
        _, _, Qkv, Heads, HeadSize, _ = axes_of(self.config)
        q, k, v = self.c_attn(x).unbind(Qkv)

        # Scaling the query, not the scores, keeps the products small in low precision.
        q = q / math.sqrt(HeadSize.size)
        if self.config.scale_attn_by_inverse_layer_idx:
            q = q / (layer + 1).astype(q.dtype)
        if self.config.upcast_attn:
            q, k = q.astype(jnp.float32), k.astype(jnp.float32)

        mixed = attend(
            q, k, v, Pos, Heads, HeadSize, segment_ids,
            by=self.config.attention, dropout=self.config.attn_pdrop, key=key,
        )  # fmt: skip
        return self.c_proj(mixed)


class Gpt2Mlp(eqx.Module):
    """Two products with a gelu between, applied to each position alone."""

    c_fc: Linear
    c_proj: Linear

    @classmethod
    def init(cls, config: Gpt2Config, *, key: PRNGKeyArray) -> "Gpt2Mlp":
        """Returns the MLP with random weights and zero biases."""
        axes = axes_of(config)
        fc_key, proj_key = jax.random.split(key)
        return cls(
            _linear(axes.Embed, axes.Mlp, config.initializer_range, key=fc_key),
            _linear(axes.Mlp, axes.Embed, config.residual_range, key=proj_key),
        )

    @named_call
    def __call__(self, x: NamedArray) -> NamedArray:
        """Returns what the MLP adds to the residual stream."""
        return self.c_proj(hax.nn.gelu(self.c_fc(x), approximate=True))


class Gpt2Block(eqx.Module):
    """One layer: attention and MLP, each normalized before and added to the residual stream."""

    ln_1: LayerNorm
    attn: Gpt2Attention
    ln_2: LayerNorm
    mlp: Gpt2Mlp
    resid_pdrop: float = eqx.field(static=True)

    @classmethod
    def init(cls, config: Gpt2Config, *, key: PRNGKeyArray) -> "Gpt2Block":
        """Returns a block with random weights."""
        attn_key, mlp_key = jax.random.split(key)
        return cls(
            _layer_norm(config),
            Gpt2Attention.init(config, key=attn_key),
            _layer_norm(config),
            Gpt2Mlp.init(config, key=mlp_key),
            config.resid_pdrop,
        )

    def __call__(
        self,
        x: NamedArray,
        Pos: Axis,
        layer: NamedArray,
        segment_ids: NamedArray | None = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> NamedArray:
        """Returns the residual stream after this layer."""
        attn_key, attn_out_key, mlp_out_key = maybe_rng_split(key, 3)
        attention = self.attn(self.ln_1(x), Pos, layer, segment_ids, key=attn_key)
        x = x + _dropout(attention, self.resid_pdrop, key=attn_out_key)
        return x + _dropout(self.mlp(self.ln_2(x)), self.resid_pdrop, key=mlp_out_key)


class Gpt2Transformer(eqx.Module):
    """The stack of blocks and the last normalization."""

    blocks: Stacked
    ln_f: LayerNorm
    unroll_layers: int = eqx.field(static=True)

    @classmethod
    def init(cls, config: Gpt2Config, *, key: PRNGKeyArray) -> "Gpt2Transformer":
        """Returns blocks with random weights, each from a key of its own."""
        Layers = axes_of(config).Layers
        stack = Stacked.init(
            Layers, Gpt2Block, gradient_checkpointing=config.gradient_checkpointing
        )
        blocks = stack(config, key=jax.random.split(key, Layers.size))
        return cls(blocks, _layer_norm(config), config.unroll_layers)

    def __call__(
        self,
        x: NamedArray,
        Pos: Axis,
        segment_ids: NamedArray | None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> NamedArray:
        """Returns the normalized residual stream after the last layer."""
        Layers = self.blocks.Block
        keys = None if key is None else jax.random.split(key, Layers.size)
        # The index of a layer is scanned along with its weights, so one program serves them all.
        return self.ln_f(
            self.blocks.fold(
                x, Pos, hax.arange(Layers), segment_ids, key=keys, unroll=self.unroll_layers
            )
        )


class Gpt2Embeddings(eqx.Module):
    """A vector for each id of the vocabulary and one for each position."""

    token_embeddings: Embedding
    position_embeddings: Embedding
    embed_pdrop: float = eqx.field(static=True)

    @classmethod
    def init(
        cls, Vocab: Axis, Pos: Axis, config: Gpt2Config, *, key: PRNGKeyArray
    ) -> "Gpt2Embeddings":
        """Returns random embeddings."""
        Embed, std = axes_of(config).Embed, config.initializer_range
        token_key, position_key = jax.random.split(key)
        return cls(
            Embedding(std * hax.random.normal(token_key, (Vocab, Embed)), Vocab, Embed),
            Embedding(std * hax.random.normal(position_key, (Pos, Embed)), Pos, Embed),
            config.embed_pdrop,
        )

    def __call__(
        self,
        input_ids: NamedArray,
        Pos: Axis,
        segment_ids: NamedArray | None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> NamedArray:
        """Returns the sum of the embeddings of each id and its position in its segment."""
        if segment_ids is None:
            at_positions = self.position_embeddings.weight[Pos.name, : Pos.size]
        else:
            at_positions = self.position_embeddings.embed(positions(segment_ids, Pos))
        x = self.token_embeddings.embed(input_ids) + at_positions
        return _dropout(x, self.embed_pdrop, key=key)


class Gpt2LmHeadModel(eqx.Module):
    """GPT-2 with its language-modelling head."""

    embeddings: Gpt2Embeddings
    transformer: Gpt2Transformer
    Vocab: Axis = eqx.field(static=True)
    Pos: Axis = eqx.field(static=True)
    config: Gpt2Config = eqx.field(static=True)

    @classmethod
    def init(
        cls, Vocab: Axis, Pos: Axis, config: Gpt2Config, *, key: PRNGKeyArray
    ) -> "Gpt2LmHeadModel":
        """Returns a model with random weights, the same whatever mesh it is made on."""
        embeddings_key, transformer_key = jax.random.split(key)
        model = cls(
            Gpt2Embeddings.init(Vocab, Pos, config, key=embeddings_key),
            Gpt2Transformer.init(config, key=transformer_key),
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
        return self.embeddings.token_embeddings.weight

    def activations(
        self,
        input_ids: NamedArray,
        *,
        segment_ids: NamedArray | None = None,
        key: PRNGKeyArray | None = None,
    ) -> NamedArray:
        """Returns what the head is applied to, for rows of at most `Pos.size` ids."""
        Pos = row_axis(input_ids, self.Pos)
        embeddings_key, transformer_key = maybe_rng_split(key)
        x = self.embeddings(input_ids, Pos, segment_ids, key=embeddings_key)
        return self.transformer(x, Pos, segment_ids, key=transformer_key)

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


def with_vocab_rows(model: Gpt2LmHeadModel, num_rows: int) -> Gpt2LmHeadModel:
    """Returns the model with so many rows in its embedding: the last are cut off, zeros appended.

    Zeros appended to what was drawn for the ids alone: no id's vector hangs on the padding.
    """
    new = with_rows(model.embeddings.token_embeddings, num_rows)
    return eqx.tree_at(lambda model: model.embeddings.token_embeddings, model, new)


def _linear(In: AxisSpec, Out: AxisSpec, std: float, *, key: PRNGKeyArray) -> Linear:
    """Returns a product with normal weights, stored `[In, Out]` as GPT-2 does, and zero bias."""
    inputs, outputs = hax.axis_spec_to_tuple(In), hax.axis_spec_to_tuple(Out)
    weight = std * hax.random.normal(key, (*inputs, *outputs))
    return Linear(weight, hax.zeros(outputs), In, Out)


def _layer_norm(config: Gpt2Config) -> LayerNorm:
    """Returns a normalization whose statistics are float32 whatever the compute dtype."""
    Embed = axes_of(config).Embed
    return LayerNorm.init(Embed, eps=config.layer_norm_epsilon, dtype=jnp.float32)


def _dropout(x: NamedArray, pdrop: float, *, key: PRNGKeyArray | None) -> NamedArray:
    return hax.nn.dropout(x, pdrop, inference=key is None, key=key)
