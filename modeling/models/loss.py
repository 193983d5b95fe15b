"""Cross-entropy over a vocabulary, block by block, never keeping the logits of a whole batch.

For the activation h, target y and weight w of each token, with logits z = h . head:

    total = sum w (logsumexp(z) - z[y])
    dh    = w (softmax(z) - [v = y]) . head         dhead = sum w (softmax(z) - [v = y]) h

Both gradients need nothing but z, so they are made in the forward pass while a block of logits is
at hand, and the backward pass only scales them: no logits are stored, and none are computed twice
(as in Hsu et al. 2024, "Liger Kernel", arXiv:2410.10989). Rows are cut along their positions, so
whatever splits a batch over devices splits every block alike. Where positions are split themselves,
each device's share is cut, and block b is the b-th piece of every share: no token moves.

Logits, exponentials and sums are float32. The factor (softmax - target) is rounded to the dtype of
the activations before it is multiplied, as every gradient of that dtype is.

The head may have more rows than there are ids: `Vocab` says how many of them are, and the logits of
the others are -inf. Their exponentials are exactly 0, and with them their part in every sum, their
gradient, and the probability that one is drawn.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, PRNGKeyArray

import haliax as hax
from haliax import Axis, AxisSpec, NamedArray

MAX_BLOCKS = 8
"""Into how many blocks rows are cut at most; more saved no more time where it was measured."""

Residuals = tuple[NamedArray, NamedArray, NamedArray, NamedArray]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def summed_cross_entropy(
    activations: NamedArray,
    head: NamedArray,
    targets: NamedArray,
    weights: NamedArray,
    Vocab: Axis,
    Pos: Axis,
) -> Float32[Array, ""]:
    """Returns the weighted sum of the losses of all tokens, in nats.

    Args:
        activations: what the head is applied to, with `Pos` among its axes.
        head: a matrix over `Vocab`, or more rows, and the axes of the activations it sums over.
        targets: integer ids, one a token.
        weights: one a token.
        Vocab: what the targets are ids of.
        Pos: the axis to cut.
    """
    Block = _blocks(Pos)

    def add(total: Array, h: NamedArray, y: NamedArray, w: NamedArray) -> Array:
        nats, _ = _losses(h, head, y, Vocab)
        return total + hax.sum(nats * w).scalar()

    return hax.fold(add, Block)(jnp.zeros(()), *_cut(Pos, Block, activations, targets, weights))


def _forward(
    activations: NamedArray,
    head: NamedArray,
    targets: NamedArray,
    weights: NamedArray,
    Vocab: Axis,
    Pos: Axis,
) -> tuple[Float32[Array, ""], Residuals]:
    Block = _blocks(Pos)
    summed_over = tuple(axis for axis in head.axes if axis.name != Vocab.name)

    def add(
        carry: tuple[Array, NamedArray], h: NamedArray, y: NamedArray, w: NamedArray
    ) -> tuple[tuple[Array, NamedArray], tuple[NamedArray, NamedArray]]:
        total, d_head = carry
        nats, excess = _losses(h, head, y, Vocab)
        excess = (excess * w).astype(h.dtype)
        d_h = hax.dot(excess, head, axis=Vocab.name, preferred_element_type=jnp.float32)
        tokens = tuple(axis for axis in h.axes if axis not in summed_over)
        d_head = d_head + hax.dot(
            excess, h, axis=tokens, preferred_element_type=jnp.float32, out_axes=head.axes
        )
        return (total + hax.sum(nats * w).scalar(), d_head), (d_h.astype(h.dtype), nats)

    start = jnp.zeros(()), hax.zeros(head.axes, dtype=jnp.float32)
    blocks = _cut(Pos, Block, activations, targets, weights)
    (total, d_head), (d_activations, nats) = hax.scan(add, Block)(start, *blocks)
    return total, (
        _join(Pos, Block, d_activations).rearrange(activations.axes),
        d_head.astype(head.dtype),
        targets,
        _join(Pos, Block, nats).rearrange(weights.axes),
    )


def _backward(
    Vocab: Axis, Pos: Axis, residuals: Residuals, cotangent: Float32[Array, ""]
) -> tuple[NamedArray, NamedArray, Any, NamedArray]:
    d_activations, d_head, targets, nats = residuals
    none = jax.tree.map(lambda ids: jnp.zeros(ids.shape, jax.dtypes.float0), targets)

    def scaled(x: NamedArray) -> NamedArray:
        return (x * cotangent).astype(x.dtype)

    return scaled(d_activations), scaled(d_head), none, scaled(nats)


summed_cross_entropy.defvjp(_forward, _backward)


def logits(activations: NamedArray, head: NamedArray, Vocab: Axis) -> NamedArray:
    """Returns the product of both, accumulated and left in float32, over all rows of the head.

    Those of rows that are no ids of `Vocab` are -inf.
    """
    over = tuple(axis for axis in head.axes if axis.name != Vocab.name)
    z = hax.dot(activations, head, axis=over, preferred_element_type=jnp.float32)
    rows = z.resolve_axis(Vocab.name)
    if rows == Vocab:
        return z
    return hax.where(hax.arange(rows) < Vocab.size, z, -jnp.inf)


def token_cross_entropy(
    activations: NamedArray, head: NamedArray, targets: NamedArray, Vocab: Axis, Pos: Axis
) -> NamedArray:
    """Returns the loss of each token in nats, float32; not meant to be differentiated."""
    Block = _blocks(Pos)
    losses = hax.map(lambda h, y: _losses(h, head, y, Vocab)[0], Block)
    nats = losses(*_cut(Pos, Block, activations, targets))
    return _join(Pos, Block, nats).rearrange(targets.axes)


def sampled_targets(
    activations: NamedArray, head: NamedArray, Vocab: Axis, Pos: Axis, *, key: PRNGKeyArray
) -> NamedArray:
    """Returns an id for each activation, drawn with the probabilities softmax(h . head)."""
    Block = _blocks(Pos)

    def draw(h: NamedArray, block: NamedArray) -> NamedArray:
        z = logits(h, head, Vocab)
        return hax.random.categorical(jax.random.fold_in(key, block.array), z, Vocab.name)

    (blocks,) = _cut(Pos, Block, jax.lax.stop_gradient(activations))
    ids = hax.map(draw, Block)(blocks, hax.arange(Block)).astype(jnp.int32)
    tokens = tuple(axis for axis in activations.axes if axis not in head.axes)
    return _join(Pos, Block, ids).rearrange(tokens)


def _losses(
    h: NamedArray, head: NamedArray, y: NamedArray, Vocab: Axis
) -> tuple[NamedArray, NamedArray]:
    """Returns each token's loss, and softmax less target: the gradient by its logits."""
    z = logits(h, head, Vocab)
    rows = z.resolve_axis(Vocab.name)
    largest = hax.max(z, rows)
    exponentials = hax.exp(z - largest)
    total = hax.sum(exponentials, rows)
    is_target = hax.arange(rows).broadcast_axis(y.axes) == y
    # Selecting instead of gathering splits over a split vocabulary, and is ordered on every device.
    target = hax.sum(hax.where(is_target, z, 0.0), rows)
    return hax.log(total) + largest - target, exponentials / total - is_target


