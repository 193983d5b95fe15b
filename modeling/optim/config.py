"""Hyperparameters of optimizers and learning-rate schedules. No JAX is imported here.

Both are unions on `type`; `schedules` and `build` have the equations. A *duration* is a number of
updates if written as an integer, and a share of the run if written with a decimal point: `1` is one
update, `1.0` the whole run.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, Tag

from modeling.canonical import added_later
from modeling.fields import STRICT, Positive, RegularExpression, type_or

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]
"""Of a moving average: 1.0 would never take anything in."""
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
Duration = Annotated[int, Field(ge=0)] | Fraction


Pattern = RegularExpression
"""A regular expression of parameters: of their whole dotted path, or of any whole part of it."""

UNDECAYED: tuple[str, ...] = (
    "bias",
    r"(ln|norm|layer_?norm)(_.*)?",
    ".*_(ln|norm)",
    ".*embed(ding)?s?(_.*)?",
    "w[tp]e",
)
"""Biases, normalizations and embeddings."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConstantScheduleConfig:
    """Linear warmup to the peak, which is held."""

    type: Literal["constant"]
    warmup: Duration = 0.01

    identity_tag: ClassVar[str] = "schedule.constant/1"
    __pydantic_config__ = STRICT


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScheduleConfig:
    """Linear warmup to the peak, then a straight line down to `min_lr_ratio` of it."""

    type: Literal["linear"]
    warmup: Duration = 0.01
    min_lr_ratio: Fraction = 0.1

    identity_tag: ClassVar[str] = "schedule.linear/1"
    __pydantic_config__ = STRICT


@dataclasses.dataclass(frozen=True, kw_only=True)
class CosineScheduleConfig:
    """Linear warmup to the peak, then half a cosine down to `min_lr_ratio` of it."""

    type: Literal["cosine"] = "cosine"
    warmup: Duration = 0.01
    min_lr_ratio: Fraction = 0.1

    identity_tag: ClassVar[str] = "schedule.cosine/1"
    __pydantic_config__ = STRICT


@dataclasses.dataclass(frozen=True, kw_only=True)
class InverseSqrtScheduleConfig:
    """Linear warmup to the peak, then a fall with the square root of the updates made."""

    type: Literal["inverse_sqrt"]
    warmup: Duration = 0.01
    timescale: Duration | None = None
    """After so many more updates the rate has fallen to 0.71 of the peak; as long as the warmup
    when absent, which makes it `peak * sqrt(warmup / update)`."""
    min_lr_ratio: Fraction = 0.0

    identity_tag: ClassVar[str] = "schedule.inverse_sqrt/1"
    __pydantic_config__ = STRICT


@dataclasses.dataclass(frozen=True, kw_only=True)
class WsdScheduleConfig:
    """Warmup, the peak held as long as possible, and a decay at the end (arXiv 2404.06395)."""

    type: Literal["wsd"]
    warmup: Duration = 0.01
    decay: Duration = 0.2
    shape: Literal["linear", "cosine", "sqrt", "exponential"] = "sqrt"
    """Of the decay; `sqrt` is the 1 - sqrt of arXiv 2405.18392."""
    min_lr_ratio: Fraction = 0.0

    identity_tag: ClassVar[str] = "schedule.wsd/1"
    __pydantic_config__ = STRICT


@dataclasses.dataclass(frozen=True, kw_only=True)
class CyclesScheduleConfig:
    """Several anneals, one after another, each after the first warmed up again from the floor."""

    type: Literal["cycles"]
    cycles: Positive | Annotated[tuple[Duration, ...], Field(min_length=1)]
    """How many of equal length, or the length of each; together they are the run."""
    warmup: Duration = 0.01
    rewarmup: Duration = 0.01
    """Before each cycle but the first: from the floor to the peak."""
    shape: Literal["linear", "cosine"] = "cosine"
    peak_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Of each cycle's peak to the one before."""
    min_lr_ratio: Fraction = 0.1

    identity_tag: ClassVar[str] = "schedule.cycles/1"
    __pydantic_config__ = STRICT


