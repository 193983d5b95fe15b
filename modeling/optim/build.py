"""Optimizers from their configurations, from Optax wherever it has them.

Each is a chain: gradient -> (what is named below) -> + weight_decay w -> times its multiplier; the
update is `w -= lr(n) * step`, for update n = 1, 2, ...

AdamW (Loshchilov & Hutter 2019, algorithm 2), with the gradient g clipped to a global norm:

    m = b1 m + (1 - b1) g           v = b2 v + (1 - b2) g^2
    step = m / (1 - b1^n) / (sqrt(v / (1 - b2^n)) + eps) + weight_decay w

Lion (Chen et al. 2023, arXiv 2302.06675):

    step = sign(b1 m + (1 - b1) g) + weight_decay w;   then   m = b2 m + (1 - b2) g

Muon (Jordan et al. 2024; scaled as in Liu et al. 2025, arXiv 2502.16982), for every matrix between
the inputs and outputs of a `Linear`, each layer, expert and index of `separate_axes` by itself:

    m = b m + (1 - b) g
    step = update_rms sqrt(max(rows, columns)) NewtonSchulz(Nesterov(m)) + weight_decay w

`adafactor` and `sophia` have their own modules. A state has the names of what it belongs to:
`opt_state.adam.mu.<path of the parameter>`, so it is split over a mesh as parameters are.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax
import optax.contrib
from jaxtyping import Array

from haliax.core import NamedArray
from modeling.optim.adafactor import scale_by_factored_moments, scale_by_parameter_rms
from modeling.optim.config import (
    AbstractOptimizerConfig,
    AdafactorConfig,
    AdamWConfig,
    LionConfig,
    MuonConfig,
    SophiaConfig,
    SophiaGConfig,
    SophiaHConfig,
)
from modeling.optim.groups import multiplier
from modeling.optim.parameters import (
    Matrix,
    Parameters,
    by_path,
    decay_mask,
    in_tree,
    matrices,
)
from modeling.optim.schedules import Schedule, learning_rate
from modeling.optim.sophia import renewed, scale_by_sophia

Stage = tuple[str, optax.GradientTransformation]
_SOPHIA = "sophia"


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """What is done with mean gradients that are clipped already."""

    config: AbstractOptimizerConfig
    chain: optax.GradientTransformationExtraArgs
    """From gradients to steps, which are to be subtracted, times the learning rate."""
    learning_rate: Schedule

    def init(self, params: Any) -> Any:
        """Returns the state before the first update."""
        return self.chain.init(params)

    def apply(
        self, gradients: Any, state: Any, params: Any, updates_made: Array
    ) -> tuple[Any, Any]:
        """Returns the next parameters and the next state."""
        steps, state = self.chain.update(gradients, state, params)
        rate = -self.learning_rate(updates_made)
        changes = jax.tree.map(lambda step: rate.astype(step.dtype) * step, steps)
        return optax.apply_updates(params, changes), state

    @property
    def curvature(self) -> SophiaConfig | None:
        """How curvature is to be estimated, by an optimizer that needs it."""
        return self.config if isinstance(self.config, SophiaHConfig | SophiaGConfig) else None

    def with_curvature(self, state: Any, updates_made: Array, estimate: Callable[[], Any]) -> Any:
        """Returns the state with an estimate of curvature taken in, if one is due."""
        assert self.curvature is not None
        found = renewed(state[_SOPHIA], self.curvature, updates_made, estimate)
        return {**state, _SOPHIA: found}

    def figures(self, state: Any) -> dict[str, Array]:
        """Returns what the optimizer itself tells of its last update."""
        return {} if self.curvature is None else {"clipped_share": state[_SOPHIA].clipped_share}


def build_optimizer(config: AbstractOptimizerConfig, num_train_steps: int) -> Optimizer:
    """Returns the optimizer of a run of `num_train_steps` updates."""
    chain = optax.named_chain(
        *_stages(config),
        ("decay", optax.add_decayed_weights(config.weight_decay, _mask(config))),
        ("multipliers", _multiplied(config)),
    )
    return Optimizer(config, chain, learning_rate(config.learning_rate, config.schedule,
                                                  num_train_steps))  # fmt: skip


def _stages(config: AbstractOptimizerConfig) -> list[Stage]:
    match config:
        case AdamWConfig():
            return [("adam", optax.scale_by_adam(config.beta1, config.beta2, config.epsilon))]
        case LionConfig():
            return [("lion", optax.scale_by_lion(config.beta1, config.beta2))]
        case AdafactorConfig():
            stages = [("adafactor", scale_by_factored_moments(config))]
            if config.relative_updates:
                stages.append(("relative", scale_by_parameter_rms()))
            if config.beta1 > 0.0:
                stages.append(("momentum", optax.ema(config.beta1, debias=False)))
            return stages
        case MuonConfig():
            return [("muon", _muon(config))]
        case SophiaHConfig() | SophiaGConfig():
            return [(_SOPHIA, scale_by_sophia(config))]
        case _:
            raise TypeError(f"optimizer: {type(config).__name__} is not an optimizer.")


def _mask(config: AbstractOptimizerConfig) -> Callable[[Any], Any]:
    return lambda params: decay_mask(params, config.undecayed)


def _multiplied(config: AbstractOptimizerConfig) -> optax.GradientTransformation:
    def update(steps: Any, params: Any) -> Any:
        del params
        changed = {}
        for path, step in by_path(steps).items():
            factor = multiplier(config, path)
            changed[path] = jax.tree.map(lambda s, factor=factor: s * factor, step)
        return in_tree(steps, changed)

    return optax.stateless(update) if config.lr_multipliers else optax.identity()


class MuonState(NamedTuple):
    """The states of both optimizers, by path of the parameters that each has."""

    matrices: Any
    others: Any


def _muon(config: MuonConfig) -> optax.GradientTransformation:
    others = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)

    def orthogonalized(
        named: Parameters, found: Mapping[str, Matrix]
    ) -> optax.GradientTransformation:
        numbers = {}
        for path, matrix in found.items():
            sides = optax.contrib.MuonDimensionNumbers(*_sides(named[path], matrix, config))
            numbers[path] = NamedArray(sides, named[path].axes)
        return optax.contrib.scale_by_muon(
            ns_steps=config.newton_schulz_steps,
            beta=config.momentum,
            weight_dimension_numbers=lambda _: numbers,
        )

    def init(params: Any) -> Any:
        named, found = by_path(params), _inner_matrices(params)
        mine, theirs = _parted(named, found)
        return MuonState(orthogonalized(named, found).init(mine), others.init(theirs))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        named, found = by_path(updates), _inner_matrices(updates)
        mine: Any
        theirs: Any
        mine, theirs = _parted(named, found)
        mine, matrices_state = orthogonalized(named, found).update(mine, state.matrices)
        for path, matrix in found.items():
            rows, columns = _sides(named[path], matrix, config)
            shape = named[path].array.shape
            longest = max(math.prod(shape[d] for d in side) for side in (rows, columns))
            mine[path] = mine[path] * (config.update_rms * math.sqrt(longest))
        theirs, others_state = others.update(theirs, state.others)
        return in_tree(updates, {**mine, **theirs}), MuonState(matrices_state, others_state)

    return optax.GradientTransformation(init, update)


def _inner_matrices(params: Any) -> dict[str, Matrix]:
    found = {path: matrix for path, matrix in matrices(params).items() if matrix.is_inner}
    if not found:
        raise ValueError(
            "optimizer: muon found no matrices in the model: no `Linear` between axes that are not "
            "the vocabulary. Take another optimizer, such as adamw."
        )
    return found


def _parted(named: Parameters, found: Mapping[str, Matrix]) -> tuple[Parameters, Parameters]:
    mine = {path: named[path] for path in found}
    return mine, {path: p for path, p in named.items() if path not in found}


def _sides(
    weight: NamedArray, matrix: Matrix, config: MuonConfig
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns which dimensions of a weight are rows and columns; all others count matrices."""

    def dimensions(names: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(
            dimension
            for dimension, axis in enumerate(weight.axes)
            if axis.name in names and axis.name not in config.separate_axes
        )

    return dimensions(matrix.rows), dimensions(matrix.columns)
