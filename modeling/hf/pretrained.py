"""A model from a local Hugging Face directory, to go on training or to evaluate.

    config.json                      what the model is; see `from_hf_config` of its architecture
    model.safetensors                its weights, or, for a large model in several files,
    model.safetensors.index.json     {"weight_map": {tensor name: file name}}

Only safetensors are read. The older `pytorch_model.bin` is a pickle, which can run any code.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import safe_open

from modeling.hf import architectures
from modeling.models.lm import Model

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


def load_pretrained(directory: Path, *, vocab_pad_multiple: int = 1) -> Model:
    """Returns the model in `directory`, in the dtype that its weights have.

    Args:
        directory: with the files of a model.
        vocab_pad_multiple: up to a multiple of how many rows to pad the embedding.

    Raises:
        FileNotFoundError: a file is missing; the message says which, and what to do.
        ValueError: no architecture here is that model's, or its weights do not fit its
            configuration.
    """
    if not (directory / CONFIG).is_file():
        raise FileNotFoundError(f"{directory / CONFIG}: no such file. Give a model's directory.")
    hf_config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    try:
        architecture = architectures.of_hf_config(hf_config)
        config, Vocab, Pos = architecture.from_hf_config(hf_config)
        config = dataclasses.replace(config, vocab_pad_multiple=vocab_pad_multiple)
        return architecture.from_tensors(_tensors(directory), config, Vocab, Pos)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error


def _tensors(directory: Path) -> dict[str, np.ndarray]:
    if not (directory / INDEX).is_file():
        return _read(directory / WEIGHTS)
    weight_map = json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"]
    tensors = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise ValueError(f"{INDEX}: {name!r} is not the name of a file beside it.")
        tensors |= _read(directory / name)
    _require_all(weight_map, tensors)
    return tensors


def _require_all(weight_map: Mapping[str, str], tensors: Mapping[str, np.ndarray]) -> None:
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise ValueError(
            f"{INDEX} places `{missing[0]}` in {weight_map[missing[0]]}, which lacks it "
            f"({len(missing)} such tensors). Download the directory again."
        )


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        hint = "Download it again."
        if any(path.parent.glob("*.bin")):
            hint = "Convert the `.bin` files, pickles that are not read here, to safetensors."
        raise FileNotFoundError(f"{path}: no such file. {hint}")
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
