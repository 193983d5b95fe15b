"""Small additions to JAX that know no names: keys that may be absent, scopes, predicates."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer

F = TypeVar("F", bound=Callable[..., Any])


def is_jax_array_like(x: object) -> bool:
    """Whether `x` has a positional shape and a dtype: arrays, tracers, `ShapeDtypeStruct`."""
    return hasattr(x, "dtype") and isinstance(getattr(x, "shape", None), tuple)


def ensure_scalar(x: Any, *, convert_to_jnp: bool = False) -> Any:
    """A number or 0-d array as it is; a 0-d named array as its raw array; anything else raises."""
    if hasattr(x, "axes") and hasattr(x, "array"):
        if x.axes:
            raise ValueError(f"Expected a scalar, got a named array with axes {x.axes}.")
        return x.array
    if getattr(x, "ndim", 0) != 0:
        raise ValueError(f"Expected a scalar, got an array of shape {x.shape}.")
    return jnp.asarray(x) if convert_to_jnp else x


def is_in_jit() -> bool:
    """Whether code is being traced by `jax.jit`, as opposed to running op by op."""
    try:
        jax.sharding.get_mesh()
    except ValueError:  # documented for any trace, so also `grad` and `vmap`: ask more closely
        return isinstance(jnp.zeros(()), Tracer)
    return False


def maybe_rng_split(key: Any, num: int = 2) -> Any:
    """`jax.random.split`, or `num` times `None` where there is no key."""
    return [None] * num if key is None else jax.random.split(key, num)


def shaped_rng_split(key: Any, split_shape: int | Sequence[int] = 2) -> Any:
    """Keys in an array of the given shape."""
    if isinstance(split_shape, int):
        return jax.random.split(key, split_shape)
    return jax.random.split(key, tuple(split_shape))


def tree_checkpoint_name(x: Any, name: str) -> Any:
    """Names every array in a tree for rematerialization policies and offloading."""
    return jax.tree_util.tree_map(
        lambda leaf: checkpoint_name(leaf, name) if is_jax_array_like(leaf) else leaf, x
    )


@overload
def named_call(f: F) -> F: ...
@overload
def named_call(f: F, name: str | None) -> F: ...
@overload
def named_call(*, name: str | None = None) -> Callable[[F], F]: ...
def named_call(f: Any = None, name: str | None = None) -> Any:
    """Runs a function in a `jax.named_scope`, so that profiles and HLO show its name.

    Methods are named after their class; use with or without parentheses.
    """
    if f is None:
        return functools.partial(named_call, name=name)
    scope = name or f.__qualname__.rpartition("<locals>.")[2]
    if name is None and f.__name__ == "__call__":
        scope = scope.removesuffix(".__call__")

    @functools.wraps(f)
    def in_scope(*args: Any, **kwargs: Any) -> Any:
        with jax.named_scope(scope):
            return f(*args, **kwargs)

    return in_scope
