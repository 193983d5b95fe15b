"""GPT-2 against the same equations written in raw `jax.numpy`, and the properties it must have."""

import dataclasses
import functools
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import haliax as hax
from haliax import Axis
from modeling import canonical
from modeling.models.attention import library_attention, uses_cudnn
from modeling.models.config import MODEL_PRESETS, Gpt2Config
from modeling.models.gpt2 import Gpt2LmHeadModel
from modeling.models.lm import LmExample, next_token_loss
from modeling.models.segments import attendable
from modeling.numerics import numerics_class
from modeling.training.config import TrainerConfig
from modeling.training.program import product_flops

Vocab, Pos, Batch = Axis("vocab", 29), Axis("position", 12), Axis("batch", 3)
TINY = Gpt2Config(hidden_dim=24, num_layers=2, num_heads=4)
# XLA's CPU matrix products are float32 throughout, accelerators' are not.
pytestmark = pytest.mark.usefixtures("highest_precision")


@pytest.fixture
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@functools.cache
def random_model(config=TINY, Vocab=Vocab, Pos=Pos):
    """A model of random weights, biases and norms too; from NumPy, which compiles nothing."""
    draw = np.random.default_rng(0)

    def leaf(path, shape):
        is_norm = jax.tree_util.keystr(path).endswith((".ln_1.weight.array", ".ln_f.weight.array"))
        return jnp.asarray(draw.normal(1.0 if is_norm else 0.0, 0.2, shape.shape), jnp.float32)

    return jax.tree.map_with_path(leaf, abstract_model(config, Vocab, Pos))


def abstract_model(config, Vocab=Vocab, Pos=Pos):
    return eqx.filter_eval_shape(
        partial(Gpt2LmHeadModel.init, Vocab, Pos, config), key=jax.random.key(0)
    )


def random_ids(seed=0, batch=Batch, pos=Pos):
    raw_ids = np.random.default_rng(seed).integers(0, Vocab.size, (batch.size, pos.size))
    return hax.named(jnp.asarray(raw_ids, jnp.int32), (batch, pos))


def raw(named, *axes):
    """The raw array of `named` with its axes in the given order."""
    return named.rearrange(axes).array


def oracle_logits(model, ids, *, upcast=False):
    """Logits `[batch, position, vocab]` of raw `ids` `[batch, position]`."""
    config, (batch, length) = model.config, ids.shape
    heads, width = config.num_heads, config.hidden_dim
    wte = raw(model.embeddings.token_embeddings.weight, "vocab", "embed")
    wpe = raw(model.embeddings.position_embeddings.weight, "position", "embed")
    block = model.transformer.blocks.stacked
    w_qkv = raw(block.attn.c_attn.weight, "layers", "embed", "qkv", "heads", "head_size")
    b_qkv = raw(block.attn.c_attn.bias, "layers", "qkv", "heads", "head_size")
    w_out = raw(block.attn.c_proj.weight, "layers", "heads", "head_size", "embed")
    w_fc = raw(block.mlp.c_fc.weight, "layers", "embed", "mlp")
    w_proj = raw(block.mlp.c_proj.weight, "layers", "mlp", "embed")

    h = wte[ids] + wpe[:length]
    for i in range(config.num_layers):
        x = norm(h, block.ln_1.weight.array[i], block.ln_1.bias.array[i], config)
        qkv = x @ w_qkv[i].reshape(width, 3 * width) + b_qkv[i].reshape(3 * width)
        q, k, v = (
            part.reshape(batch, length, heads, -1).transpose(0, 2, 1, 3)
            for part in jnp.split(qkv, 3, axis=-1)
        )
        if upcast:
            q, k = q.astype(jnp.float32), k.astype(jnp.float32)
        scores = q @ k.transpose(0, 1, 3, 2) / (width // heads) ** 0.5
        if config.scale_attn_by_inverse_layer_idx:
            scores = scores / (i + 1)
        scores = jnp.where(np.tri(length, dtype=bool), scores, -jnp.inf)
        mixed = jax.nn.softmax(scores, axis=-1).astype(v.dtype) @ v
        mixed = mixed.transpose(0, 2, 1, 3).reshape(batch, length, width)
        h = h + mixed @ w_out[i].reshape(width, width) + block.attn.c_proj.bias.array[i]
        x = norm(h, block.ln_2.weight.array[i], block.ln_2.bias.array[i], config)
        x = x @ w_fc[i] + block.mlp.c_fc.bias.array[i]
        gelu = 0.5 * x * (1 + jnp.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))
        h = h + gelu @ w_proj[i] + block.mlp.c_proj.bias.array[i]
    ln_f = model.transformer.ln_f
    return norm(h, ln_f.weight.array, ln_f.bias.array, config) @ wte.T


