"""Strict arithmetic for named tensors: no implicit dtype promotion, no silent rank promotion."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_arithmetic() -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
