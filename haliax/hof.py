"""`scan`, `fold`, `map` and `vmap` over a named axis.

Inside the mapped function the axis is gone: arrays that have it come in slices, wherever it was
among their axes, and everything else comes whole. Results get it back, in front. Named arrays never
travel through JAX's own transformations with a name too many, since only raw arrays are handed to
them.
"""

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from haliax.axis import Axis, AxisSelection, AxisSelector, pairs
from haliax.checkpointing import ScanCheckpointPolicy
from haliax.core import NamedArray, honest, trusted
from haliax.errors import describe
from haliax.jax_utils import is_jax_array_like, tree_checkpoint_name
from haliax.partitioning import physical_axis_name
from haliax.util import is_named_array

Axes = tuple[Axis, ...]


def is_named_or_shaped_array_like(x: object) -> bool:
    """Whether `x` is a named array, or an array that has a leading dimension to scan over."""
    return isinstance(x, NamedArray) or (is_jax_array_like(x) and len(x.shape) >= 1)  # pyright: ignore


@dataclass(frozen=True)
class _Mapped:
    """Where a leaf comes in slices, and the axes of a slice (`None`: a plain array)."""

    slot: int
    axes: Axes | None


@dataclass(frozen=True)
class _Arguments:
    """Arguments taken apart: raw arrays to map over, with the axis first, and the rest."""

    mapped: list[Any]
    leaves: list[Any]
    treedef: Any

    def rebuilt(self, slices: Sequence[Any]) -> Any:
        """The arguments with one slice of each mapped array."""

        def fill(leaf: Any) -> Any:
            if not isinstance(leaf, _Mapped):
                return leaf
            piece = slices[leaf.slot]
            return piece if leaf.axes is None else trusted(piece, leaf.axes)

        return jax.tree_util.tree_unflatten(self.treedef, [fill(leaf) for leaf in self.leaves])


def _take_apart(
    operation: str, f: Any, axis: AxisSelector, tree: Any, wants: Callable[[Any], Any]
) -> tuple[_Arguments, Axis]:
    """Finds what to map over; `wants(leaf)` is a dimension of plain arrays, or `None`."""
    [(name, size)] = pairs(axis)
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_named_array)
    mapped: list[Any] = []
    leaves: list[Any] = []
    for path, leaf in with_paths:
        dimension = wants(leaf)
        own = None
        if isinstance(leaf, NamedArray):
            own = next((i for i, a in enumerate(leaf.axes) if a.name == name), None)
            dimension = None if dimension is None or not is_jax_array_like(leaf.array) else own
        if dimension is None:
            leaves.append(leaf)
            continue
        raw = honest(operation, leaf) if isinstance(leaf, NamedArray) else jnp.asarray(leaf)
        size = _agreed_size(operation, f, name, size, path, leaf, raw.shape[dimension])
        rest = None if own is None else (*leaf.axes[:own], *leaf.axes[own + 1 :])
        leaves.append(_Mapped(len(mapped), rest))
        mapped.append(raw if dimension == 0 else jnp.moveaxis(raw, dimension, 0))
    if size is None:
        raise ValueError(
            f"{operation}: no argument has the axis '{name}', so its size is unknown. Pass "
            f"`Axis('{name}', size)`, or check the name."
        )
    return _Arguments(mapped, leaves, treedef), Axis(name, size)


def _agreed_size(
    operation: str, f: Any, name: str, size: int | None, path: Any, leaf: Any, found: int
) -> int:
    if size is None or size == found:
        return found
    kind = (
        f"axes {describe(leaf.axes)}"
        if isinstance(leaf, NamedArray)
        else f"leading dimension {found}"
    )
    raise ValueError(
        f"{operation}: the axis '{name}' has size {size}, but {_path_name(f, path)} has {kind}. "
        "All scanned arrays must agree; arrays to pass whole must not have the axis, or must be "
        "bound outside with `functools.partial`."
    )


def _path_name(f: Any, path: Any) -> str:
    """The argument's own name in `f`, and the way into it: `foo.my_array`."""
    which, key, *rest = path
    is_keyword = which.idx == 1
    first = key.key if is_keyword else _parameter_name(f, key.idx)
    return first + "".join(
        str(k) for k in rest if not (isinstance(k, jax.tree_util.GetAttrKey) and k.name == "array")
    )


