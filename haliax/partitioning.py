"""Spreading named arrays over devices: `shard`, `auto_sharded`, `pspec_for`, `named_jit`, `fsdp`.

A mapping in force (`axis_mapping`) reaches the results of contractions and random numbers by
itself; `shard` applies one on purpose to a whole tree; `named_jit` is `jax.jit` for functions of
any pytrees and under a mapping. Both kinds of mesh context work: `with jax.set_mesh(mesh):` and
`with mesh:`.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding

from haliax.core import NamedArray, trusted
from haliax.jax_utils import is_in_jit, is_jax_array_like
from haliax.sharding import AnyMesh as AnyMesh
from haliax.sharding import PhysicalAxisSpec as PhysicalAxisSpec
from haliax.sharding import ResourceAxis as ResourceAxis
from haliax.sharding import ResourceMapping as ResourceMapping
from haliax.sharding import _get_mesh as _get_mesh
from haliax.sharding import axis_mapping as axis_mapping
from haliax.sharding import check_divisible as check_divisible
from haliax.sharding import current_mesh as current_mesh
from haliax.sharding import current_thread_local_mapping as current_thread_local_mapping
from haliax.sharding import physical_axis_name as physical_axis_name
from haliax.sharding import physical_axis_size as physical_axis_size
from haliax.sharding import pspec_for_axis as pspec_for_axis
from haliax.sharding import round_axis_for_partitioning as round_axis_for_partitioning
from haliax.sharding import sharding_for_axis as sharding_for_axis

T = TypeVar("T")


def shard(x: T, mapping: ResourceMapping | None = None, mesh: AnyMesh | None = None) -> T:
    """Spreads every named array of a tree over the mesh as the mapping says.

    Under `jit` it constrains the sharding; outside, it moves the data. Plain arrays stay as they
    are. Without a mesh nothing happens.
    """
    mapping = current_thread_local_mapping() if mapping is None else mapping
    if mapping is None:
        if not is_in_jit():
            warnings.warn(
                "shard: no axis mapping is in force, so nothing was sharded. Pass one, or call it "
                "inside `hax.axis_mapping(...)`.",
                RuntimeWarning,
                stacklevel=2,
            )
        return x
    mesh = mesh or current_mesh()
    if mesh is None:
        return x

    def place(leaf: Any) -> Any:
        return _place(leaf, mapping, mesh) if isinstance(leaf, NamedArray) else leaf

    return jax.tree_util.tree_map(place, x, is_leaf=_is_named)


shard_with_axis_mapping = shard


def _is_named(x: object) -> bool:
    return isinstance(x, NamedArray)


def _place(x: NamedArray, mapping: ResourceMapping, mesh: AnyMesh) -> NamedArray:
    if not is_jax_array_like(x.array) or len(x.array.shape) != len(x.axes):
        return x  # a placeholder, or an intermediate of a raw `vmap`
    spec = pspec_for_axis(x.axes, mapping)
    check_divisible(x.axes, mapping, mesh)
    sharding = NamedSharding(mesh, spec)
    if isinstance(x.array, jax.ShapeDtypeStruct):
        struct = jax.ShapeDtypeStruct(x.array.shape, x.array.dtype, sharding=sharding)
        return trusted(struct, x.axes)
    if isinstance(x.array, Tracer):
        return trusted(_constrain(x.array, sharding), x.axes)
    return trusted(jax.device_put(x.array, sharding), x.axes)


def _constrain(array: Any, sharding: NamedSharding) -> Any:
    """A hint to the partitioner; on a mesh whose axes are explicit, a resharding."""
    if any(kind == AxisType.Explicit for kind in sharding.mesh.axis_types):
        return jax.sharding.reshard(array, sharding)
    return jax.lax.with_sharding_constraint(array, sharding)


def auto_sharded(x: T, mesh: AnyMesh | None = None) -> T:
    """`shard` with the mapping in force; does nothing when there is none."""
    if current_thread_local_mapping() is None:
        return x
    return shard(x, current_thread_local_mapping(), mesh)


def pspec_for(
    tree: Any,
    resource_mapping: ResourceMapping | None = None,
    preserve_existing_shardings: bool = True,
) -> Any:
    """A partition spec, or a sharding, for every array of a tree.

    Named arrays follow the mapping. Plain arrays follow the names given by
    `hax.field(axis_names=)`; otherwise they keep the sharding they have, if
    `preserve_existing_shardings`, or are replicated. Leaves that are no arrays get `None`.
    """
    mapping = current_thread_local_mapping() if resource_mapping is None else resource_mapping
    if mapping is None:
        raise ValueError(
            "pspec_for: no axis mapping. Pass one, or call it inside `hax.axis_mapping`."
        )

    def spec_of(node: Any, names: tuple[str, ...] | None = None) -> Any:
        if isinstance(node, NamedArray):
            return pspec_for_axis(node.axes, mapping) if is_jax_array_like(node.array) else None
        if isinstance(node, eqx.Module):
            return _spec_of_module(node, spec_of)
        if not is_jax_array_like(node):
            return None
        if names is not None:
            return pspec_for_axis(names, mapping)
        if (
            preserve_existing_shardings
            and isinstance(node, jax.Array)
            and not isinstance(node, Tracer)
        ):
            return node.sharding if isinstance(node.sharding, NamedSharding) else PartitionSpec()
        return PartitionSpec()

    def is_unit(node: Any) -> bool:
        return isinstance(node, (NamedArray, eqx.Module))

    return jax.tree_util.tree_map(spec_of, tree, is_leaf=is_unit)


def _spec_of_module(module: eqx.Module, spec_of: Callable[..., Any]) -> Any:
    """The module with specs for arrays; fields made by `hax.field` know their axis names."""
    names_by_field = {
        field.name: field.metadata["axis_names"]
        for field in dataclasses.fields(module)
        if "axis_names" in field.metadata
    }
    ids = {id(getattr(module, name, None)): names for name, names in names_by_field.items()}

    def is_unit(node: Any) -> bool:
        return node is not module and isinstance(node, (NamedArray, eqx.Module))

    return jax.tree_util.tree_map(
        lambda node: spec_of(node, ids[id(node)]) if id(node) in ids else spec_of(node),
        module,
        is_leaf=is_unit,
    )


def infer_resource_partitions(
    tree: Any,
    resource_mapping: ResourceMapping | None = None,
    preserve_existing_shardings: bool = True,
    mesh: AnyMesh | None = None,
) -> Any:
    """`pspec_for`, as shardings on the given or current mesh."""
    specs = pspec_for(tree, resource_mapping, preserve_existing_shardings)
    mesh = mesh or current_mesh()
    if mesh is None:
        raise ValueError(
            "infer_resource_partitions: there is no mesh. Pass `mesh=`, or call it inside "
            "`jax.set_mesh(mesh)`."
        )

    def on_mesh(spec: Any) -> Sharding:
        return NamedSharding(mesh, spec) if isinstance(spec, PartitionSpec) else spec

    return jax.tree_util.tree_map(
        on_mesh, specs, is_leaf=lambda s: isinstance(s, (PartitionSpec, Sharding))
    )


class _Static:
    """What a compilation is for besides arrays: tree structure, non-array leaves, the mapping."""

    __slots__ = ("_hash", "_key", "leaves", "mapping", "slots", "treedef")

    def __init__(self, treedef: Any, leaves: Any, slots: Any, mapping: Any) -> None:
        self.treedef, self.leaves, self.slots, self.mapping = treedef, leaves, slots, mapping
        # 1, 1.0 and True are equal to Python, but not to a trace.
        self._key = (slots, leaves, tuple(map(type, leaves)), mapping)
        try:
            self._hash = hash(self._key)
        except TypeError:
            bad = next(leaf for leaf in leaves if not _is_hashable(leaf))
            raise TypeError(
                f"named_jit: {type(bad).__name__} is no array, so it is static and must be "
                f"hashable: {bad!r}. Convert it with `jnp.asarray`, or close over it."
            ) from None

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Static):
            return NotImplemented
        return self._key == other._key and self.treedef == other.treedef


def _is_hashable(x: Any) -> bool:
    try:
        hash(x)
    except TypeError:
        return False
    return True


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _OutStructure:
    """The tree and the non-array leaves of a result, carried through `jit` as structure."""

    treedef: Any
    leaves: tuple[Any, ...]


_ARRAY_TYPES: set[type] = set()


def _is_dynamic(leaf: Any) -> bool:
    if type(leaf) in _ARRAY_TYPES:
        return True
    if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)):
        return False
    if not isinstance(leaf, Tracer):
        _ARRAY_TYPES.add(type(leaf))  # `isinstance` on `jax.Array` is slow, and asked of every leaf
    return True


class _NamedJit:
    """A compiled function of pytrees; see `named_jit`."""

    def __init__(self, fn: Callable[..., Any], donate: tuple[Any, Any], **options: Any) -> None:
        functools.update_wrapper(self, fn, updated=())
        self._fn = fn
        self._fn_has_arrays = any(_is_dynamic(leaf) for leaf in jax.tree_util.tree_leaves(fn))
        self._mapping = options.pop("axis_resources")
        self._in_mapping = options.pop("in_axis_resources")
        out_mapping = options.pop("out_axis_resources")
        self._out_mapping = self._mapping if out_mapping is None else out_mapping
        self._donate_args, self._donate_kwargs = donate
        self._donated_leaves: dict[Any, tuple[bool, ...]] = {}
        self._jitted = jax.jit(self._trace, static_argnums=2, donate_argnums=0, **options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arrays, structure = self._jitted(*self._split(args, kwargs))
        return _joined(structure, arrays)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """`jax.jit`'s lowering for the arguments, which may be `ShapeDtypeStruct`s."""
        return self._jitted.lower(*self._split(args, kwargs))

    def _split(self, args: Any, kwargs: Any) -> tuple[list[Any], list[Any], _Static]:
        fn = self._fn if self._fn_has_arrays else None
        leaves, treedef = jax.tree_util.tree_flatten((fn, args, kwargs))
        donated: list[Any] = []
        kept: list[Any] = []
        if self._donate_args is None and self._donate_kwargs is None:
            flags: Sequence[bool] = ()
        else:
            flags = self._donations(treedef, fn, args, kwargs)
        statics: list[Any] = []
        slots: list[int | None] = []
        for i, leaf in enumerate(leaves):
            if type(leaf) not in _ARRAY_TYPES and not _is_dynamic(leaf):
                slots.append(None)
                statics.append(leaf)
            elif flags and flags[i]:
                donated.append(leaf)
                slots.append(1)
            else:
                kept.append(leaf)
                slots.append(0)
        mapping = current_thread_local_mapping() if self._mapping is None else self._mapping
        key = (
            None if mapping is None else tuple(sorted((k, _frozen(v)) for k, v in mapping.items()))
        )
        return donated, kept, _Static(treedef, tuple(statics), tuple(slots), key)

    def _donations(self, treedef: Any, fn: Any, args: Any, kwargs: Any) -> tuple[bool, ...]:
        known = self._donated_leaves.get(treedef)
        if known is None:
            wanted_args = self._donate_args
            if isinstance(wanted_args, Sequence):
                wanted_args = [*wanted_args, *[False] * (len(args) - len(wanted_args))]
                flags = [_spread(w, a) for w, a in zip(wanted_args, args, strict=True)]
            else:
                flags = [_spread(bool(wanted_args), arg) for arg in args]
            wanted = self._donate_kwargs
            by_name = wanted if isinstance(wanted, dict) else dict.fromkeys(kwargs, bool(wanted))
            named_flags = {k: _spread(by_name.get(k, False), v) for k, v in kwargs.items()}
            tree = (_spread(False, fn), flags, named_flags)
            known = self._donated_leaves[treedef] = tuple(jax.tree_util.tree_leaves(tree))
        return known

    def _trace(self, donated: list[Any], kept: list[Any], static: _Static) -> Any:
        sources = {0: iter(kept), 1: iter(donated), None: iter(static.leaves)}
        leaves = [next(sources[slot]) for slot in static.slots]
        fn, args, kwargs = jax.tree_util.tree_unflatten(static.treedef, leaves)
        fn = fn if self._fn_has_arrays else self._fn
        if self._in_mapping is not None:
            args, kwargs = shard((args, kwargs), self._in_mapping)
        if static.mapping is None:
            out = fn(*args, **kwargs)
        else:
            with axis_mapping(dict(static.mapping)):
                out = fn(*args, **kwargs)
        if self._out_mapping is not None:
            out = _constrained_outputs(out, self._out_mapping)
        return _parted(out)