def norm(x, weight, bias, config):
    """Layer normalization over the last dimension."""
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + config.layer_norm_epsilon) * weight + bias


@eqx.filter_jit
def run(model, ids, key=None):
    return model(ids, key=key)


@eqx.filter_jit
def run_oracle(model, ids):
    return oracle_logits(model, ids.array)


def oracle_loss(model, ids):
    """Mean nats a predicted token, and the logits."""
    logits = oracle_logits(model, ids.array)
    log_probabilities = jax.nn.log_softmax(logits[:, :-1])
    picked = jnp.take_along_axis(log_probabilities, ids.array[:, 1:, None], axis=-1)
    return -picked.mean(), logits


def our_loss(model, ids):
    """The same by what is tested."""
    total, weight = next_token_loss(model, LmExample.causal(ids))
    return total / weight, model(ids)


VARIANTS = {
    "plain": TINY,
    "inverse_layer_wide": dataclasses.replace(
        TINY, scale_attn_by_inverse_layer_idx=True, mlp_scale=5, layer_norm_epsilon=1e-2
    ),
    "one_head_kept": dataclasses.replace(TINY, num_heads=1, gradient_checkpointing=False),
    "products_unrolled": dataclasses.replace(
        TINY, gradient_checkpointing="products", unroll_layers=2
    ),
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_logits_and_gradients_equal_the_plain_equations(config):
    model, ids = random_model(config), random_ids()
    differentiated = partial(eqx.filter_value_and_grad, has_aux=True)
    (loss, logits), gradient = eqx.filter_jit(differentiated(our_loss))(model, ids)
    (wanted_loss, wanted_logits), wanted_gradient = eqx.filter_jit(differentiated(oracle_loss))(
        model, ids
    )
    assert logits.axes == (Batch, Pos, Vocab)
    assert float(wanted_logits.std()) > 0.5
    np.testing.assert_allclose(logits.array, wanted_logits, rtol=0, atol=2e-5)
    assert float(loss) == pytest.approx(float(wanted_loss), abs=1e-6)
    wanted_leaves = jax.tree.leaves_with_path(wanted_gradient)
    for (path, wanted), found in zip(wanted_leaves, jax.tree.leaves(gradient), strict=True):
        name, scale = jax.tree_util.keystr(path), float(jnp.abs(wanted).max())
        assert scale > 1e-4, f"{name} has no gradient to compare"
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * max(scale, 1.0), err_msg=name)


def test_gpt2_sizes_have_the_published_number_of_parameters():
    published = {
        "gpt2-small": 124_439_808,
        "gpt2-medium": 354_823_168,
        "gpt2-large": 774_030_080,
        "gpt2-xl": 1_557_611_200,
    }
    for name, count in published.items():
        model = abstract_model(MODEL_PRESETS[name], Axis("vocab", 50257), Axis("position", 1024))
        assert sum(leaf.size for leaf in jax.tree.leaves(model)) == count, name


def test_a_later_token_changes_nothing_before_it():
    model, ids = random_model(), random_ids()
    before = run(model, ids).array
    for position in (0, 5, Pos.size - 1):
        changed = ids.at[Pos, position].set((ids[Pos, position] + 1) % Vocab.size)
        after = run(model, changed).array
        np.testing.assert_array_equal(after[:, :position], before[:, :position])
        assert (after[:, position:] != before[:, position:]).any(axis=-1).all()


