"""Named tensors for JAX: arrays whose dimensions have names, and the functions that go by them.

    import haliax as hax

    Batch, Embed = hax.make_axes(batch=4, embed=8)
    x = hax.random.normal(key, (Batch, Embed))
    (x - x.mean(Embed)) / x.std("embed")

Functions mirror `jax.numpy`, with axis names in the place of positions, and most are methods of
`NamedArray` as well. `docs/named-tensors.md` is a tutorial. This file holds no logic: it gathers
the public names, binds methods, and loads the rarely used modules on first use.
"""

import importlib
import operator
from typing import TYPE_CHECKING

import jax.numpy as jnp

from haliax import axis as axis
from haliax import core as core
from haliax import haxtyping as haxtyping
from haliax import hof as hof
from haliax import jax_utils as jax_utils
from haliax import nn as nn
from haliax import partitioning as partitioning
from haliax import random as random
from haliax import state_dict as state_dict
from haliax import tree_util as tree_util
from haliax import util as util
from haliax.annotations import NamedArrayAxes as NamedArrayAxes
from haliax.axis import Axis as Axis
from haliax.axis import AxisSelection as AxisSelection
from haliax.axis import AxisSelector as AxisSelector
from haliax.axis import AxisSpec as AxisSpec
from haliax.axis import PartialAxisSpec as PartialAxisSpec
from haliax.axis import PartialShapeDict as PartialShapeDict
from haliax.axis import ShapeDict as ShapeDict
from haliax.axis import axis_name as axis_name
from haliax.axis import axis_size as axis_size
from haliax.axis import axis_spec_to_shape_dict as axis_spec_to_shape_dict
from haliax.axis import axis_spec_to_tuple as axis_spec_to_tuple
from haliax.axis import concat_axes as concat_axes
from haliax.axis import concat_axis_specs as concat_axis_specs
from haliax.axis import eliminate_axes as eliminate_axes
from haliax.axis import intersect_axes as intersect_axes
from haliax.axis import is_axis_compatible as is_axis_compatible
from haliax.axis import is_axis_spec as is_axis_spec
from haliax.axis import make_axes as make_axes
from haliax.axis import rearrange_for_partial_order as rearrange_for_partial_order
from haliax.axis import replace_axis as replace_axis
from haliax.axis import resolve_axis as resolve_axis
from haliax.axis import selects_axis as selects_axis
from haliax.axis import to_jax_shape as to_jax_shape
from haliax.axis import union_axes as union_axes
from haliax.axis import unsize_axes as unsize_axes
from haliax.axis import without_axes as without_axes
from haliax.axiswise import argsort as argsort
from haliax.axiswise import cumprod as cumprod
from haliax.axiswise import cumsum as cumsum
from haliax.axiswise import log_softmax as log_softmax
from haliax.axiswise import logsumexp as logsumexp
from haliax.axiswise import nancumprod as nancumprod
from haliax.axiswise import nancumsum as nancumsum
from haliax.axiswise import softmax as softmax
from haliax.axiswise import sort as sort
from haliax.axiswise import top_k as top_k
from haliax.broadcasting import broadcast_arrays as broadcast_arrays
from haliax.broadcasting import broadcast_arrays_and_return_axes as broadcast_arrays_and_return_axes
from haliax.broadcasting import broadcast_axis as broadcast_axis
from haliax.broadcasting import broadcast_to as broadcast_to
from haliax.checkpointing import ScanCheckpointPolicy as ScanCheckpointPolicy
from haliax.contraction import dot as dot
from haliax.core import NamedArray as NamedArray
from haliax.core import NamedOrNumeric as NamedOrNumeric
from haliax.core import Scalar as Scalar
from haliax.core import are_shape_checks_enabled as are_shape_checks_enabled
from haliax.core import enable_shape_checks as enable_shape_checks
from haliax.core import field as field
from haliax.core import named as named
from haliax.creation import arange as arange
from haliax.creation import full as full
from haliax.creation import full_like as full_like
from haliax.creation import geomspace as geomspace
from haliax.creation import linspace as linspace
from haliax.creation import logspace as logspace
from haliax.creation import ones as ones
from haliax.creation import ones_like as ones_like
from haliax.creation import zeros as zeros
from haliax.creation import zeros_like as zeros_like
from haliax.dslice import dblock as dblock
from haliax.dslice import ds as ds
from haliax.dslice import dslice as dslice
from haliax.elementwise import abs as abs
from haliax.elementwise import absolute as absolute
from haliax.elementwise import add as add
from haliax.elementwise import angle as angle
from haliax.elementwise import apply_operator, comparison
from haliax.elementwise import arccos as arccos
from haliax.elementwise import arccosh as arccosh
from haliax.elementwise import arcsin as arcsin
from haliax.elementwise import arcsinh as arcsinh
from haliax.elementwise import arctan as arctan
from haliax.elementwise import arctan2 as arctan2
from haliax.elementwise import arctanh as arctanh
from haliax.elementwise import around as around
from haliax.elementwise import bitwise_and as bitwise_and
from haliax.elementwise import bitwise_count as bitwise_count
from haliax.elementwise import bitwise_invert as bitwise_invert
from haliax.elementwise import bitwise_left_shift as bitwise_left_shift
from haliax.elementwise import bitwise_not as bitwise_not
from haliax.elementwise import bitwise_or as bitwise_or
from haliax.elementwise import bitwise_right_shift as bitwise_right_shift
from haliax.elementwise import bitwise_xor as bitwise_xor
from haliax.elementwise import cbrt as cbrt
from haliax.elementwise import ceil as ceil
from haliax.elementwise import conj as conj
from haliax.elementwise import conjugate as conjugate
from haliax.elementwise import copy as copy
from haliax.elementwise import copysign as copysign
from haliax.elementwise import cos as cos
from haliax.elementwise import cosh as cosh
from haliax.elementwise import deg2rad as deg2rad
from haliax.elementwise import degrees as degrees
from haliax.elementwise import divide as divide
from haliax.elementwise import divmod as divmod
from haliax.elementwise import equal as equal
from haliax.elementwise import exp as exp
from haliax.elementwise import exp2 as exp2
from haliax.elementwise import expm1 as expm1
from haliax.elementwise import fabs as fabs
from haliax.elementwise import fix as fix
from haliax.elementwise import float_power as float_power
from haliax.elementwise import floor as floor
from haliax.elementwise import floor_divide as floor_divide
from haliax.elementwise import fmax as fmax
from haliax.elementwise import fmin as fmin
from haliax.elementwise import fmod as fmod
from haliax.elementwise import frexp as frexp
from haliax.elementwise import gcd as gcd
from haliax.elementwise import greater as greater
from haliax.elementwise import greater_equal as greater_equal
from haliax.elementwise import heaviside as heaviside
from haliax.elementwise import hypot as hypot
from haliax.elementwise import i0 as i0
from haliax.elementwise import imag as imag
from haliax.elementwise import invert as invert
from haliax.elementwise import iscomplex as iscomplex
from haliax.elementwise import isfinite as isfinite
from haliax.elementwise import isinf as isinf
from haliax.elementwise import isnan as isnan
from haliax.elementwise import isneginf as isneginf
from haliax.elementwise import isposinf as isposinf
from haliax.elementwise import isreal as isreal
from haliax.elementwise import lcm as lcm
from haliax.elementwise import ldexp as ldexp
from haliax.elementwise import left_shift as left_shift
from haliax.elementwise import less as less
from haliax.elementwise import less_equal as less_equal
from haliax.elementwise import log as log
from haliax.elementwise import log1p as log1p
from haliax.elementwise import log2 as log2
from haliax.elementwise import log10 as log10
from haliax.elementwise import logaddexp as logaddexp
from haliax.elementwise import logaddexp2 as logaddexp2
from haliax.elementwise import logical_and as logical_and
from haliax.elementwise import logical_not as logical_not
from haliax.elementwise import logical_or as logical_or
from haliax.elementwise import logical_xor as logical_xor
from haliax.elementwise import maximum as maximum
from haliax.elementwise import minimum as minimum
from haliax.elementwise import mod as mod
from haliax.elementwise import modf as modf
from haliax.elementwise import multiply as multiply
from haliax.elementwise import nan_to_num as nan_to_num
from haliax.elementwise import negative as negative
from haliax.elementwise import nextafter as nextafter
from haliax.elementwise import not_equal as not_equal
from haliax.elementwise import positive as positive
from haliax.elementwise import pow as pow
from haliax.elementwise import power as power
from haliax.elementwise import rad2deg as rad2deg
from haliax.elementwise import radians as radians
from haliax.elementwise import real as real
from haliax.elementwise import reciprocal as reciprocal
from haliax.elementwise import remainder as remainder
from haliax.elementwise import right_shift as right_shift
from haliax.elementwise import rint as rint
from haliax.elementwise import round as round
from haliax.elementwise import rsqrt as rsqrt
from haliax.elementwise import sign as sign
from haliax.elementwise import signbit as signbit
from haliax.elementwise import sin as sin
from haliax.elementwise import sinc as sinc
from haliax.elementwise import sinh as sinh
from haliax.elementwise import spacing as spacing
from haliax.elementwise import sqrt as sqrt
from haliax.elementwise import square as square
from haliax.elementwise import subtract as subtract
from haliax.elementwise import tan as tan
from haliax.elementwise import tanh as tanh
from haliax.elementwise import true_divide as true_divide
from haliax.elementwise import trunc as trunc
from haliax.hof import fold as fold
from haliax.hof import map as map
from haliax.hof import scan as scan
from haliax.hof import vmap as vmap
from haliax.indexing import IndexUpdates, getitem
from haliax.indexing import index as index
from haliax.indexing import slice as slice
from haliax.indexing import take as take
from haliax.indexing import updated_slice as updated_slice
from haliax.jax_utils import named_call as named_call
from haliax.ops import allclose as allclose
from haliax.ops import array_equal as array_equal
from haliax.ops import array_equiv as array_equiv
from haliax.ops import bincount as bincount
from haliax.ops import clip as clip
from haliax.ops import isclose as isclose
from haliax.ops import nonzero as nonzero
from haliax.ops import packbits as packbits
from haliax.ops import raw_array_or_scalar as raw_array_or_scalar
from haliax.ops import searchsorted as searchsorted
from haliax.ops import trace as trace
from haliax.ops import tril as tril
from haliax.ops import triu as triu
from haliax.ops import unique as unique
from haliax.ops import unique_all as unique_all
from haliax.ops import unique_counts as unique_counts
from haliax.ops import unique_inverse as unique_inverse
from haliax.ops import unique_values as unique_values
from haliax.ops import unpackbits as unpackbits
from haliax.ops import where as where
from haliax.partitioning import ResourceAxis as ResourceAxis
from haliax.partitioning import auto_sharded as auto_sharded
from haliax.partitioning import axis_mapping as axis_mapping
from haliax.partitioning import current_thread_local_mapping as current_thread_local_mapping
from haliax.partitioning import fsdp as fsdp
from haliax.partitioning import infer_resource_partitions as infer_resource_partitions
from haliax.partitioning import named_jit as named_jit
from haliax.partitioning import physical_axis_name as physical_axis_name
from haliax.partitioning import physical_axis_size as physical_axis_size
from haliax.partitioning import pspec_for as pspec_for
from haliax.partitioning import pspec_for_axis as pspec_for_axis
from haliax.partitioning import round_axis_for_partitioning as round_axis_for_partitioning
from haliax.partitioning import shard as shard
from haliax.partitioning import shard_with_axis_mapping as shard_with_axis_mapping
from haliax.partitioning import sharding_for_axis as sharding_for_axis
from haliax.reductions import ReductionFunction as ReductionFunction
from haliax.reductions import all as all
from haliax.reductions import amax as amax
from haliax.reductions import amin as amin
from haliax.reductions import any as any
from haliax.reductions import argmax as argmax
from haliax.reductions import argmin as argmin
from haliax.reductions import count_nonzero as count_nonzero
from haliax.reductions import max as max
from haliax.reductions import mean as mean
from haliax.reductions import median as median
from haliax.reductions import min as min
from haliax.reductions import nanargmax as nanargmax
from haliax.reductions import nanargmin as nanargmin
from haliax.reductions import nanmax as nanmax
from haliax.reductions import nanmean as nanmean
from haliax.reductions import nanmin as nanmin
from haliax.reductions import nanprod as nanprod
from haliax.reductions import nanstd as nanstd
from haliax.reductions import nansum as nansum
from haliax.reductions import nanvar as nanvar
from haliax.reductions import prod as prod
from haliax.reductions import product as product
from haliax.reductions import ptp as ptp
from haliax.reductions import std as std
from haliax.reductions import sum as sum
from haliax.reductions import var as var
from haliax.shapes import concatenate as concatenate
from haliax.shapes import flatten as flatten
from haliax.shapes import flatten_axes as flatten_axes
from haliax.shapes import pad as pad
from haliax.shapes import pad_left as pad_left
from haliax.shapes import ravel as ravel
from haliax.shapes import rearrange as rearrange
from haliax.shapes import rename as rename
from haliax.shapes import repeat as repeat
from haliax.shapes import roll as roll
from haliax.shapes import split as split
from haliax.shapes import stack as stack
from haliax.shapes import tile as tile
from haliax.shapes import unbind as unbind
from haliax.shapes import unflatten_axis as unflatten_axis
from haliax.util import ensure_tuple as ensure_tuple
from haliax.util import is_named_array as is_named_array

