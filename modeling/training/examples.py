"""Rows of a cache as the examples that models take, and their shapes to compile for."""

from typing import Any

import jax
import jax.numpy as jnp

from haliax import Axis, NamedArray
from modeling.data.rows import Columns, Rows
from modeling.models.lm import LmExample


def example_of(rows: Rows, Batch: Axis, Pos: Axis) -> LmExample:
    """Returns the example that raw rows are."""
    named: Any = jax.tree_util.tree_map(lambda column: NamedArray(column, (Batch, Pos)), rows)
    return LmExample.causal(named.tokens, Pos, named.segment_ids, named.loss_mask)


def row_shapes(Batch: Axis, Pos: Axis, columns: Columns) -> Any:
    """Returns the shapes of a batch with these columns."""
    ids: Any = jax.ShapeDtypeStruct((Batch.size, Pos.size), jnp.int32)
    mask: Any = jax.ShapeDtypeStruct((Batch.size, Pos.size), jnp.bool_)
    return Rows(ids, ids if columns.segment_ids else None, mask if columns.loss_mask else None)