def _frozen(physical: Any) -> Any:
    return physical if isinstance(physical, str) else tuple(physical)


def _spread(flag: Any, tree: Any) -> Any:
    """A prefix tree of booleans, spread over the leaves of a tree."""
    return jax.tree_util.tree_map(
        lambda one, subtree: jax.tree_util.tree_map(lambda _: bool(one), subtree), flag, tree
    )


def _parted(out: Any) -> tuple[list[Any], _OutStructure]:
    leaves, treedef = jax.tree_util.tree_flatten(out)
    arrays = [leaf for leaf in leaves if _is_dynamic(leaf)]
    # `_ARRAY` marks where arrays go; everything else is returned as it was when traced.
    marks = tuple(_ARRAY if _is_dynamic(leaf) else leaf for leaf in leaves)
    return arrays, _OutStructure(treedef, marks)


class _ArrayMark:
    """Where an array goes among static leaves."""


_ARRAY = _ArrayMark()


def _joined(structure: _OutStructure, arrays: list[Any]) -> Any:
    if len(arrays) == len(structure.leaves):
        return structure.treedef.unflatten(arrays)
    left = iter(arrays)
    return structure.treedef.unflatten(
        [next(left) if leaf is _ARRAY else leaf for leaf in structure.leaves]
    )


def _constrained_outputs(out: Any, mapping: ResourceMapping) -> Any:
    mesh = current_mesh()
    if mesh is None:
        return out
    out = shard(out, mapping, mesh)
    specs = pspec_for(out, mapping, preserve_existing_shardings=False)

    def constrain(spec: Any, leaf: Any) -> Any:
        if isinstance(leaf, NamedArray) or spec is None:
            return leaf
        return _constrain(jnp.asarray(leaf), NamedSharding(mesh, spec))

    def is_unit(x: Any) -> bool:
        return x is None or isinstance(x, (PartitionSpec, NamedArray))

    flat_specs, treedef = jax.tree_util.tree_flatten(specs, is_leaf=is_unit)
    units = treedef.flatten_up_to(out)
    pairs = zip(flat_specs, units, strict=True)
    return treedef.unflatten([constrain(spec, unit) for spec, unit in pairs])


