"""Pictures in asset metadata: the UI shows a Markdown image whose bytes are in the link itself."""

import base64
import io
from collections.abc import Mapping, Sequence

import dagster as dg


def lengths_picture(counts: Mapping[str, Sequence[int]]) -> dg.MetadataValue:
    """Returns histograms over powers of two, one below the other.

    Args:
        counts: for each split, how many documents have up to 1 token, 2 to 3, 4 to 7...
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 0.5 + 1.8 * len(counts)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(counts), squeeze=False, sharex=True)
    for axes, (split, bins) in zip(grid[:, 0], counts.items(), strict=True):
        axes.bar(range(len(bins)), bins)
        axes.set_ylabel(f"{split} documents")
        axes.grid(axis="y", alpha=0.3)
    longest = max(map(len, counts.values()))
    step = max(longest // 10, 1)
    bottom = grid[-1, 0]
    bottom.set_xticks(range(0, longest, step), [f"{2**k:,}" for k in range(0, longest, step)])
    bottom.set_xlabel("tokens and more")
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=80)
    encoded = base64.b64encode(written.getvalue()).decode()
    return dg.MetadataValue.md(f"![document lengths](data:image/png;base64,{encoded})")
