"""The eval report: how well a checkpoint predicts the validation split, and what it writes.

    report.json   the results: what the report's content id is over (`content_id`)
    report.html   the same for people, one page that loads nothing from elsewhere

    loss           = sum of nats / number of predicted tokens
    perplexity     = exp(loss)
    bits per byte  = sum of nats / ln 2 / bytes of the predicted tokens

Nats and bytes are summed over all rows before anything is divided, in float64 from float32 losses
of single tokens, and rows that only fill up the last batch are dropped: another batch size changes
nothing but rounding.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax.numpy as jnp
import numpy as np

import haliax as hax
from haliax import Axis, NamedArray
from modeling import canonical
from modeling.artifacts import Built, Workspace
from modeling.data.cache import TokenCache
from modeling.data.rows import Rows, spread_rows
from modeling.data.tokenizer import PassthroughTokenizer, Tokenizer, load_tokenizer
from modeling.evaluation.config import EvaluationConfig
from modeling.evaluation.generate import Stop, greedy
from modeling.evaluation.heat_map import TokenView, render, views
from modeling.experiment import ExperimentConfig
from modeling.models.lm import LanguageModel, token_losses
from modeling.models.trained import load_model
from modeling.progress import Meter, Report, ignore
from modeling.training.precision import Policy

SPLIT = "validation"
REPORT_JSON, REPORT_HTML = "report.json", "report.html"

_STOPS: Mapping[Stop, str] = {
    "end": "the model ended the document",
    "limit": "stopped at the limit",
    "context": "stopped where the context was full",
}


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt and what the model makes of it."""

    prompt: str
    text: str
    num_tokens: int
    stopped: Stop


@dataclasses.dataclass(frozen=True)
class Results:
    """All that the report says, in plain values."""

    loss: float
    """Nats a token."""
    perplexity: float
    bits_per_byte: float | None
    """None where the bytes of a token are not known."""
    num_rows: int
    num_tokens: int
    """Those predicted: all of a row but its first, that of each segment, and those masked out."""
    num_bytes: int | None
    """What the predicted tokens stand for in UTF-8; special tokens for nothing."""
    loss_by_position: tuple[float | None, ...]
    """Mean nats for the second token of a row or segment, the third, and so on; None where the loss
    mask leaves none."""
    samples: tuple[Sample, ...]
    row: tuple[TokenView, ...]
    """The first validation row as the model saw it."""

    def facts(self) -> dict[str, Any]:
        """Returns figures and samples, without the curves and pictures."""
        figures = ("loss", "perplexity", "bits_per_byte", "num_rows", "num_tokens", "num_bytes")
        return {name: getattr(self, name) for name in figures} | {
            "samples": [dataclasses.asdict(sample) for sample in self.samples]
        }


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


def write(results: Results, directory: Path) -> None:
    """Writes both files of the report."""
    text = json.dumps(
        dataclasses.asdict(results), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False
    )
    (directory / REPORT_JSON).write_text(text + "\n", encoding="utf-8")
    (directory / REPORT_HTML).write_text(to_html(results), encoding="utf-8")


def content_id(report_dir: Path) -> str:
    """Returns the identity of a report: a digest of the canonical form of its `report.json`."""
    values = json.loads((report_dir / REPORT_JSON).read_text(encoding="utf-8"))
    # As bytes: texts that differ in Unicode normalization alone are different samples.
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return canonical.digest("eval_report/1", text.encode())


def to_html(results: Results) -> str:
    """Returns the report as one page; it says nothing that `results` does not."""
    figures = (
        ("Loss (nats per token)", f"{results.loss:.4f}"),
        ("Perplexity", f"{results.perplexity:,.2f}"),
        ("Bits per byte", "" if results.bits_per_byte is None else f"{results.bits_per_byte:.4f}"),
        ("Rows", f"{results.num_rows:,}"),
        ("Predicted tokens", f"{results.num_tokens:,}"),
        ("Bytes", "" if results.num_bytes is None else f"{results.num_bytes:,}"),
    )
    figures = tuple((name, value) for name, value in figures if value)
    return render(
        "report.html",
        figures=figures,
        chart=_chart(results.loss_by_position),
        samples=results.samples,
        stops=_STOPS,
        row=results.row,
    )


def _chart(by_position: Sequence[float | None]) -> dict[str, Any]:
    """Returns the geometry of a line through values, with round figures on the upright axis."""
    known = [(i, value) for i, value in enumerate(by_position) if value is not None]
    values = [value for _, value in known]
    width, height, left, right, top, bottom = 720, 220, 44, 712, 10, 196
    step = _tick_step(max(values) - min(values))
    low, high = math.floor(min(values) / step), math.ceil(max(values) / step)
    high = max(high, low + 1)

    def y(value: float) -> float:
        return round(bottom - (value / step - low) / (high - low) * (bottom - top), 1)

    span = max(len(by_position) - 1, 1)
    points = (f"{left + i / span * (right - left):.1f},{y(v)}" for i, v in known)
    ticks = [{"y": y(i * step), "label": f"{i * step:g}"} for i in range(low, high + 1)]
    return {
        "width": width,
        "height": height,
        "left": left,
        "right": right,
        "ticks": ticks,
        "points": " ".join(points),
        "last_position": len(by_position),
    }


def _tick_step(spread: float) -> float:
    """Returns 1, 2 or 5 times a power of ten, such that at most six of it cover `spread`."""
    rough = max(spread, 1e-6) / 5
    magnitude = 10.0 ** math.floor(math.log10(rough))
    return next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= rough)
