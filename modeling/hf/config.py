"""How a model is exported. No JAX is imported here."""

import dataclasses
from typing import ClassVar, Literal

from modeling.canonical import added_later
from modeling.fields import STRICT
from modeling.training.config import WeightsChoice


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The dtype of the exported weights; `float32` loses nothing."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    weights: WeightsChoice = dataclasses.field(default="last", metadata=added_later("last"))
    """Of the last update, or the average that `trainer.ema` or `trainer.tail_average` keeps."""

    identity_tag: ClassVar[str] = "export/1"
    __pydantic_config__ = STRICT