ScheduleConfig = Annotated[
    Annotated[ConstantScheduleConfig, Tag("constant")]
    | Annotated[LinearScheduleConfig, Tag("linear")]
    | Annotated[CosineScheduleConfig, Tag("cosine")]
    | Annotated[InverseSqrtScheduleConfig, Tag("inverse_sqrt")]
    | Annotated[WsdScheduleConfig, Tag("wsd")]
    | Annotated[CyclesScheduleConfig, Tag("cycles")],
    type_or("cosine"),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractOptimizerConfig:
    """What every optimizer has: a peak rate and its schedule, decay, clipping, and who is spared.

    Weight decay is decoupled: `w -= lr * weight_decay * w` beside the optimizer's own update.
    """

    learning_rate: PositiveFloat
    weight_decay: NonNegativeFloat
    max_grad_norm: PositiveFloat = 1.0
    """Gradients of a larger global norm are scaled down to it."""
    schedule: ScheduleConfig = CosineScheduleConfig()
    undecayed: tuple[Pattern, ...] = dataclasses.field(
        default=UNDECAYED, metadata=added_later(UNDECAYED)
    )
    """Parameters that weight decay spares."""
    lr_multipliers: Mapping[Pattern, NonNegativeFloat] = dataclasses.field(
        default_factory=dict, metadata=added_later({})
    )
    """Times the learning rate, for the parameters that a pattern matches; 0.0 freezes them."""

    __pydantic_config__ = STRICT


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamWConfig(AbstractOptimizerConfig):
    """AdamW (Loshchilov & Hutter 2019); decay spares biases, layer norms and embeddings."""

    type: Literal["adamw"] = "adamw"
    learning_rate: PositiveFloat = 6e-4
    weight_decay: NonNegativeFloat = 0.1
    beta1: Rate = 0.9
    beta2: Rate = 0.95
    epsilon: PositiveFloat = 1e-8

    identity_tag: ClassVar[str] = "optim.adamw/1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LionConfig(AbstractOptimizerConfig):
    """Lion (Chen et al. 2023): the sign of a momentum; one moment, a smaller rate, more decay."""

    type: Literal["lion"]
    learning_rate: PositiveFloat = 1e-4
    weight_decay: NonNegativeFloat = 0.6
    beta1: Rate = 0.95
    beta2: Rate = 0.98

    identity_tag: ClassVar[str] = "optim.lion/1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdafactorConfig(AbstractOptimizerConfig):
    """Adafactor (Shazeer & Stern 2018): second moments of matrices as a row and a column."""

    type: Literal["adafactor"]
    learning_rate: PositiveFloat = 1e-2
    """Relative to the size of each parameter, unless `relative_updates` is off."""
    weight_decay: NonNegativeFloat = 0.0
    relative_updates: bool = True
    beta1: Rate = 0.0
    """Of a momentum of updates, which costs an array the size of the weights; 0.0 keeps none."""
    decay_exponent: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.8
    """The second moment's rate at update t is `1 - t ** -decay_exponent`."""
    max_update_rms: PositiveFloat = 1.0
    epsilon: PositiveFloat = 1e-30
    smallest_factored: Positive = 128
    """Matrices with fewer rows or columns keep their second moments whole."""

    identity_tag: ClassVar[str] = "optim.adafactor/1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MuonConfig(AbstractOptimizerConfig):
    """Muon (Jordan et al. 2024) for the matrices inside the model, AdamW for everything else."""

    type: Literal["muon"]
    learning_rate: PositiveFloat = 6e-4
    weight_decay: NonNegativeFloat = 0.1
    momentum: Rate = 0.95
    newton_schulz_steps: Positive = 5
    update_rms: PositiveFloat = 0.2
    """Of the updates of matrices: that of AdamW's (arXiv 2502.16982), so that one learning rate
    serves both."""
    separate_axes: tuple[str, ...] = ("qkv",)
    """Axes of a weight that count different matrices, besides layers and experts."""
    beta1: Rate = 0.9
    beta2: Rate = 0.95
    epsilon: PositiveFloat = 1e-8

    identity_tag: ClassVar[str] = "optim.muon/1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractSophiaConfig(AbstractOptimizerConfig):
    """Sophia (Liu et al. 2023, arXiv 2305.14342): a momentum over an estimated curvature, clipped.

    The curvature is estimated once in `estimate_every` updates, on part of the batch.
    """

    learning_rate: PositiveFloat = 5e-4
    weight_decay: NonNegativeFloat = 0.2
    beta1: Rate = 0.96
    beta2: Rate = 0.99
    gamma: PositiveFloat
    epsilon: PositiveFloat = 1e-12
    estimate_every: Positive = 10
    estimate_rows: Positive | Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Rows of the batch that each estimate takes, or their share."""

    def is_due(self, updates_made: Any) -> Any:
        """Returns whether the next update takes an estimate in; of an array, an array."""
        return updates_made % self.estimate_every == 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SophiaHConfig(AbstractSophiaConfig):
    """Sophia with Hutchinson's estimate of the Hessian's diagonal: a second differentiation."""

    type: Literal["sophia_h"]
    gamma: PositiveFloat = 0.01

    identity_tag: ClassVar[str] = "optim.sophia_h/1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SophiaGConfig(AbstractSophiaConfig):
    """Sophia with the Gauss-Newton-Bartlett estimate: a gradient towards the model's own labels."""

    type: Literal["sophia_g"]
    gamma: PositiveFloat = 0.05

    identity_tag: ClassVar[str] = "optim.sophia_g/1"


SophiaConfig = SophiaHConfig | SophiaGConfig
OptimizerConfig = Annotated[
    Annotated[AdamWConfig, Tag("adamw")]
    | Annotated[LionConfig, Tag("lion")]
    | Annotated[AdafactorConfig, Tag("adafactor")]
    | Annotated[MuonConfig, Tag("muon")]
    | Annotated[SophiaHConfig, Tag("sophia_h")]
    | Annotated[SophiaGConfig, Tag("sophia_g")],
    type_or("adamw"),
]