def test_shorter_rows_give_the_prefix_of_the_logits():
    model, ids = random_model(), random_ids()
    short = ids[Pos, 0:7]
    np.testing.assert_allclose(model(short).array, model(ids).array[:, :7], rtol=0, atol=1e-5)


def test_rows_longer_than_the_model_are_refused():
    ids = random_ids(pos=Pos.resize(13))
    with pytest.raises(ValueError, match="'position' has size 13, but the model knows 12"):
        random_model()(ids)


def test_any_axes_besides_position_are_carried_along():
    model = random_model()
    A, B = Axis("a", 2), Axis("b", 3)
    raw_ids = random_ids(batch=Axis("batch", 6)).array
    named = hax.named(raw_ids.reshape(2, 3, 12), (A, B, Pos))
    together = run(model, named).rearrange((A, B, Pos, Vocab)).array.reshape(6, 12, -1)
    np.testing.assert_allclose(
        together, run_oracle(model, hax.named(raw_ids, ("batch", "position"))), rtol=0, atol=2e-5
    )
    single = run(model, named[A, 1, B, 2])
    assert single.axes == (Pos, Vocab)
    np.testing.assert_allclose(single.array, together[5], rtol=0, atol=1e-5)


def test_axes_of_vocabulary_and_position_may_have_any_name():
    V, P = Axis("ids", 29), Axis("time", 12)
    model, usual, ids = random_model(TINY, V, P), random_model(), random_ids()
    renamed = run(model, ids.rename({"position": "time"}))
    assert renamed.axes == (Batch, P, V)
    np.testing.assert_array_equal(renamed.array, run(usual, ids).array)


FRESH = (
    Axis("vocab", 500),
    Axis("position", 64),
    Gpt2Config(hidden_dim=64, num_layers=4, num_heads=4),
)


@functools.cache
def fresh_model():
    return jax.jit(partial(Gpt2LmHeadModel.init, *FRESH))(key=jax.random.key(3))


def test_weights_start_as_the_paper_has_them():
    model = fresh_model()
    block = model.transformer.blocks.stacked
    residual = 0.02 / np.sqrt(2 * 4)
    expected = {
        "token": (model.embeddings.token_embeddings.weight, 0.02),
        "position": (model.embeddings.position_embeddings.weight, 0.02),
        "c_attn": (block.attn.c_attn.weight, 0.02),
        "attn.c_proj": (block.attn.c_proj.weight, residual),
        "c_fc": (block.mlp.c_fc.weight, 0.02),
        "mlp.c_proj": (block.mlp.c_proj.weight, residual),
    }
    for name, (weight, std) in expected.items():
        values = np.asarray(weight.array)
        assert values.std() == pytest.approx(std, rel=0.05), name
        assert abs(values.mean()) < 0.05 * std, name
        # A normal distribution: four times in a hundred thousand beyond 4.1 deviations.
        assert 3.0 < np.abs(values).max() / std < 6.0, name
    for linear in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
        assert not linear.bias.array.any()
    for norm_ in (block.ln_1, block.ln_2, model.transformer.ln_f):
        assert (norm_.weight.array == 1).all()
        assert not norm_.bias.array.any()
    per_layer = np.asarray(block.mlp.c_fc.weight.array)
    assert not np.array_equal(per_layer[0], per_layer[1])


def test_weights_do_not_depend_on_the_mesh_they_are_made_on():
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    mapping = {"embed": "data", "heads": "model", "mlp": "model"}
    with jax.set_mesh(mesh):
        init = partial(Gpt2LmHeadModel.init, *FRESH, key=jax.random.key(3))
        sharded = hax.named_jit(init, axis_resources=mapping)()
    weight = sharded.transformer.blocks.stacked.mlp.c_fc.weight.array
    assert len({str(shard.index) for shard in weight.addressable_shards}) == 4
    for one, other in zip(jax.tree.leaves(fresh_model()), jax.tree.leaves(sharded), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "mapping",
    [{"batch": "data", "embed": "data"}, {"batch": "data", "heads": "model", "mlp": "model"}],
    ids=["fsdp", "tensor_parallel"],
)
def test_layouts_over_devices_give_the_same_logits(mapping):
    model, ids = random_model(), random_ids(batch=Axis("batch", 4))
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    compute = {k: v for k, v in mapping.items() if k != "embed"}
    with jax.set_mesh(mesh):
        placed = hax.shard(model, mapping)
        logits = hax.named_jit(lambda m, x: m(x), axis_resources=compute)(placed, ids)
    np.testing.assert_allclose(logits.array, run(model, ids).array, rtol=0, atol=2e-5)


