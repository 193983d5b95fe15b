"""One update against plain JAX; the layouts against each other and what they promise."""

import dataclasses
import re
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from haliax import Axis, NamedArray
from modeling.data.rows import Columns, Rows
from modeling.experiment import ConfigError
from modeling.models.lm import LmExample, next_token_loss
from modeling.optim.build import build_optimizer
from modeling.training import step as step_module
from modeling.training.leaves import named_leaves
from modeling.training.memory import StateMemory
from modeling.training.mesh import build_layout
from modeling.training.precision import Policy
from modeling.training.state import trainable
from modeling.training.step import compile_step
from modeling.training.trainer import make_plan

sys.path.insert(0, str(Path(__file__).parent))
import driver

TENSOR_PARALLEL = {"batch": "data", "heads": "model", "mlp": "model"}
LAYOUTS = {
    "one": {"mesh": {"data": 1}},
    "fsdp": {"mesh": {"data": 4}},
    "fsdp and tensor parallel": {
        "mesh": {"data": 2, "model": 2},
        "axis_resources": TENSOR_PARALLEL,
    },
    "elastic": {"mesh": {"data": 2}, "reproducibility": "elastic", "elastic_shards": 4},
}
MODEL = {"hidden_dim": 64, "num_layers": 3, "num_heads": 4}


@dataclasses.dataclass
class Compiled:
    plan: object
    step: object
    initial: list

    def start(self):
        """The initial state in fresh arrays, since a step consumes its own."""
        shardings = self.plan.blueprint.shardings.values()
        return [jax.device_put(a, s) for a, s in zip(self.initial, shardings, strict=True)]

    def run(self, arrays, tokens):
        return self.step.run(arrays, jax.device_put(tokens, self.step.batch_sharding))


def compiled(layout, **trainer):
    experiment = driver.experiment(trainer=LAYOUTS[layout] | trainer, model=MODEL)
    plan = make_plan(experiment, driver.counting_cache())
    step = compile_step(
        plan.blueprint, experiment.optimizer, experiment.trainer, plan.layout,
        Batch=plan.batch_axis(0), Pos=plan.Pos,
    )  # fmt: skip
    initial = plan.blueprint.initialize(plan.make, jax.random.PRNGKey(5))
    return Compiled(plan, step, [np.asarray(array) for array in initial])


@pytest.fixture(scope="module")
def steps():
    """Each layout, compiled once."""
    return {name: compiled(name) for name in LAYOUTS}


def batches(count, size=8):
    cache = driver.counting_cache()
    return [cache.rows("train", np.arange(i * size, (i + 1) * size)) for i in range(count)]


def test_an_update_is_the_optimizers_on_the_gradient_of_the_mean_loss(steps):
    case = steps["one"]
    plan, tokens = case.plan, batches(1)[0]
    state = plan.blueprint.unflatten(case.start())
    params, rest = trainable(state.model)

    def mean_loss(params):
        rows = NamedArray(jnp.asarray(tokens.tokens), (plan.batch_axis(0), plan.Pos))
        example = LmExample.causal(rows)
        total, weight = next_token_loss(eqx.combine(params, rest), example)
        return total / weight

    loss, gradient = jax.jit(jax.value_and_grad(mean_loss))(params)
    optimizer = build_optimizer(plan.experiment.optimizer, plan.num_steps)
    clip = optax.clip_by_global_norm(plan.experiment.optimizer.max_grad_norm)
    clipped, _ = jax.jit(clip.update)(gradient, clip.init(params))
    expected, _ = jax.jit(optimizer.apply)(clipped, state.opt_state, params, state.step)

    arrays, metrics = case.run(case.start(), tokens)
    after = plan.blueprint.unflatten(arrays)
    np.testing.assert_allclose(metrics.loss, loss, rtol=1e-6)
    assert float(metrics.weight) == 8 * 15
    assert int(after.step) == 1
    # The first update of Adam is the sign of the gradient, so compare where that is not noise.
    for path, found, wanted, slope in zip(
        (path for path, _, _ in named_leaves(params)),
        jax.tree.leaves(trainable(after.model)[0]),
        jax.tree.leaves(expected),
        jax.tree.leaves(gradient),
        strict=True,
    ):
        clear = np.abs(slope) > 1e-6
        assert clear.any()
        np.testing.assert_allclose(
            np.asarray(found)[clear], np.asarray(wanted)[clear], atol=2e-6, err_msg=path
        )
    squares = [float(jnp.sum(jnp.square(leaf))) for leaf in jax.tree.leaves(gradient)]
    np.testing.assert_allclose(metrics.gradient_squares, squares, rtol=1e-4)
    assert case.step.parameter_names[0] == "embeddings.token_embeddings.weight"
    assert len(case.step.parameter_names) == len(squares)


