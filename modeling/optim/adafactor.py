"""Adafactor's second moments, factored along named axes (Shazeer & Stern 2018, arXiv 1804.04235).

For update t of a matrix with the gradient G, with rate b = 1 - t^-decay_exponent:

    R = b R + (1 - b) mean over columns of (G^2 + eps)
    C = b C + (1 - b) mean over rows of (G^2 + eps)
    U = G / sqrt(R / mean(R)) / sqrt(C)
    U = U / max(1, rms(U) / max_update_rms)

Everything that is no matrix keeps its second moments whole: V in the place of R C / mean(R). Optax
has the same with the two largest dimensions of an array as rows and columns, which are the wrong
ones for stacked layers and attention heads, and its factors have no names to be split over a mesh
by. Here rows and columns are what the modules say, each of any number of axes; R and C have the
names that are left; every mean and every rms is over one matrix, so that a stack of layers is
treated as its layers would be one by one.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32

import haliax as hax
from haliax.core import NamedArray
from modeling.optim.config import AdafactorConfig
from modeling.optim.parameters import Matrix, by_path, in_tree, matrices, stacked_axes

Moments = dict[str, NamedArray]
"""By path of the parameter."""


class AdafactorState(NamedTuple):
    """Second moments: of each matrix a row and a column, of everything else all."""

    updates_made: Int32[Array, ""]
    row: Moments
    column: Moments
    whole: Moments


def scale_by_factored_moments(config: AdafactorConfig) -> optax.GradientTransformation:
    """Returns the transformation from gradients to updates of at most `max_update_rms`."""

    def init(params: Any) -> Any:
        blocks = _blocks(params, config)
        row, column, whole = {}, {}, {}
        for path, parameter in by_path(params).items():
            like, matrix = _named(parameter), blocks[path].factored
            if matrix is None:
                whole[path] = hax.zeros(like.axes)
            else:
                row[path] = hax.zeros(_without(like, matrix.columns))
                column[path] = hax.zeros(_without(like, matrix.rows))
        return AdafactorState(jnp.zeros((), jnp.int32), row, column, whole)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        made = state.updates_made + 1
        rate = 1.0 - made.astype(jnp.float32) ** -config.decay_exponent
        blocks = _blocks(updates, config)
        row, column, whole, steps = {}, {}, {}, {}
        for path, gradient in by_path(updates).items():
            g, block = _named(gradient), blocks[path]
            squares, matrix = hax.square(g) + config.epsilon, block.factored
            if matrix is None:
                whole[path] = rate * state.whole[path] + (1.0 - rate) * squares
                scaled = g * hax.rsqrt(whole[path])
            else:
                rows, columns = (hax.mean(squares, axis) for axis in (matrix.columns, matrix.rows))
                row[path] = rate * state.row[path] + (1.0 - rate) * rows
                column[path] = rate * state.column[path] + (1.0 - rate) * columns
                relative = row[path] / hax.mean(row[path], matrix.rows)
                scaled = g * hax.rsqrt(relative) * hax.rsqrt(column[path])
            size = _rms(scaled, block.axes)
            clipped = scaled / hax.maximum(size / config.max_update_rms, 1.0)
            steps[path] = _like(gradient, clipped)
        return in_tree(updates, steps), AdafactorState(made, row, column, whole)

    return optax.GradientTransformation(init, update)


def scale_by_parameter_rms(smallest: float = 1e-3) -> optax.GradientTransformation:
    """Returns the transformation that multiplies updates by the rms of what they change."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        blocks, named = _blocks(params, None), by_path(params)
        scaled = {
            path: _like(
                step,
                _named(step) * hax.maximum(_rms(_named(named[path]), blocks[path].axes), smallest),
            )
            for path, step in by_path(updates).items()
        }
        return in_tree(updates, scaled), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class _Block(NamedTuple):
    """How a parameter is seen: the axes of one block of it, and whether its moments are two."""

    axes: tuple[str, ...]
    factored: Matrix | None


def _blocks(params: Any, config: AdafactorConfig | None) -> dict[str, _Block]:
    known, layers, blocks = matrices(params), stacked_axes(params), {}
    for path, parameter in by_path(params).items():
        like, matrix = _named(parameter), known.get(path)
        batch = layers if matrix is None else matrix.batch
        axes = tuple(axis.name for axis in like.axes if axis.name not in batch)
        if matrix is not None and config is not None:
            sides = (math.prod(like.axis_size(side)) for side in (matrix.rows, matrix.columns))
            if min(sides) < config.smallest_factored:
                matrix = None
        blocks[path] = _Block(axes, matrix)
    return blocks


def _rms(x: NamedArray, axes: tuple[str, ...]) -> NamedArray:
    return hax.sqrt(hax.mean(hax.square(x), axes)) if axes else hax.abs(x)


def _named(x: Any) -> NamedArray:
    """Returns a parameter in float32; one without names gets some."""
    if not isinstance(x, NamedArray):
        x = hax.named(x, tuple(f"dimension_{number}" for number in range(x.ndim)))
    return x.astype(jnp.float32)


def _like(parameter: Any, x: NamedArray) -> Any:
    """Returns `x` with the axes, or as bare as, and in the dtype of a parameter."""
    if isinstance(parameter, NamedArray):
        return x.rearrange(parameter.axes).astype(parameter.dtype)
    return x.array.astype(parameter.dtype)


def _without(x: NamedArray, names: tuple[str, ...]) -> tuple[hax.Axis, ...]:
    return tuple(axis for axis in x.axes if axis.name not in names)
