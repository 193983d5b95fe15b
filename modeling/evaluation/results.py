"""What an eval report says: its figures, its two files, and their identity.

    report.json   the results: what the report's content id is over (`content_id`)
    report.html   the same for people, one page that loads nothing from elsewhere

Imports no JAX, so that a report on record is shown and checked at once.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from modeling import canonical
from modeling.evaluation.heat_map import TokenView, render
from modeling.pictures import tick_step

REPORT_JSON, REPORT_HTML = "report.json", "report.html"

Stop = Literal["end", "limit", "context"]
"""The model ended the document; the wanted number of tokens were made; the row was full."""
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
class Figures:
    """What a model makes of the rows of one source."""

    loss: float | None
    """Nats a token; None where the loss mask of all its rows is 0."""
    perplexity: float | None
    bits_per_byte: float | None
    """None where the bytes of a token are not known, or there are none."""
    num_rows: int
    num_tokens: int
    num_bytes: int | None


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
    by_source: Mapping[str, Figures] = dataclasses.field(default_factory=dict)
    """Where the corpus has several; the figures above are then over the rows of all."""
    macro_loss: float | None = None
    """Mean of the losses of the sources, where there are several."""

    def plain(self) -> dict[str, Any]:
        """Returns all of it; what is said of several sources, only where there are several."""
        values = dataclasses.asdict(self)
        if not self.by_source:
            del values["by_source"], values["macro_loss"]
        return values

    def facts(self) -> dict[str, Any]:
        """Returns figures and samples, without the curves and pictures."""
        return {
            name: value
            for name, value in self.plain().items()
            if name not in ("loss_by_position", "row")
        } | {"samples": [dataclasses.asdict(sample) for sample in self.samples]}


def write(results: Results, directory: Path) -> None:
    """Writes both files of the report."""
    text = json.dumps(
        results.plain(), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False
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
    macro = results.macro_loss
    figures = (
        ("Loss (nats per token)", f"{results.loss:.4f}"),
        ("Perplexity", f"{results.perplexity:,.2f}"),
        ("Bits per byte", _shown(results.bits_per_byte, ".4f")),
        ("Mean loss of the sources", _shown(macro, ".4f")),
        ("Its perplexity", _shown(None if macro is None else math.exp(macro), ",.2f")),
        ("Rows", f"{results.num_rows:,}"),
        ("Predicted tokens", f"{results.num_tokens:,}"),
        ("Bytes", _shown(results.num_bytes, ",")),
    )
    figures = tuple((name, value) for name, value in figures if value)
    return render(
        "report.html",
        figures=figures,
        chart=_chart(results.loss_by_position),
        samples=results.samples,
        stops=_STOPS,
        row=results.row,
        sources=[
            (
                name,
                _shown(one.loss, ".4f"),
                _shown(one.perplexity, ",.2f"),
                _shown(one.bits_per_byte, ".4f"),
                f"{one.num_rows:,}",
                f"{one.num_tokens:,}",
            )
            for name, one in results.by_source.items()
        ],
    )


def _shown(value: int | float | None, pattern: str) -> str:
    return "" if value is None else format(value, pattern)


def _chart(by_position: Sequence[float | None]) -> dict[str, Any]:
    """Returns the geometry of a line through values, with round figures on the upright axis."""
    known = [(i, value) for i, value in enumerate(by_position) if value is not None]
    values = [value for _, value in known]
    width, height, left, right, top, bottom = 720, 220, 44, 712, 10, 196
    step = tick_step(max(values) - min(values))
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