def test_all_devices_together_make_the_same_products_and_an_elastic_one_has_all_weights(steps):
    """Counted for whole updates of the whole mesh, in however many programs they are."""
    flops = {name: case.step.product_flops for name, case in steps.items()}
    layers, embed, tokens = MODEL["num_layers"], MODEL["hidden_dim"], 8 * driver.LENGTH
    weights = layers * 12 * embed * embed + driver.VOCAB * embed
    assert flops["one"] > 6 * weights * tokens
    for name in ("fsdp", "elastic"):
        assert flops[name] == pytest.approx(flops["one"], rel=0.01), name
    # Both devices of a pair make the products of the head, which is not split.
    head = 6 * driver.VOCAB * embed * tokens
    both = flops["fsdp and tensor parallel"]
    assert both == pytest.approx(flops["one"] + head, rel=0.01)
    elastic, parts = steps["elastic"].step.memory, steps["elastic"].plan.blueprint
    state = StateMemory.of(parts).total
    assert elastic.arguments == state
    # The gathered weights and at least one whole gradient beside the state.
    assert elastic.total > state + 2 * 4 * weights


def test_layouts_agree_on_losses_and_weights(steps):
    found = {}
    for name, case in steps.items():
        arrays, losses = case.start(), []
        for tokens in batches(4):
            arrays, metrics = case.run(arrays, tokens)
            losses.append(float(metrics.loss))
        found[name] = (losses, [np.asarray(array) for array in arrays])
    losses, arrays = found["one"]
    assert losses[-1] < losses[0]
    for other_losses, other_arrays in found.values():
        np.testing.assert_allclose(other_losses, losses, rtol=2e-5)
        # Adam divides by the gradient's size: where that is noise, so is the direction.
        apart = [
            np.abs(a - b).max() for a, b in zip(arrays, other_arrays, strict=True) if a.size > 2
        ]
        assert max(apart) < 3e-3


def test_the_initial_weights_do_not_depend_on_the_layout(steps):
    one, *others = (case.initial for case in steps.values())
    for other in others:
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"elastic_shards": 6}, r"6 must be a power of two"),
        ({"elastic_shards": 2, "mesh": {"data": 4}}, r"2 must be .* multiple of the 4 devices"),
        ({"elastic_shards": 16}, r"16 logical shards must divide trainer.train_batch_size 8"),
        ({"elastic_shards": 4, "num_microbatches": 2}, r"num_microbatches, which is 2"),
        ({"elastic_shards": 4, **LAYOUTS["fsdp and tensor parallel"]}, r"\{'model': 2\} besides"),
        ({"elastic_shards": 4, "axis_resources": {}}, r"map `batch` to one mesh axis, found \[\]"),
        (
            {"mesh": {"replica": 2, "data": 2}, "axis_resources": {"batch": ["replica", "data"]}},
            r"map `batch` to one mesh axis, found \['replica', 'data'\]",
        ),
    ],
)
def test_an_elastic_run_that_cannot_be_is_refused(change, message):
    trainer = {"parameter_axis_resources": {}, "reproducibility": "elastic"} | change
    with pytest.raises(ConfigError, match=message):
        driver.experiment(trainer=trainer)


def bytes_on_first_device(arrays):
    return sum(array.addressable_shards[0].data.nbytes for array in arrays)


def test_fsdp_leaves_each_device_its_share_and_gathers_one_layer_at_a_time(steps):
    case = steps["fsdp"]
    arrays = case.start()
    whole = sum(array.nbytes for array in arrays)
    # Biases over `mlp` or `heads` have no `embed` axis, so they are whole everywhere.
    assert bytes_on_first_device(arrays) < whole / 4 * 1.15
    after, _ = case.run(arrays, batches(1)[0])
    assert bytes_on_first_device(after) < whole / 4 * 1.15

    layers, embed = MODEL["num_layers"], MODEL["hidden_dim"]
    layer = 4 * embed * 4 * embed  # bytes of one layer's largest weight
    gathered = gather_shapes(case.step.compiled.as_text())
    assert (4 * embed, embed) in gathered, "no layer's weights are gathered"
    stacked = [shape for shape in gathered if shape[:1] == (layers,) and np.prod(shape) > layer / 4]
    assert not stacked, f"all layers at once: {stacked}"

    memory = case.step.compiled.memory_analysis()
    assert memory.alias_size_in_bytes > 0.99 * memory.argument_size_in_bytes, "state not donated"


