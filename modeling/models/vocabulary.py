"""What models of every architecture do alike with ids: rows of a table, rows of a batch, logits."""

import haliax as hax
from haliax import Axis, NamedArray
from haliax.nn import Embedding
from modeling.models.loss import logits


def row_axis(input_ids: NamedArray, Pos: Axis) -> Axis:
    """Returns the axis of the rows of `input_ids`, of at most `Pos.size` positions."""
    found = input_ids.resolve_axis(Pos.name)
    if found.size > Pos.size:
        raise ValueError(
            f"input_ids: axis '{found.name}' has size {found.size}, but the model knows "
            f"{Pos.size} positions; cut the rows, or train with a longer sequence_length."
        )
    return found


def logits_of_ids(activations: NamedArray, head: NamedArray, Vocab: Axis) -> NamedArray:
    """Returns float32 logits over `Vocab`, of whose axis the head may have more rows."""
    return _resized(logits(activations, head, Vocab), Vocab)


def with_rows(table: Embedding, num_rows: int) -> Embedding:
    """Returns the table with so many rows: the last are cut off, zeros appended."""
    Rows = table.Vocab.resize(num_rows)
    return Embedding(_resized(table.weight, Rows), Rows, table.Embed)


def _resized(x: NamedArray, NewAxis: Axis) -> NamedArray:
    """Returns `x` with the axis of this name cut, or grown by zeros, at its end."""
    missing = NewAxis.size - x.axis_size(NewAxis.name)
    if missing > 0:
        return hax.pad(x, {NewAxis.name: (0, missing)})
    return x if missing == 0 else hax.slice(x, NewAxis.name, NewAxis)
