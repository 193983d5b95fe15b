"""Pictures of data as SVG: they cost no import, and every page can hold them."""

from collections.abc import Sequence
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 640, 220, 8, 24, 180


def histogram(counts: Sequence[tuple[int, int]], across: str, up: str) -> str:
    """Returns bars for counts by power of two: `(64, 7)` says that 7 are from 64 on, below 128."""
    bars = max(len(counts), 1)
    step = (_WIDTH - 2 * _LEFT) / bars
    most = max((count for _, count in counts), default=1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" font-size="11" '
        f'fill="#59636e"><rect width="100%" height="100%" fill="#ffffff"/>'
    ]
    for place, (power, count) in enumerate(counts):
        x, height = _LEFT + place * step, (_BOTTOM - _TOP) * count / most
        middle = x + step / 2
        parts.append(
            f'<rect x="{x + 1:.1f}" y="{_BOTTOM - height:.1f}" width="{step - 2:.1f}" '
            f'height="{height:.1f}" fill="#0b5cad"><title>{power} to {2 * power - 1}: {count:,}'
            f"</title></rect>"
            f'<text x="{middle:.1f}" y="{_BOTTOM - height - 4:.1f}" text-anchor="middle">'
            f"{_short(count)}</text>"
            f'<text x="{middle:.1f}" y="{_BOTTOM + 14}" text-anchor="middle">{_short(power)}</text>'
        )
    parts.append(
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(up)} by '
        f"{escape(across)}</text></svg>"
    )
    return "".join(parts)


def _short(number: int) -> str:
    for power, letter in ((9, "G"), (6, "M"), (4, "k")):
        if number >= 10**power:
            return f"{number / 10 ** (3 if letter == 'k' else power):.3g}{letter}"
    return str(number)
