"""`NamedArray`: an array whose dimensions have names instead of positions.

The class holds data and answers questions about its axes. Everything that computes is a function
elsewhere (`haliax.elementwise`, `haliax.reductions`, ...); `haliax/__init__.py` binds those that
read well as methods, and the `TYPE_CHECKING` block below declares them for editors.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, overload

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from haliax.annotations import NamedArrayAxes, parse_axes_pattern
from haliax.axis import (
    AxesLike,
    Axis,
    AxisSelection,
    AxisSelector,
    PartialShapeDict,
    axis_name,
    axis_spec_to_tuple,
    check_unique,
    pairs,
    resolve_axis,
)
from haliax.errors import describe
from haliax.jax_utils import is_jax_array_like

_checks = threading.local()


def are_shape_checks_enabled() -> bool:
    """Whether the constructor compares axes with the array's shape."""
    return getattr(_checks, "enabled", True)


@contextmanager
def enable_shape_checks(enabled: bool) -> Iterator[None]:
    """Switches the constructor's shape checks on or off in this thread."""
    before = are_shape_checks_enabled()
    _checks.enabled = enabled
    try:
        yield
    finally:
        _checks.enabled = before


if TYPE_CHECKING:
    from haliax.methods import Methods
else:
    Methods = object


@dataclass(frozen=True, init=False, repr=False, eq=False, slots=True, weakref_slot=True)
class NamedArray(Methods):
    """An array with one `Axis` per dimension.

    Immutable, and a pytree with the array as its only child. `array` may also be `None` or any
    other object, as `eqx.filter` and `eqx.partition` make them.
    """

    array: Any
    axes: tuple[Axis, ...]

    # NumPy would otherwise build an object array out of `np_array + named`.
    __array_ufunc__ = None
    # `__getitem__` alone would make Python iterate by integer index.
    __iter__ = None
    # `==` is elementwise, so equal hashes could not mean equal arrays.
    __hash__ = None  # pyright: ignore[reportAssignmentType]

    # `axes` is an `AxisSpec`; a bare name gets an error of our own.
    def __init__(self, array: Any, axes: Any) -> None:
        if isinstance(axes, str):
            raise TypeError(
                f"NamedArray takes axes with sizes, not the name '{axes}'. Use `hax.named(array, "
                "axes)` to take the sizes from the array."
            )
        axes = axis_spec_to_tuple(axes)
        if len(axes) > 1:
            check_unique("NamedArray", axes)
        _set_array(self, array)
        _set_axes(self, axes)
        if are_shape_checks_enabled() and is_jax_array_like(array):
            _check_shape(array.shape, axes)

    @overload
    def axis_size(self, axis: AxisSelector) -> int: ...
    @overload
    def axis_size(self, axis: Sequence[AxisSelector]) -> tuple[int, ...]: ...
    def axis_size(self, axis: AxisSelector | Sequence[AxisSelector]) -> int | tuple[int, ...]:
        """The size of one axis, or a tuple of the sizes of several."""
        found = resolve_axis(self.axes, axis)
        return found.size if isinstance(found, Axis) else tuple(a.size for a in found)  # pyright: ignore

    @overload
    def resolve_axis(self, axes: AxisSelector) -> Axis: ...
    @overload
    def resolve_axis(self, axes: PartialShapeDict) -> dict[str, int]: ...
    @overload
    def resolve_axis(self, axes: Sequence[AxisSelector]) -> tuple[Axis, ...]: ...
    @overload
    def resolve_axis(self, axes: AxisSelection) -> Any: ...
    def resolve_axis(self, axes: AxisSelection) -> Any:
        """The array's axes that are selected, with their sizes."""
        return resolve_axis(self.axes, axes)

    @overload
    def axis_indices(self, axis: AxisSelector) -> int | None: ...
    @overload
    def axis_indices(self, axis: Sequence[AxisSelector]) -> tuple[int | None, ...]: ...
    def axis_indices(
        self, axis: AxisSelector | Sequence[AxisSelector]
    ) -> int | tuple[int | None, ...] | None:
        """The position of an axis, or `None`; an `Axis` of another size is a RuntimeError."""
        if isinstance(axis, (Axis, str)):
            return _position(self.axes, axis)
        return tuple(_position(self.axes, one) for one in axis)

    def has_axis(self, axis: AxisSelection) -> bool:
        """Whether the array has the axis, or all of the axes, asked for."""
        known = {own.name: own.size for own in self.axes}
        return all(
            name in known and (size is None or size == known[name]) for name, size in pairs(axis)
        )

    def matches_axes(self, spec: Any) -> bool:
        """Whether names, order and dtype fit an annotation like `NamedArray["batch embed ..."]`."""
        if hasattr(spec, "__metadata__"):
            spec = next((m for m in spec.__metadata__ if isinstance(m, NamedArrayAxes)), spec)
        wanted = parse_axes_pattern(spec)
        if wanted.dtype is not None and not _has_dtype(self.array, wanted.dtype):
            return False
        return wanted.matches([axis.name for axis in self.axes])

    def __class_getitem__(cls, pattern: Any) -> Any:
        if isinstance(pattern, tuple):
            pattern = list(pattern)
        return Annotated[NamedArray, parse_axes_pattern(pattern)]

    @property
    def shape(self) -> dict[str, int]:
        """Sizes by name, in order."""
        return {axis.name: axis.size for axis in self.axes}

    @property
    def dtype(self) -> Any:
        """The dtype of the array."""
        return self.array.dtype

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.axes)

    @property
    def size(self) -> int:
        """The number of elements."""
        return self.array.size

    @property
    def nbytes(self) -> int:
        """The number of bytes of the elements."""
        return self.array.nbytes

    @property
    def real(self) -> "NamedArray":
        """The real part."""
        return trusted(self.array.real, self.axes)

    @property
    def imag(self) -> "NamedArray":
        """The imaginary part."""
        return trusted(self.array.imag, self.axes)

    def astype(self, dtype: Any) -> "NamedArray":
        """The same values in another dtype."""
        return trusted(self.array.astype(dtype), self.axes)

    def copy(self) -> "NamedArray":
        """A copy in its own memory."""
        return trusted(self.array.copy(), self.axes)

    def conj(self) -> "NamedArray":
        """The complex conjugate."""
        return trusted(jnp.conj(self.array), self.axes)

    def scalar(self) -> Array:
        """The array itself, if it has no axes; otherwise a ValueError."""
        if self.axes:
            raise ValueError(
                f"Expected a scalar, but the array has axes {describe(self.axes)}. Reduce them "
                "first, for example with `.sum()`, or index them."
            )
        return self.array

    def item(self) -> Any:
        """The only element, as a Python number."""
        return self.array.item()

    def tolist(self) -> Any:
        """Nested lists of Python numbers."""
        return self.array.tolist()

    def tobytes(self) -> bytes:
        """The elements as bytes, in row-major order."""
        return np.asarray(self.array).tobytes()

    def __bool__(self) -> bool:
        return bool(self.scalar())

    def __int__(self) -> int:
        return int(self.scalar())

    def __index__(self) -> int:
        return self.scalar().__index__()

    def __float__(self) -> float:
        return float(self.scalar())

    def __complex__(self) -> complex:
        return complex(self.scalar())

    def __str__(self) -> str:
        if not is_jax_array_like(self.array):
            return f"NamedArray({self.array!r}, {self.shape})"
        if isinstance(self.array, (Tracer, jax.ShapeDtypeStruct)):
            return f"NamedArray({self.array.dtype}{self.shape})"
        return f"NamedArray({self.array.dtype}{self.shape}, {self.array})"

    def __repr__(self) -> str:
        return str(self)

    def __pdoc__(self, **kwargs: Any) -> Any:
        import wadler_lindig

        if is_jax_array_like(self.array):
            return wadler_lindig.TextDoc(f"Named({self.array.dtype}{self.shape})")
        inner = wadler_lindig.pdoc(self.array, **kwargs)
        return wadler_lindig.TextDoc("Named(") + inner + wadler_lindig.TextDoc(f", {self.shape})")


