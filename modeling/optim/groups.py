"""Which parameters weight decay and learning rate multipliers act on, told apart by their paths."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from modeling.optim.config import UNDECAYED, AbstractOptimizerConfig
from modeling.optim.parameters import by_path, matches


@dataclasses.dataclass(frozen=True)
class Groups:
    """Who is treated how, by path."""

    decayed: tuple[str, ...]
    undecayed: tuple[str, ...]
    multiplied: Mapping[str, float]
    """Multipliers other than 1."""


def parameter_groups(config: AbstractOptimizerConfig, params: Any) -> Groups:
    """Returns what weight decay and multipliers act on.

    Raises:
        ValueError: a pattern that somebody has written matches no parameter.
    """
    paths = sorted(by_path(params))
    own = [] if config.undecayed == UNDECAYED else list(config.undecayed)
    for field, patterns in {
        "undecayed": own,
        "lr_multipliers": list(config.lr_multipliers),
    }.items():
        for pattern in patterns:
            if not any(matches(path, [pattern]) for path in paths):
                raise ValueError(
                    f"optimizer.{field}: {pattern!r} matches no parameter, neither a whole path "
                    f"nor a whole part of one; the paths are {paths}."
                )
    spared = [path for path in paths if matches(path, config.undecayed)]
    return Groups(
        tuple(path for path in paths if path not in spared),
        tuple(spared),
        {path: m for path in paths if (m := multiplier(config, path)) != 1.0},
    )


def multiplier(config: AbstractOptimizerConfig, path: str) -> float:
    """Returns the product over all patterns that match, which hangs on no order."""
    found = [m for pattern, m in config.lr_multipliers.items() if matches(path, [pattern])]
    return math.prod(found, start=1.0)
