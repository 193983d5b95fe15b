"""Hyperparameters of optimizers and learning-rate schedules. No JAX is imported here."""

import dataclasses
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

STRICT = ConfigDict(extra="forbid", strict=True)
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CosineScheduleConfig:
    """Linear warmup to the peak, then half a cosine down to `min_lr_ratio` of it."""

    type: Literal["cosine"] = "cosine"
    warmup: Annotated[int, Field(ge=0)] | Fraction = 0.01
    """Steps if written as an integer, a share of the run if written with a decimal point."""
    min_lr_ratio: Fraction = 0.1

    identity_tag: ClassVar[str] = "schedule.cosine/1"
    __pydantic_config__ = STRICT


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    """AdamW (Loshchilov & Hutter 2019); decay spares biases, layer norms and embeddings."""

    type: Literal["adamw"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0.0)] = 6e-4
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    epsilon: Annotated[float, Field(gt=0.0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    max_grad_norm: Annotated[float, Field(gt=0.0)] = 1.0
    schedule: CosineScheduleConfig = CosineScheduleConfig()

    identity_tag: ClassVar[str] = "optim.adamw/1"
    __pydantic_config__ = STRICT


OptimizerConfig = AdamWConfig