def _parameter_name(f: Any, position: int) -> str:
    try:
        parameters = list(inspect.signature(f).parameters.values())
    except (TypeError, ValueError):
        return f"argument {position}"
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in parameters if p.kind in kinds]
    return names[position] if position < len(names) else f"argument {position}"


class _Results:
    """Takes results apart while tracing, and puts them together after it."""

    def apart(self, tree: Any) -> list[Any]:
        leaves, self._treedef = jax.tree_util.tree_flatten(tree, is_leaf=is_named_array)
        self._leaves: list[Any] = []
        raw: list[Any] = []
        for leaf in leaves:
            array = leaf.array if isinstance(leaf, NamedArray) else leaf
            # Python numbers stay what they are: a flag such as `Dropout.inference` must not be
            # traced.
            if is_jax_array_like(array):
                axes = leaf.axes if isinstance(leaf, NamedArray) else None
                self._leaves.append(_Mapped(len(raw), axes))
                raw.append(array)
            else:
                self._leaves.append(leaf)
        return raw

    def together(self, raw: Sequence[Any], axis: Axis) -> Any:
        def fill(leaf: Any) -> Any:
            if not isinstance(leaf, _Mapped):
                return leaf
            if leaf.axes is None:
                return raw[leaf.slot]
            return NamedArray(raw[leaf.slot], (axis, *leaf.axes))

        return jax.tree_util.tree_unflatten(self._treedef, [fill(leaf) for leaf in self._leaves])


def scan(
    f: Callable[..., Any],
    axis: AxisSelector,
    *,
    remat: bool | str | ScanCheckpointPolicy = False,
    reverse: bool = False,
    unroll: int = 1,
    is_scanned: Callable[[Any], Any] = is_named_or_shaped_array_like,
) -> Callable[..., Any]:
    """Runs `f(carry, *args, **kwargs) -> (carry, y)` for each position of an axis.

    Returns a function of `(init, *args, **kwargs)` that gives the last carry and all `y`, stacked
    along the axis. Arguments that have the axis come in slices, plain arrays along their first
    dimension; others, and the carry, come whole. `remat` says what the backward pass recomputes.
    """
    policy = ScanCheckpointPolicy.from_bool_or_str(remat)
    [(axis_name, _)] = pairs(axis)
    carry_name, input_name = f"scan({axis_name})__carry", f"scan({axis_name})__input"

    def wants(leaf: Any) -> Any:
        return 0 if is_scanned(leaf) and is_named_or_shaped_array_like(leaf) else None

    def scanned(init: Any, *args: Any, **kwargs: Any) -> Any:
        shifted = _SkipFirst(f)
        arguments, full_axis = _take_apart("scan", shifted, axis, (args, kwargs), wants)
        carry = _Carry(init)
        results = _Results()

        def step(raw_carry: Any, slices: Any) -> Any:
            if not (policy.disable or policy.simple):
                raw_carry = tree_checkpoint_name(raw_carry, carry_name)
                slices = tree_checkpoint_name(slices, input_name)
            step_args, step_kwargs = arguments.rebuilt(slices)
            result = f(carry.together(raw_carry), *step_args, **step_kwargs)
            if not isinstance(result, tuple) or len(result) != 2:
                raise ValueError(
                    f"scan: the function must return (carry, output), got {type(result).__name__}. "
                    "Use `hax.fold` for a function that returns the carry alone."
                )
            return carry.apart_again(result[0]), results.apart(result[1])

        step = policy.checkpointed(step, carry_name, input_name)
        last, ys = _run(step, carry.raw, arguments.mapped, full_axis.size, reverse, unroll, policy)
        return carry.together(last), results.together(ys, full_axis)

    return scanned


class _SkipFirst:
    """The signature of a function without its carry, for messages."""

    def __init__(self, f: Any) -> None:
        try:
            signature = inspect.signature(f)
        except (TypeError, ValueError):
            return
        self.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])

    def __call__(self) -> None:
        raise AssertionError("only its signature is used")


