"""Llama against `transformers`' and the properties that training needs of it."""

import dataclasses
import json
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import haliax as hax
from haliax import Axis
from modeling.experiment import ConfigError, ExperimentConfig, validate
from modeling.hf import architectures, reference
from modeling.hf.export import float32_logits
from modeling.hf.model_card import LINEAGE, model_card
from modeling.hf.pretrained import load_pretrained
from modeling.models.attention import library_attention
from modeling.models.config import MODEL_PRESETS, LlamaConfig
from modeling.models.llama import LlamaLmHeadModel, rotary_angles, rotated
from modeling.models.lm import LanguageModel, LmExample, next_token_loss, token_losses
from modeling.training.accounting import ModelShape

torch = pytest.importorskip("torch", reason="the `parity` extra is not installed")
transformers = pytest.importorskip("transformers", reason="the `parity` extra is not installed")

TINY = LlamaConfig(
    type="llama", hidden_dim=24, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=40
)
Vocab, Pos, Batch = Axis("vocab", 29), Axis("position", 12), Axis("batch", 4)
SAVED = {
    "grouped": {"num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True, "rms_norm_eps": 1e-3},
    "one_kv_head": {"num_key_value_heads": 1, "rope_theta": 500.0},
}
pytestmark = pytest.mark.usefixtures("highest_precision")


@pytest.fixture
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module", params=SAVED.values(), ids=SAVED)
def saved(request, tmp_path_factory):
    """A Llama of `transformers`, far from its initial weights, and its directory."""
    fields = dict(request.param)
    theta = {"rope_type": "default", "rope_theta": fields.pop("rope_theta", 10000.0)}
    config = transformers.LlamaConfig(
        vocab_size=29, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=12, bos_token_id=0, eos_token_id=0,
        attn_implementation="eager", rope_parameters=theta, **fields,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    directory = tmp_path_factory.mktemp("llama")
    model.save_pretrained(directory)
    return model, directory


def some_rows(num_rows=3):
    return np.random.default_rng(1).integers(0, 29, (num_rows, 12))


def ids_of(rows):
    return hax.named(jnp.asarray(rows, jnp.int32), (Batch.resize(len(rows)), Pos))


def test_a_llama_of_transformers_computes_the_same_here_and_goes_back(saved):
    theirs, directory = saved
    rows = some_rows()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(rows)).logits.numpy()
    assert expected.std() > 0.5
    ours = load_pretrained(directory, vocab_pad_multiple=8)
    assert ours.head.axis_size("vocab") == 32
    np.testing.assert_allclose(float32_logits(ours, rows), expected, rtol=0, atol=1e-5)

    tensors = reference.read_tensors(directory)
    back = architectures.to_tensors(ours)
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)
    config = architectures.to_hf_config(ours, dtype="float32", bos_token_id=0, eos_token_id=0)
    theirs_again = transformers.LlamaConfig(**config)
    for field in config.keys() - {"architectures", "dtype", "rope_theta", "bos_token_id"}:
        assert getattr(theirs_again, field) == getattr(theirs.config, field), field


def test_the_reference_is_transformers_in_float64(saved):
    theirs, directory = saved
    rows = some_rows()
    with torch.no_grad():
        expected = type(theirs).from_pretrained(directory).double()(torch.from_numpy(rows))
    # Its frequencies are float32, whatever the rest is.
    np.testing.assert_allclose(
        reference.logits(directory, rows), expected.logits.numpy(), rtol=0, atol=1e-5
    )


def test_gradients_are_those_of_transformers(saved):
    theirs, directory = saved
    rows = some_rows()
    theirs.zero_grad()
    loss = theirs(torch.from_numpy(rows), labels=torch.from_numpy(rows)).loss
    loss.backward()

    @eqx.filter_jit
    @partial(eqx.filter_value_and_grad)
    def ours(model):
        total, weight = next_token_loss(model, LmExample.causal(ids_of(rows)))
        return total / weight

    value, gradient = ours(load_pretrained(directory))
    assert float(value) == pytest.approx(loss.item(), abs=1e-5)
    found = architectures.to_tensors(gradient)
    for name, parameter in theirs.named_parameters():
        if name in found:  # a tied head is the embedding's
            wanted = parameter.grad.numpy()
            close = 1e-5 * max(1.0, float(np.abs(wanted).max()))
            np.testing.assert_allclose(found[name], wanted, rtol=0, atol=close, err_msg=name)


@pytest.fixture(scope="module")
def model():
    """Ours, of random weights far from initial ones."""
    config = TINY
    draw = np.random.default_rng(0)
    abstract = eqx.filter_eval_shape(
        partial(LlamaLmHeadModel.init, Vocab, Pos, config), key=jax.random.key(0)
    )
    return jax.tree.map(
        lambda x: jnp.asarray(draw.normal(0.3, 0.3, x.shape), jnp.float32), abstract
    )


run = eqx.filter_jit(lambda model, ids, segments=None: model(ids, segment_ids=segments))


def test_it_is_a_language_model_that_sees_no_later_token(model):
    assert isinstance(model, LanguageModel)
    ids = ids_of(some_rows())
    before = run(model, ids)
    assert before.axes == (Batch.resize(3), Pos, Vocab)
    assert before.dtype == jnp.float32
    changed = ids.at[Pos, 7].set((ids[Pos, 7] + 1) % 29)
    after = run(model, changed)
    np.testing.assert_array_equal(after.array[:, :7], before.array[:, :7])
    assert (after.array[:, 7:] != before.array[:, 7:]).any(axis=-1).all()


