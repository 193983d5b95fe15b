"""Pictures of figures as SVG: they cost no import, and every page can hold them."""

import math
from collections.abc import Iterator, Sequence
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 640, 220, 8, 24, 180
_INK, _GRID, _DIM = "#0b5cad", "#d0d7de", "#59636e"
_MOST_PLACES = 600


def histogram(counts: Sequence[tuple[int, int]], across: str, up: str) -> str:
    """Returns bars for counts by power of two: `(64, 7)` says that 7 are from 64 on, below 128."""
    bars = max(len(counts), 1)
    step = (_WIDTH - 2 * _LEFT) / bars
    most = max((count for _, count in counts), default=1)
    parts = []
    for place, (power, count) in enumerate(counts):
        x, height = _LEFT + place * step, (_BOTTOM - _TOP) * count / most
        middle = x + step / 2
        parts.append(
            f'<rect x="{x + 1:.1f}" y="{_BOTTOM - height:.1f}" width="{step - 2:.1f}" '
            f'height="{height:.1f}" fill="{_INK}"><title>{power} to {2 * power - 1}: {count:,}'
            f"</title></rect>"
            f'<text x="{middle:.1f}" y="{_BOTTOM - height - 4:.1f}" text-anchor="middle">'
            f"{_short(count)}</text>"
            f'<text x="{middle:.1f}" y="{_BOTTOM + 14}" text-anchor="middle">{_short(power)}</text>'
        )
    parts.append(
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(up)} by '
        f"{escape(across)}</text>"
    )
    return _page(parts)


def curve(values: Sequence[float], across: str, up: str) -> str:
    """Returns a line through values 1, 2, ...; places of several have their mean, on their range.

    A value that is not finite, as of a run that has diverged, is left out.
    """
    places = list(_places(values))
    lowest = min((low for _, low, _, _ in places), default=0.0)
    highest = max((high for *_, high in places), default=1.0)
    # Values that are all the same have an axis too, with labels that can be told apart.
    step = tick_step(max(highest - lowest, 1e-3 * abs(highest)))
    floor = math.floor(lowest / step)
    ceiling = max(math.ceil(highest / step), floor + 1)
    left, right = 48, _WIDTH - _LEFT

    def x(position: float) -> float:
        return left + (position - 1) / max(len(values) - 1, 1) * (right - left)

    def y(value: float) -> float:
        return _BOTTOM - (value / step - floor) / (ceiling - floor) * (_BOTTOM - _TOP)

    parts = [
        f'<line x1="{left}" x2="{right}" y1="{y(tick * step):.1f}" y2="{y(tick * step):.1f}" '
        f'stroke="{_GRID}"/><text x="{left - 6}" y="{y(tick * step) + 4:.1f}" text-anchor="end">'
        f"{tick * step:g}</text>"
        for tick in range(floor, ceiling + 1)
    ]
    parts += [
        f'<line x1="{x(at):.1f}" x2="{x(at):.1f}" y1="{y(low):.1f}" y2="{y(high):.1f}" '
        f'stroke="{_INK}" stroke-opacity="0.25"/>'
        for at, low, _, high in places
        if high > low
    ]
    line = " ".join(f"{x(at):.1f},{y(mean):.1f}" for at, _, mean, _ in places)
    parts.append(
        f'<polyline fill="none" stroke="{_INK}" stroke-width="1.5" points="{line}"/>'
        f'<text x="{left}" y="{_BOTTOM + 14}">1</text>'
        f'<text x="{right}" y="{_BOTTOM + 14}" text-anchor="end">{len(values):,}</text>'
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(up)} by '
        f"{escape(across)}</text>"
    )
    return _page(parts)


def tick_step(spread: float) -> float:
    """Returns 1, 2 or 5 times a power of ten, such that at most six of it cover `spread`."""
    rough = max(spread, 1e-6) / 5
    magnitude = 10.0 ** math.floor(math.log10(rough))
    return next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= rough)


def _places(values: Sequence[float]) -> Iterator[tuple[float, float, float, float]]:
    """Yields position, lowest, mean and highest of neighbours that share a place, if not one."""
    size = max(math.ceil(len(values) / _MOST_PLACES), 1)
    for start in range(0, len(values), size):
        known = [value for value in values[start : start + size] if math.isfinite(value)]
        if known:
            middle = start + (min(start + size, len(values)) - start + 1) / 2
            yield middle, min(known), math.fsum(known) / len(known), max(known)


def _page(parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" font-size="11" '
        f'fill="{_DIM}"><rect width="100%" height="100%" fill="#ffffff"/>'
        + "".join(parts) + "</svg>"
    )  # fmt: skip


def _short(number: int) -> str:
    for power, letter in ((9, "G"), (6, "M"), (4, "k")):
        if number >= 10**power:
            return f"{number / 10 ** (3 if letter == 'k' else power):.3g}{letter}"
    return str(number)
