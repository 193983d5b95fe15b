# ruff: noqa: E501 - names are listed as the tables they are
"""The promised surface: every name, every method, every module, and what importing it costs."""

import importlib
import inspect
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import haliax as hax

PACKAGE = Path(hax.__file__).parent
# Under another name the checker of annotations leaves it alone: these are declarations, not code.
Methods = runpy.run_path(str(PACKAGE / "methods.py"), run_name="declarations")["Methods"]

MODULES = [
    "axis",
    "core",
    "ops",
    "nn",
    "nn.scan",
    "nn.attention",
    "nn.linear",
    "nn.normalization",
    "nn.embedding",
    "nn.loss",
    "random",
    "partitioning",
    "hof",
    "state_dict",
    "haxtyping",
    "jax_utils",
    "tree_util",
    "debug",
    "quantization",
    "util",
    "fft",
    "poly",
]

NAMES = {
    "haliax": """
        Axis AxisSelector AxisSpec AxisSelection PartialAxisSpec ShapeDict PartialShapeDict NamedOrNumeric
        Scalar ReductionFunction NamedArray NamedArrayAxes ScanCheckpointPolicy ResourceAxis
        make_axes axis_name axis_size axis_spec_to_tuple axis_spec_to_shape_dict to_jax_shape concat_axes
        concat_axis_specs union_axes intersect_axes eliminate_axes without_axes replace_axis resolve_axis
        selects_axis unsize_axes is_axis_compatible rearrange_for_partial_order dslice ds dblock
        named field enable_shape_checks broadcast_to broadcast_axis broadcast_arrays
        broadcast_arrays_and_return_axes where clip isclose allclose array_equal array_equiv
        index take slice updated_slice rearrange flatten_axes unflatten_axis ravel flatten rename split unbind
        stack concatenate repeat tile roll pad pad_left top_k tril triu trace dot einsum
        all any sum prod product mean var std max min amax amin ptp argmax argmin nanargmax nanargmin nanmax
        nanmin nansum nanprod nanmean nanstd nanvar cumsum cumprod nancumsum nancumprod sort argsort
        unique unique_values unique_counts unique_inverse unique_all searchsorted bincount nonzero packbits
        unpackbits zeros ones full zeros_like ones_like full_like arange linspace logspace geomspace
        abs absolute angle arccos arccosh arcsin arcsinh arctan arctanh around bitwise_not cbrt ceil conj
        conjugate copy cos cosh deg2rad degrees exp exp2 expm1 fabs fix floor frexp i0 imag invert iscomplex
        isfinite isinf isnan isneginf isposinf isreal log log10 log1p log2 logical_not negative positive
        rad2deg radians real reciprocal rint round rsqrt sign signbit sin sinc sinh sqrt square tan tanh trunc
        add arctan2 bitwise_and bitwise_or bitwise_xor bitwise_left_shift bitwise_right_shift copysign divide
        divmod equal float_power floor_divide fmax fmin fmod gcd greater greater_equal heaviside hypot lcm ldexp
        left_shift less less_equal logaddexp logaddexp2 logical_and logical_or logical_xor maximum minimum mod
        multiply nextafter not_equal pow power remainder right_shift subtract true_divide
        scan fold map vmap axis_mapping shard shard_with_axis_mapping auto_sharded named_jit fsdp pspec_for
        pspec_for_axis infer_resource_partitions sharding_for_axis physical_axis_name physical_axis_size
        round_axis_for_partitioning current_thread_local_mapping named_call
        fft ifft rfft irfft hfft ihfft fftshift ifftshift fftfreq rfftfreq
        poly polyadd polysub polymul polydiv polyval polyder polyint polyfit roots
        nn random state_dict tree_util util haxtyping jax_utils debug quantization hof partitioning
        is_named_array ensure_tuple raw_array_or_scalar
    """,
    "haliax.nn": """
        Linear Embedding LayerNorm RmsNorm Dropout dropout MLP MoELinear Conv ConvTranspose max_pool mean_pool
        min_pool Stacked BlockSeq softmax log_softmax logsumexp one_hot cross_entropy_loss
        binary_cross_entropy_loss reduce_loss maybe_reduce_loss cross_entropy_loss_and_log_normalizers
        dot_product_attention dot_product_attention_weights relu relu6 sigmoid softplus soft_sign silu swish
        log_sigmoid leaky_relu hard_sigmoid hard_silu hard_swish hard_tanh elu celu selu gelu quick_gelu glu
        relu_squared attention normalization embedding linear loss scan
    """,
    "haliax.nn.attention": """
        dot_product_attention dot_product_attention_weights causal_mask prefix_lm_mask combine_masks_and
        combine_masks_or forgetful_causal_mask alibi_attention_bias mask_to_bias
    """,
    "haliax.random": """
        uniform normal bernoulli randint poisson exponential gamma beta laplace cauchy logistic
        truncated_normal ball choice categorical gumbel permutation rademacher t weibull_min pareto loggamma
    """,
    "haliax.partitioning": """
        axis_mapping shard shard_with_axis_mapping auto_sharded named_jit fsdp pspec_for pspec_for_axis
        infer_resource_partitions sharding_for_axis physical_axis_name physical_axis_size ResourceAxis
        ResourceMapping round_axis_for_partitioning current_thread_local_mapping _get_mesh
    """,
    "haliax.state_dict": """
        to_state_dict from_state_dict ModuleWithStateDictSerialization with_prefix to_torch_compatible_state_dict
        from_torch_compatible_state_dict to_numpy_state_dict save_state_dict load_state_dict StateDict
        flatten_modules_for_export
    """,
    "haliax.quantization": """
        DotGeneralOp DefaultDotGeneralOp Fp8DotGeneralOp Int8DotGeneralOp OverwriteWithGradient
        partition_for_grad_overwrite apply_updates QuantizationConfig quantize_linear_layers
    """,
    "haliax.jax_utils": """
        maybe_rng_split named_call shaped_rng_split is_jax_array_like tree_checkpoint_name ensure_scalar is_in_jit
    """,
    "haliax.util": "is_named_array is_jax_or_hax_array_like ensure_tuple StringHolderEnum",
    "haliax.tree_util": """
        tree_map tree_leaves tree_flatten tree_unflatten tree_structure scan_aware_tree_map resize_axis
    """,
    "haliax.haxtyping": "f32 i32 bool_ bf16 Float Int UInt Complex Named NamedArrayAxes",
    "haliax.debug": "diagnose_common_issues visualize_shardings ModuleProblems",
    "haliax.hof": "scan fold map vmap",
    "haliax.core": "NamedArray named NamedOrNumeric",
    "haliax.ops": "where clip isclose tril triu trace searchsorted bincount unique raw_array_or_scalar",
}


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_importable(module):
    assert importlib.import_module(f"haliax.{module}").__doc__