def _run(
    step: Any, init: Any, xs: list[Any], length: int, reverse: bool, unroll: int, policy: Any
) -> Any:
    groups = policy.num_groups(length)
    if groups is None:
        return lax.scan(step, init, xs, length=length, reverse=reverse, unroll=unroll)
    per_group = length // groups

    def group(carry: Any, group_xs: Any) -> Any:
        return lax.scan(step, carry, group_xs, length=per_group, reverse=reverse, unroll=unroll)

    grouped = [x.reshape(groups, per_group, *x.shape[1:]) for x in xs]
    remembered = jax.checkpoint(group, prevent_cse=policy.prevent_cse)
    last, ys = lax.scan(remembered, init, grouped, length=groups, reverse=reverse)
    return last, jax.tree_util.tree_map(lambda y: y.reshape(length, *y.shape[2:]), ys)


class _Carry:
    """A carry as raw arrays. Its structure must stay; the order of axes may vary."""

    def __init__(self, init: Any) -> None:
        leaves, self._treedef = jax.tree_util.tree_flatten(init, is_leaf=is_named_array)
        self._leaves = leaves
        self.raw = [self._raw(leaf) for leaf in leaves if self._is_carried(leaf)]

    @staticmethod
    def _is_carried(leaf: Any) -> bool:
        array = leaf.array if isinstance(leaf, NamedArray) else leaf
        return is_jax_array_like(array) or isinstance(array, (bool, int, float, complex))

    @staticmethod
    def _raw(leaf: Any) -> Any:
        return jnp.asarray(leaf.array if isinstance(leaf, NamedArray) else leaf)

    def together(self, raw: Sequence[Any]) -> Any:
        arrays = iter(raw)

        def fill(leaf: Any) -> Any:
            if not self._is_carried(leaf):
                return leaf
            array = next(arrays)
            return trusted(array, leaf.axes) if isinstance(leaf, NamedArray) else array

        return jax.tree_util.tree_unflatten(self._treedef, [fill(leaf) for leaf in self._leaves])

    def apart_again(self, carry: Any) -> list[Any]:
        leaves, treedef = jax.tree_util.tree_flatten(carry, is_leaf=is_named_array)
        if treedef != self._treedef:
            raise ValueError(
                "scan: the carry must keep its structure, but it went in as\n"
                f"  {self._treedef}\nand came out as\n  {treedef}\n"
                "Return a carry of the same shape of containers as `init`."
            )
        raw = []
        for before, after in zip(self._leaves, leaves, strict=True):
            if self._is_carried(before):
                raw.append(self._like(before, after))
            elif before is not after and not bool(before == after):
                raise ValueError(
                    f"scan: {before!r} in the carry is no array, so it cannot change to {after!r}. "
                    "Make it an array, or take it out of the carry."
                )
        return raw

    def _like(self, before: Any, after: Any) -> Any:
        if isinstance(before, NamedArray) != isinstance(after, NamedArray):
            raise ValueError(
                f"scan: the carry must keep its type, but {_typed(before)} came out as "
                f"{_typed(after)}."
            )
        if not isinstance(before, NamedArray):
            return after
        if set(before.axes) != set(after.axes):
            raise ValueError(
                f"scan: the carry must keep its axes, but {describe(before.axes)} came out as "
                f"{describe(after.axes)}. Broadcast `init` to the final axes first, or reduce the "
                "update."
            )
        return lax.transpose(after.array, [after.axes.index(a) for a in before.axes])


def _typed(x: Any) -> str:
    if isinstance(x, NamedArray):
        return f"a NamedArray with axes {describe(x.axes)}"
    return f"a plain {type(x).__name__}"


def _copy_signature(wrapper: Any, fn: Any, leading: Sequence[str] = ()) -> None:
    """Lets messages use the parameter names of the wrapped function, if it has a signature."""
    first = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in leading]
    with contextlib.suppress(TypeError, ValueError):
        signature = inspect.signature(fn)
        wrapper.__signature__ = signature.replace(
            parameters=[*first, *signature.parameters.values()]
        )


def fold(
    fn: Callable[..., Any],
    axis: AxisSelector,
    *,
    remat: bool | str | ScanCheckpointPolicy = False,
    reverse: bool = False,
    unroll: int = 1,
    is_scanned: Callable[[Any], Any] = is_named_or_shaped_array_like,
) -> Callable[..., Any]:
    """`scan` for `fn(carry, *args, **kwargs) -> carry`; gives the last carry."""
    options: dict[str, Any] = {"remat": remat, "reverse": reverse, "unroll": unroll}

    def step(carry: Any, *args: Any, **kwargs: Any) -> Any:
        return fn(carry, *args, **kwargs), None

    _copy_signature(step, fn)
    run = scan(step, axis, is_scanned=is_scanned, **options)

    def folded(init: Any, *args: Any, **kwargs: Any) -> Any:
        return run(init, *args, **kwargs)[0]

    return folded


