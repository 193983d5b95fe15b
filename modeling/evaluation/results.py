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
