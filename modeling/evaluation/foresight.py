"""How well a model foresees each token of some rows, and what it would rather have seen."""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np

import haliax as hax
from haliax import Axis, NamedArray
from modeling.data.rows import Rows
from modeling.evaluation.heat_map import TokenView
from modeling.models.lm import LanguageModel


def views(
    model: LanguageModel,
    rows: Rows,
    decode: Callable[[Sequence[int]], str],
    *,
    num_alternatives: int = 3,
) -> list[tuple[TokenView, ...]]:
    """Returns every token of `rows` as `model` sees it; `decode` gives the text of ids."""
    num_rows, length = rows.tokens.shape
    axes = Axis("row", num_rows), model.Pos.resize(length)
    tokens = hax.named(jnp.asarray(rows.tokens), axes)
    segments = rows.segment_ids
    named_segments = None if segments is None else hax.named(jnp.asarray(segments), axes)
    seen = eqx.filter_jit(foreseen)(model, tokens, named_segments, num_alternatives)
    taken, likeliest, ids = (np.asarray(x.array) for x in seen)
    return views_of(rows, taken, likeliest, ids, decode)


def views_of(
    rows: Rows,
    taken: np.ndarray,
    likeliest: np.ndarray,
    ids: np.ndarray,
    decode: Callable[[Sequence[int]], str],
) -> list[tuple[TokenView, ...]]:
    """Returns every token of `rows` as a model saw it, given what `foreseen` has returned."""
    num_rows, length = rows.tokens.shape
    segments = rows.segment_ids

    def view(row: int, position: int) -> TokenView:
        text = decode([int(rows.tokens[row, position])])
        if position == 0 or (
            segments is not None and segments[row, position] != segments[row, position - 1]
        ):
            return TokenView(text, None)
        before = position - 1
        alternatives = zip(ids[row, before], likeliest[row, before], strict=True)
        return TokenView(
            text,
            float(taken[row, before]),
            tuple((decode([int(i)]), float(p)) for i, p in alternatives),
        )

    return [tuple(view(row, position) for position in range(length)) for row in range(num_rows)]


def foreseen(
    model: LanguageModel,
    tokens: NamedArray,
    segment_ids: NamedArray | None,
    num_alternatives: int = 3,
) -> tuple[NamedArray, NamedArray, NamedArray]:
    """Returns each next token's probability, and the likeliest ones with their ids."""
    row, position = tokens.axes
    before, after = slice(0, position.size - 1), slice(1, position.size)
    logits = model(tokens, segment_ids=segment_ids)
    probabilities = hax.nn.softmax(logits, axis=model.Vocab)[position.name, before]
    likeliest, ids = hax.top_k(probabilities, model.Vocab, num_alternatives, new_axis="alternative")
    order = (row, position.resize(position.size - 1))
    taken = probabilities[model.Vocab, tokens[position.name, after]]
    return (
        taken.rearrange(order),
        likeliest.rearrange((*order, "alternative")),
        ids.rearrange((*order, "alternative")),
    )