def test_without_a_key_nothing_is_dropped():
    config = dataclasses.replace(TINY, embed_pdrop=0.5, resid_pdrop=0.5, attn_pdrop=0.5)
    ids = random_ids()
    np.testing.assert_array_equal(
        run(random_model(config), ids).array, run(random_model(), ids).array
    )


@pytest.mark.parametrize("place", ["embed_pdrop", "resid_pdrop", "attn_pdrop"])
def test_each_dropout_acts_by_its_key_alone(place):
    model, ids = random_model(dataclasses.replace(TINY, **{place: 0.5})), random_ids()
    first, second = jax.random.key(5), jax.random.key(6)
    dropped = run(model, ids, first).array
    np.testing.assert_array_equal(run(model, ids, first).array, dropped)
    assert (run(model, ids, second).array != dropped).any(axis=(-1, -2)).all()
    kept = run(random_model(), ids).array
    # The first position attends to itself alone, so attention may keep all it has there.
    assert (dropped[:, 1:] != kept[:, 1:]).any(axis=-1).mean() > 0.9


def test_dropout_probability_zero_with_a_key_drops_nothing():
    model, ids = random_model(), random_ids()
    with_key = run(model, ids, jax.random.key(0)).array
    np.testing.assert_allclose(with_key, run(model, ids).array, rtol=0, atol=1e-6)


def test_layers_draw_different_dropout():
    config = dataclasses.replace(TINY, resid_pdrop=0.5, num_layers=2)
    model = random_model(config)
    # With every branch a constant 1, the residual stream counts how often a feature was kept.
    block = model.transformer.blocks.stacked
    model = eqx.tree_at(
        lambda m: (
            m.transformer.blocks.stacked.attn.c_proj.weight.array,
            m.transformer.blocks.stacked.attn.c_proj.bias.array,
            m.transformer.blocks.stacked.mlp.c_proj.weight.array,
            m.transformer.blocks.stacked.mlp.c_proj.bias.array,
        ),
        model,
        (
            jnp.zeros_like(block.attn.c_proj.weight.array),
            jnp.ones_like(block.attn.c_proj.bias.array),
            jnp.zeros_like(block.mlp.c_proj.weight.array),
            jnp.ones_like(block.mlp.c_proj.bias.array),
        ),
    )
    zero = hax.zeros((Axis("batch", 40), Pos, Axis("embed", 24)))
    keys = jax.random.split(jax.random.key(1), 2)
    blocks = model.transformer.blocks
    counts = blocks.fold(zero, Pos, hax.arange(Axis("layers", 2)), key=keys)
    kept = np.round(np.asarray(counts.array) / 2).astype(int)  # of four draws, each kept half
    shares = np.bincount(kept.ravel(), minlength=5) / kept.size
    np.testing.assert_allclose(shares, [1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16], atol=0.02)


@pytest.mark.parametrize("upcast", [False, True])
def test_scores_have_the_dtype_that_upcast_says(upcast):
    config = dataclasses.replace(TINY, upcast_attn=upcast)
    model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_model(config))
    exponentials = {
        eqn.outvars[0].aval.dtype.name
        for eqn in equations(jax.make_jaxpr(lambda m, x: m.activations(x))(model, random_ids()))
        if eqn.primitive.name == "exp"
    }
    assert exponentials == {"float32" if upcast else "bfloat16"}


