"""Losses over named classes: cross entropy of integer or one-hot targets, binary cross entropy."""

from typing import Any

import jax
import jax.numpy as jnp

from haliax.axis import AxisSelection, AxisSelector, axis_name
from haliax.broadcasting import aligned, contains
from haliax.contraction import dot
from haliax.core import NamedArray, honest, trusted
from haliax.errors import axis_not_found, describe, size_mismatch
from haliax.nn.activations import log_sigmoid
from haliax.ops import where as select
from haliax.reductions import ReductionFunction, logsumexp, mean


class Unspecified:
    """The type of `UNSPECIFIED`, which tells "not given" from `None`."""

    def __repr__(self) -> str:
        return "UNSPECIFIED"


UNSPECIFIED = Unspecified()


def cross_entropy_loss(
    logits: NamedArray,
    Label: AxisSelector,
    targets: NamedArray,
    reduction: ReductionFunction | Unspecified | None = UNSPECIFIED,
    where: NamedArray | None = None,
    reduction_axis: AxisSelection | None = None,
) -> NamedArray:
    """`-log p(target)` for logits over `Label`, averaged unless `reduction` says otherwise.

    Targets are class numbers, without the axis `Label`, or distributions over it. `reduction=None`
    keeps one loss per element; any reduction of `haliax` may be given. `where` selects the elements
    that count. A class number out of range gives NaN where it counts.
    """
    loss, _ = cross_entropy_loss_and_log_normalizers(logits, Label, targets)
    return maybe_reduce_loss(loss, reduction, reduction_axis, where)


def cross_entropy_loss_and_log_normalizers(
    logits: NamedArray, Label: AxisSelector, targets: NamedArray
) -> tuple[NamedArray, NamedArray]:
    """The loss of each element, and the log of the sum of exponentials of its logits."""
    label = next((a for a in logits.axes if a.name == axis_name(Label)), None)
    if label is None:
        raise axis_not_found("cross_entropy_loss", axis_name(Label), logits.axes)
    if not isinstance(Label, str) and Label != label:
        raise size_mismatch("cross_entropy_loss", label.name, Label.size, label.size, logits.axes)
    log_normalizers = logsumexp(logits, label)
    if targets.has_axis(label.name):
        if jnp.issubdtype(targets.dtype, jnp.integer) or targets.dtype == bool:
            targets = targets.astype(logits.dtype)
        total = targets.sum(label)
        return log_normalizers * total - dot(logits, targets, axis=label), log_normalizers
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(
            f"cross_entropy_loss: targets {targets.dtype}{targets.shape} are neither class numbers "
            f"(integers without the axis '{label.name}') nor distributions over {label}."
        )
    rest = tuple(a for a in logits.axes if a != label)
    if not contains(rest, targets.axes):
        raise ValueError(
            f"cross_entropy_loss: targets with axes {describe(targets.axes)} do not fit logits "
            f"{describe(logits.axes)}; without '{label.name}' those have {describe(rest)}."
        )
    return log_normalizers - _picked(logits, label, targets), log_normalizers


def _picked(logits: NamedArray, label: Any, targets: NamedArray) -> NamedArray:
    """The logit of each target.

    A masked sum, which XLA fuses with its neighbours. A gather would have a scatter as its
    gradient: slow, of unspecified order on GPUs, and an all-gather where `Label` is sharded.
    """
    raw = honest("cross_entropy_loss", logits)
    at = logits.axes.index(label)
    rest = (*logits.axes[:at], *logits.axes[at + 1 :])
    chosen = jnp.asarray(aligned(honest("cross_entropy_loss", targets), targets.axes, rest))
    if not chosen.ndim:
        chosen = chosen.reshape((1,) * len(rest))
    classes = jax.lax.broadcasted_iota(chosen.dtype, raw.shape, at)
    hit = classes == jnp.expand_dims(chosen, at)
    picked = jnp.sum(raw, axis=at, where=hit)
    in_range = (chosen >= 0) & (chosen < label.size)
    return trusted(jnp.where(in_range, picked, jnp.asarray(jnp.nan, picked.dtype)), rest)


def binary_cross_entropy_loss(
    logits: NamedArray,
    targets: NamedArray,
    reduction: ReductionFunction | Unspecified | None = UNSPECIFIED,
    where: NamedArray | None = None,
    reduction_axis: AxisSelection | None = None,
) -> NamedArray:
    """`-(t log sigmoid(x) + (1 - t) log sigmoid(-x))` for targets 0, 1 or between."""
    if not jnp.issubdtype(targets.dtype, jnp.floating):
        targets = targets.astype(logits.dtype)
    loss = -targets * log_sigmoid(logits) - (1.0 - targets) * log_sigmoid(-logits)
    return maybe_reduce_loss(loss, reduction, reduction_axis, where)


def reduce_loss(
    arr: NamedArray,
    reduction: ReductionFunction | Unspecified | None = UNSPECIFIED,
    reduction_axis: AxisSelection | None = None,
    where: NamedArray | None = None,
) -> NamedArray:
    """Reduces losses, by their mean unless told otherwise, over all axes or those given."""
    return maybe_reduce_loss(arr, reduction, reduction_axis, where)


def maybe_reduce_loss(
    arr: NamedArray,
    reduction: ReductionFunction | Unspecified | None = UNSPECIFIED,
    reduction_axis: AxisSelection | None = None,
    where: NamedArray | None = None,
) -> NamedArray:
    """`reduce_loss`; with `reduction=None`, the losses themselves, 0 where `where` is false."""
    if reduction is None:
        if reduction_axis is not None:
            raise ValueError(
                "reduction=None keeps every element, so `reduction_axis` has no meaning."
            )
        return arr if where is None else select(where, arr, jnp.zeros((), arr.dtype))
    if isinstance(reduction, Unspecified):
        reduction = mean
    return reduction(arr, reduction_axis, where=where)