def test_a_document_within_a_row_is_what_it_is_alone(model):
    rows = some_rows(1)
    segments = hax.named(jnp.asarray([[1] * 5 + [2] * 7]), (Batch.resize(1), Pos))
    together = run(model, ids_of(rows), segments).array[:, 5:]
    alone = float32_logits(model, rows[:, 5:])
    np.testing.assert_allclose(together, alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "mapping",
    [{"batch": "data", "embed": "data"}, {"batch": "data", "heads": "model", "mlp": "model"}],
    ids=["fsdp", "tensor_parallel"],
)
def test_layouts_over_devices_give_the_same_losses(model, mapping):
    ids = ids_of(some_rows(4))
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    compute = {k: v for k, v in mapping.items() if k != "embed"}
    with jax.set_mesh(mesh):
        placed = hax.shard(model, mapping)
        losses = hax.named_jit(token_losses, axis_resources=compute)(placed, ids)
    np.testing.assert_allclose(
        losses.array, jax.jit(token_losses)(model, ids).array, rtol=0, atol=5e-5
    )


def test_turning_depends_on_distance_alone():
    """The product of a query and a key is that of their positions' difference."""
    Size = Axis("head_size", 6)
    q, k = hax.random.normal(jax.random.key(0), Size), hax.random.normal(jax.random.key(1), Size)

    def product(at_q, at_k):
        turned = [
            rotated(x, rotary_angles(hax.named(jnp.asarray(at), ()), TINY), Size)
            for x, at in ((q, at_q), (k, at_k))
        ]
        return float(hax.dot(*turned, axis=Size).array)

    assert product(9, 4) == pytest.approx(product(5, 0), abs=1e-5)
    assert abs(product(9, 4) - product(9, 5)) > 1e-2


def test_the_librarys_attention_has_the_same_heads_in_a_group():
    Heads, Group, Size = Axis("heads", 2), Axis("group", 3), Axis("head_size", 4)
    draw = np.random.default_rng(0)
    q, k, v = (
        hax.named(jnp.asarray(draw.normal(size=[a.size for a in axes]), jnp.float32), axes)
        for axes in ((Pos, Heads, Group, Size), (Pos, Heads, Size), (Pos, Heads, Size))
    )
    mixed = library_attention(q, k, v, Pos, Heads, Size, None, Group=Group, implementation="xla")
    for i in range(Group.size):
        one = library_attention(q[Group, i], k, v, Pos, Heads, Size, None, implementation="xla")
        np.testing.assert_allclose(
            mixed[Group, i].rearrange(one.axes).array, one.array, rtol=0, atol=1e-6
        )


def test_products_stay_in_the_compute_dtype(model):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
    assert half.activations(ids_of(some_rows())).dtype == jnp.bfloat16


def test_sizes_and_flops_are_counted_without_what_is_only_looked_up():
    config = MODEL_PRESETS["llama-350m"]
    D, M, V, L = 1024, 2816, 32000, 24
    weights = L * (D * D * 2 + 2 * D * D // 2 + 3 * D * M + 2 * D) + D
    abstract = eqx.filter_eval_shape(
        partial(LlamaLmHeadModel.init, Axis("vocab", V), Axis("position", 1024), config),
        key=jax.random.key(0),
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract))
    assert count == weights + 2 * V * D
    sizes = {"num_parameters": count, "sequence_length": 1024, "vocab_size": V}
    assert ModelShape.of(config, **sizes).num_parameters == weights + V * D
    tied = dataclasses.replace(config, tie_word_embeddings=True)
    sizes["num_parameters"] = weights + V * D
    assert ModelShape.of(tied, **sizes).num_parameters == weights + V * D


def experiment(**model):
    trainer = {"num_train_steps": 1, "train_batch_size": 1}
    fields = {"dataset": "d", "sequence_length": 8, "trainer": trainer, "model": model}
    return validate(ExperimentConfig, fields, "x.yaml")


def test_an_experiment_says_which_architecture_by_its_type():
    assert experiment(type="llama", mlp_dim=64).model == LlamaConfig(type="llama", mlp_dim=64)
    assert experiment(num_layers=2).model.type == "gpt2"
    with pytest.raises(ConfigError, match=r"model\.mlp_scale: no such field"):
        experiment(type="llama", mlp_scale=4)
    with pytest.raises(ConfigError, match=r"num_heads 16 is not a multiple of num_kv_heads 3"):
        experiment(type="llama", num_kv_heads=3)
    with pytest.raises(ConfigError, match="'gpt2', 'llama'"):
        experiment(type="mamba")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type: 'yarn' is not supported"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling"),
        ({"attention_bias": True}, "attention_bias: True is not supported"),
        ({"head_dim": 32}, "head_dim: 32 x 4 heads is not hidden_size 24"),
        ({"model_type": "mamba"}, "model_type: 'mamba'"),
    ],
)
def test_what_our_llama_is_not_is_refused(tmp_path, model, change, message):
    config = architectures.to_hf_config(model, dtype="float32", bos_token_id=None, eos_token_id=0)
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)


def test_its_card_says_what_it_is(model):
    config = architectures.to_hf_config(model, dtype="float32", bos_token_id=None, eos_token_id=0)
    lineage = {kind: "0" * 64 for kind, _ in LINEAGE}
    card = model_card(config, num_parameters=5, lineage=lineage, digests={})
    assert "# Llama language model" in card
    assert "| Context | 12 tokens |" in card
