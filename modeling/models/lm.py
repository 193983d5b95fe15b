"""Language modelling: predict each token from those before it, whatever the architecture.

    loss = sum_t w_t (logsumexp(z_t) - z_t[token_(t+1)]) / sum_t w_t        z = logits, w = weights

The two sums are returned apart: a step divides once, after the sums of all microbatches, or a
ragged batch would count short rows twice. Everything from the logits on is float32; `loss` says how
they are computed.
"""

from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

import haliax as hax
from haliax import Axis, AxisSelector, NamedArray
from modeling.models.config import Gpt2Config, LlamaConfig
from modeling.models.gpt2 import Gpt2LmHeadModel
from modeling.models.llama import LlamaLmHeadModel
from modeling.models.loss import sampled_targets, summed_cross_entropy, token_cross_entropy


@runtime_checkable
class LanguageModel(Protocol):
    """What training, evaluation and generation ask of a model."""

    Vocab: Axis
    Pos: Axis

    @property
    def head(self) -> NamedArray:
        """The matrix whose product with an activation gives logits.

        It may have more rows than `Vocab`, which are no ids.
        """
        ...

    def activations(
        self,
        input_ids: NamedArray,
        *,
        segment_ids: NamedArray | None = None,
        key: PRNGKeyArray | None = None,
    ) -> NamedArray:
        """Returns what the head is applied to."""
        ...

    def __call__(
        self,
        input_ids: NamedArray,
        *,
        segment_ids: NamedArray | None = None,
        key: PRNGKeyArray | None = None,
    ) -> NamedArray:
        """Returns float32 logits over `Vocab`."""
        ...


class LmExample(eqx.Module):
    """Rows of tokens, and how much the prediction made *at* each position counts."""

    tokens: NamedArray
    loss_weight: NamedArray
    segment_ids: NamedArray | None = None
    """Which tokens belong together; None: all of a row."""

    @classmethod
    def causal(
        cls,
        tokens: NamedArray,
        Pos: AxisSelector = "position",
        segment_ids: NamedArray | None = None,
        loss_mask: NamedArray | None = None,
    ) -> "LmExample":
        """Returns rows in which every token is predicted but the first of a row or segment.

        Args:
            tokens: ids.
            Pos: the axis of a row.
            segment_ids: which tokens belong together.
            loss_mask: which tokens are predicted at all; those that are count alike.
        """
        row = tokens.resolve_axis(Pos)
        counts = hax.arange(row) < row.size - 1
        if segment_ids is not None:
            counts = counts & (segment_ids == hax.roll(segment_ids, -1, row))
        if loss_mask is not None:
            counts = counts & hax.roll(loss_mask, -1, row).astype(bool)
        weights = counts.astype(jnp.float32)
        return cls(tokens, weights.broadcast_to(tokens.axes).rearrange(tokens.axes), segment_ids)


Model = Gpt2LmHeadModel | LlamaLmHeadModel
"""Of any architecture that there is."""


def build_model(
    config: Gpt2Config | LlamaConfig, Vocab: Axis, Pos: Axis, *, key: PRNGKeyArray
) -> Model:
    """Returns a model with random weights for rows of at most `Pos.size` ids of `Vocab`."""
    if isinstance(config, LlamaConfig):
        return LlamaLmHeadModel.init(Vocab, Pos, config, key=key)
    return Gpt2LmHeadModel.init(Vocab, Pos, config, key=key)


def next_token_loss(
    model: LanguageModel, example: LmExample, *, key: PRNGKeyArray | None = None
) -> tuple[Array, Array]:
    """Returns the weighted sum of losses in nats and the sum of weights, both float32 scalars.

    Dropout acts when `key` is given.
    """
    weights = example.loss_weight.astype(jnp.float32)
    activations, targets, Pos = _predictions(model, example.tokens, example.segment_ids, key)
    # `custom_vjp` hides what the function returns from type checkers.
    total: Any = summed_cross_entropy(activations, model.head, targets, weights, model.Vocab, Pos)
    return total, hax.sum(weights).scalar()


def own_label_loss(
    model: LanguageModel, example: LmExample, *, key: PRNGKeyArray
) -> tuple[Array, Array]:
    """Returns what `next_token_loss` does, for targets drawn with the model's own probabilities."""
    weights = example.loss_weight.astype(jnp.float32)
    activations, _, Pos = _predictions(model, example.tokens, example.segment_ids, None)
    targets = sampled_targets(activations, model.head, model.Vocab, Pos, key=key)
    total: Any = summed_cross_entropy(activations, model.head, targets, weights, model.Vocab, Pos)
    return total, hax.sum(weights).scalar()


def token_losses(
    model: LanguageModel,
    tokens: NamedArray,
    *,
    segment_ids: NamedArray | None = None,
    key: PRNGKeyArray | None = None,
) -> NamedArray:
    """Returns the loss in nats of the prediction made at each position.

    The last one of a row, with nothing to predict, is compared with the row's first token, and the
    last one of a segment with the next segment's first; weigh them 0.
    """
    activations, targets, Pos = _predictions(model, tokens, segment_ids, key)
    return token_cross_entropy(activations, model.head, targets, model.Vocab, Pos)


def _predictions(
    model: LanguageModel,
    tokens: NamedArray,
    segment_ids: NamedArray | None,
    key: PRNGKeyArray | None,
) -> tuple[NamedArray, NamedArray, Axis]:
    """Returns what the head is applied to at each position, the id that follows, and the axis."""
    Pos = tokens.resolve_axis(model.Pos.name)
    activations = model.activations(tokens, segment_ids=segment_ids, key=key)
    return activations, hax.roll(tokens, -1, Pos), Pos
