"""`ScanCheckpointPolicy`: what a scan keeps for its backward pass, and what it computes again.

The gradient of a scan needs intermediates of every step. Kept, they cost memory in proportion to
the depth; computed again from the step's input, they cost about a third more time. In between,
chosen values are kept or offloaded to host memory, and `nested` keeps only every so many steps
(about sqrt(depth) memory for one more forward pass).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any, Literal

import equinox as eqx
import jax


@dataclass(frozen=True)
class ScanCheckpointPolicy:
    """Chooses what is saved, offloaded or recomputed; all off means: recompute each whole step.

    Args:
        save_carries: keep (`True`) or offload (`"offload"`) what goes from step to step.
        save_inputs: keep or offload each step's slice of what is scanned.
        save_block_internals: keep all intermediates, or those named by `tree_checkpoint_name`.
        offload_block_internals: names of intermediates to move to host memory.
        save_products: keep the results of matrix products that have no batch axes, which are what
            is dear to compute again.
        prevent_cse: keep XLA from undoing the recomputation; a scan does not need it.
        disable: no checkpointing at all.
        simple: plain `jax.checkpoint` of a step, with no names.
        nested: checkpoint groups of steps too; an integer is the number of groups.
    """

    save_carries: bool | Literal["offload"] = False
    save_inputs: bool | Literal["offload"] = False
    save_block_internals: bool | Sequence[str] = False
    offload_block_internals: Sequence[str] = ()
    prevent_cse: bool = False
    disable: bool = False
    simple: bool = False
    nested: bool | int = False
    save_products: bool = False

    def __post_init__(self) -> None:
        # A policy is part of the structure of a module, so it must be hashable.
        for name in ("save_block_internals", "offload_block_internals"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                object.__setattr__(self, name, tuple(value))

    @staticmethod
    def from_bool_or_str(remat: "bool | str | ScanCheckpointPolicy") -> "ScanCheckpointPolicy":
        """The policy of a name: a bool, or one of `full` (`recompute`), `save_all`, ..."""
        if isinstance(remat, ScanCheckpointPolicy):
            return remat
        if isinstance(remat, bool):
            return ScanCheckpointPolicy(simple=remat, disable=not remat)
        if remat not in _POLICIES:
            raise ValueError(
                f"'{remat}' is not a checkpointing policy. Use True, False, {sorted(_POLICIES)}, "
                "or a `ScanCheckpointPolicy`."
            )
        return _POLICIES[remat]

    def checkpointed(self, step: Callable[..., Any], carry_name: str, input_name: str) -> Any:
        """`step` under `jax.checkpoint` with this policy."""
        if self.disable:
            return step
        policy = None if self.simple else self._jax_policy(carry_name, input_name)
        return eqx.filter_checkpoint(step, policy=policy, prevent_cse=self.prevent_cse)

    def num_groups(self, length: int) -> int | None:
        """How many groups of steps to nest, or `None` for a flat scan."""
        if self.disable or self.nested is False or length <= 1:
            return None
        if self.nested is not True:
            if length % self.nested:
                raise ValueError(
                    f"nested={self.nested} groups do not divide {length} steps evenly. Choose a "
                    "divisor, or `nested=True` to have one chosen."
                )
            return int(self.nested)
        return next(n for n in range(isqrt(length), 0, -1) if length % n == 0)

    def _jax_policy(self, carry_name: str, input_name: str) -> Any:
        if self.save_products:
            return jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        chosen = {carry_name: self.save_carries, input_name: self.save_inputs}
        saved = [name for name, choice in chosen.items() if choice is True]
        offloaded = [name for name, choice in chosen.items() if choice == "offload"]
        offloaded += list(self.offload_block_internals)
        if self.save_block_internals is True:
            if offloaded:
                raise ValueError(
                    f"save_block_internals=True keeps everything, so {offloaded} cannot be "
                    "offloaded. Name the internals to keep instead."
                )
            dropped = [name for name, choice in chosen.items() if not choice]
            return jax.checkpoint_policies.save_anything_except_these_names(*dropped)
        if self.save_block_internals:
            saved += list(self.save_block_internals)
        if offloaded:
            return jax.checkpoint_policies.save_and_offload_only_these_names(
                names_which_can_be_saved=saved,
                names_which_can_be_offloaded=offloaded,
                offload_src="device",
                offload_dst="pinned_host",
            )
        return jax.checkpoint_policies.save_only_these_names(*saved)


_POLICIES = {
    "offload": ScanCheckpointPolicy(save_carries="offload", save_inputs="offload"),
    "recompute": ScanCheckpointPolicy(),
    "full": ScanCheckpointPolicy(),
    "save_all": ScanCheckpointPolicy(
        save_carries=True, save_inputs=True, save_block_internals=True
    ),
    "nested": ScanCheckpointPolicy(nested=True),
    "products": ScanCheckpointPolicy(save_products=True),
}