if TYPE_CHECKING:
    from haliax import debug as debug
    from haliax import fft as fft
    from haliax import poly as poly
    from haliax import quantization as quantization
    from haliax.einsums import einsum as einsum
    from haliax.fft import fftfreq as fftfreq
    from haliax.fft import fftshift as fftshift
    from haliax.fft import hfft as hfft
    from haliax.fft import ifft as ifft
    from haliax.fft import ifftshift as ifftshift
    from haliax.fft import ihfft as ihfft
    from haliax.fft import irfft as irfft
    from haliax.fft import rfft as rfft
    from haliax.fft import rfftfreq as rfftfreq
    from haliax.poly import polyadd as polyadd
    from haliax.poly import polyder as polyder
    from haliax.poly import polydiv as polydiv
    from haliax.poly import polyfit as polyfit
    from haliax.poly import polyint as polyint
    from haliax.poly import polymul as polymul
    from haliax.poly import polysub as polysub
    from haliax.poly import polyval as polyval
    from haliax.poly import roots as roots

_LAZY_MODULES = ("debug", "fft", "poly", "quantization")
_LAZY_NAMES = {
    "einsums": "einsum",
    "fft": "fftfreq fftshift hfft ifft ifftshift ihfft irfft rfft rfftfreq",
    "poly": "polyadd polyder polydiv polyfit polyint polymul polysub polyval roots",
}

