"""Which dtype parameters and computation have: `p=f32,c=bfloat16`, see `config.precision`.

Parameters and optimizer state are kept in `p`; each step casts a copy to `c` for the forward and
backward pass, so gradients return in `p` through the cast. Losses and weights are summed in float32
whatever the policy.
"""

import dataclasses
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp

from modeling.training.config import precision

Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class Policy:
    """Dtypes by role; casts touch floating-point arrays alone."""

    param: Any
    compute: Any

    @staticmethod
    def parse(text: str) -> "Policy":
        """Reads `p=<dtype>,c=<dtype>`."""
        named = precision(text)
        return Policy(getattr(jnp, named["p"]), getattr(jnp, named["c"]))

    def cast_to_param(self, tree: Tree) -> Tree:
        """Returns the tree as it is stored."""
        return _cast(tree, self.param)

    def cast_to_compute(self, tree: Tree) -> Tree:
        """Returns the tree as the forward pass takes it."""
        return _cast(tree, self.compute)


def _cast(tree: Tree, dtype: Any) -> Tree:
    return jax.tree_util.tree_map(
        lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf, tree
    )
