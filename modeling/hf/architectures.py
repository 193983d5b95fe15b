"""The architectures that `transformers` knows too, by their `model_type`; each has its file."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np

from modeling.hf import gpt2, llama
from modeling.models.lm import Model

_BY_TYPE: Mapping[str, ModuleType] = {"gpt2": gpt2, "llama": llama}


def to_tensors(model: Model) -> dict[str, np.ndarray]:
    """Returns the model's weights by Hugging Face name, in the dtype that they have."""
    return _BY_TYPE[model.config.type].to_tensors(model)


def to_hf_config(
    model: Model, *, dtype: str, bos_token_id: int | None, eos_token_id: int
) -> dict[str, Any]:
    """Returns the model's `config.json`."""
    write = _BY_TYPE[model.config.type].to_hf_config
    return write(model, dtype=dtype, bos_token_id=bos_token_id, eos_token_id=eos_token_id)


def of_hf_config(hf_config: Mapping[str, Any]) -> ModuleType:
    """Returns the file of the architecture that a `config.json` describes.

    Raises:
        ValueError: there is none of that `model_type`.
    """
    found = hf_config.get("model_type")
    if not isinstance(found, str) or found not in _BY_TYPE:
        raise ValueError(
            f"config.json: model_type: {found!r} is not supported, only "
            f"{' or '.join(map(repr, _BY_TYPE))}. Convert the model, or choose another."
        )
    return _BY_TYPE[found]