def equations(jaxpr):
    """Every equation, those of inner programs included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner, "eqns"):
                    yield from equations(inner)
                elif hasattr(inner, "jaxpr"):
                    yield from equations(inner.jaxpr)


def test_the_program_does_not_grow_with_the_number_of_layers():
    def num_equations(num_layers):
        config = dataclasses.replace(TINY, num_layers=num_layers)
        model = abstract_model(config)
        return sum(1 for _ in equations(jax.make_jaxpr(lambda m, x: m(x))(model, random_ids())))

    assert num_equations(2) == num_equations(7)


def test_logits_are_float32_whatever_the_compute_dtype():
    model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_model())
    assert model.activations(random_ids()).dtype == jnp.bfloat16
    assert model(random_ids()).dtype == jnp.float32


def test_what_is_kept_for_the_backward_pass_decides_its_products():
    """Recomputing everything makes more products than keeping those without batch axes."""

    @functools.cache
    def products(remat):
        config = dataclasses.replace(TINY, num_layers=4, gradient_checkpointing=remat)
        model, ids = abstract_model(config), random_ids()
        gradient = eqx.filter_grad(lambda model: our_loss(model, ids)[0])
        return product_flops(
            jax.jit(lambda model: gradient(model)).lower(model).compile().as_text()
        )

    scores = 2 * Batch.size * Pos.size * Pos.size * TINY.hidden_dim
    width = Batch.size * Pos.size * TINY.hidden_dim
    matrices = 4 * 2 * width * TINY.hidden_dim * 8  # qkv, the projection, up; down is not needed
    assert products(True) - products(False) == 4 * 2 * scores + matrices
    assert products("products") - products(False) == 4 * 2 * scores


@pytest.mark.parametrize("batch_axes", [(Batch,), (Axis("outer", 2), Batch), ()])
@pytest.mark.parametrize("segmented", [False, True])
def test_the_librarys_attention_is_ours(batch_axes, segmented):
    """By its XLA implementation, which takes what cuDNN's takes."""
    Heads, HeadSize = Axis("heads", 4), Axis("head_size", 8)
    axes = (Heads, *batch_axes, HeadSize, Pos)
    draw = np.random.default_rng(3)
    q, k, v = (hax.named(jnp.asarray(draw.normal(size=[a.size for a in axes]), jnp.float32), axes)
               for _ in range(3))  # fmt: skip
    segments = None
    if segmented:
        segments = hax.named(jnp.asarray([1] * 5 + [2] * 4 + [3] * 3), Pos)
    mixed = library_attention(q, k, v, Pos, Heads, HeadSize, segments, implementation="xla")
    KPos = Pos.alias("key_position")
    scores = hax.where(
        attendable(Pos, KPos, segments), hax.dot(q, k.rename({Pos: KPos}), axis=HeadSize), -jnp.inf
    )
    wanted = hax.dot(hax.nn.softmax(scores, KPos), v.rename({Pos: KPos}), axis=KPos)
    np.testing.assert_allclose(mixed.rearrange(wanted.axes).array, wanted.array, atol=1e-6)


def test_cudnn_attends_where_it_can_and_is_refused_where_not():
    def chosen(attention, platform="gpu", dtype=jnp.bfloat16, dropout=0.0, heads=12):
        return uses_cudnn(attention, 768 // heads, platform, dtype, dropout=dropout)

    assert chosen("auto")
    assert chosen("cudnn", dtype=jnp.float16)
    assert not chosen("xla")
    cannot = {
        "platform cpu": {"platform": "cpu"},
        "float32 scores": {"dtype": jnp.float32},
        "attn_pdrop 0.1": {"dropout": 0.1},
        "head size of 192": {"heads": 4},
    }
    for reason, options in cannot.items():
        assert not chosen("auto", **options), reason
        with pytest.raises(ValueError, match=f"model.attention: cudnn cannot .*{reason}"):
            chosen("cudnn", **options)


def test_how_sums_are_computed_is_no_science_but_may_change_bits():
    changed = {"gradient_checkpointing": False, "unroll_layers": 2, "attention": "xla"}
    assert TINY.execution.keys() == changed.keys()
    for name, value in changed.items():
        other = dataclasses.replace(TINY, **{name: value})
        assert canonical.encode(other) == canonical.encode(TINY)
        assert other.execution != TINY.execution
        trainer = TrainerConfig(num_train_steps=1, train_batch_size=1)
        assert numerics_class(trainer, execution=other.execution) != numerics_class(
            trainer, execution=TINY.execution
        )