_new = object.__new__
# Slot descriptors write past the frozen dataclass's `__setattr__`.
_set_array: Callable[[Any, Any], None] = NamedArray.__dict__["array"].__set__
_set_axes: Callable[[Any, Any], None] = NamedArray.__dict__["axes"].__set__


def trusted(array: Any, axes: tuple[Axis, ...]) -> NamedArray:
    """A `NamedArray` from parts known to fit; much cheaper than the checked constructor."""
    fresh = _new(NamedArray)
    _set_array(fresh, array)
    _set_axes(fresh, axes)
    return fresh


def honest(operation: str, x: NamedArray) -> Any:
    """The raw array, after checking that it still has one dimension per axis.

    A raw `jax.vmap`, `lax.scan` or `tree_map` changes the array but not the names; without this
    check an operation would then work on the wrong dimension, silently.
    """
    array = x.array
    if len(array.shape) != len(x.axes):
        raise ValueError(
            f"{operation}: the array has shape {tuple(array.shape)}, but its axes are "
            f"{describe(x.axes)}: a raw JAX transformation such as `jax.vmap` or `lax.scan` took a "
            "dimension and left its name. Use `hax.vmap`, `hax.scan` or `hax.fold` over the named "
            "axis."
        )
    return array


def _flatten(x: NamedArray) -> Any:
    return (x.array,), x.axes


