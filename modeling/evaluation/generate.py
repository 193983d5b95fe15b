"""Greedy continuations of prompts: the likeliest token, appended, until there is a reason to stop.

All prompts go through one compiled program of fixed shapes: a buffer `[sample, Pos]` that starts
with the prompts, left-aligned, and takes one more token a round. Causality makes what stands to the
right of a row's end irrelevant to its next token, so the buffer needs no mask.
"""

import dataclasses
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import haliax as hax
from haliax import Axis, NamedArray
from modeling.evaluation.results import Stop
from modeling.models.lm import LanguageModel
from modeling.models.loss import logits


@dataclasses.dataclass(frozen=True)
class Continuation:
    """What follows one prompt."""

    tokens: tuple[int, ...]
    """Without the prompt and without the token that ends a document."""
    stopped: Stop


def greedy(
    model: LanguageModel, prompts: Sequence[Sequence[int]], num_tokens: int, *, end_id: int
) -> list[Continuation]:
    """Returns the continuation of each prompt, of at most `num_tokens` tokens.

    Args:
        model: gives the logits; of equal ones the lowest id is taken.
        prompts: ids, at least one a prompt and fewer than the model has positions.
        num_tokens: after how many tokens to stop.
        end_id: the token that ends a document.
    """
    if not prompts:
        return []
    for prompt in prompts:
        if not 0 < len(prompt) < model.Pos.size:
            raise ValueError(
                f"A prompt of {len(prompt)} tokens has no continuation: the model needs at least 1 "
                f"and, to have room for more, at most {model.Pos.size - 1}. Shorten the prompt, or "
                f"begin an empty one with the end-of-document token."
            )
    rows = np.full((len(prompts), model.Pos.size), end_id, np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt
    Sample = Axis("sample", len(prompts))
    starts = [len(prompt) for prompt in prompts]
    ends = [min(start + num_tokens, model.Pos.size) for start in starts]
    buffer, reached = _continue(
        model,
        hax.named(jnp.asarray(rows), (Sample, model.Pos)),
        hax.named(jnp.asarray(starts, jnp.int32), Sample),
        hax.named(jnp.asarray(ends, jnp.int32), Sample),
        end_id,
    )
    filled = buffer.rearrange((Sample, model.Pos)).tolist()
    made = (
        row[start:end] for row, start, end in zip(filled, starts, reached.tolist(), strict=True)
    )
    return [_continuation(tokens, num_tokens, end_id) for tokens in made]


def _continuation(tokens: list[int], num_tokens: int, end_id: int) -> Continuation:
    if tokens and tokens[-1] == end_id:
        return Continuation(tuple(tokens[:-1]), "end")
    return Continuation(tuple(tokens), "limit" if len(tokens) == num_tokens else "context")


@eqx.filter_jit
def _continue(
    model: LanguageModel, buffer: NamedArray, lengths: NamedArray, ends: NamedArray, end_id: int
) -> tuple[NamedArray, NamedArray]:
    """Returns the filled buffer and the length of each row, a closing `end_id` included."""
    Pos = model.Pos
    positions = hax.arange(Pos)

    def is_open(state: tuple[NamedArray, NamedArray, NamedArray]) -> Array:
        _, lengths, ended = state
        return hax.any(~ended & (lengths < ends)).scalar()

    def append(
        state: tuple[NamedArray, NamedArray, NamedArray],
    ) -> tuple[NamedArray, NamedArray, NamedArray]:
        buffer, lengths, ended = state
        last = model.activations(buffer)[Pos, lengths - 1]
        scores = logits(last, model.head, model.Vocab)
        token = hax.argmax(scores, axis=model.Vocab.name).astype(jnp.int32)
        grows = ~ended & (lengths < ends)
        here = (positions.broadcast_axis(lengths.axes) == lengths) & grows
        buffer = hax.where(here, token, buffer)
        return buffer, lengths + grows, ended | (grows & (token == end_id))

    ended = hax.zeros_like(lengths, dtype=bool)
    buffer, lengths, _ = jax.lax.while_loop(is_open, append, (buffer, lengths, ended))
    return buffer, lengths
