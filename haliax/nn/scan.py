"""Depth as an axis: `Stacked` runs one block with stacked parameters, `BlockSeq` unrolls.

`Stacked` compiles its block once, whatever the depth, and its parameters are arrays with a `Block`
axis that can be sharded, checkpointed and optimized like any other. Both have the same methods, and
state dicts with the keys of a list of blocks: `0.weight`, `1.weight`, ...
"""

import functools
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp

from haliax.axis import Axis
from haliax.checkpointing import ScanCheckpointPolicy
from haliax.core import NamedArray
from haliax.hof import fold, scan, vmap
from haliax.jax_utils import is_jax_array_like
from haliax.shapes import stack
from haliax.state_dict import (
    ModuleWithStateDictSerialization,
    StateDict,
    flatten_modules_for_export,
    from_state_dict,
    to_state_dict,
    unflatten_modules_from_export,
    with_prefix,
)
from haliax.util import is_named_array

M = TypeVar("M", bound=eqx.Module)
Checkpointing = bool | str | ScanCheckpointPolicy


def _policy(gradient_checkpointing: Any, prevent_cse: bool | None) -> ScanCheckpointPolicy:
    policy = ScanCheckpointPolicy.from_bool_or_str(gradient_checkpointing)
    if prevent_cse is None or prevent_cse == policy.prevent_cse:
        return policy
    import dataclasses

    return dataclasses.replace(policy, prevent_cse=prevent_cse)


