"""Precision policies and meshes: what is built, and how mistakes are told."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest

from modeling.models.config import Gpt2Config
from modeling.training.config import TrainerConfig
from modeling.training.mesh import build_layout, idle_devices, require_divisible_vocabulary
from modeling.training.precision import Policy

TRAINER = TrainerConfig(num_train_steps=1, train_batch_size=8)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("p=f32,c=bfloat16", (jnp.float32, jnp.bfloat16)),
        ("c=bf16, p=f32", (jnp.float32, jnp.bfloat16)),
        ("p=bfloat16,c=float32", (jnp.bfloat16, jnp.float32)),
    ],
)
def test_policies_are_read(text, expected):
    policy = Policy.parse(text)
    assert (policy.param, policy.compute) == expected


@pytest.mark.parametrize(
    ("text", "blames"),
    [("p=f32", "lacks `c=`"), ("p=f32,c=int8", "'c=int8'"), ("p=f32,c=f32,p=f16", "'p=f16'"),
     ("", "''"), ("x=f32,c=f32", "'x=f32'"), ("f32", "'f32'"),
     ("p=f32,c=bf16,o=f32", "'o=f32' would change nothing")],
)  # fmt: skip
def test_an_unreadable_policy_is_refused_by_part(text, blames):
    with pytest.raises(ValueError, match=f"trainer.mp.*{blames}"):
        Policy.parse(text)


def test_casts_leave_integers_and_other_leaves_alone():
    tree = {"w": jnp.ones(2), "ids": jnp.arange(2), "name": "x", "none": None}
    cast = Policy.parse("p=f32,c=bfloat16").cast_to_compute(tree)
    assert cast["w"].dtype == jnp.bfloat16
    assert cast["ids"].dtype == tree["ids"].dtype
    assert (cast["name"], cast["none"]) == ("x", None)


def test_the_mesh_takes_the_first_devices_in_order():
    trainer = dataclasses.replace(
        TRAINER, mesh={"data": 2, "model": 2}, axis_resources={"batch": "data", "mlp": "model"}
    )
    layout = build_layout(trainer)
    assert dict(layout.mesh.shape) == {"data": 2, "model": 2}
    assert list(layout.mesh.devices.flat) == jax.devices()[:4]
    assert layout.compute == {"batch": "data", "mlp": "model"}
    assert layout.parameters == {"batch": "data", "mlp": "model", "embed": "data"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mesh": {"data": 16}}, r"trainer\.mesh.*needs 16 devices, but there are 8"),
        ({"axis_resources": {"mlp": "modle"}}, r"axis_resources: `mlp: modle`.*\['data'\]"),
        ({"parameter_axis_resources": {"embed": "x"}}, r"parameter_axis_resources: `embed: x`"),
        ({"num_microbatches": 3}, r"num_microbatches: 3 does not divide .*8"),
        ({"mesh": {"data": 4}, "num_microbatches": 4}, r"2 rows at a time.*4 devices.*of 16"),
        (
            {"mesh": {"data": 3}},
            r"train_batch_size: 8 rows.*3 devices along mesh axis `data`.*multiple of 3",
        ),
        (
            {"mesh": {"a": 2, "b": 2}, "axis_resources": {"batch": ("a", "a")}},
            r"axis_resources: `batch: \['a', 'a'\]` must name one or more mesh axes, each once",
        ),
        ({"axis_resources": {"batch": ()}}, r"`batch: \[\]` must name one or more mesh axes"),
        (
            {"mesh": {"data": 4}, "processes": 3},
            r"processes: 3 processes cannot share the 4 devices.*a divisor of 4",
        ),
        (
            {"mesh": {"data": 2}, "axis_resources": {"batch": "data", "mlp": "dato"}},
            r"axis_resources: `mlp: dato`.*did you mean `data`",
        ),
    ],
)  # fmt: skip
def test_a_layout_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        build_layout(dataclasses.replace(TRAINER, **change))


def test_a_vocabulary_that_devices_cannot_share_is_refused_with_the_padding_it_takes():
    trainer = dataclasses.replace(
        TRAINER, mesh={"data": 2, "model": 4}, axis_resources={"batch": "data", "vocab": "model"}
    )
    layout = build_layout(trainer)
    with pytest.raises(ValueError, match=r"102 rows.*over 4 devices.*vocab_pad_multiple: 4"):
        require_divisible_vocabulary(layout, Gpt2Config(), 102)
    require_divisible_vocabulary(layout, Gpt2Config(vocab_pad_multiple=4), 102)


def test_accelerators_that_the_mesh_leaves_out_are_told():
    def fake(platform):
        return [types.SimpleNamespace(platform=platform, device_kind="H200") for _ in range(8)]

    two = build_layout(dataclasses.replace(TRAINER, mesh={"data": 2}))
    assert idle_devices(two, fake("gpu")) == (
        "6 of 8 H200 devices are idle: trainer.mesh {'data': 2} takes 2. "
        "Take them in with trainer.mesh {'data': 8}."
    )
    assert idle_devices(two, fake("gpu")[:2]) is None
    assert idle_devices(two, fake("cpu")) is None
