"""The eval report: how well a checkpoint predicts the validation split, and what it writes.

    loss           = sum of nats / number of predicted tokens
    perplexity     = exp(loss)
    bits per byte  = sum of nats / ln 2 / bytes of the predicted tokens

Nats and bytes are summed over all rows before anything is divided, in float64 from float32 losses
of single tokens, and rows that only fill up the last batch are dropped: another batch size changes
nothing but rounding.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import equinox as eqx
import jax.numpy as jnp
import numpy as np

import haliax as hax
from haliax import Axis, NamedArray
from modeling.artifacts import Built, Workspace
from modeling.data.cache import TokenCache
from modeling.data.rows import Rows, spread_rows
from modeling.data.tokenizer import PassthroughTokenizer, Tokenizer, load_tokenizer
from modeling.evaluation.config import EvaluationConfig
from modeling.evaluation.foresight import views
from modeling.evaluation.generate import greedy
from modeling.evaluation.results import Results, Sample, content_id, write
from modeling.experiment import ExperimentConfig
from modeling.models.lm import LanguageModel, token_losses
from modeling.models.trained import load_model
from modeling.progress import Meter, Report, ignore
from modeling.training.precision import Policy

SPLIT = "validation"


@runtime_checkable
class RowSource(Protocol):
    """What is evaluated on: a token cache, or anything that gives rows like one."""

    sequence_length: int

    def num_rows(self, split: str) -> int:
        """Returns how many rows a split has."""
        ...

    def rows(self, split: str, indices: np.ndarray) -> Rows:
        """Returns the rows at `indices`."""
        ...


def build(
    experiment: ExperimentConfig,
    checkpoint_dir: Path,
    cache: TokenCache,
    tokenizer_dir: Path,
    workspace: Workspace,
    *,
    report: Report = ignore,
) -> Built:
    """Evaluates a checkpoint in the precision that it was trained in, and writes the report."""
    model = load_model(checkpoint_dir, experiment, experiment.evaluation.weights)
    model = Policy.parse(experiment.trainer.mp).cast_to_compute(model)
    tokenizer = load_tokenizer(tokenizer_dir)
    results = evaluate(experiment.evaluation, model, cache, tokenizer, report=report)
    write(results, workspace.output)
    return Built(content_id(workspace.output), facts=results.facts())


def evaluate(
    config: EvaluationConfig,
    model: LanguageModel,
    cache: RowSource,
    tokenizer: Tokenizer | PassthroughTokenizer,
    *,
    report: Report = ignore,
) -> Results:
    """Returns what `model` makes of the validation rows of `cache`, and samples from it.

    Raises:
        ValueError: there is no validation row, or the loss is not finite.
    """
    indices = row_indices(cache, config.max_rows)
    num_rows = len(indices)
    position_nats = np.zeros(cache.sequence_length)
    position_tokens = np.zeros(cache.sequence_length, np.int64)
    has_text = isinstance(tokenizer, Tokenizer)
    byte_lengths = tokenizer.token_byte_lengths() if has_text else None
    num_bytes = None if byte_lengths is None else 0
    meter = Meter(report, "evaluation", num_rows, "rows")
    for start in range(0, num_rows, config.batch_size):
        rows = cache.rows(SPLIT, indices[start : start + config.batch_size])
        counts = rows.predicted()[:, 1:]
        nats = row_losses(model, rows, config.batch_size)[counts]
        positions = rows.positions()[:, 1:][counts]
        position_nats += np.bincount(positions, nats, len(position_nats))
        position_tokens += np.bincount(positions, minlength=len(position_nats))
        if byte_lengths is not None and num_bytes is not None:
            num_bytes += int(byte_lengths[rows.tokens[:, 1:][counts]].sum(dtype=np.int64))
        meter.advance(len(rows.tokens))
    meter.finish()

    nats, num_tokens = math.fsum(position_nats), int(position_tokens.sum())
    if num_tokens == 0:
        raise ValueError(
            f"None of the {num_rows} validation rows has a token to predict: their loss mask is 0 "
            f"all over. Hold out other documents, or raise validation.fraction of the dataset."
        )
    if not math.isfinite(nats):
        raise ValueError(
            f"The loss over {num_rows} validation rows is {nats}: the model has diverged. Lower "
            f"optimizer.learning_rate, or compute in float32 (trainer.mp)."
        )
    (first_row,) = views(model, cache.rows(SPLIT, np.arange(1)), tokenizer.decode)
    return Results(
        loss=nats / num_tokens,
        perplexity=math.exp(nats / num_tokens),
        bits_per_byte=None if num_bytes is None else nats / math.log(2) / num_bytes,
        num_rows=num_rows,
        num_tokens=num_tokens,
        num_bytes=num_bytes,
        loss_by_position=_means(position_nats[1:], position_tokens[1:]),
        samples=tuple(samples(config, model, tokenizer)) if has_text else (),
        row=first_row,
    )


def _means(sums: np.ndarray, counts: np.ndarray) -> tuple[float | None, ...]:
    """Returns the quotients, None where there is none, up to the last that there is."""
    last = int(np.flatnonzero(counts).max(initial=-1))
    pairs = zip(sums[: last + 1].tolist(), counts[: last + 1].tolist(), strict=True)
    return tuple(total / count if count else None for total, count in pairs)


def row_indices(cache: RowSource, max_rows: int | None) -> np.ndarray:
    """Returns which validation rows are taken."""
    available = cache.num_rows(SPLIT)
    if available == 0:
        raise ValueError(
            f"The split `{SPLIT}` has no row of {cache.sequence_length} tokens. Raise "
            f"validation.fraction of the dataset, or take a shorter sequence_length."
        )
    return spread_rows(available, max_rows or available)


def row_losses(model: LanguageModel, rows: Rows, batch_size: int) -> np.ndarray:
    """Returns the loss in nats of every token of `rows` but the first ones, in float64.

    Which of them mean something, `rows.predicted` says.

    Fewer rows than `batch_size` are filled up to it, so that one compiled program serves all.
    """
    num_rows, length = rows.tokens.shape
    Batch, Row = Axis("batch", batch_size), model.Pos.resize(length)

    def filled(column: np.ndarray) -> NamedArray:
        padding = np.repeat(column[:1], batch_size - num_rows, axis=0)
        return hax.named(jnp.asarray(np.concatenate([column, padding])), (Batch, Row))

    segment_ids = None if rows.segment_ids is None else filled(rows.segment_ids)
    losses = _token_losses(model, filled(rows.tokens), segment_ids)
    raw = np.asarray(losses.rearrange((Batch, Row)).array)
    return raw[:num_rows, :-1].astype(np.float64)


@eqx.filter_jit
def _token_losses(
    model: LanguageModel, tokens: NamedArray, segment_ids: NamedArray | None
) -> NamedArray:
    return token_losses(model, tokens, segment_ids=segment_ids)


def samples(
    config: EvaluationConfig, model: LanguageModel, tokenizer: Tokenizer
) -> Iterator[Sample]:
    """Yields the greedy continuation of each prompt; an empty prompt begins a document."""
    prompts = [tokenizer.encode(prompt) or [tokenizer.eos_id] for prompt in config.prompts]
    made = greedy(model, prompts, config.sample_tokens, end_id=tokenizer.eos_id)
    for prompt, continuation in zip(config.prompts, made, strict=True):
        text = tokenizer.decode(continuation.tokens)
        yield Sample(prompt, text, len(continuation.tokens), continuation.stopped)
