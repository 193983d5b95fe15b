"""How a model is exported. No JAX is imported here."""

import dataclasses
from typing import ClassVar, Literal

from pydantic import ConfigDict

STRICT = ConfigDict(extra="forbid", strict=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The dtype of the exported weights; `float32` loses nothing."""

    dtype: Literal["float32", "bfloat16"] = "float32"

    identity_tag: ClassVar[str] = "export/1"
    __pydantic_config__ = STRICT
