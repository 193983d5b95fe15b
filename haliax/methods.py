# ruff: noqa: D102
"""The methods of `NamedArray` as type checkers and editors see them; never imported at run time.

Each is a function of the same name elsewhere, with the array as its first argument, bound in
`haliax/__init__.py`. A test compares these signatures with the functions'.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

from haliax.axis import Axis, AxisSelection, AxisSelector, AxisSpec, PartialAxisSpec


class Methods:
    """What is bound to `NamedArray`."""

    # Bound in `haliax/__init__.py`; a test compares these signatures with the functions'.

    def _unary(self) -> Self: ...

    abs = absolute = angle = arccos = arccosh = arcsin = arcsinh = arctan = arctanh = _unary
    bitwise_count = bitwise_invert = bitwise_not = cbrt = ceil = conjugate = cos = cosh = _unary
    deg2rad = degrees = exp = exp2 = expm1 = fabs = fix = floor = i0 = invert = iscomplex = _unary
    isfinite = isinf = isnan = isneginf = isposinf = isreal = log = log10 = log1p = log2 = _unary
    logical_not = negative = positive = rad2deg = radians = reciprocal = rint = rsqrt = _unary
    sign = signbit = sin = sinc = sinh = sqrt = square = tan = tanh = trunc = _unary
    __neg__ = __pos__ = __abs__ = __invert__ = _unary

    def _parts(self) -> tuple[Self, Self]: ...

    frexp = modf = _parts

    def around(self, decimals: int = 0) -> Self: ...

    round = __round__ = around

    def nan_to_num(self, **kwargs: Any) -> Self: ...

    def _operator(self, other: Any, /) -> Self: ...

    __add__ = __sub__ = __mul__ = __truediv__ = __floordiv__ = __mod__ = __pow__ = _operator
    __radd__ = __rsub__ = __rmul__ = __rtruediv__ = __rfloordiv__ = __rmod__ = _operator
    __rpow__ = __lshift__ = __rshift__ = __and__ = __or__ = __xor__ = _operator
    __rlshift__ = __rrshift__ = __rand__ = __ror__ = __rxor__ = _operator
    __lt__ = __le__ = __gt__ = __ge__ = _operator

    def __eq__(self, other: object) -> Self: ...  # pyright: ignore
    def __ne__(self, other: object) -> Self: ...  # pyright: ignore
    def __divmod__(self, other: Any) -> tuple[Self, Self]: ...

    def _reduce(
        self,
        axis: AxisSelection | None = None,
        *,
        where: Self | None = None,
        **kwargs: Any,
    ) -> Self: ...

    all = amax = amin = any = max = mean = median = min = nanmax = nanmean = nanmin = _reduce
    nanprod = nanstd = nansum = nanvar = prod = product = ptp = std = sum = var = _reduce

    def _arg_reduce(self, axis: AxisSelector | None = None) -> Self: ...

    argmax = argmin = nanargmax = nanargmin = _arg_reduce

    def _along(self, axis: AxisSelector | None = None, **kwargs: Any) -> Self: ...

    argsort = cumprod = cumsum = nancumprod = nancumsum = sort = _along

    def top_k(
        self, axis: AxisSelector, k: int, new_axis: AxisSelector | None = None
    ) -> tuple[Self, Self]: ...
    def broadcast_axis(self, axis: AxisSpec) -> Self: ...
    def broadcast_to(
        self,
        axes: AxisSelection,
        ensure_order: bool = True,
        enforce_no_extra_axes: bool = True,
    ) -> Self: ...
    def clip(self, a_min: Any = None, a_max: Any = None) -> Self: ...
    def dot(
        self,
        *arrays: Self,
        axis: AxisSelection | None,
        precision: Any = None,
        preferred_element_type: Any = None,
        out_axes: PartialAxisSpec | None = None,
        dot_general: Any = ...,
    ) -> Self: ...
    def flatten_axes(self, old_axes: AxisSelection, new_axis: AxisSelector) -> Self: ...
    def ravel(self, new_axis_name: AxisSelector) -> Self: ...

    flatten = ravel

    def unflatten_axis(self, axis: AxisSelector, new_axes: AxisSelection) -> Self: ...
    def rearrange(self, axes: PartialAxisSpec | str, **bindings: Any) -> Self: ...
    def rename(self, renames: Mapping[Any, Any]) -> Self: ...
    def repeat(
        self, repeats: Any, axis: AxisSelector, total_repeat_length: int | None = None
    ) -> Self: ...
    def tile(self, reps: Mapping[Any, int]) -> Self: ...
    def roll(self, shift: Any, axis: AxisSelection) -> Self: ...
    def pad(self, padding: Mapping[Any, tuple[int, int]], **kwargs: Any) -> Self: ...
    def pad_left(self, axis: AxisSelector, new_axis: Axis, value: Any = 0) -> Self: ...
    def split(self, axis: AxisSelector, new_axes: Sequence[Axis]) -> Sequence[Self]: ...
    def unbind(self, axis: AxisSelector) -> list[Self]: ...
    def take(self, axis: AxisSelector, index: Any) -> Self: ...
    def slice(
        self,
        axis: AxisSelector | Mapping[Any, Any],
        new_axis: AxisSelector | Mapping[Any, Any] | None = None,
        start: Any = 0,
        length: int | Axis | None = None,
    ) -> Self: ...
    def updated_slice(self, start: Mapping[Any, Any], update: Self) -> Self: ...
    def packbits(self, axis: AxisSelector, *, bitorder: str = "big") -> Self: ...
    def unpackbits(
        self, axis: AxisSelector, *, count: int | None = None, bitorder: str = "big"
    ) -> Self: ...
    def tril(self, axis1: AxisSelector, axis2: AxisSelector, k: int = 0) -> Self: ...
    def triu(self, axis1: AxisSelector, axis2: AxisSelector, k: int = 0) -> Self: ...
    def trace(
        self, axis1: AxisSelector, axis2: AxisSelector, offset: int = 0, dtype: Any = None
    ) -> Self: ...
    def __getitem__(self, item: Any) -> Self: ...
    @property
    def at(self) -> Any: ...
