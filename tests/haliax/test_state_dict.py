"""State dicts, quantized products, diagnosis of modules, and trees with named leaves."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import haliax as hax
from haliax import debug, quantization, state_dict, tree_util
from haliax.nn import Linear, Stacked

E, F, L = hax.make_axes(embed=4, mlp=6, layers=2)
Heads, Size = hax.make_axes(heads=2, size=3)
KEY = jax.random.PRNGKey(0)


class Net(state_dict.ModuleWithStateDictSerialization):
    proj: Linear
    stack: Stacked
    scale: jax.Array
    extra: Linear | None = None

    def _state_dict_key_map(self):
        return {"proj": "c_proj", "stack": None}


def _net():
    keys = jax.random.split(KEY, 2)
    return Net(
        Linear.init(E, (Heads, Size), key=KEY),
        Stacked.init(L, Linear)(E, F, key=keys),
        jnp.arange(3.0),
    )


def test_keys_follow_fields_maps_and_layers():
    found = state_dict.to_torch_compatible_state_dict(_net(), prefix="model")
    assert {key: tuple(value.shape) for key, value in found.items()} == {
        "model.c_proj.weight": (6, 4),
        "model.c_proj.bias": (6,),
        "model.0.weight": (6, 4),
        "model.0.bias": (6,),
        "model.1.weight": (6, 4),
        "model.1.bias": (6,),
        "model.scale": (3,),
    }
    unflattened = state_dict.to_torch_compatible_state_dict(_net(), flatten=False)
    assert unflattened["c_proj.weight"].shape == (2, 3, 4)


@pytest.mark.parametrize("flatten", [True, False])
def test_reading_is_the_inverse_of_writing(flatten, tmp_path):
    net = _net()
    written = state_dict.to_torch_compatible_state_dict(net, flatten=flatten)
    state_dict.save_state_dict(written, tmp_path / "model.safetensors")
    loaded = state_dict.load_state_dict(tmp_path / "model.safetensors")
    template = jax.tree_util.tree_map(jnp.zeros_like, net)
    again = state_dict.from_torch_compatible_state_dict(template, loaded, unflatten=flatten)
    assert again.proj.weight.axes == net.proj.weight.axes
    assert again.extra is None
    for a, b in zip(jax.tree_util.tree_leaves(again), jax.tree_util.tree_leaves(net), strict=True):
        np.testing.assert_array_equal(a, b)


def test_files_are_those_of_pytorch(tmp_path):
    from safetensors import safe_open

    state_dict.save_state_dict({"w": jnp.ones((2, 3))}, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("w").shape == (2, 3)


def test_reading_says_what_is_missing_or_misshapen():
    written = state_dict.to_state_dict(_net())
    del written["c_proj.bias"]
    with pytest.raises(KeyError, match=r"c_proj\.bias"):
        state_dict.from_state_dict(_net(), written)
    with pytest.raises(ValueError, match=r"'scale' has shape \(9,\)"):
        state_dict.from_state_dict(
            _net(), {**state_dict.to_state_dict(_net()), "scale": jnp.ones(9)}
        )


def test_prefixes_join():
    assert state_dict.with_prefix("a", "b") == "a.b"
    assert state_dict.with_prefix(None, "b") == "b"
    assert state_dict.with_prefix("a", None) == "a"
    assert state_dict.with_prefix(None, None) is None


def test_containers_and_numpy():
    tree = {"a": [hax.ones(E), (jnp.ones(2),)], "b": None}
    found = state_dict.to_numpy_state_dict(tree)
    assert {k: type(v) for k, v in found.items()} == {"a.0": np.ndarray, "a.1.0": np.ndarray}
    again = state_dict.from_state_dict(tree, {k: v * 2 for k, v in found.items()})
    assert again["a"][0].axes == (E,)
    assert again["a"][1][0].tolist() == [2, 2]


def _quantized(**options):
    net = {
        "first": Linear.init(E, F, key=KEY),
        "stack": Stacked.init(L, Linear)(E, F, key=jax.random.split(KEY, 2)),
    }
    return net, quantization.quantize_linear_layers(net, quantization.QuantizationConfig(**options))


def test_fp8_layers_are_near_and_keep_scales_per_layer():
    net, quantized = _quantized(fp8=True, amax_history_length=4)
    assert quantized["first"].dot_general.input_amax_history.shape == (4,)
    assert quantized["stack"].stacked.dot_general.input_amax_history.shape == (2, 4)
    x = hax.random.normal(KEY, E)
    exact, near = net["first"](x).array, quantized["first"](x).array
    np.testing.assert_allclose(near, exact, atol=0.1)
    assert not np.array_equal(near, exact)
    rename = lambda block, c: block(c)["mlp", 0:4].rename({"mlp": "embed"})
    assert quantized["stack"].fold_via(rename)(x).axes == (E,)


def test_fp8_state_comes_back_as_its_gradient():
    _, quantized = _quantized(fp8=True, amax_history_length=4)
    layer, x = quantized["first"], hax.random.normal(KEY, E) * 3
    grad = eqx.filter_grad(lambda m: (m(x) ** 2).sum().scalar())(layer)
    overwrites, proper = quantization.partition_for_grad_overwrite(grad)
    assert proper.dot_general is None
    assert overwrites.weight is None
    updates = jax.tree_util.tree_map(lambda g: -0.1 * g, proper)
    stepped = quantization.apply_updates(layer, updates, overwrites)
    assert float(stepped.dot_general.input_amax_history[0]) == pytest.approx(
        float(hax.abs(x).max())
    )
    np.testing.assert_allclose(
        stepped.weight.array, layer.weight.array - 0.1 * grad.weight.array, rtol=1e-6
    )
    again = eqx.filter_grad(lambda m: (m(x) ** 2).sum().scalar())(stepped)
    wanted = float(hax.abs(x).max()) / float(jnp.finfo(jnp.float8_e4m3fn).max)
    assert float(again.dot_general.input_scale) == pytest.approx(wanted)


def test_int8_products_are_near_and_differentiate_as_if_exact():
    net, quantized = _quantized(int8=True)
    x = hax.random.normal(KEY, E)
    np.testing.assert_allclose(quantized["first"](x).array, net["first"](x).array, atol=0.05)
    loss = lambda m: m(x).sum().scalar()
    exact, near = (eqx.filter_grad(loss)(m["first"]) for m in (net, quantized))
    np.testing.assert_allclose(near.weight.array, exact.weight.array, rtol=1e-6)
    batched = hax.dot(
        hax.random.normal(KEY, (Heads, E)),
        hax.random.normal(KEY, (Heads, E, F)),
        axis=E,
        dot_general=quantization.Int8DotGeneralOp.init(),
    )
    assert batched.axes == (Heads, F)


@pytest.mark.parametrize(
    ("targets", "hit"),
    [
        (["first"], {"first"}),
        (r"stack.*", {"stack"}),
        (["nothing"], set()),
        (None, {"first", "stack"}),
    ],
)
def test_quantization_targets(targets, hit):
    _, quantized = _quantized(int8=True, targets=targets)
    layers = {"first": quantized["first"], "stack": quantized["stack"].stacked}
    found = {
        k for k, v in layers.items() if isinstance(v.dot_general, quantization.Int8DotGeneralOp)
    }
    assert found == hit


def test_one_kind_of_quantization_at_a_time():
    with pytest.raises(ValueError, match="not both"):
        quantization.QuantizationConfig(fp8=True, int8=True)


def test_diagnosis_finds_reused_and_static_arrays():
    class Bad(eqx.Module):
        a: Linear
        b: Linear
        table: object = eqx.field(static=True)

    layer = Linear.init(E, F, key=KEY)
    problems = debug.diagnose_common_issues(Bad(layer, layer, hax.nn.relu))
    assert {tuple(paths) for _, paths in problems.reused_arrays} == {
        (".a.weight", ".b.weight"),
        (".a.bias", ".b.bias"),
    }
    assert "eqx.nn.Shared" in str(problems)
    assert not debug.diagnose_common_issues(_net())
    with pytest.warns(UserWarning, match="static"):
        bad = Bad(layer, Linear.init(E, F, key=KEY), np.ones(3))
    assert debug.diagnose_common_issues(bad).static_arrays == [".table"]


def test_shardings_are_shown_by_axis_name(capsys):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    wide = hax.ones((E, hax.Axis("batch", 16)))
    with jax.set_mesh(mesh):
        text = debug.visualize_shardings({"x": hax.shard(wide, {"batch": "data"})})
    assert text == "['x']: float32{'embed': 4, 'batch': 16} batch over data, (4, 2) per device"
    assert capsys.readouterr().out.strip() == text


def test_trees_take_named_arrays_as_leaves():
    tree = {"a": hax.ones(E), "b": [hax.ones(F), 3]}
    assert [type(x).__name__ for x in tree_util.tree_leaves(tree)] == [
        "NamedArray",
        "NamedArray",
        "int",
    ]
    mapped = tree_util.tree_map(
        lambda x: x.rename({"embed": "e"}) if hax.is_named_array(x) and x.has_axis("embed") else x,
        tree,
    )
    assert mapped["a"].shape == {"e": 4}
    stop = tree_util.tree_leaves(tree, is_leaf=lambda x: isinstance(x, list))
    assert len(stop) == 2
    leaves, treedef = tree_util.tree_flatten(tree)
    assert tree_util.tree_structure(tree) == treedef
    assert tree_util.tree_unflatten(treedef, leaves)["b"][1] == 3


def test_scan_aware_map_sees_single_layers():
    stack = Stacked.init(L, Linear)(E, F, key=jax.random.split(KEY, 2))
    seen = []

    def center(leaf):
        seen.append(tuple(leaf.shape))
        return leaf - leaf.mean()

    mapped = tree_util.scan_aware_tree_map(center, {"s": stack})
    assert ("mlp", "embed") in seen
    raw = stack.stacked.weight.array
    expected = raw - raw.mean((1, 2), keepdims=True)
    np.testing.assert_allclose(mapped["s"].stacked.weight.array, expected, rtol=1e-5, atol=1e-7)


def test_resize_axis():
    tree = {"a": hax.ones((F, E)), "b": hax.ones(F)}
    assert tree_util.resize_axis(tree, "embed", 2)["a"].shape == {"mlp": 6, "embed": 2}
    grown = tree_util.resize_axis(tree, "embed", 6)
    assert grown["a"].array[0].tolist() == [1, 1, 1, 1, 0, 0]
    assert grown["b"].shape == {"mlp": 6}
    noisy = tree_util.resize_axis(tree, E, 6, key=KEY)
    np.testing.assert_allclose(noisy["a"].array, 1)


def test_fields_that_are_no_arrays_are_left_alone():
    class Odd(state_dict.ModuleWithStateDictSerialization):
        nothing: list
        empty: tuple
        act: object
        name: str
        flag: bool
        table: dict

    odd = Odd([], (), hax.nn.relu, "n", True, {"k": jnp.ones(2), "gone": None})
    written = state_dict.to_state_dict(odd)
    assert list(written) == ["table.k"]
    again = state_dict.from_state_dict(odd, {"table.k": jnp.zeros(2)})
    assert again.table["k"].tolist() == [0, 0]
    assert (again.nothing, again.empty, again.act, again.name, again.flag) == (
        [],
        (),
        hax.nn.relu,
        "n",
        True,
    )