class Stacked(ModuleWithStateDictSerialization, Generic[M]):
    """`Block.size` copies of a module, with the parameters of all in one array each."""

    stacked: M
    Block: Axis = eqx.field(static=True)
    gradient_checkpointing: ScanCheckpointPolicy = eqx.field(static=True)

    @staticmethod
    def init(
        Block: Axis,
        module: Any,
        *,
        gradient_checkpointing: Checkpointing = False,
        prevent_cse: bool | None = None,
    ) -> Callable[..., "Stacked[M]"]:
        """A function that takes the arguments of `module.init`, with `Block` on those that vary."""
        policy = _policy(gradient_checkpointing, prevent_cse)

        @functools.wraps(module.init)
        def initialize(*args: Any, **kwargs: Any) -> "Stacked[M]":
            return Stacked(vmap(module.init, Block)(*args, **kwargs), Block, policy)

        return initialize

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raises: `fold`, or `scan` for blocks that return a pair, is what you mean."""
        raise TypeError(
            "A Stacked is not called: use `.fold(x, ...)`, `.scan(x, ...)` or `.vmap(x)`."
        )

    def fold(self, init: Any, *args: Any, unroll: int = 1, **kwargs: Any) -> Any:
        """`x = block(x, *args, **kwargs)` for each block; arguments with the axis are sliced."""
        return self.fold_via(_call, unroll=unroll)(init, *args, **kwargs)

    def scan(self, init: Any, *extra_args: Any, unroll: int = 1, **extra_kwargs: Any) -> Any:
        """`x, y = block(x, ...)` for each block; gives the last `x` and all `y`."""
        return self.scan_via(_call, unroll=unroll)(init, *extra_args, **extra_kwargs)

    def vmap(self, init: Any, *extra_args: Any, **extra_kwargs: Any) -> Any:
        """All blocks at once, each on `init`, or on its slice of it."""
        return self.vmap_via(_call)(init, *extra_args, **extra_kwargs)

    def fold_via(self, fn: Callable[..., Any], *, unroll: int = 1) -> Callable[..., Any]:
        """`fold` with `fn(block, carry, ...)` in the place of `block(carry, ...)`."""

        def step(carry: Any, block: Any, *args: Any, **kwargs: Any) -> Any:
            return fn(block, carry, *args, **kwargs)

        run = fold(step, self.Block, remat=self.gradient_checkpointing, unroll=unroll)
        return lambda init, *args, **kwargs: run(init, self.stacked, *args, **kwargs)

    def scan_via(self, fn: Callable[..., Any], *, unroll: int = 1) -> Callable[..., Any]:
        """`scan` with `fn(block, carry, ...)` in the place of `block(carry, ...)`."""

        def step(carry: Any, block: Any, *args: Any, **kwargs: Any) -> Any:
            return fn(block, carry, *args, **kwargs)

        run = scan(step, self.Block, remat=self.gradient_checkpointing, unroll=unroll)
        return lambda init, *args, **kwargs: run(init, self.stacked, *args, **kwargs)

    def vmap_via(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`vmap` with `fn(block, ...)` in the place of `block(...)`."""
        run = vmap(fn, self.Block)
        return lambda *args, **kwargs: run(self.stacked, *args, **kwargs)

    def get_layer(self, index: int) -> M:
        """One block."""
        return _slices(self.Block, self.stacked, index)

    def unstacked(self) -> list[M]:
        """The blocks, one by one."""
        return [self.get_layer(i) for i in range(self.Block.size)]

    def _state_dict_key_map(self) -> dict[str, str | None]:
        return {"stacked": None}

    def to_state_dict(self, prefix: str | None = None) -> StateDict:
        """The keys of a list of blocks."""
        found: StateDict = {}
        for key, array in to_state_dict(self.stacked, "x").items():
            for i in range(self.Block.size):
                found[_join(prefix, i, key)] = array[i]
        return found

    def from_state_dict(self, state_dict: StateDict, prefix: str | None = None) -> "Stacked[M]":
        """Stacks the arrays of a list of blocks."""
        gathered: StateDict = {}
        for key in to_state_dict(self.stacked, "x"):
            keys = [_join(prefix, i, key) for i in range(self.Block.size)]
            missing = [k for k in keys if k not in state_dict]
            if missing:
                raise KeyError(f"from_state_dict: the keys {missing} are not in the state dict.")
            gathered[key] = jnp.stack([jnp.asarray(state_dict[k]) for k in keys])
        return eqx.tree_at(lambda s: s.stacked, self, from_state_dict(self.stacked, gathered, "x"))

    def flatten_for_export(self) -> "Stacked[M]":
        """Every block in export form."""
        flat = vmap(flatten_modules_for_export, self.Block)(self.stacked)
        return Stacked(flat, self.Block, self.gradient_checkpointing)

    def unflatten_from_export(self, template: Any) -> "Stacked[M]":
        """The inverse; the template has the axes."""
        blocks = vmap(unflatten_modules_from_export, self.Block)(self.stacked, template.stacked)
        return Stacked(blocks, self.Block, self.gradient_checkpointing)


def _call(block: Any, *args: Any, **kwargs: Any) -> Any:
    return block(*args, **kwargs)


def _join(prefix: str | None, index: int, key: str) -> str:
    """`prefix.index.rest` for a key `x.rest`, or `x`."""
    rest = key.partition(".")[2]
    return str(with_prefix(with_prefix(prefix, str(index)), rest or None))


