"""Mappings, meshes and named_jit on eight devices: what is asked is what the devices hold."""

import threading
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import haliax as hax
from haliax.partitioning import ResourceAxis, auto_sharded, current_mesh, named_jit

B, E, M = hax.make_axes(batch=8, embed=16, mlp=4)
MAPPING = {"batch": ResourceAxis.DATA, "mlp": ResourceAxis.MODEL}


@pytest.fixture
def mesh():
    return Mesh(np.array(jax.devices()).reshape(4, 2), (ResourceAxis.DATA, ResourceAxis.MODEL))


def _local(x):
    return x.array.addressable_shards[0].data.shape


@pytest.fixture(params=["set_mesh", "with"])
def in_mesh(request, mesh):
    if request.param == "set_mesh":
        with jax.set_mesh(mesh):
            yield mesh
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        mesh.__enter__()
    yield mesh
    mesh.__exit__(None, None, None)


def test_mappings_nest_and_the_inner_wins():
    assert hax.current_thread_local_mapping() is None
    with hax.axis_mapping({"batch": "data"}):
        with hax.axis_mapping({"mlp": "model"}):
            assert hax.current_thread_local_mapping() == {"mlp": "model"}
        with hax.axis_mapping({"batch": "model", "embed": "data"}, merge=True):
            assert hax.current_thread_local_mapping() == {"batch": "model", "embed": "data"}
        assert hax.current_thread_local_mapping() == {"batch": "data"}
    assert hax.current_thread_local_mapping() is None


def test_partition_specs_follow_the_mapping():
    assert hax.pspec_for_axis((B, E, M), MAPPING) == P("data", None, "model")
    assert hax.pspec_for_axis("batch", MAPPING) == P("data")
    assert hax.pspec_for_axis((E,), MAPPING) == P()
    assert hax.pspec_for_axis((B,), {"batch": ("replica", "data")}) == P(("replica", "data"))
    with hax.axis_mapping(MAPPING):
        assert hax.pspec_for_axis((M, B)) == P("model", "data")
        assert hax.physical_axis_name(M) == "model"
        assert hax.physical_axis_name(E) is None


def test_the_mesh_is_found_in_and_out_of_jit(in_mesh):
    assert dict(current_mesh().shape) == {"data": 4, "model": 2}
    seen = []
    jax.jit(lambda x: seen.append(dict(current_mesh().shape)) or x)(1.0)
    assert seen == [{"data": 4, "model": 2}]
    assert hax.physical_axis_size(B, MAPPING) == 4
    assert hax.physical_axis_size(B, {"batch": ("data", "model")}) == 8
    assert hax.physical_axis_size(E, MAPPING) is None
    assert hax.round_axis_for_partitioning(B.resize(5), MAPPING) == B
    assert hax.sharding_for_axis((B, E), MAPPING).spec == P("data")


def test_without_a_mesh_nothing_is_sharded():
    assert current_mesh() is None
    x = hax.ones((B, E))
    assert hax.shard(x, MAPPING) is x
    assert auto_sharded(x) is x


def test_without_a_mapping_shard_warns():
    with pytest.warns(RuntimeWarning, match="axis mapping"):
        hax.shard(hax.ones(B))


def test_shard_moves_data_outside_jit(in_mesh):
    plain = jnp.ones(8)
    tree = hax.shard({"a": hax.ones((B, E)), "b": (plain, "x")}, MAPPING)
    assert _local(tree["a"]) == (2, 16)
    assert tree["b"][0] is plain
    assert tree["b"][1] == "x"


def test_shard_constrains_inside_jit(in_mesh):
    @jax.jit
    def f(x):
        with hax.axis_mapping(MAPPING):
            return hax.shard(x * 2)

    out = f(hax.ones((M, B)))
    assert _local(out) == (2, 2)


def test_contractions_and_random_numbers_follow_the_mapping(in_mesh):
    with hax.axis_mapping(MAPPING):
        x = hax.random.normal(jax.random.PRNGKey(0), (B, E))
        assert _local(x) == (2, 16)
        y = hax.dot(x, hax.ones((E, M)), axis=E)
        assert _local(y) == (2, 2)
        assert _local(hax.zeros((B, E))) == (8, 16)


def test_named_jit_maps_inputs_and_outputs(in_mesh):
    @named_jit(axis_resources=MAPPING)
    def f(x, factor, *, name):
        assert hax.current_thread_local_mapping() == MAPPING
        return {"y": x * factor, "plain": jnp.arange(8), "name": name, "n": None}

    out = f(hax.ones((B, E)), 3, name="static")
    assert _local(out["y"]) == (2, 16)
    assert out["name"] == "static"
    assert out["n"] is None
    assert out["plain"].sharding.is_fully_replicated
    np.testing.assert_array_equal(out["y"].array, 3)


def test_named_jit_reshards_inputs_only_when_asked(in_mesh):
    x = hax.shard(hax.ones((B, E)), {"embed": "data"})
    kept = named_jit(lambda x: x * 2)(x)
    assert _local(kept) == (8, 4)
    moved = named_jit(lambda x: x * 2, in_axis_resources=MAPPING, out_axis_resources=MAPPING)(x)
    assert _local(moved) == (2, 16)


def test_named_jit_compiles_once_for_each_structure():
    traces = []

    @named_jit
    def f(x, flag):
        traces.append(flag)
        return x + (1 if flag else 0)

    f(hax.ones(B), True)
    f(hax.ones(B), True)
    assert traces == [True]
    f(hax.ones(B), 1)
    assert traces == [True, 1]
    f(hax.ones(E), True)
    with hax.axis_mapping({"batch": "data"}):
        f(hax.ones(B), True)
    assert len(traces) == 4


