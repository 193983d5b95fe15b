"""A checkpoint as a Hugging Face model directory that says where it comes from.

    config.json              what the model is; generation_config.json beside it
    model.safetensors        weights in `transformers`' layout, one metadata key (`format`): several
                             would be written in an order that changes from process to process
    tokenizer.json           byte for byte the tokenizer artifact's; tokenizer_config.json and
                             special_tokens_map.json tell `AutoTokenizer` how to use it, and
                             chat_template.jinja is beside them if the tokenizer came with one;
                             none of these where documents were ids already
    README.md                model card: lineage from checkpoint back to corpus, SHA-256 of files

Nothing in these files depends on path, clock or host: the same checkpoint and lineage give the same
bytes. The content id covers the logical tensors (name, dtype, shape, SHA-256) and every file.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

import haliax as hax
from haliax import Axis
from modeling import canonical
from modeling.artifacts import Built, Workspace
from modeling.data.tokenizer import (
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    PassthroughTokenizer,
    Tokenizer,
    load_tokenizer,
)
from modeling.experiment import ExperimentConfig
from modeling.hf import reference
from modeling.hf.architectures import to_hf_config, to_tensors
from modeling.hf.model_card import model_card
from modeling.inventory import file_sha256
from modeling.models.lm import Model
from modeling.models.trained import load_model
from modeling.progress import Meter, Report, ignore

WEIGHTS, MODEL_CARD = "model.safetensors", "README.md"


def build(
    experiment: ExperimentConfig,
    checkpoint_dir: Path,
    tokenizer_dir: Path,
    lineage: Mapping[str, str],
    workspace: Workspace,
    *,
    evaluation: Mapping[str, float] | None = None,
    report: Report = ignore,
) -> Built:
    """Writes the export of a checkpoint.

    Args:
        experiment: what the checkpoint was trained by; its `export` says in which dtype to write.
        checkpoint_dir: the checkpoint's files.
        tokenizer_dir: the tokenizer that the model was trained with.
        lineage: content ids by artifact kind, from the corpus to the checkpoint, for the card.
        workspace: where to write.
        evaluation: figures for the card, such as the perplexity.
        report: told of the progress.
    """
    model = load_model(checkpoint_dir, experiment, experiment.export.weights)
    return write(
        model, tokenizer_dir, lineage, workspace.output,
        dtype=experiment.export.dtype, evaluation=evaluation, report=report,
    )  # fmt: skip


def write(
    model: Model,
    tokenizer_dir: Path,
    lineage: Mapping[str, str],
    output: Path,
    *,
    dtype: str,
    evaluation: Mapping[str, float] | None = None,
    report: Report = ignore,
) -> Built:
    """Writes the export of a model; the rest is as in `build`."""
    tokenizer = load_tokenizer(tokenizer_dir)
    _require_same_vocabulary(model, tokenizer, tokenizer_dir)
    tensors = {name: t.astype(jnp.dtype(dtype)) for name, t in to_tensors(model).items()}
    num_parameters = sum(tensor.size for tensor in tensors.values())
    meter = Meter(report, "export", num_parameters, "parameters")
    save_file(tensors, output / WEIGHTS, metadata={"format": "pt"})
    (output / WEIGHTS).chmod(0o644)  # the library makes it its owner's alone, unlike every other
    meter.advance(num_parameters)

    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    config = to_hf_config(model, dtype=dtype, **ids)
    _write_json(output / "config.json", config)
    _write_json(output / "generation_config.json", ids | {"pad_token_id": tokenizer.eos_id})
    if isinstance(tokenizer, Tokenizer):
        _write_tokenizer(output, tokenizer, tokenizer_dir, max_length=model.Pos.size)
    card = model_card(
        config,
        num_parameters=num_parameters,
        lineage=lineage,
        digests=_digests(output),
        evaluation=evaluation,
        has_tokenizer=isinstance(tokenizer, Tokenizer),
    )
    (output / MODEL_CARD).write_text(card, encoding="utf-8")
    meter.finish()

    leaves = {name: _tensor_digest(tensor) for name, tensor in tensors.items()}
    sizes = {path.name: path.stat().st_size for path in sorted(output.iterdir())}
    facts = {"num_parameters": num_parameters, "dtype": dtype, "files": sizes}
    content_id = canonical.digest("hf_model/1", {"tensors": leaves, "files": _digests(output)})
    return Built(content_id, facts=facts, leaves=leaves)


@dataclasses.dataclass(frozen=True)
class LogitDifference:
    """How far two models' logits are apart, and how large they are."""

    max_abs: float
    largest: float
    """The largest |logit|: float32 rounds in proportion to it."""

    @property
    def limit(self) -> float:
        """What float32 rounding explains: 1e-5, or eight units in the last place of the largest."""
        return max(1e-5, 8 * float(np.finfo(np.float32).eps) * self.largest)


def logit_difference(
    export_dir: Path, checkpoint_dir: Path, experiment: ExperimentConfig, token_rows: np.ndarray
) -> LogitDifference:
    """Returns by how much the export's logits differ from the checkpoint's, at most, on some rows.

    The export is computed by `reference` in float64; the checkpoint by our model in float32, from
    weights rounded as the export's are, so that only the computation is left to differ.
    """
    dtype = jnp.dtype(experiment.export.dtype)
    model = jax.tree.map(
        lambda x: x.astype(dtype).astype(jnp.float32),
        load_model(checkpoint_dir, experiment, experiment.export.weights),
    )
    ours = float32_logits(model, token_rows)
    max_abs = reference.max_abs_logit_difference(export_dir, token_rows, ours)
    return LogitDifference(max_abs, float(np.max(np.abs(ours))))


def float32_logits(model: Model, token_rows: np.ndarray) -> np.ndarray:
    """Returns logits `[rows, positions, vocab]`, with products in full float32 on every device."""
    Row, Position = Axis("row", len(token_rows)), model.Pos.resize(token_rows.shape[1])
    tokens = hax.named(jnp.asarray(token_rows, jnp.int32), (Row, Position))
    with jax.default_matmul_precision("highest"):
        logits = hax.named_jit(model)(tokens)
    return np.asarray(logits.rearrange((Row, Position, model.Vocab)).array)


def _require_same_vocabulary(
    model: Model, tokenizer: Tokenizer | PassthroughTokenizer, tokenizer_dir: Path
) -> None:
    if tokenizer.vocab_size != model.Vocab.size:
        raise ValueError(
            f"{tokenizer_dir}: the tokenizer has {tokenizer.vocab_size} ids, but the checkpoint's "
            f"model {model.Vocab.size}. Export with the tokenizer that the model was trained with."
        )


def _write_tokenizer(
    output: Path, tokenizer: Tokenizer, tokenizer_dir: Path, *, max_length: int
) -> None:
    """Writes the files that `AutoTokenizer` reads; it adds no token and cleans no text up."""
    special = {f"{role}_token": token for role, token in tokenizer.named_tokens.items()}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    (output / TOKENIZER_FILE).write_bytes((tokenizer_dir / TOKENIZER_FILE).read_bytes())
    if tokenizer.chat_template is not None:
        (output / TEMPLATE_FILE).write_text(tokenizer.chat_template, encoding="utf-8")
    _write_json(output / "special_tokens_map.json", special)
    _write_json(output / "tokenizer_config.json", settings | special)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _digests(directory: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in sorted(directory.iterdir())}


def _tensor_digest(tensor: np.ndarray) -> str:
    """Returns an id of dtype, shape and row-major bytes."""
    data = hashlib.sha256(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data).hexdigest()
    return canonical.digest("tensor/1", [tensor.dtype.name, list(tensor.shape), data])
