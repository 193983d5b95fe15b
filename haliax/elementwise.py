"""`jnp`'s elementwise functions on named arrays, one table row each.

Names, argument order and results are `jnp`'s; operands broadcast by name. Plain arrays and numbers
work too and give plain arrays.
"""

from collections.abc import Callable
from typing import Any, Protocol, overload, runtime_checkable

import jax
import jax.numpy as jnp

from haliax.broadcasting import binary
from haliax.core import NamedArray, trusted


@runtime_checkable
class UnaryFunction(Protocol):
    """Takes one array, named or not, and answers in kind."""

    @overload
    def __call__(self, a: NamedArray, **kwargs: Any) -> NamedArray: ...
    @overload
    def __call__(self, a: Any, **kwargs: Any) -> Any: ...
    def __call__(self, a: Any, **kwargs: Any) -> Any:
        """Applies the function."""
        ...


@runtime_checkable
class BinaryFunction(Protocol):
    """Takes two operands, named or not; the result is named if one of them is."""

    @overload
    def __call__(self, x1: NamedArray, x2: Any, /) -> NamedArray: ...
    @overload
    def __call__(self, x1: Any, x2: NamedArray, /) -> NamedArray: ...
    @overload
    def __call__(self, x1: Any, x2: Any, /) -> Any: ...
    def __call__(self, x1: Any, x2: Any, /) -> Any:
        """Applies the function."""
        ...


def _documented(op: Any, name: str, fn: Callable[..., Any]) -> Any:
    op.__name__ = op.__qualname__ = name
    op.__module__ = __name__
    first = (fn.__doc__ or "").strip().split("\n")[0]
    op.__doc__ = f"`jnp.{name}` by name. {first}".strip()
    return op


def unary(fn: Callable[..., Any], name: str | None = None) -> UnaryFunction:
    """Lifts a function of one array; results that are tuples become tuples of named arrays."""
    name = name or fn.__name__

    def op(a: Any, **kwargs: Any) -> Any:
        if a.__class__ is not NamedArray:
            return fn(a, **kwargs)
        result = fn(a.array, **kwargs)
        if isinstance(result, tuple):
            return tuple(trusted(part, a.axes) for part in result)
        return trusted(result, a.axes)

    return _documented(op, name, fn)


def binary_function(fn: Callable[..., Any], name: str | None = None) -> BinaryFunction:
    """Lifts a function of two arrays."""
    name = name or fn.__name__

    def op(x1: Any, x2: Any, /) -> Any:
        if x1.__class__ is NamedArray:
            if x2.__class__ is NamedArray and x1.axes == x2.axes:
                return _named_parts(fn(x1.array, x2.array), x1.axes)
        elif x2.__class__ is not NamedArray:
            return fn(x1, x2)
        return _split_parts(binary(fn, name, x1, x2))

    return _documented(op, name, fn)