def gather_shapes(hlo):
    """The shapes that all-gathers of a compiled program give."""
    found = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather(?:-start)?\(", hlo)
    return {tuple(int(n) for n in shape.split(",")) for shape in found if shape}


def test_tensor_parallelism_splits_heads_and_mlp(steps):
    case = steps["fsdp and tensor parallel"]
    model = case.plan.blueprint.unflatten(case.start()).model
    block = model.transformer.blocks.stacked
    Layers, embed = MODEL["num_layers"], MODEL["hidden_dim"]
    shards = {
        "attn": block.attn.c_attn.weight.array.addressable_shards[0].data.shape,
        "mlp": block.mlp.c_fc.weight.array.addressable_shards[0].data.shape,
    }
    assert shards["attn"] == (Layers, embed // 2, 3, 2, 16)
    assert shards["mlp"] == (Layers, embed // 2, 4 * embed // 2)
    # No device ever holds all heads, or the whole hidden layer, of one product.
    text = case.step.compiled.as_text()
    assert not re.search(rf"\[\d+,16,{4 * embed}\]", text)


def test_the_state_given_is_consumed(steps):
    case = steps["one"]
    arrays = case.start()
    case.run(arrays, batches(1)[0])
    assert all(array.is_deleted() for array in arrays)


def ragged_example():
    """Eight rows, of which the later ones have fewer and fewer predictions that count."""
    Batch, Pos = Axis("batch", 8), Axis("position", driver.LENGTH)
    example = LmExample.causal(NamedArray(jnp.asarray(batches(1)[0].tokens), (Batch, Pos)))
    counts = np.arange(driver.LENGTH)[None, :] < np.asarray([15, 15, 9, 9, 2, 2, 1, 1])[:, None]
    return LmExample(example.tokens, NamedArray(jnp.asarray(counts, jnp.float32), (Batch, Pos)))


def test_accumulation_weighs_tokens_not_microbatches(steps):
    case = steps["one"]
    plan, example = case.plan, ragged_example()
    model = plan.blueprint.unflatten(case.start()).model
    policy, layout = Policy.parse("p=f32,c=f32"), build_layout(plan.experiment.trainer)

    def mean_and_gradient(model, number):
        total, weight, gradient = step_module.summed(
            model, example, policy, layout, jax.random.PRNGKey(0),
            Batch=plan.batch_axis(0), num_microbatches=number,
        )  # fmt: skip
        return total / weight, jax.tree.map(lambda g: g / weight, gradient)

    whole = eqx.filter_jit(mean_and_gradient)(model, 1)
    pieces = eqx.filter_jit(mean_and_gradient)(model, 4)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(pieces), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-7)

    @eqx.filter_jit
    def mean_of_means(model):
        sums = [next_token_loss(model, pick(example, [j, j + 4])) for j in range(4)]
        return sum(total / weight for total, weight in sums) / 4

    assert abs(float(mean_of_means(model)) - float(whole[0])) > 1e-3, "the case cannot tell"


class PackedCache(driver.CountingCache):
    """Rows of two documents and padding, the last of whose tokens is not to be predicted."""

    columns = Columns(segment_ids=True, loss_mask=True)

    def rows(self, split, indices):
        tokens = super().rows(split, indices).tokens
        segment_ids = np.broadcast_to(np.repeat([1, 2, 0], [6, 8, 2]), tokens.shape)
        mask = (segment_ids > 0) & (np.arange(tokens.shape[1]) != 13)
        return Rows(tokens, segment_ids.astype(np.int32), mask)


@pytest.mark.parametrize(
    "trainer",
    [
        {
            "num_microbatches": 2,
            "mesh": {"data": 2, "sequence": 2},
            "axis_resources": {"batch": "data", "position": "sequence"},
        },
        {"reproducibility": "elastic"},
    ],
    ids=["positions and microbatches", "elastic"],
)
def test_rows_of_several_documents_are_trained_on_as_such(trainer):
    model = {"hidden_dim": 16, "num_layers": 1, "num_heads": 2}
    experiment = driver.experiment(trainer={"mesh": {"data": 2}} | trainer, model=model)
    cache = PackedCache(driver.LENGTH, driver.ROWS)
    plan = make_plan(experiment, cache)
    step = compile_step(
        plan.blueprint, experiment.optimizer, experiment.trainer, plan.layout,
        Batch=plan.batch_axis(0), Pos=plan.Pos, columns=cache.columns,
    )  # fmt: skip
    arrays = plan.blueprint.initialize(plan.make, jax.random.PRNGKey(5))
    model = plan.blueprint.unflatten(arrays).model
    rows = cache.rows("train", np.arange(8))

    @jax.jit
    def mean_loss(params):
        model = eqx.combine(params, rest)
        documents = [rows.tokens[:, :6], rows.tokens[:, 6:13]]
        losses = [next_token_loss(model, LmExample.causal(named(x, plan))) for x in documents]
        return sum(total for total, _ in losses) / sum(weight for _, weight in losses)

    params, rest = trainable(model)
    loss, gradient = jax.value_and_grad(mean_loss)(params)
    squares = [float(jnp.sum(g**2)) for g in jax.tree.leaves(gradient)]
    _, metrics = step.run(arrays, jax.device_put(rows, step.batch_sharding))
    assert float(metrics.weight) == 8 * (5 + 6)
    np.testing.assert_allclose(metrics.loss, loss, rtol=1e-5)
    np.testing.assert_allclose(metrics.gradient_squares, squares, rtol=1e-4, atol=1e-12)


def named(tokens, plan):
    return NamedArray(jnp.asarray(tokens), (plan.batch_axis(0), plan.Pos.resize(tokens.shape[1])))


def pick(example, rows):
    return jax.tree.map(
        lambda x: x["batch", jnp.asarray(rows)],
        example,
        is_leaf=lambda x: isinstance(x, NamedArray),
    )
