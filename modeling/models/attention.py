"""Causal attention by axis names, by whichever program can do what is asked.

    out = softmax(mask(q . k)) . v        over `HeadSize`, then over the positions of the keys

Queries come scaled. Their heads may be more than those of keys and values (grouped-query
attention, Ainslie et al. 2023, arXiv:2305.13245): queries then have an axis `Group` besides
`Heads`, and all of a group see the same keys.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

import haliax as hax
from haliax import Axis, NamedArray
from modeling.models.segments import attendable

Program = Literal["auto", "xla", "cudnn"]
"""cuDNN's fused attention, which keeps no scores; XLA's products; or the first where it can."""


def attend(
    q: NamedArray,
    k: NamedArray,
    v: NamedArray,
    Pos: Axis,
    Heads: Axis,
    HeadSize: Axis,
    segment_ids: NamedArray | None,
    *,
    by: Program,
    Group: Axis | None = None,
    dropout: float = 0.0,
    key: PRNGKeyArray | None = None,
) -> NamedArray:
    """Returns the values mixed for each query.

    Args:
        q: scaled queries, over `Pos`, `Heads`, `HeadSize` and, if there is one, `Group`.
        k: keys, without `Group`; `v`, the values, likewise.
        v: see `k`.
        Pos: of a row.
        Heads: of keys and values.
        HeadSize: what scores are summed over.
        segment_ids: attention stays within each; None: all of a row is one.
        by: which program.
        Group: the queries that share a head of keys.
        dropout: the share of the weights that is dropped, given a key.
        key: for dropout; None drops nothing.
    """
    acting = 0.0 if key is None else dropout
    if uses_cudnn(by, HeadSize.size, jax.default_backend(), q.dtype, dropout=acting):
        return library_attention(
            q, k, v, Pos, Heads, HeadSize, segment_ids, Group=Group, implementation="cudnn"
        )
    KPos = Pos.alias("key_position")
    k, v = k.rename({Pos: KPos}), v.rename({Pos: KPos})
    mask = attendable(Pos, KPos, segment_ids)
    scores = hax.where(mask, hax.dot(q, k, axis=HeadSize), -jnp.inf)
    weights = hax.nn.softmax(scores, axis=KPos).astype(v.dtype)
    weights = hax.nn.dropout(weights, dropout, inference=key is None, key=key)
    return hax.dot(weights, v, axis=KPos)


def uses_cudnn(by: Program, head_size: int, platform: str, dtype: Any, *, dropout: float) -> bool:
    """Returns whether attention is computed by cuDNN.

    Raises:
        ValueError: it is asked for by name where it cannot do what is asked.
    """
    lacking = {
        f"platform {platform}, not gpu": platform == "gpu",
        f"{jnp.dtype(dtype).name} scores, not 16-bit": jnp.dtype(dtype).itemsize == 2,
        f"dropout of weights (model.attn_pdrop {dropout})": dropout == 0.0,
        f"a head size of {head_size}, not a multiple of 8 up to 128": (
            head_size % 8 == 0 and head_size <= 128
        ),
    }
    reasons = [reason for reason, holds in lacking.items() if not holds]
    if by == "cudnn" and reasons:
        raise ValueError(
            f"model.attention: cudnn cannot do with {'; '.join(reasons)}. Take `auto`, which "
            f"chooses by what is possible, or `xla`."
        )
    return by != "xla" and not reasons


def library_attention(
    q: NamedArray,
    k: NamedArray,
    v: NamedArray,
    Pos: Axis,
    Heads: Axis,
    HeadSize: Axis,
    segment_ids: NamedArray | None,
    *,
    Group: Axis | None = None,
    implementation: Literal["cudnn", "xla"],
) -> NamedArray:
    """Returns the values mixed by causal attention of scaled queries, in one call of the library.

    The library takes arrays `[batch, position, head, feature]`: other axes become one batch. It has
    the heads of a group side by side.
    """
    of_queries = (Heads,) if Group is None else (Heads, Group)
    others = tuple(axis for axis in q.axes if axis not in (Pos, *of_queries, HeadSize))

    def raw(x: NamedArray, heads: tuple[Axis, ...]) -> Array:
        ordered = x.rearrange((*others, Pos, *heads, HeadSize)).array
        return ordered.reshape(-1, Pos.size, hax.axis_size(heads), HeadSize.size)

    mask = None
    if segment_ids is not None:
        rows = segment_ids.broadcast_to((*others, Pos)).rearrange((*others, Pos))
        ids = rows.array.reshape(-1, Pos.size)
        mask = (ids[:, :, None] == ids[:, None, :])[:, None]
    mixed = jax.nn.dot_product_attention(
        raw(q, of_queries), raw(k, (Heads,)), raw(v, (Heads,)),
        mask=mask, scale=1.0, is_causal=True, implementation=implementation,
    )  # fmt: skip
    order = (*others, Pos, *of_queries, HeadSize)
    return hax.named(mixed.reshape([axis.size for axis in order]), order)
