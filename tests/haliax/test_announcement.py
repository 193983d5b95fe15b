"""The announcement: one attention for every layout, names beat order, one-line sharding."""

import math
import re
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

import haliax as hax

Batch, Pos, KPos, Heads, Key, Embed = hax.make_axes(
    batch=2, position=5, key_position=5, head=3, key_size=4, embed=6
)


def attention(Key, KPos, query, key, value, mask):
    # how similar is each query to each key
    scores = hax.dot(query, key, axis=Key) / jnp.sqrt(Key.size)
    # mask out invalid positions
    if mask is not None:
        scores -= 1e9 * (1.0 - mask)
    # convert to probabilities
    scores = hax.nn.softmax(scores, axis=KPos)
    # weighted sum of values
    return hax.dot(scores, value, axis=KPos)


def _normal(seed, *axes):
    return hax.random.normal(jax.random.PRNGKey(seed), axes)


def _reference(q, k, v, mask):
    """For q, k, v with the axes batch, head, position, key."""
    scores = np.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1])
    scores = np.where(mask[None, None] > 0, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhqk,bhkd->bhqd", weights, v)


def test_attention_is_multi_head():
    q = _normal(0, Batch, Heads, Pos, Key)
    k, v = _normal(1, Batch, Heads, KPos, Key), _normal(2, Batch, Heads, KPos, Key)
    mask = hax.nn.attention.causal_mask(Pos, KPos).astype(jnp.float32)
    out = attention(Key, KPos, q, k, v, mask)
    assert out.axes == (Batch, Heads, Pos, Key)
    expected = _reference(q.array, k.array, v.array, np.tril(np.ones((5, 5))))
    np.testing.assert_allclose(out.array, expected, rtol=1e-5, atol=1e-6)


def test_the_same_attention_is_multi_query():
    q = _normal(0, Batch, Heads, Pos, Key)
    k, v = _normal(1, Batch, KPos, Key), _normal(2, Batch, KPos, Key)
    mask = hax.nn.attention.causal_mask(Pos, KPos).astype(jnp.float32)
    out = attention(Key, KPos, q, k, v, mask)
    assert out.axes == (Batch, Heads, Pos, Key)
    full_k, full_v = (np.broadcast_to(x.array[:, None], (2, 3, 5, 4)) for x in (k, v))
    expected = _reference(q.array, full_k, full_v, np.tril(np.ones((5, 5))))
    np.testing.assert_allclose(out.array, expected, rtol=1e-5, atol=1e-6)


def test_the_same_attention_reads_image_patches():
    Height, Width = hax.make_axes(height=2, width=3)
    q = _normal(0, Batch, Heads, Pos, Key)
    k = _normal(1, Batch, Heads, Height, Width, Key)
    v = _normal(2, Batch, Heads, Height, Width, Key)
    out = attention(Key, (Height, Width), q, k, v, None)
    assert out.axes == (Batch, Heads, Pos, Key)
    flat_k, flat_v = (np.asarray(x.array).reshape(2, 3, 6, 4) for x in (k, v))
    expected = _reference(q.array, flat_k, flat_v, np.ones((5, 6)))
    np.testing.assert_allclose(out.array, expected, rtol=1e-5, atol=1e-6)


def test_mean_squared_error_goes_by_name_not_by_order():
    """By position, (4, 8) against (8, 4) fails and (4, 1) against (4,) silently broadcasts."""
    B, D = hax.make_axes(batch=4, dim=8)
    pred, target = _normal(0, B, D), _normal(1, D, B)

    def mse(pred, target):
        return hax.mean((pred - target) * (pred - target), axis=D)

    loss = mse(pred, target)
    assert loss.axes == (B,)
    expected = ((np.asarray(pred.array) - np.asarray(target.array).T) ** 2).mean(1)
    np.testing.assert_allclose(loss.array, expected, rtol=1e-6)


class Block(eqx.Module):
    up: hax.nn.Linear
    down: hax.nn.Linear

    @staticmethod
    def init(Embed, Mlp, *, key):
        k_up, k_down = jax.random.split(key)
        return Block(
            hax.nn.Linear.init(Embed, Mlp, key=k_up), hax.nn.Linear.init(Mlp, Embed, key=k_down)
        )

    def __call__(self, x):
        return x + self.down(hax.nn.relu(self.up(x)))


class Model(eqx.Module):
    embeddings: hax.nn.Embedding
    blocks: hax.nn.Stacked

    @staticmethod
    def init():
        Embed, Mlp, Vocab, Layers = hax.make_axes(embed=16, mlp=32, vocab=24, layers=2)
        k_embed, k_blocks = jax.random.split(jax.random.PRNGKey(0))
        blocks = hax.nn.Stacked.init(Layers, Block)(Embed, Mlp, key=jax.random.split(k_blocks, 2))
        return Model(hax.nn.Embedding.init(Vocab, Embed, init_scale=4.0, key=k_embed), blocks)

    def __call__(self, tokens):
        return self.embeddings.unembed(self.blocks.fold(self.embeddings.embed(tokens)))


def _loss(model, tokens):
    logits = model(tokens)
    targets = hax.roll(tokens, -1, "position")
    return hax.nn.cross_entropy_loss(logits, "vocab", targets).scalar()


def _tokens():
    B, P = hax.make_axes(batch=8, position=6)
    return hax.random.randint(jax.random.PRNGKey(1), (B, P), 0, 24)


def _three_steps(parameter_mapping, compute_mapping):
    """The announcement's training loop; its only mentions of devices are the two mappings."""
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam raises a Python float to an int32
        model, state, train_step = _begin(parameter_mapping, compute_mapping)
        losses = []
        for _ in range(3):
            loss, model, state = train_step(model, state, _tokens())
            losses.append(float(loss))
    return losses, model, state


def _begin(parameter_mapping, compute_mapping):
    """Returns the sharded model, the sharded optimizer state, and the step that trains them."""
    optimizer = optax.adamw(1e-2)

    @hax.named_jit
    def init():
        return hax.shard_with_axis_mapping(Model.init(), parameter_mapping)

    model = init()

    @hax.named_jit
    def init_optimizer(model):
        state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
        return hax.shard_with_axis_mapping(state, parameter_mapping)

    state = init_optimizer(model)

    @eqx.filter_value_and_grad
    def compute_loss(model, tokens):
        with hax.axis_mapping(compute_mapping):
            return _loss(model, hax.auto_sharded(tokens))

    @hax.named_jit(donate_args=(True, True, False))
    def train_step(model, state, tokens):
        loss, grads = compute_loss(model, tokens)
        updates, state = optimizer.update(grads, state, params=model)
        model = eqx.apply_updates(model, updates)
        return loss, *hax.shard_with_axis_mapping((model, state), parameter_mapping)

    return model, state, train_step


def _compiled(parameter_mapping, compute_mapping):
    """Returns the training step's program, and the bytes of model and optimizer state in all."""
    with jax.numpy_dtype_promotion("standard"):
        model, state, train_step = _begin(parameter_mapping, compute_mapping)
        program = train_step.lower(model, state, _tokens()).compile()
    return program, sum(x.nbytes for x in jax.tree.leaves((model, state)))


def _collectives(program):
    kinds = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
    text = program.as_text()
    return {kind for kind in kinds if re.search(rf" = .* {kind}(-start)?\(", text)}


def _local_shape(array):
    return array.array.addressable_shards[0].data.shape


@pytest.fixture(scope="module")
def unsharded_losses():
    return _three_steps({}, {})[0]


def test_training_lowers_the_loss(unsharded_losses):
    assert unsharded_losses[2] < unsharded_losses[1] < unsharded_losses[0]


def test_fsdp_is_one_mapping(unsharded_losses):
    mesh = Mesh(np.array(jax.devices()).reshape(8), ("data",))
    with jax.set_mesh(mesh):
        losses, model, state = _three_steps({"embed": "data"}, {"batch": "data"})
    np.testing.assert_allclose(losses, unsharded_losses, rtol=1e-5)
    weight = model.blocks.stacked.up.weight
    assert tuple(weight.shape.items()) == (("layers", 2), ("mlp", 32), ("embed", 16))
    assert _local_shape(weight) == (2, 32, 2)
    assert _local_shape(model.embeddings.weight) == (24, 2)
    moments = state[0].mu.blocks.stacked.up.weight
    assert _local_shape(moments) == (2, 32, 2)


def test_tensor_parallelism_is_one_more_entry(unsharded_losses):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    with jax.set_mesh(mesh):
        losses, model, _ = _three_steps(
            {"embed": "data", "mlp": "model"}, {"batch": "data", "mlp": "model"}
        )
    np.testing.assert_allclose(losses, unsharded_losses, rtol=1e-5)
    assert _local_shape(model.blocks.stacked.up.weight) == (2, 16, 4)
    assert _local_shape(model.blocks.stacked.down.weight) == (2, 4, 16)


def test_a_mesh_context_by_with_shards_as_well(unsharded_losses):
    mesh = Mesh(np.array(jax.devices()).reshape(8), ("data",))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with mesh:
            losses, model, _ = _three_steps({"embed": "data"}, {"batch": "data"})
    np.testing.assert_allclose(losses, unsharded_losses, rtol=1e-5)
    assert _local_shape(model.embeddings.weight) == (24, 2)


def test_the_compiled_step_holds_an_eighth_of_everything_and_gathers_it():
    alone, _ = _compiled({}, {})
    assert _collectives(alone) == set()
    mesh = Mesh(np.array(jax.devices()).reshape(8), ("data",))
    with jax.set_mesh(mesh):
        replicated, num_bytes = _compiled({}, {"batch": "data"})
        sharded, _ = _compiled({"embed": "data"}, {"batch": "data"})
    tokens = 8 * 6 * 4
    whole = replicated.memory_analysis().argument_size_in_bytes
    assert num_bytes <= whole <= num_bytes + tokens
    # Biases of `mlp` alone have no `embed` axis and stay whole; the rest is cut in eight.
    biases = 3 * 2 * 32 * 4 + 8
    part = sharded.memory_analysis().argument_size_in_bytes
    assert part <= num_bytes / 8 + biases + tokens
    assert "all-gather" in _collectives(sharded)
    assert _collectives(sharded) & {"all-reduce", "reduce-scatter"}
    assert _collectives(replicated) == {"all-reduce"}


def test_tensor_parallelism_adds_sums_over_its_own_axis():
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(1, 2), ("data", "model"))
    with jax.set_mesh(mesh):
        program, _ = _compiled({"mlp": "model"}, {"mlp": "model"})
    assert _collectives(program) == {"all-reduce"}
