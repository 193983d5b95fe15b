"""Types of named arrays by names and dtype: `f32["batch embed"]`, `Float[NamedArray, "batch ..."]`.

They are `Annotated[NamedArray, NamedArrayAxes(...)]`; `array.matches_axes(annotation)` checks one.
For plain arrays the same names give jaxtyping's types: `f32[Array, "b e"]`.
"""

from typing import Annotated, Any

import jaxtyping

from haliax.annotations import NamedArrayAxes as NamedArrayAxes
from haliax.annotations import parse_axes_pattern
from haliax.core import NamedArray


class DtypeFamily:
    """A dtype or family of them, indexed by `[NamedArray, axes]`, `[axes]` or `[Array, dims]`."""

    def __init__(self, name: str, dtype: Any) -> None:
        self._name = name
        self._dtype = dtype

    def __getitem__(self, item: Any) -> Any:
        array_type, pattern = NamedArray, item
        if isinstance(item, tuple) and len(item) == 2 and not isinstance(item[0], str):
            array_type, pattern = item
        if array_type is NamedArray:
            if isinstance(pattern, tuple):
                pattern = list(pattern)
            dtype = None if self._dtype is jaxtyping.Shaped else self._dtype
            return Annotated[NamedArray, parse_axes_pattern(pattern).with_dtype(dtype)]
        return self._dtype[array_type, pattern]

    def __repr__(self) -> str:
        return self._name


Named = DtypeFamily("Named", jaxtyping.Shaped)
Bool = DtypeFamily("Bool", jaxtyping.Bool)
Complex = DtypeFamily("Complex", jaxtyping.Complex)
Float = DtypeFamily("Float", jaxtyping.Float)
Inexact = DtypeFamily("Inexact", jaxtyping.Inexact)
Int = DtypeFamily("Int", jaxtyping.Int)
Integer = DtypeFamily("Integer", jaxtyping.Integer)
Num = DtypeFamily("Num", jaxtyping.Num)
Shaped = DtypeFamily("Shaped", jaxtyping.Shaped)
UInt = DtypeFamily("UInt", jaxtyping.UInt)

bf16 = DtypeFamily("bf16", jaxtyping.BFloat16)
bool_ = DtypeFamily("bool_", jaxtyping.Bool)
c64 = DtypeFamily("c64", jaxtyping.Complex64)
c128 = DtypeFamily("c128", jaxtyping.Complex128)
f16 = DtypeFamily("f16", jaxtyping.Float16)
f32 = DtypeFamily("f32", jaxtyping.Float32)
f64 = DtypeFamily("f64", jaxtyping.Float64)
i8 = DtypeFamily("i8", jaxtyping.Int8)
i16 = DtypeFamily("i16", jaxtyping.Int16)
i32 = DtypeFamily("i32", jaxtyping.Int32)
i64 = DtypeFamily("i64", jaxtyping.Int64)
u8 = DtypeFamily("u8", jaxtyping.UInt8)
u16 = DtypeFamily("u16", jaxtyping.UInt16)
u32 = DtypeFamily("u32", jaxtyping.UInt32)
u64 = DtypeFamily("u64", jaxtyping.UInt64)
