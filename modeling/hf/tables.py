"""Tables that say how our arrays and the tensors of a Hugging Face model correspond.

Ours keeps every axis apart and stacks the layers; theirs is a matrix a layer. A table says, for
each tensor, where ours is and which of its axes make up which dimension of theirs. It is read in
both directions, so export and import cannot disagree.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from haliax import NamedArray

Groups = tuple[tuple[str, ...], ...]
"""The dimensions of one of their tensors, each as the axes of ours that make it up, row-major."""

LAYERS = "layers"


class Row(NamedTuple):
    """One kind of tensor."""

    name: str
    """Theirs; that of a layer's is what follows the layer's prefix."""
    path: str
    """Ours, from the model or from its stacked blocks."""
    groups: Groups


@dataclasses.dataclass(frozen=True)
class Table:
    """All tensors of an architecture."""

    title: str
    """What people call it."""
    outside: Sequence[Row]
    layer_prefix: str
    """Of their names in a layer, with `{}` for its number."""
    blocks: str
    """The path of our stacked blocks."""
    inside: Sequence[Row]

    def rows(self, num_layers: int) -> Iterator[tuple[Row, list[str]]]:
        """Yields each row, by the path from the model, and the names of the tensors it is about."""
        for row in self.outside:
            yield row, [row.name]
        for name, path, groups in self.inside:
            names = [f"{self.layer_prefix.format(i)}{name}" for i in range(num_layers)]
            yield Row(name, f"{self.blocks}.{path}", ((LAYERS,), *groups)), names


def to_tensors(model: Any, table: Table) -> dict[str, np.ndarray]:
    """Returns the model's weights by their names, in the dtype that they have."""
    tensors = {}
    for row, names in table.rows(model.config.num_layers):
        array = _flat(_at(model, row.path), row.groups)
        tensors |= dict(zip(names, array if _is_stacked(row) else [array], strict=True))
    return tensors


def from_tensors(given: Mapping[str, np.ndarray], template: Any, table: Table) -> Any:
    """Returns the abstract model `template` with these weights, in the dtype that they have.

    Raises:
        ValueError: naming each tensor that is missing, unknown, or of another shape.
    """
    _check(given, template, table)
    paths, arrays = [], []
    for row, names in table.rows(template.config.num_layers):
        tensor = np.stack([given[n] for n in names]) if _is_stacked(row) else given[names[0]]
        paths.append(row.path)
        arrays.append(_unflat(tensor, _at(template, row.path), row.groups))
    return eqx.tree_at(lambda model: [_at(model, path) for path in paths], template, arrays)


def tensor_shapes(model: Any, table: Table) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor by their names; `model` may be abstract."""
    shapes = {}
    for row, names in table.rows(model.config.num_layers):
        shape = _shape(_at(model, row.path), row.groups)
        shapes |= dict.fromkeys(names, shape[1:] if _is_stacked(row) else shape)
    return shapes


def require_assumed(fields: Mapping[str, Any], assumed: Mapping[str, Sequence[Any]]) -> None:
    """Raises `ValueError` for a field of `config.json` that says what ours cannot compute."""
    for name, accepted in assumed.items():
        if fields.get(name) not in accepted:
            raise ValueError(
                f"config.json: {name}: {fields.get(name)!r} is not supported, only "
                f"{' or '.join(map(repr, accepted))}. Convert the model, or choose another."
            )


def _is_stacked(row: Row) -> bool:
    return row.groups[0] == (LAYERS,)


def _at(model: Any, path: str) -> NamedArray:
    return functools.reduce(getattr, path.split("."), model)


def _flat(array: NamedArray, groups: Groups) -> np.ndarray:
    """Returns the raw array with one dimension a group; a view where the axes stand in order."""
    ordered = array.rearrange(tuple(axis for group in groups for axis in group))
    return np.asarray(ordered.array).reshape(_shape(array, groups))


def _unflat(tensor: np.ndarray, like: NamedArray, groups: Groups) -> NamedArray:
    axes = [like.resolve_axis(axis) for group in groups for axis in group]
    named = NamedArray(jnp.asarray(tensor.reshape([axis.size for axis in axes])), tuple(axes))
    return named.rearrange(like.axes)


def _check(given: Mapping[str, np.ndarray], template: Any, table: Table) -> None:
    expected = tensor_shapes(template, table)
    faults = [f"`{name}` is missing" for name in expected if name not in given]
    faults += [f"`{name}` is not part of a {table.title}" for name in given if name not in expected]
    faults += [
        f"`{name}` has shape {given[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in given and given[name].shape != shape
    ]
    if faults:
        raise ValueError(
            f"{len(faults)} tensors do not fit: {'; '.join(faults[:8])}"
            f"{'; ...' if len(faults) > 8 else ''}. Check the sizes in `config.json`."
        )


def _shape(array: NamedArray, groups: Groups) -> tuple[int, ...]:
    return tuple(math.prod(array.axis_size(axis) for axis in group) for group in groups)