def test_named_jit_takes_modules_classes_and_bound_methods():
    class Model(eqx.Module):
        w: hax.NamedArray
        act: object

        def __init__(self):
            self.w = hax.ones(E)
            self.act = hax.nn.relu

        def __call__(self, x):
            return self.act(x * self.w)

    model = named_jit(Model)()
    assert model.act is hax.nn.relu
    assert named_jit(model)(hax.ones((B, E))).axes == (B, E)
    assert named_jit(model.__call__)(hax.ones((B, E))).axes == (B, E)


def test_named_jit_decorates_methods():
    class Trainer:
        scale = 3.0

        @named_jit
        def step(self, x):
            return x * self.scale

    assert float(Trainer().step(hax.ones(B))["batch", 0]) == 3


def test_donated_arrays_are_gone():
    @named_jit(donate_args=(True, False), donate_kwargs={"c": True})
    def f(a, b, *, c):
        return a + 1, b + 1, c + 1

    a, b, c = hax.ones(B), hax.ones(B), hax.ones(B)
    f(a, b, c=c)
    assert a.array.is_deleted()
    assert not b.array.is_deleted()
    assert c.array.is_deleted()
    d = hax.ones(B)
    named_jit(lambda x: x + 1, donate_args=True)(d)
    assert d.array.is_deleted()


def test_named_jit_lowers_shapes():
    x = eqx.filter_eval_shape(lambda: hax.ones((B, E)))
    text = named_jit(lambda x: x + 1).lower(x).as_text()
    assert "tensor<8x16xf32>" in text


def test_named_jit_says_which_static_argument_has_no_hash():
    class Unhashable:
        __hash__ = None

    with pytest.raises(TypeError, match="Unhashable"):
        named_jit(lambda x, y: x)(hax.ones(B), Unhashable())


def test_fsdp_holds_parameters_one_way_and_computes_another(in_mesh):
    seen = []

    @hax.fsdp(parameter_mapping={"embed": "data"}, compute_mapping={"batch": "data"})
    def f(w, x):
        seen.append(hax.current_thread_local_mapping())
        return w + hax.dot(x, x * w, axis="batch")["embed", 0:16]

    w = f(hax.ones(E), hax.ones((B, E)))
    assert seen == [{"batch": "data"}]
    assert _local(w) == (4,)


def test_pspec_for_trees(in_mesh):
    class Module(eqx.Module):
        named: hax.NamedArray
        plain: jax.Array
        text: str = eqx.field(static=True)

    module = Module(hax.ones((B, M)), jnp.ones(8), "x")
    specs = hax.pspec_for(module, MAPPING, preserve_existing_shardings=False)
    assert specs.named == P("data", "model")
    assert specs.plain == P()
    placed = jax.device_put(jnp.ones(8), NamedSharding(in_mesh, P("model")))
    kept = hax.infer_resource_partitions(Module(hax.ones(B), placed, "x"), MAPPING)
    assert kept.plain.spec == P("model")
    assert kept.named == NamedSharding(in_mesh, P("data"))


def test_explicit_mesh_axes_reshard():
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    with jax.set_mesh(mesh):
        x = jax.jit(lambda: hax.shard(hax.ones((B, E)), MAPPING))()
        assert _local(x) == (2, 16)


@pytest.mark.parametrize(
    ("mapping", "axes", "message"),
    [
        ({"batch": "data", "embed": "data"}, (B, E), "'batch' and 'embed' .* mesh axis 'data'"),
        ({"batch": "data"}, (B.resize(6),), "'batch' of size 6 .* size 4. Round it up to 8"),
        ({"batch": "dat"}, (B,), "'batch' is mapped to the mesh axis 'dat'.*Did you mean 'data'"),
        ({"batch": ("data", "model")}, (B.resize(12),), "'batch' of size 12 .* size 8"),
    ],
)
def test_mistakes_name_the_logical_axis(mesh, mapping, axes, message):
    with jax.set_mesh(mesh):
        with pytest.raises(ValueError, match=message):
            hax.shard(hax.ones(axes), mapping)
        with pytest.raises(ValueError, match=message):
            jax.jit(lambda: hax.shard(hax.ones(axes), mapping))()


def test_sharded_equals_unsharded(mesh):
    key = jax.random.PRNGKey(0)
    layer = hax.nn.Linear.init(E, M, key=key)
    x = hax.random.normal(key, (B, E))

    def loss(layer, x):
        return (hax.nn.gelu(layer(x)) ** 2).mean().scalar()

    step = eqx.filter_value_and_grad(loss)
    expected, expected_grad = step(layer, x)
    with jax.set_mesh(mesh):
        sharded = hax.shard((layer, x), {"batch": "data", "mlp": "model"})
        value, grad = named_jit(step, axis_resources=MAPPING)(*sharded)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(grad.weight.array, expected_grad.weight.array, rtol=1e-5, atol=1e-7)


def test_vmap_over_a_sharded_axis_stays_sharded(in_mesh):
    w = hax.random.normal(jax.random.PRNGKey(0), (E, M))
    x = hax.random.normal(jax.random.PRNGKey(1), (B, E))

    @named_jit(axis_resources=MAPPING)
    def f(x, w):
        return hax.vmap(lambda row: hax.dot(row, w, axis=E), B)(x)

    out = f(hax.shard(x, MAPPING), w)
    assert _local(out) == (2, 2)
    np.testing.assert_allclose(out.array, x.array @ w.array, rtol=1e-5, atol=1e-6)


def test_threads_have_their_own_mapping():
    seen = []
    with hax.axis_mapping(MAPPING):
        thread = threading.Thread(target=lambda: seen.append(hax.current_thread_local_mapping()))
        thread.start()
        thread.join()
    assert seen == [None]
