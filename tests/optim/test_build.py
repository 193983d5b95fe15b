"""Each optimizer's updates against its equations in NumPy, in double precision."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import haliax as hax
from haliax import Axis
from haliax.core import NamedArray
from haliax.nn import Embedding, Linear, Stacked
from modeling.optim.build import build_optimizer
from modeling.optim.config import (
    UNDECAYED,
    AdafactorConfig,
    AdamWConfig,
    ConstantScheduleConfig,
    LionConfig,
    MuonConfig,
    SophiaGConfig,
    SophiaHConfig,
)
from modeling.optim.groups import parameter_groups
from modeling.optim.parameters import decay_mask, matches, matrices, stacked_axes
from modeling.optim.sophia import renewed

Vocab, Embed, Mlp = Axis("vocab", 7), Axis("embed", 4), Axis("mlp", 6)
Layers, Qkv, Heads, HeadSize = Axis("layers", 2), Axis("qkv", 3), Axis("heads", 2), Axis("size", 3)
CONSTANT = ConstantScheduleConfig(type="constant", warmup=0)


class Norm(eqx.Module):
    weight: NamedArray
    bias: NamedArray


class Block(eqx.Module):
    ln_1: Norm
    attn: Linear
    proj: Linear
    up: Linear

    @staticmethod
    def init(*, key):
        return Block(
            Norm(hax.ones(Embed), hax.zeros(Embed)),
            Linear.init(Embed, (Qkv, Heads, HeadSize), key=key, out_first=False),
            Linear.init((Heads, HeadSize), Embed, key=key, use_bias=False),
            Linear.init(Embed, Mlp, key=key),
        )


class Model(eqx.Module):
    token_embeddings: Embedding
    blocks: Stacked
    lm_head: Linear


def random_model(seed: int, scale: float = 1.0) -> Model:
    """A model of every kind of parameter, all of them random."""
    key = jax.random.PRNGKey(0)
    model = Model(
        Embedding.init(Vocab, Embed, key=key),
        Stacked.init(Layers, Block)(key=jax.random.split(key, Layers.size)),
        Linear.init(Embed, Vocab, key=key, use_bias=False),
    )
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape) * scale, x.dtype), model)


PATHS = {
    "token_embeddings.weight": False,
    "blocks.stacked.ln_1.weight": False,
    "blocks.stacked.ln_1.bias": False,
    "blocks.stacked.attn.weight": True,
    "blocks.stacked.attn.bias": False,
    "blocks.stacked.proj.weight": True,
    "blocks.stacked.up.weight": True,
    "blocks.stacked.up.bias": False,
    "lm_head.weight": True,
}
"""In the order of the tree; whether weight decay acts."""


def arrays(tree) -> dict[str, np.ndarray]:
    """The parameters by path, in double precision."""
    leaves = jax.tree.leaves(tree)
    return {path: np.asarray(x, np.float64) for path, x in zip(PATHS, leaves, strict=True)}


def follow(config, by_hand, *, num_steps=4, gradient_scale=1.0, rtol=2e-5, atol=2e-6):
    """Compares some updates with `by_hand(path, n, w, g) -> step`, before decay and rate."""
    optimizer = build_optimizer(config, num_steps)
    model = random_model(0)
    state = optimizer.init(model)
    apply = jax.jit(optimizer.apply)
    weights = arrays(model)
    for n in range(1, num_steps + 1):
        gradients = random_model(n, gradient_scale)
        model, state = apply(gradients, state, model, jnp.int32(n - 1))
        for path, g in arrays(gradients).items():
            step = by_hand(path, n, weights[path], g)
            decay = config.weight_decay * PATHS[path] * weights[path]
            weights[path] = weights[path] - config.learning_rate * (step + decay)
        for path, found in arrays(model).items():
            np.testing.assert_allclose(found, weights[path], rtol, atol, err_msg=f"{path} at {n}")
    return state


def zeros():
    return {path: np.zeros_like(w) for path, w in arrays(random_model(0)).items()}


def test_adamw_equals_its_equation():
    m, v = zeros(), zeros()

    def step(path, n, w, g):
        m[path] = 0.9 * m[path] + 0.1 * g
        v[path] = 0.95 * v[path] + 0.05 * g**2
        return m[path] / (1 - 0.9**n) / (np.sqrt(v[path] / (1 - 0.95**n)) + 1e-8)

    follow(AdamWConfig(learning_rate=0.02, weight_decay=0.3, schedule=CONSTANT), step)


def test_lion_equals_its_equation():
    m = zeros()

    def step(path, n, w, g):
        signs = np.sign(0.95 * m[path] + 0.05 * g)
        m[path] = 0.98 * m[path] + 0.02 * g
        return signs

    follow(LionConfig(type="lion", learning_rate=0.02, schedule=CONSTANT), step)


def layered(path, function):
    """Applies a function to each layer of a stacked parameter, or to the whole of another."""

    def apply(*operands):
        if path.startswith("blocks"):
            return np.stack([function(*layer) for layer in zip(*operands, strict=True)])
        return function(*operands)

    return apply


SHAPES = {
    "token_embeddings.weight": (7, 4),
    "blocks.stacked.attn.weight": (4, 18),
    "blocks.stacked.proj.weight": (6, 4),
    "blocks.stacked.up.weight": (6, 4),
    "lm_head.weight": (7, 4),
}
"""Of each layer's matrix, as it lies in memory: `proj`, `up` and the head have outputs first."""


