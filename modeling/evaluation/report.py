"""The eval report: how well a checkpoint predicts the validation split, and what it writes.

    loss           = sum of nats / number of predicted tokens
    perplexity     = exp(loss)
    bits per byte  = sum of nats / ln 2 / bytes of the predicted tokens

Nats and bytes are summed over all rows before anything is divided, in float64 from float32 losses
of single tokens, and rows that only fill up the last batch are dropped: another batch size changes
nothing but rounding. Of a corpus of several sources this is over the rows of all (the micro
average), and the same figures are given for each; the macro average is the mean of their losses.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
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
from modeling.data.splits import VALIDATION, role_of, source_of
from modeling.data.tokenizer import PassthroughTokenizer, Tokenizer, load_tokenizer
from modeling.evaluation.config import EvaluationConfig
from modeling.evaluation.foresight import views
from modeling.evaluation.generate import greedy
from modeling.evaluation.results import Figures, Results, Sample, content_id, write
from modeling.experiment import ExperimentConfig
from modeling.models.lm import LanguageModel, token_losses
from modeling.models.trained import load_model
from modeling.progress import Meter, Report, ignore
from modeling.training.precision import Policy


@runtime_checkable
class RowSource(Protocol):
    """What is evaluated on: a token cache, or anything that gives rows like one."""

    sequence_length: int

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        ...

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
    taken = row_indices(cache, config.max_rows)
    has_text = isinstance(tokenizer, Tokenizer)
    byte_lengths = tokenizer.token_byte_lengths() if has_text else None
    meter = Meter(report, "evaluation", sum(map(len, taken.values())), "rows")
    sums = {
        split: _summed(config, model, cache, split, indices, byte_lengths, meter)
        for split, indices in taken.items()
    }
    meter.finish()

    total = _Sums.of(sums.values())
    if total.num_tokens == 0:
        raise ValueError(
            f"None of the {total.num_rows} validation rows has a token to predict: their loss mask "
            f"is 0 all over. Hold out other documents, or raise validation.fraction of the dataset."
        )
    if not math.isfinite(total.nats):
        raise ValueError(
            f"The loss over {total.num_rows} validation rows is {total.nats}: the model has "
            f"diverged. Lower optimizer.learning_rate, or compute in float32 (trainer.mp)."
        )
    (first_row,) = views(model, cache.rows(next(iter(taken)), np.arange(1)), tokenizer.decode)
    by_source = {
        source: one.figures() for split, one in sums.items() if (source := source_of(split))
    }
    losses = [figures.loss for figures in by_source.values() if figures.loss is not None]
    figures = total.figures()
    assert figures.loss is not None
    assert figures.perplexity is not None
    return Results(
        loss=figures.loss,
        perplexity=figures.perplexity,
        bits_per_byte=figures.bits_per_byte,
        num_rows=figures.num_rows,
        num_tokens=figures.num_tokens,
        num_bytes=figures.num_bytes,
        loss_by_position=_means(total.position_nats[1:], total.position_tokens[1:]),
        samples=tuple(samples(config, model, tokenizer)) if has_text else (),
        row=first_row,
        by_source=by_source,
        macro_loss=math.fsum(losses) / len(losses) if by_source else None,
    )


@dataclass(frozen=True)
class _Sums:
    """What is added up over rows, before anything is divided."""

    num_rows: int
    position_nats: np.ndarray
    position_tokens: np.ndarray
    num_bytes: int | None

    @classmethod
    def of(cls, parts: Iterable["_Sums"]) -> "_Sums":
        """Returns the sums of all parts."""
        first, *others = parts
        for part in others:
            num_bytes = None
            if first.num_bytes is not None and part.num_bytes is not None:
                num_bytes = first.num_bytes + part.num_bytes
            first = cls(
                first.num_rows + part.num_rows,
                first.position_nats + part.position_nats,
                first.position_tokens + part.position_tokens,
                num_bytes,
            )
        return first

    @property
    def nats(self) -> float:
        return math.fsum(self.position_nats)

    @property
    def num_tokens(self) -> int:
        return int(self.position_tokens.sum())

    def figures(self) -> Figures:
        nats, num_tokens, num_bytes = self.nats, self.num_tokens, self.num_bytes
        return Figures(
            loss=nats / num_tokens if num_tokens else None,
            perplexity=math.exp(nats / num_tokens) if num_tokens else None,
            bits_per_byte=nats / math.log(2) / num_bytes if num_bytes else None,
            num_rows=self.num_rows,
            num_tokens=num_tokens,
            num_bytes=num_bytes,
        )


def _summed(
    config: EvaluationConfig,
    model: LanguageModel,
    cache: RowSource,
    split: str,
    indices: np.ndarray,
    byte_lengths: np.ndarray | None,
    meter: Meter,
) -> _Sums:
    """Returns the sums over some rows of a split."""
    position_nats = np.zeros(cache.sequence_length)
    position_tokens = np.zeros(cache.sequence_length, np.int64)
    num_bytes = None if byte_lengths is None else 0
    for start in range(0, len(indices), config.batch_size):
        rows = cache.rows(split, indices[start : start + config.batch_size])
        counts = rows.predicted()[:, 1:]
        nats = row_losses(model, rows, config.batch_size)[counts]
        positions = rows.positions()[:, 1:][counts]
        position_nats += np.bincount(positions, nats, len(position_nats))
        position_tokens += np.bincount(positions, minlength=len(position_nats))
        if byte_lengths is not None and num_bytes is not None:
            num_bytes += int(byte_lengths[rows.tokens[:, 1:][counts]].sum(dtype=np.int64))
        meter.advance(len(rows.tokens))
    return _Sums(len(indices), position_nats, position_tokens, num_bytes)


def _means(sums: np.ndarray, counts: np.ndarray) -> tuple[float | None, ...]:
    """Returns the quotients, None where there is none, up to the last that there is."""
    last = int(np.flatnonzero(counts).max(initial=-1))
    pairs = zip(sums[: last + 1].tolist(), counts[: last + 1].tolist(), strict=True)
    return tuple(total / count if count else None for total, count in pairs)


def row_indices(cache: RowSource, max_rows: int | None) -> dict[str, np.ndarray]:
    """Returns which rows are taken of each validation split that has any.

    Where not all are, each split has its share of them, and one row at least.
    """
    splits = [split for split in cache.splits if role_of(split) == VALIDATION]
    available = {split: rows for split in splits if (rows := cache.num_rows(split))}
    if not available:
        raise ValueError(
            f"No validation split ({', '.join(splits) or 'there is none'}) has a row of "
            f"{cache.sequence_length} tokens. Raise validation.fraction of the dataset, or take a "
            f"shorter sequence_length."
        )
    total = sum(available.values())
    wanted = total if max_rows is None else max_rows
    return {
        split: spread_rows(rows, max(wanted * rows // total, 1))
        for split, rows in available.items()
    }


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