@pytest.mark.parametrize("module", NAMES)
def test_names_are_there(module):
    found = importlib.import_module(module)
    missing = [name for name in NAMES[module].split() if not hasattr(found, name)]
    assert missing == []


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hax.nothing


DECLARED = sorted(
    name
    for name, value in vars(Methods).items()
    if (callable(value) or isinstance(value, property)) and (not name.startswith("_") or name.endswith("__"))
    and name not in ("__class__", "__doc__", "__init__")
)  # fmt: skip


def test_editors_see_every_bound_method():
    assert len(DECLARED) >= 150
    bound = set(hax._METHODS.split()) | {
        f"__{name}__" for name in (*hax._OPERATORS, *hax._COMPARISONS)
    }
    assert bound <= set(DECLARED) | {"at"}


@pytest.mark.parametrize("name", DECLARED)
def test_declared_methods_take_what_the_functions_take(name):
    """The declarations for editors cannot drift from the functions that are bound."""
    bound = inspect.getattr_static(hax.NamedArray, name)
    if isinstance(bound, property):
        return
    wanted = list(inspect.signature(vars(Methods)[name]).parameters.values())[1:]
    actual = list(inspect.signature(bound).parameters.values())[1:]
    has_kwargs = any(p.kind is p.VAR_KEYWORD for p in actual)
    known = {p.name for p in actual}
    for parameter in wanted:
        is_variadic = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        is_positional_only = parameter.kind is parameter.POSITIONAL_ONLY
        assert is_variadic or is_positional_only or has_kwargs or parameter.name in known, parameter
    required = [
        p.name for p in actual if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    assert len(required) <= len(wanted)


_LOADED = """
import json, sys
import jax, equinox, jaxtyping, numpy
before = set(sys.modules)
import haliax
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_importing_loads_nothing_heavy():
    done = subprocess.run(
        [sys.executable, "-c", _LOADED], capture_output=True, text=True, check=True
    )
    loaded = json.loads(done.stdout)
    heavy = (
        "jax.experimental.pallas",
        "safetensors",
        "torch",
        "aqt",
        "haliax.quantization",
        "haliax.fft",
    )
    heavy += (
        "haliax.poly",
        "haliax.debug",
        "haliax.methods",
        "optax",
        "modeling",
        "wadler_lindig._",
    )
    assert [m for m in loaded if m.startswith(heavy)] == []
    others = [m for m in loaded if not m.startswith("haliax")]
    assert others in ([], ["jax.ad_checkpoint"])


def test_files_stay_small():
    sizes = sorted(len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py"))
    assert sizes[len(sizes) // 2] < 250
    assert sizes[-1] <= 700


def test_no_private_jax_and_no_pickle():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert "jax._src" not in text, path
        assert "jax.interpreters" not in text, path
        assert "import pickle" not in text, path
        assert "from __future__" not in text, path
