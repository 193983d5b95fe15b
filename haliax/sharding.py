"""Mappings from axis names to mesh axes, the mesh in force, and the partition specs they make.

A *mapping* says which mesh axis, or tuple of mesh axes, each named axis is split over, as in
`{"batch": "data", "mlp": "model"}`; axes that it does not name are replicated. Mistakes are found
here, where the names are known, and not by XLA, which would only tell positions.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from haliax.axis import Axis, AxisSelection, AxisSelector, axis_name
from haliax.errors import describe, suggestion
from haliax.jax_utils import is_in_jit

PhysicalAxisSpec: TypeAlias = str | Sequence[str]
ResourceMapping: TypeAlias = Mapping[str, PhysicalAxisSpec]
AnyMesh: TypeAlias = Mesh | AbstractMesh


class StringHolderEnum:
    """A namespace of string constants: `ResourceAxis.DATA == "data"`, and that is a `str`."""

    def __new__(cls) -> "StringHolderEnum":
        """There are no instances."""
        raise TypeError(f"{cls.__name__} only holds constants; use them as `{cls.__name__}.NAME`.")


class ResourceAxis(StringHolderEnum):
    """Customary names of mesh axes."""

    DATA = "data"
    MODEL = "model"
    REPLICA = "replica"


class _Context(threading.local):
    mapping: ResourceMapping | None = None


_context = _Context()


def current_thread_local_mapping() -> ResourceMapping | None:
    """The mapping in force, or `None`."""
    return _context.mapping


@contextmanager
def axis_mapping(mapping: ResourceMapping, *, merge: bool = False) -> Iterator[None]:
    """Puts a mapping in force for this thread; with `merge`, on top of the one already there."""
    before = _context.mapping
    _context.mapping = {**(before or {}), **mapping} if merge else dict(mapping)
    try:
        yield
    finally:
        _context.mapping = before


def current_mesh() -> AnyMesh | None:
    """The mesh of the enclosing `jax.set_mesh(mesh)` or `with mesh:`, or `None`."""
    abstract = jax.sharding.get_abstract_mesh()
    if not abstract.empty:
        return abstract if is_in_jit() else jax.sharding.get_mesh()
    return _mesh_of_with_statement()


def _mesh_of_with_statement() -> AnyMesh | None:
    """JAX has no public question for the mesh of `with mesh:`, so see what a constraint finds."""
    try:
        with jax.ensure_compile_time_eval():
            probe = jax.lax.with_sharding_constraint(jnp.zeros(()), PartitionSpec())
    except RuntimeError:
        return None
    sharding = probe.sharding
    return sharding.mesh if isinstance(sharding, NamedSharding) and sharding.mesh.size else None


def _get_mesh() -> AnyMesh:
    """The current mesh, empty where there is none."""
    return current_mesh() or Mesh((), ())


def physical_axis_name(
    axis: AxisSelector, mapping: ResourceMapping | None = None
) -> PhysicalAxisSpec | None:
    """The mesh axis or axes that a named axis is split over, or `None`."""
    mapping = _context.mapping if mapping is None else mapping
    return None if mapping is None else mapping.get(axis_name(axis))


def physical_axis_size(axis: AxisSelector, mapping: ResourceMapping | None = None) -> int | None:
    """How many ways a named axis is split, or `None` if it is not."""
    physical = physical_axis_name(axis, mapping)
    mesh = current_mesh()
    if physical is None or mesh is None:
        return None
    return prod(_mesh_axis_size(mesh, axis_name(axis), name) for name in _as_tuple(physical))


def round_axis_for_partitioning(axis: Axis, mapping: ResourceMapping | None = None) -> Axis:
    """The axis, grown to the next size that divides evenly over its part of the mesh."""
    ways = physical_axis_size(axis, mapping)
    return axis if ways is None else axis.resize(-(-axis.size // ways) * ways)


def pspec_for_axis(axis: AxisSelection, mapping: ResourceMapping | None = None) -> PartitionSpec:
    """The partition spec of an array with the given axes, in order."""
    mapping = _context.mapping if mapping is None else mapping
    if isinstance(axis, (Axis, str)):
        axis = (axis,)
    names = [axis_name(one) for one in axis]
    spec = []
    taken: dict[str, str] = {}
    for name in names:
        physical = None if mapping is None else mapping.get(name)
        for mesh_axis in _as_tuple(physical):
            if mesh_axis in taken:
                raise ValueError(
                    f"Axes '{taken[mesh_axis]}' and '{name}' of {names} are both mapped to the "
                    f"mesh axis '{mesh_axis}', but one array can use it once. Map one of them to "
                    "another mesh axis, or leave it out of the mapping."
                )
            taken[mesh_axis] = name
        spec.append(physical if physical is None or isinstance(physical, str) else tuple(physical))
    while spec and spec[-1] is None:
        spec.pop()
    return PartitionSpec(*spec)


def _as_tuple(physical: PhysicalAxisSpec | None) -> tuple[str, ...]:
    if physical is None:
        return ()
    return (physical,) if isinstance(physical, str) else tuple(physical)


def sharding_for_axis(
    axis: AxisSelection, mapping: ResourceMapping | None = None, mesh: AnyMesh | None = None
) -> NamedSharding:
    """The sharding, on the given or current mesh, of an array with the given axes."""
    mesh = mesh or current_mesh()
    if mesh is None:
        raise ValueError(
            "sharding_for_axis: there is no mesh. Pass `mesh=`, or call it inside "
            "`jax.set_mesh(mesh)`."
        )
    spec = pspec_for_axis(axis, mapping)
    sized = (axis,) if isinstance(axis, (Axis, str)) else axis
    if not isinstance(sized, Mapping):
        check_divisible(tuple(a for a in sized if isinstance(a, Axis)), mapping, mesh)
    return NamedSharding(mesh, spec)


def _mesh_axis_size(mesh: AnyMesh, logical: str, physical: str) -> int:
    shape = dict(mesh.shape)
    if physical not in shape:
        raise ValueError(
            f"Axis '{logical}' is mapped to the mesh axis '{physical}', but the mesh has "
            f"{shape}.{suggestion(physical, shape) or ' Correct the mapping or the mesh.'}"
        )
    return shape[physical]


def check_divisible(axes: tuple[Axis, ...], mapping: ResourceMapping | None, mesh: AnyMesh) -> None:
    """Raises if an axis of the mesh does not exist, or does not divide what is split over it."""
    mapping = _context.mapping if mapping is None else mapping
    for axis in axes:
        physical = _as_tuple((mapping or {}).get(axis.name))
        ways = prod(_mesh_axis_size(mesh, axis.name, name) for name in physical)
        if axis.size % ways:
            rounded = -(-axis.size // ways) * ways
            raise ValueError(
                f"Axis '{axis.name}' of size {axis.size} in {describe(axes)} cannot be split "
                f"evenly over mesh axis {' x '.join(physical)} of size {ways}. Round it up to "
                f"{rounded} with `hax.partitioning.round_axis_for_partitioning`, or leave it out "
                "of the mapping."
            )
