"""Token probabilities as a picture: the background says how well the model foresaw each token.

One `TokenView` a token: its text, the probability that the model gave it from what stands before,
and what the model would rather have seen. The same view is drawn in the eval report and, during
training, as a page of its own (`page`). All text is escaped by the template engine, so a corpus
full of HTML is shown, never run; nothing is loaded from elsewhere.

Colours come in bands of probability, not as a gradient: a legend can name a band, the eye can tell
six of them apart, and their lightness alone orders them, also in grey or for the colour-blind
(after ColorBrewer's YlOrRd).

Drawing takes what `foresight` has computed, or a report has kept, and imports no JAX.
"""

import bisect
import dataclasses
from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import escape

from modeling import pages


@dataclasses.dataclass(frozen=True)
class TokenView:
    """One token of a row as the model saw it."""

    text: str
    probability: float | None
    """None for the first token of a row or segment, which nothing foretells."""
    alternatives: tuple[tuple[str, float], ...] = ()
    """The likeliest tokens in its place, best first, with their probabilities."""


@dataclasses.dataclass(frozen=True)
class Band:
    """A range of probabilities drawn in one colour."""

    floor: float
    label: str
    background: str
    ink: str


BANDS = (
    Band(0.0, "under 0.1 %", "#a50f26", "#ffffff"),
    Band(0.001, "0.1 to 1 %", "#e8502d", "#000000"),
    Band(0.01, "1 to 10 %", "#fd9a4e", "#000000"),
    Band(0.1, "10 to 50 %", "#fed98e", "#000000"),
    Band(0.5, "50 to 90 %", "#fff3bf", "#000000"),
    Band(0.9, "over 90 %", "#ffffff", "#000000"),
)
"""From surprise to certainty; each floor belongs to its band."""

# Characters that a reader could not see, each drawn as a sign; a line break also breaks the line.
_SIGNS = {"\n": "↵\n", "\r": "␍", "\t": "⇥\t"}


def band_of(probability: float) -> int:
    """Returns the index in `BANDS` of the band that `probability` lies in."""
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"{probability} is not a probability; give a number from 0 to 1.")
    return bisect.bisect_right([band.floor for band in BANDS], probability) - 1


def visible(text: str) -> str:
    """Returns `text` with signs for line breaks, tabs and other characters that print nothing."""
    return "".join(_visible_character(character) for character in text) or "∅"


def page(title: str, rows: Sequence[Sequence[TokenView]], *, caption: str = "") -> str:
    """Returns one self-contained HTML page that shows `rows`, for a live view during training."""
    return render("live.html", title=title, caption=caption, rows=rows)


def drawing(row: Sequence[TokenView], *, columns: int = 96) -> str:
    """Returns a row as a picture (SVG), for where a page cannot be; lines hold `columns` signs."""
    width, height = 7.5, 20
    parts, column, line = [], 0, 0
    for token in row:
        for number, shown in enumerate(visible(token.text).split("\n")):
            if number or column + len(shown) > columns:
                column, line = 0, line + 1
            if not shown:
                continue
            x, y, size = column * width, line * height, len(shown) * width
            column += len(shown)
            band = None if token.probability is None else BANDS[band_of(token.probability)]
            colours = ("#d0d7de", "#000000") if band is None else (band.background, band.ink)
            parts.append(
                f'<rect x="{x:g}" y="{y}" width="{size:g}" height="{height - 1}" '
                f'fill="{colours[0]}"/><text x="{x:g}" y="{y + 14}" textLength="{size:g}" '
                f'fill="{colours[1]}">{escape(shown)}</text>'
            )
    legend_y = (line + 2) * height
    for place, band in enumerate(BANDS):
        x = place * columns * width / len(BANDS)
        parts.append(
            f'<rect x="{x:g}" y="{legend_y}" width="12" height="12" fill="{band.background}" '
            f'stroke="#888888"/><text x="{x + 18:g}" y="{legend_y + 11}" fill="#59636e" '
            f'font-family="sans-serif">{band.label}</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{columns * width:g}" '
        f'height="{legend_y + height}" font-family="monospace" font-size="12" '
        f'xml:space="preserve"><rect width="100%" height="100%" fill="#ffffff"/>'
        + "".join(parts) + "</svg>"
    )  # fmt: skip


def render(template: str, **values: Any) -> str:
    """Returns the named template filled in, with everything in `values` escaped."""
    environment = pages.templates("modeling.evaluation")
    environment.filters.update(visible=visible, percent=_percent)
    environment.globals.update(bands=BANDS, band_of=band_of)
    return environment.get_template(template).render(**values)


def _visible_character(character: str) -> str:
    if character in _SIGNS:
        return _SIGNS[character]
    if character < " ":
        return chr(0x2400 + ord(character))  # Unicode's control pictures
    return "␡" if character == "\x7f" else character


def _percent(probability: float) -> str:
    return f"{100 * probability:.3g} %"