def _shares(Pos: Axis) -> Axis:
    """Returns the axis of the shares that the mapping in force splits `Pos` into."""
    return Axis("share", hax.partitioning.physical_axis_size(Pos) or 1)


def _blocks(Pos: Axis) -> Axis:
    """Returns the axis of blocks: the most of them, up to the limit, that cut each share evenly."""
    share = Pos.size // _shares(Pos).size
    return Axis("block", max(n for n in range(1, MAX_BLOCKS + 1) if share % n == 0))


def _cut(Pos: Axis, Block: Axis, *arrays: NamedArray) -> tuple[NamedArray, ...]:
    Share, Here = _shares(Pos), Pos.resize(Pos.size // Block.size)
    if Share.size == 1:
        return tuple(hax.unflatten_axis(array, Pos, (Block, Here)) for array in arrays)
    piece: AxisSpec = (Share, Block, Axis("piece", Here.size // Share.size))
    pieces = (hax.unflatten_axis(array, Pos, piece) for array in arrays)
    return tuple(hax.flatten_axes(array, ("share", "piece"), Here) for array in pieces)


def _join(Pos: Axis, Block: Axis, array: NamedArray) -> NamedArray:
    Share = _shares(Pos)
    if Share.size == 1:
        return hax.flatten_axes(array, (Block, Pos.name), Pos)
    Piece = Axis("piece", Pos.size // Block.size // Share.size)
    pieces = hax.unflatten_axis(array, Pos.name, (Share, Piece))
    return hax.flatten_axes(pieces, (Share, Block, Piece), Pos)