@pytest.mark.parametrize("relative", [True, False])
def test_adafactor_equals_its_equations(relative):
    """Shazeer & Stern 2018, algorithms 4 to 6, a layer at a time."""
    assert next(iter(matrices(random_model(0)).values())).rows == ("vocab",)
    config = AdafactorConfig(
        type="adafactor", learning_rate=0.05, weight_decay=0.1, relative_updates=relative,
        smallest_factored=4, max_update_rms=0.7, schedule=CONSTANT,
    )  # fmt: skip
    row, column, whole = {}, {}, {}
    shapes = SHAPES | {"blocks.stacked.proj.weight": (4, 6)}  # laid out as [embed, heads, size]

    def rms(x):
        return math.sqrt((x**2).mean())

    def step(path, n, w, g):
        rate = 1 - n**-0.8

        def of_layer(number, w, g):
            key, squares = (path, number), g**2 + 1e-30
            if path in shapes:
                squares = squares.reshape(shapes[path])
                row[key] = rate * row.get(key, 0) + (1 - rate) * squares.mean(1)
                column[key] = rate * column.get(key, 0) + (1 - rate) * squares.mean(0)
                v = np.outer(row[key], column[key]) / row[key].mean()
                u = g / np.sqrt(v.reshape(g.shape))
            else:
                whole[key] = rate * whole.get(key, 0) + (1 - rate) * squares
                u = g / np.sqrt(whole[key])
            u = u / max(1, rms(u) / 0.7)
            return u * max(1e-3, rms(w)) if relative else u

        layers = len(w) if path.startswith("blocks") else 1
        return layered(path, of_layer)(*((np.arange(layers), w, g) if layers > 1 else (0, w, g)))

    follow(config, step, rtol=1e-4)


def test_adafactors_momentum_averages_its_updates():
    plain = AdafactorConfig(type="adafactor", smallest_factored=4, schedule=CONSTANT)
    heavy = AdafactorConfig(type="adafactor", smallest_factored=4, schedule=CONSTANT, beta1=0.75)
    model, gradients = random_model(0), random_model(1)
    steps = {}
    for name, config in (("plain", plain), ("heavy", heavy)):
        optimizer = build_optimizer(config, 3)
        after, _ = jax.jit(optimizer.apply)(gradients, optimizer.init(model), model, jnp.int32(0))
        steps[name] = {path: x - arrays(model)[path] for path, x in arrays(after).items()}
    for path in PATHS:
        expected = 0.25 * steps["plain"][path]
        np.testing.assert_allclose(steps["heavy"][path], expected, atol=1e-6)