def named_jit(
    fn: Callable[..., Any] | None = None,
    axis_resources: ResourceMapping | None = None,
    *,
    in_axis_resources: ResourceMapping | None = None,
    out_axis_resources: ResourceMapping | None = None,
    donate_args: Any = None,
    donate_kwargs: Any = None,
    **jit_args: Any,
) -> Any:
    """`jax.jit` for functions of any pytrees, under an axis mapping.

    Array leaves of the arguments, and of `fn` itself, are traced; all others are static. Results
    may hold non-arrays too. Use it as a decorator, with or without arguments.

    Args:
        fn: the function, or an `eqx.Module` or a class of one.
        axis_resources: the mapping in force while tracing, and for results.
        in_axis_resources: reshards named arguments; otherwise they stay where they are.
        out_axis_resources: shards results, instead of `axis_resources`; plain arrays are
            replicated.
        donate_args: whether buffers of positional arguments may be reused: a bool, or one for each.
        donate_kwargs: likewise for keyword arguments: a bool, or a dict.
        **jit_args: anything else that `jax.jit` takes.
    """
    options: dict[str, Any] = {
        "axis_resources": axis_resources,
        "in_axis_resources": in_axis_resources,
        "out_axis_resources": out_axis_resources,
    }
    if fn is None:
        return functools.partial(
            named_jit, donate_args=donate_args, donate_kwargs=donate_kwargs, **options, **jit_args
        )
    return _NamedJit(fn, (donate_args, donate_kwargs), **options, **jit_args)


def fsdp(
    fn: Callable[..., Any] | None = None,
    parameter_mapping: ResourceMapping | None = None,
    compute_mapping: ResourceMapping | None = None,
    **options: Any,
) -> Any:
    """`named_jit` with fully sharded state: sharded one way at rest, another way while computing.

    Arguments and results follow `parameter_mapping`, the computation `compute_mapping`.
    """
    if parameter_mapping is None or compute_mapping is None:
        raise ValueError("fsdp: pass both `parameter_mapping` and `compute_mapping`.")
    return named_jit(
        fn,
        axis_resources=compute_mapping,
        in_axis_resources=parameter_mapping,
        out_axis_resources=parameter_mapping,
        **options,
    )
