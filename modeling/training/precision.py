"""Which dtype parameters, computation and outputs have: `p=f32,c=bfloat16,o=f32`.

Parameters and optimizer state are kept in `p`; each step casts a copy to `c` for the forward and
backward pass, so gradients return in `p` through the cast. `o` is the dtype of what a model hands
out (logits), `p` if not given. Losses and weights are summed in float32 whatever the policy.
"""

import dataclasses
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp

Tree = TypeVar("Tree")

_DTYPES = {
    "f32": jnp.float32,
    "float32": jnp.float32,
    "bf16": jnp.bfloat16,
    "bfloat16": jnp.bfloat16,
    "f16": jnp.float16,
    "float16": jnp.float16,
}
_ROLES = {"p": "param", "c": "compute", "o": "output"}


@dataclasses.dataclass(frozen=True)
class Policy:
    """Dtypes by role; casts touch floating-point arrays alone."""

    param: Any
    compute: Any
    output: Any

    @staticmethod
    def parse(text: str) -> "Policy":
        """Reads `p=<dtype>,c=<dtype>` with an optional `,o=<dtype>`."""
        given: dict[str, Any] = {}
        for part in text.split(","):
            letter, _, dtype = (piece.strip() for piece in part.partition("="))
            if letter not in _ROLES or dtype not in _DTYPES or letter in given:
                raise ValueError(
                    f"trainer.mp: {text!r}: cannot read {part!r}; write p=, c= and at most o= once "
                    f"each, with one of {sorted(_DTYPES)}, e.g. `p=f32,c=bfloat16`."
                )
            given[letter] = _DTYPES[dtype]
        missing = [letter for letter in "pc" if letter not in given]
        if missing:
            raise ValueError(
                f"trainer.mp: {text!r} lacks `{missing[0]}=`; write e.g. `p=f32,c=bfloat16`."
            )
        return Policy(given["p"], given["c"], given.get("o", given["p"]))

    def cast_to_param(self, tree: Tree) -> Tree:
        """Returns the tree as it is stored."""
        return _cast(tree, self.param)

    def cast_to_compute(self, tree: Tree) -> Tree:
        """Returns the tree as the forward pass takes it."""
        return _cast(tree, self.compute)

    def cast_to_output(self, tree: Tree) -> Tree:
        """Returns the tree as it is handed out."""
        return _cast(tree, self.output)


def _cast(tree: Tree, dtype: Any) -> Tree:
    return jax.tree_util.tree_map(
        lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf, tree
    )