def test_small_matrices_keep_their_second_moments_whole():
    config = AdafactorConfig(type="adafactor", smallest_factored=5)
    state = build_optimizer(config, 1).init(random_model(0))["adafactor"]
    assert set(state.row) == set()
    assert set(state.whole) == set(PATHS)
    factored = AdafactorConfig(type="adafactor", smallest_factored=4)
    state = build_optimizer(factored, 1).init(random_model(0))["adafactor"]
    assert set(state.row) == set(state.column) == set(SHAPES)
    assert state.row["blocks.stacked.attn.weight"].axes == (Layers, Embed)
    assert state.column["blocks.stacked.attn.weight"].axes == (Layers, Qkv, Heads, HeadSize)


def newton_schulz(x):
    """Jordan et al. 2024: five quintic steps towards the nearest orthogonal matrix."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x


def test_muon_equals_its_equation_a_matrix_at_a_time_and_leaves_the_rest_to_adamw():
    m, v = zeros(), zeros()
    inner = {"blocks.stacked.attn.weight", "blocks.stacked.proj.weight", "blocks.stacked.up.weight"}

    def orthogonal(matrix, out_first):
        # Rows are inputs: Newton-Schulz of the transpose is the transpose.
        found = newton_schulz(matrix.T if out_first else matrix)
        return found.T if out_first else found

    def of_layer(path, x):
        if path.endswith("attn.weight"):  # [embed, qkv, heads, size]: queries, keys and values
            parts = [orthogonal(x[:, i].reshape(4, 6), False) for i in range(3)]
            return 0.2 * math.sqrt(6) * np.stack([part.reshape(4, 2, 3) for part in parts], axis=1)
        if path.endswith("proj.weight"):  # [embed, heads, size]
            return 0.2 * math.sqrt(6) * orthogonal(x.reshape(4, 6), True).reshape(x.shape)
        return 0.2 * math.sqrt(6) * orthogonal(x, True)  # [mlp, embed]

    def step(path, n, w, g):
        if path not in inner:
            m[path] = 0.9 * m[path] + 0.1 * g
            v[path] = 0.95 * v[path] + 0.05 * g**2
            return m[path] / (1 - 0.9**n) / (np.sqrt(v[path] / (1 - 0.95**n)) + 1e-8)
        m[path] = 0.95 * m[path] + 0.05 * g
        nesterov = 0.95 * m[path] / (1 - 0.95 ** (n + 1)) + 0.05 * g / (1 - 0.95**n)
        return np.stack([of_layer(path, layer) for layer in nesterov])

    follow(MuonConfig(type="muon", learning_rate=0.02, schedule=CONSTANT), step, rtol=1e-3,
           atol=1e-5)  # fmt: skip


def test_muon_without_matrices_is_refused():
    with pytest.raises(ValueError, match="muon found no matrices"):
        build_optimizer(MuonConfig(type="muon"), 1).init({"weight": jnp.zeros((3, 3))})


def averaged(rate, before, of_before, new, half_unit):
    """Returns a moving average and a bound on its error in float32: three operations and rates."""
    size = rate * np.abs(before) + (1 - rate) * np.abs(new)
    after = rate * before + (1 - rate) * new
    return after, rate * of_before + 5 * half_unit * size


@pytest.mark.parametrize("name", ["sophia_h", "sophia_g"])
def test_sophia_equals_algorithm_3_of_the_paper(name):
    """With estimates given at updates 1, 4 and 7, some of them negative.

    The tolerance of each number is what rounding can come to: a bound on its error is carried along
    beside the paper's update in float64, with one half unit for each operation and constant.
    """
    kind = {"sophia_h": SophiaHConfig, "sophia_g": SophiaGConfig}[name]
    config = kind(
        type=name, learning_rate=0.03, weight_decay=0.2, gamma=0.4, epsilon=1e-4,
        beta1=0.9, beta2=0.8, estimate_every=3, schedule=CONSTANT,
    )  # fmt: skip
    optimizer, model = build_optimizer(config, 8), random_model(0)
    state, weights = optimizer.init(model), arrays(model)
    m, h = zeros(), zeros()
    of_m, of_h, of_w = zeros(), zeros(), zeros()  # bounds on their errors
    shares, half_unit = set(), 2.0**-24

    @jax.jit
    def update(model, state, gradients, estimate, made):
        state = optimizer.with_curvature(state, made, lambda: estimate)
        return optimizer.apply(gradients, state, model, made)

    for t in range(1, 9):
        gradients, estimate = random_model(t, 0.5), random_model(100 + t, 2.0)
        model, state = update(model, state, gradients, estimate, jnp.int32(t - 1))
        clipped = total = 0
        for path, g in arrays(gradients).items():
            m[path], of_m[path] = averaged(0.9, m[path], of_m[path], g, half_unit)
            if t % 3 == 1:
                e = arrays(estimate)[path]
                h[path], of_h[path] = averaged(0.8, h[path], of_h[path], e, half_unit)
            floor = np.maximum(0.4 * h[path], 1e-4)
            of_floor = 0.4 * of_h[path] + 3 * half_unit * floor
            ratio = m[path] / floor
            of_ratio = (of_m[path] + np.abs(ratio) * of_floor) / (floor - of_floor)
            of_ratio += half_unit * np.abs(ratio)
            clipped, total = clipped + (np.abs(ratio) >= 1).sum(), total + ratio.size
            before = weights[path]
            weights[path] = before - 0.03 * 0.2 * PATHS[path] * before
            # The paper decays first, and moves by what does not hang on the weights.
            weights[path] = weights[path] - 0.03 * np.clip(ratio, -1, 1)
            of_step = np.where(np.abs(ratio) - of_ratio >= 1, 0.0, of_ratio)
            rounded = np.abs(before) + 5 * 0.03 * (1 + 0.2 * np.abs(before))
            of_w[path] = of_w[path] * (1 + 0.03 * 0.2) + 0.03 * of_step + half_unit * rounded
        for path, found in arrays(model).items():
            assert np.all(np.abs(found - weights[path]) <= of_w[path]), (t, path)
            assert np.median(of_w[path]) < 8 * t * half_unit, "and that is not much"
        share = float(optimizer.figures(state)["clipped_share"])
        assert share == pytest.approx(clipped / total, abs=half_unit)
        shares.add(share)
    assert 0.1 < min(shares) < max(shares) < 0.9, "the case must clip some and not all"


def test_an_estimate_is_computed_only_when_it_is_due():
    config = SophiaGConfig(type="sophia_g", estimate_every=4)
    optimizer, model = build_optimizer(config, 9), random_model(0)
    asked = []

    def estimate():
        jax.debug.callback(lambda: asked.append(True))
        return model

    @jax.jit
    def run(made):
        return renewed(optimizer.init(model)["sophia"], config, made, estimate).hessian

    moved = [bool(jnp.any(jax.tree.leaves(run(jnp.int32(n)))[0] != 0)) for n in range(9)]
    jax.effects_barrier()
    assert [n for n, has in enumerate(moved) if has] == [0, 4, 8]
    assert len(asked) == 3


def test_the_rate_of_an_update_is_its_schedules():
    config = AdamWConfig(learning_rate=1.0, weight_decay=0.0)
    optimizer = build_optimizer(config, 10)
    model, gradients = random_model(0), random_model(1)
    state = optimizer.init(model)
    for made in (0, 5):
        after, _ = jax.jit(optimizer.apply)(gradients, state, model, jnp.int32(made))
        moved = arrays(after)["lm_head.weight"] - arrays(model)["lm_head.weight"]
        rate = float(optimizer.learning_rate(made))
        np.testing.assert_allclose(np.abs(moved), rate, rtol=1e-5)


def test_zero_decay_reduces_to_optaxs_adam():
    optimizer = build_optimizer(AdamWConfig(weight_decay=0.0), 10)
    adam = optax.adam(optimizer.learning_rate, 0.9, 0.95)
    model, gradients = random_model(0), random_model(1)
    found, _ = jax.jit(optimizer.apply)(gradients, optimizer.init(model), model, jnp.int32(0))
    updates, _ = jax.jit(adam.update)(gradients, adam.init(model), model)
    expected = optax.apply_updates(model, updates)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_matrices_are_what_their_modules_say():
    found = matrices(random_model(0))
    assert set(found) == set(SHAPES)
    assert found["blocks.stacked.proj.weight"] == (("layers",), ("heads", "size"), ("embed",), True)
    inner = {path for path, matrix in found.items() if matrix.is_inner}
    assert inner == {path for path in SHAPES if path.startswith("blocks")}
    assert stacked_axes(random_model(0)) == {"layers"}


def test_decay_spares_biases_norms_and_embeddings_and_says_so():
    model = random_model(0)
    groups = parameter_groups(AdamWConfig(), model)
    assert groups.decayed == tuple(sorted(path for path, decays in PATHS.items() if decays))
    assert groups.undecayed == tuple(sorted(path for path, decays in PATHS.items() if not decays))
    assert jax.tree.leaves(decay_mask(model, UNDECAYED)) == list(PATHS.values())


@pytest.mark.parametrize(
    ("path", "decays"),
    [
        ("transformer.blocks.stacked.attn.c_attn.weight", True),
        ("transformer.blocks.stacked.attn.c_attn.bias", False),
        ("transformer.blocks.stacked.ln_1.weight", False),
        ("transformer.ln_f.weight", False),
        ("transformer.final_norm.weight", False),
        ("layer_norm.weight", False),
        ("embeddings.token_embeddings", False),
        ("wte", False),
        ("position_embeddings.weight", False),
        ("attn.normalizer.weight", True),
        ("lm_head.weight", True),
        ("biased_gate.weight", True),
    ],
)
def test_the_spared_paths(path, decays):
    assert matches(path, UNDECAYED) is not decays


def test_own_patterns_are_of_whole_paths_or_whole_parts():
    config = AdamWConfig(undecayed=("lm_head.*", "up"), lr_multipliers={"up": 0.5, ".*bias": 0.1})
    groups = parameter_groups(config, random_model(0))
    assert set(groups.undecayed) == {
        "lm_head.weight", "blocks.stacked.up.weight", "blocks.stacked.up.bias",
    }  # fmt: skip
    assert groups.multiplied == {
        "blocks.stacked.attn.bias": 0.1,
        "blocks.stacked.ln_1.bias": 0.1,
        "blocks.stacked.up.bias": pytest.approx(0.05),
        "blocks.stacked.up.weight": 0.5,
    }


def test_multipliers_act_on_the_rate_and_so_on_decay_too():
    plain = AdamWConfig(learning_rate=0.1, schedule=CONSTANT)
    config = AdamWConfig(
        learning_rate=0.1, schedule=CONSTANT, lr_multipliers={"up": 0.5, "lm_head.*": 0.0}
    )
    model, gradients = random_model(0), random_model(1)
    moved = {}
    for name, one in (("plain", plain), ("multiplied", config)):
        optimizer = build_optimizer(one, 3)
        after, _ = jax.jit(optimizer.apply)(gradients, optimizer.init(model), model, jnp.int32(0))
        moved[name] = {path: x - arrays(model)[path] for path, x in arrays(after).items()}
    for path in PATHS:
        factor = {"blocks.stacked.up.weight": 0.5, "blocks.stacked.up.bias": 0.5}.get(path, 1.0)
        factor = 0.0 if path == "lm_head.weight" else factor
        expected = factor * moved["plain"][path]
        np.testing.assert_allclose(moved["multiplied"][path], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AdamWConfig(undecayed=("lm_head",)), None),
        (AdamWConfig(undecayed=("head",)), r"undecayed: 'head' matches no parameter.*'lm_head\."),
        (AdamWConfig(lr_multipliers={"bia": 2.0}), r"lr_multipliers: 'bia' matches no parameter"),
    ],
)
def test_a_pattern_of_ones_own_that_matches_nothing_is_refused(config, message):
    if message is None:
        assert parameter_groups(config, random_model(0)).undecayed == ("lm_head.weight",)
        return
    with pytest.raises(ValueError, match=message):
        parameter_groups(config, random_model(0))