class BlockSeq(ModuleWithStateDictSerialization, Generic[M]):
    """`Stacked` as a Python loop over blocks: slower to compile, and they may differ."""

    blocks: list[M]
    Block: Axis = eqx.field(static=True)
    gradient_checkpointing: ScanCheckpointPolicy = eqx.field(static=True)

    @staticmethod
    def init(
        Block: Axis,
        module: Any,
        *,
        gradient_checkpointing: Checkpointing = False,
        prevent_cse: bool | None = None,
    ) -> Callable[..., "BlockSeq[M]"]:
        """A function that takes the arguments of `module.init`, with `Block` on those that vary."""
        policy = _policy(gradient_checkpointing, prevent_cse)

        @functools.wraps(module.init)
        def initialize(*args: Any, **kwargs: Any) -> "BlockSeq[M]":
            sliced = [_slices(Block, (args, kwargs), i) for i in range(Block.size)]
            return BlockSeq([module.init(*a, **k) for a, k in sliced], Block, policy)

        return initialize

    def fold(self, init: Any, *args: Any, unroll: int = 1, **kwargs: Any) -> Any:
        """`x = block(x, *args, **kwargs)` for each block."""
        return self.fold_via(_call, unroll=unroll)(init, *args, **kwargs)

    def scan(self, init: Any, *extra_args: Any, unroll: int = 1, **extra_kwargs: Any) -> Any:
        """`x, y = block(x, ...)` for each block; gives the last `x` and all `y`, stacked."""
        return self.scan_via(_call, unroll=unroll)(init, *extra_args, **extra_kwargs)

    def vmap(self, init: Any, *extra_args: Any, **extra_kwargs: Any) -> Any:
        """Each block on `init`, or on its slice of it; the results stacked."""
        return self.vmap_via(_call)(init, *extra_args, **extra_kwargs)

    def fold_via(self, fn: Callable[..., Any], *, unroll: int = 1) -> Callable[..., Any]:
        """`fold` with `fn(block, carry, ...)` in the place of `block(carry, ...)`."""
        del unroll

        def run(init: Any, *args: Any, **kwargs: Any) -> Any:
            step = self._checkpointed(fn)
            for i, block in enumerate(self.blocks):
                a, k = _slices(self.Block, (args, kwargs), i)
                init = step(block, init, *a, **k)
            return init

        return run

    def scan_via(self, fn: Callable[..., Any], *, unroll: int = 1) -> Callable[..., Any]:
        """`scan` with `fn(block, carry, ...)` in the place of `block(carry, ...)`."""
        del unroll

        def run(init: Any, *args: Any, **kwargs: Any) -> Any:
            step = self._checkpointed(fn)
            outputs = []
            for i, block in enumerate(self.blocks):
                a, k = _slices(self.Block, (args, kwargs), i)
                result = step(block, init, *a, **k)
                if not isinstance(result, tuple) or len(result) != 2:
                    raise ValueError(
                        "scan: the block must return (carry, output), got "
                        f"{type(result).__name__}. Use `fold` for blocks that return the carry "
                        "alone."
                    )
                init, output = result
                outputs.append(output)
            return init, _stack_trees(self.Block, outputs)

        return run

    def vmap_via(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`vmap` with `fn(block, ...)` in the place of `block(...)`."""

        def run(*args: Any, **kwargs: Any) -> Any:
            sliced = [_slices(self.Block, (args, kwargs), i) for i in range(len(self.blocks))]
            pairs = zip(self.blocks, sliced, strict=True)
            return _stack_trees(self.Block, [fn(block, *a, **k) for block, (a, k) in pairs])

        return run

    def get_layer(self, index: int) -> M:
        """One block."""
        return self.blocks[index]

    def unstacked(self) -> list[M]:
        """The blocks, one by one."""
        return list(self.blocks)

    def _checkpointed(self, fn: Callable[..., Any]) -> Any:
        name = f"scan({self.Block.name})"
        return self.gradient_checkpointing.checkpointed(fn, f"{name}__carry", f"{name}__input")

    def _state_dict_key_map(self) -> dict[str, str | None]:
        return {"blocks": None}


def _slices(Block: Axis, tree: Any, i: int) -> Any:
    """Arguments of block `i`: slices of what has the axis, and of plain arrays."""

    def piece(leaf: Any) -> Any:
        if isinstance(leaf, NamedArray):
            return leaf[Block, i] if leaf.has_axis(Block.name) else leaf
        return leaf[i] if is_jax_array_like(leaf) and len(leaf.shape) > 0 else leaf

    return jax.tree_util.tree_map(piece, tree, is_leaf=is_named_array)


def _stack_trees(Block: Axis, trees: list[Any]) -> Any:
    def joined(*leaves: Any) -> Any:
        if isinstance(leaves[0], NamedArray):
            return stack(Block, leaves)
        return jnp.stack(leaves) if is_jax_array_like(leaves[0]) else leaves[0]

    return jax.tree_util.tree_map(joined, *trees, is_leaf=is_named_array)