_METHODS = """
abs absolute angle arccos arccosh arcsin arcsinh arctan arctanh around bitwise_count bitwise_invert
bitwise_not cbrt ceil conjugate cos cosh deg2rad degrees exp exp2 expm1 fabs fix floor frexp i0
invert iscomplex isfinite isinf isnan isneginf isposinf isreal log log10 log1p log2 logical_not modf
nan_to_num negative positive rad2deg radians reciprocal rint round rsqrt sign signbit sin sinc sinh
sqrt square tan tanh trunc
all amax amin any argmax argmin max mean median min nanargmax nanargmin nanmax nanmean nanmin
nanprod nanstd nansum nanvar prod product ptp std sum var
argsort cumprod cumsum nancumprod nancumsum sort top_k
broadcast_axis broadcast_to clip dot flatten flatten_axes pad pad_left packbits ravel rearrange
rename repeat roll slice split take tile trace tril triu unbind unflatten_axis unpackbits
updated_slice
"""

_OPERATORS = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "truediv": operator.truediv,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "divmod": jnp.divmod,
    "pow": operator.pow,
    "lshift": operator.lshift,
    "rshift": operator.rshift,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
}

_COMPARISONS = {"lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge}


def _bind_methods() -> None:
    for name in _METHODS.split():
        setattr(NamedArray, name, globals()[name])
    for name, function in _OPERATORS.items():
        forward, reflected = apply_operator(function, f"`{name}`")
        setattr(NamedArray, f"__{name}__", forward)
        setattr(NamedArray, f"__r{name}__", reflected)
    for name, function in _COMPARISONS.items():
        setattr(NamedArray, f"__{name}__", apply_operator(function, f"`{name}`")[0])
    extra = {
        "__eq__": comparison(operator.eq, "`==`", "=="),
        "__ne__": comparison(operator.ne, "`!=`", "!="),
        "__matmul__": _no_matmul,
        "__rmatmul__": _no_matmul,
        "__neg__": negative,
        "__pos__": positive,
        "__abs__": abs,
        "__invert__": invert,
        "__round__": around,
        "__getitem__": getitem,
        "at": property(IndexUpdates),
    }
    for name, method in extra.items():
        setattr(NamedArray, name, method)


def _no_matmul(self: NamedArray, other: object) -> NamedArray:
    raise ValueError("`@` cannot know which axis to sum over. Use `hax.dot(a, b, axis=...)`.")


_bind_methods()


def __getattr__(name: str) -> object:
    if name in _LAZY_MODULES:
        return importlib.import_module(f"haliax.{name}")
    for module, names in _LAZY_NAMES.items():
        if name in names.split():
            return getattr(importlib.import_module(f"haliax.{module}"), name)
    raise AttributeError(f"module 'haliax' has no attribute '{name}'")