def _named_parts(result: Any, axes: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(trusted(part, axes) for part in result)
    return trusted(result, axes)


def _split_parts(result: Any) -> Any:
    """`divmod` gives two arrays: a tuple of named ones, not a named tuple."""
    if isinstance(result, NamedArray) and isinstance(result.array, tuple):
        return tuple(trusted(part, result.axes) for part in result.array)
    return result


abs = unary(jnp.abs, "abs")
absolute = unary(jnp.absolute, "absolute")
angle = unary(jnp.angle)
arccos = unary(jnp.arccos, "arccos")
arccosh = unary(jnp.arccosh, "arccosh")
arcsin = unary(jnp.arcsin, "arcsin")
arcsinh = unary(jnp.arcsinh, "arcsinh")
arctan = unary(jnp.arctan, "arctan")
arctanh = unary(jnp.arctanh, "arctanh")
around = unary(jnp.around, "around")
bitwise_count = unary(jnp.bitwise_count)
bitwise_invert = unary(jnp.bitwise_invert)
bitwise_not = unary(jnp.bitwise_not)
cbrt = unary(jnp.cbrt)
ceil = unary(jnp.ceil)
conj = unary(jnp.conj, "conj")
conjugate = unary(jnp.conjugate)
copy = unary(jnp.copy)
cos = unary(jnp.cos)
cosh = unary(jnp.cosh)
deg2rad = unary(jnp.deg2rad)
degrees = unary(jnp.degrees)
exp = unary(jnp.exp)
exp2 = unary(jnp.exp2)
expm1 = unary(jnp.expm1)
fabs = unary(jnp.fabs)
fix = unary(jnp.trunc, "fix")
floor = unary(jnp.floor)
frexp = unary(jnp.frexp)
i0 = unary(jnp.i0)
imag = unary(jnp.imag)
invert = unary(jnp.invert)
iscomplex = unary(jnp.iscomplex)
isfinite = unary(jnp.isfinite)
isinf = unary(jnp.isinf)
isnan = unary(jnp.isnan)
isneginf = unary(jnp.isneginf)
isposinf = unary(jnp.isposinf)
isreal = unary(jnp.isreal)
log = unary(jnp.log)
log10 = unary(jnp.log10)
log1p = unary(jnp.log1p)
log2 = unary(jnp.log2)
logical_not = unary(jnp.logical_not)
modf = unary(jnp.modf)
nan_to_num = unary(jnp.nan_to_num)
negative = unary(jnp.negative)
positive = unary(jnp.positive)
rad2deg = unary(jnp.rad2deg)
radians = unary(jnp.radians)
real = unary(jnp.real)
reciprocal = unary(jnp.reciprocal)
rint = unary(jnp.rint)
round = unary(jnp.round, "round")
rsqrt = unary(jax.lax.rsqrt)
sign = unary(jnp.sign)
signbit = unary(jnp.signbit)
sin = unary(jnp.sin)
sinc = unary(jnp.sinc)
sinh = unary(jnp.sinh)
spacing = unary(jnp.spacing)
sqrt = unary(jnp.sqrt)
square = unary(jnp.square)
tan = unary(jnp.tan)
tanh = unary(jnp.tanh)
trunc = unary(jnp.trunc)

add = binary_function(jnp.add, "add")
arctan2 = binary_function(jnp.arctan2, "arctan2")
bitwise_and = binary_function(jnp.bitwise_and, "bitwise_and")
bitwise_left_shift = binary_function(jnp.bitwise_left_shift, "bitwise_left_shift")
bitwise_or = binary_function(jnp.bitwise_or, "bitwise_or")
bitwise_right_shift = binary_function(jnp.bitwise_right_shift, "bitwise_right_shift")
bitwise_xor = binary_function(jnp.bitwise_xor, "bitwise_xor")
copysign = binary_function(jnp.copysign, "copysign")
divide = binary_function(jnp.divide, "divide")
divmod = binary_function(jnp.divmod, "divmod")
equal = binary_function(jnp.equal, "equal")
float_power = binary_function(jnp.float_power, "float_power")
floor_divide = binary_function(jnp.floor_divide, "floor_divide")
fmax = binary_function(jnp.fmax, "fmax")
fmin = binary_function(jnp.fmin, "fmin")
fmod = binary_function(jnp.fmod, "fmod")
gcd = binary_function(jnp.gcd, "gcd")
greater = binary_function(jnp.greater, "greater")
greater_equal = binary_function(jnp.greater_equal, "greater_equal")
heaviside = binary_function(jnp.heaviside, "heaviside")
hypot = binary_function(jnp.hypot, "hypot")
lcm = binary_function(jnp.lcm, "lcm")
ldexp = binary_function(jnp.ldexp, "ldexp")
left_shift = binary_function(jnp.left_shift, "left_shift")
less = binary_function(jnp.less, "less")
less_equal = binary_function(jnp.less_equal, "less_equal")
logaddexp = binary_function(jnp.logaddexp, "logaddexp")
logaddexp2 = binary_function(jnp.logaddexp2, "logaddexp2")
logical_and = binary_function(jnp.logical_and, "logical_and")
logical_or = binary_function(jnp.logical_or, "logical_or")
logical_xor = binary_function(jnp.logical_xor, "logical_xor")
maximum = binary_function(jnp.maximum, "maximum")
minimum = binary_function(jnp.minimum, "minimum")
mod = binary_function(jnp.mod, "mod")
multiply = binary_function(jnp.multiply, "multiply")
nextafter = binary_function(jnp.nextafter, "nextafter")
not_equal = binary_function(jnp.not_equal, "not_equal")
pow = binary_function(jnp.power, "pow")
power = binary_function(jnp.power, "power")
remainder = binary_function(jnp.remainder, "remainder")
right_shift = binary_function(jnp.right_shift, "right_shift")
subtract = binary_function(jnp.subtract, "subtract")
true_divide = binary_function(jnp.true_divide, "true_divide")


def apply_operator(fn: Callable[[Any, Any], Any], name: str) -> tuple[Any, Any]:
    """The forward and reflected methods of a Python operator.

    Operands that are no numbers get `NotImplemented`, so that Python can ask the other side.
    """
    operate = binary_function(fn, name)

    def forward(self: NamedArray, other: Any) -> Any:
        return operate(self, other) if _is_operand(other) else NotImplemented

    def reflected(self: NamedArray, other: Any) -> Any:
        return operate(other, self) if _is_operand(other) else NotImplemented

    return forward, reflected


def _is_operand(other: Any) -> bool:
    return (
        other.__class__ is NamedArray
        or isinstance(other, (int, float, complex))
        or (hasattr(other, "dtype") and hasattr(other, "ndim"))
    )


def comparison(fn: Callable[[Any, Any], Any], name: str, symbol: str) -> Any:
    """The method of `==` or `!=`, which refuses what Python would silently call unequal."""
    operate = binary_function(fn, name)

    def method(self: NamedArray, other: Any) -> Any:
        if not _is_operand(other):
            raise ValueError(
                f"`{symbol}` compares a named array elementwise, so it cannot take {other!r}. Use "
                "`is None`, or `isinstance`, to ask what the object is."
            )
        return operate(self, other)

    return method
