"""Precision policies and meshes: what is built, and how mistakes are told."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from modeling.training.config import TrainerConfig
from modeling.training.mesh import build_layout
from modeling.training.precision import Policy

TRAINER = TrainerConfig(num_train_steps=1, train_batch_size=8)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("p=f32,c=bfloat16", (jnp.float32, jnp.bfloat16, jnp.float32)),
        ("c=bf16, p=f32, o=f16", (jnp.float32, jnp.bfloat16, jnp.float16)),
        ("p=bfloat16,c=float32", (jnp.bfloat16, jnp.float32, jnp.bfloat16)),
    ],
)
def test_policies_are_read(text, expected):
    policy = Policy.parse(text)
    assert (policy.param, policy.compute, policy.output) == expected


@pytest.mark.parametrize(
    ("text", "blames"),
    [("p=f32", "lacks `c=`"), ("p=f32,c=int8", "'c=int8'"), ("p=f32,c=f32,p=f16", "'p=f16'"),
     ("", "''"), ("x=f32,c=f32", "'x=f32'"), ("f32", "'f32'")],
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
    ],
)  # fmt: skip
def test_a_layout_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        build_layout(dataclasses.replace(TRAINER, **change))