def _flatten_with_keys(x: NamedArray) -> Any:
    return ((jax.tree_util.GetAttrKey("array"), x.array),), x.axes


def _unflatten(axes: Any, children: Any) -> NamedArray:
    # JAX puts tracers, `None` and sentinels of other shapes here: nothing can be checked.
    fresh = _new(NamedArray)
    _set_array(fresh, children[0])
    _set_axes(fresh, axes)
    return fresh


jax.tree_util.register_pytree_with_keys(NamedArray, _flatten_with_keys, _unflatten, _flatten)


def _check_shape(shape: tuple[int, ...], axes: tuple[Axis, ...]) -> None:
    if shape == tuple(axis.size for axis in axes):
        return
    if len(shape) != len(axes):
        raise ValueError(
            f"Shape mismatch: an array of shape {shape} has {len(shape)} dimensions, but "
            f"{describe(axes)} names {len(axes)}. Give one axis per dimension."
        )
    bad = next(i for i, axis in enumerate(axes) if axis.size != shape[i])
    raise ValueError(
        f"Shape mismatch: axis '{axes[bad].name}' has size {axes[bad].size}, but dimension {bad} "
        f"of the array has size {shape[bad]} (shape {shape}, axes {describe(axes)}). Use "
        "`hax.named(array, names)` to take the sizes from the array."
    )


def _position(axes: tuple[Axis, ...], axis: AxisSelector) -> int | None:
    name = axis_name(axis)
    for i, own in enumerate(axes):
        if own.name == name:
            if isinstance(axis, Axis) and axis.size != own.size:
                raise RuntimeError(
                    f"Axis '{name}' has size {own.size} in {describe(axes)}, but size {axis.size} "
                    f"was asked for. Pass '{name}' to accept any size."
                )
            return i
    return None


def _has_dtype(array: Any, wanted: Any) -> bool:
    if hasattr(wanted, "dtypes"):  # a jaxtyping family such as `Float`
        return array.dtype.name in wanted.dtypes
    return jnp.issubdtype(array.dtype, wanted)


def named(
    a: Any, axes: AxisSelector | Sequence[AxisSelector] | Mapping[str, int | None]
) -> NamedArray:
    """Names the dimensions of an array, list or number.

    Sizes may be left to the array: `named(a, ("batch", "embed"))`. One string is one axis, spaces
    and all.
    """
    if not is_jax_array_like(a) or isinstance(a, (np.ndarray, np.generic)):
        a = jnp.asarray(a)
    wanted = pairs(axes)
    if len(wanted) != len(a.shape):
        raise ValueError(
            f"named: Shape mismatch: an array of shape {tuple(a.shape)} has {len(a.shape)} "
            f"dimensions, but {describe(axes)} names {len(wanted)}. Give one name per dimension."
        )
    sized = tuple(Axis(n, a.shape[i] if s is None else s) for i, (n, s) in enumerate(wanted))
    return NamedArray(a, sized)


def field(*, axis_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
    """`eqx.field` that can name the axes of a plain array, for `pspec_for` to shard it by."""
    if axis_names is None:
        return eqx.field(**kwargs)
    if kwargs.get("static", False):
        raise ValueError("A static field holds no array, so it cannot have `axis_names`.")
    metadata = {**kwargs.pop("metadata", {}), "axis_names": tuple(axis_names)}
    return eqx.field(metadata=metadata, **kwargs)


Scalar: TypeAlias = float | int | bool | complex | jax.Array | np.generic
NamedOrNumeric: TypeAlias = NamedArray | jax.Array | np.ndarray | np.generic | complex | float | int

__all__ = [
    "AxesLike",
    "NamedArray",
    "NamedOrNumeric",
    "Scalar",
    "are_shape_checks_enabled",
    "enable_shape_checks",
    "field",
    "honest",
    "named",
    "trusted",
]