def map(
    fn: Callable[..., Any],
    axis: AxisSelector,
    *,
    remat: bool | str | ScanCheckpointPolicy = False,
    reverse: bool = False,
    unroll: int = 1,
    is_mapped: Callable[[Any], Any] = is_named_or_shaped_array_like,
) -> Callable[..., Any]:
    """Runs `fn(*args, **kwargs)` for each position of an axis, one after another."""

    def step(carry: None, *args: Any, **kwargs: Any) -> Any:
        return None, fn(*args, **kwargs)

    _copy_signature(step, fn, leading=["carry"])
    options: dict[str, Any] = {"remat": remat, "reverse": reverse, "unroll": unroll}
    run = scan(step, axis, is_scanned=is_mapped, **options)

    def mapped(*args: Any, **kwargs: Any) -> Any:
        return run(None, *args, **kwargs)[1]

    return mapped


def _zero_if_array(leaf: Any) -> int | None:
    return 0 if is_named_or_shaped_array_like(leaf) else None


def vmap(
    fn: Callable[..., Any],
    axis: AxisSelection,
    *,
    default: Any = _zero_if_array,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Runs `fn` for all positions of an axis, or of several, at once.

    Named arrays that have the axis come in slices, other named arrays whole. For plain arrays,
    `default`, `args` (by position) and `kwargs` say which dimension is mapped, as `in_axes` of
    `jax.vmap`; `None` also keeps a named array whole. The axis may be new: then `fn` runs
    `axis.size` times. Results have the axis in front; with several axes, the first one outermost.
    """
    axes = pairs(axis)
    if not axes:
        raise ValueError("vmap: there is no axis to map over. Pass an axis or its name.")
    mapped = fn
    for name, size in reversed(axes):
        one = name if size is None else Axis(name, size)
        mapped = _vmap_one(mapped, one, default, tuple(args), dict(kwargs or {}))
    return mapped


def _vmap_one(fn: Any, axis: AxisSelector, default: Any, by_place: Any, by_name: Any) -> Any:
    def vmapped(*args: Any, **kwargs: Any) -> Any:
        dimensions = [
            _dimensions(by_place[i] if i < len(by_place) else default, arg)
            for i, arg in enumerate(args)
        ]
        named_dimensions = {k: _dimensions(by_name.get(k, default), v) for k, v in kwargs.items()}
        wanted = iter([*_flat(dimensions), *_flat(named_dimensions)])
        arguments, full_axis = _take_apart("vmap", fn, axis, (args, kwargs), lambda _: next(wanted))
        results = _Results()

        def inner(slices: Any) -> Any:
            inner_args, inner_kwargs = arguments.rebuilt(slices)
            return results.apart(fn(*inner_args, **inner_kwargs))

        physical = physical_axis_name(full_axis)
        spmd = physical if physical is None or isinstance(physical, str) else tuple(physical)
        run = jax.vmap(inner, axis_size=full_axis.size, spmd_axis_name=spmd)
        return results.together(run(arguments.mapped), full_axis)

    _copy_signature(vmapped, fn)
    return vmapped


class _Dimension:
    """A dimension number, or `None`, as a leaf."""

    def __init__(self, number: Any) -> None:
        self.number = number


def _dimensions(spec: Any, tree: Any) -> Any:
    """`spec`, a number, `None`, a function of leaves or a prefix tree of these, for each leaf."""

    def per_leaf(one: Any, subtree: Any) -> Any:
        def at(leaf: Any) -> _Dimension:
            number = one(leaf) if callable(one) else one
            return _Dimension(number if is_named_or_shaped_array_like(leaf) else None)

        return jax.tree_util.tree_map(at, subtree, is_leaf=is_named_array)

    if spec is None or isinstance(spec, int) or callable(spec):
        return per_leaf(spec, tree)
    return jax.tree_util.tree_map(per_leaf, spec, tree, is_leaf=lambda s: s is None)


def _flat(tree: Any) -> list[int | None]:
    return [d.number for d in jax.tree_util.tree_leaves(tree) if isinstance(d, _Dimension)]
