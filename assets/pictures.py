"""Pictures of artifacts, as the metadata panel shows them."""

import io
from collections import Counter
from collections.abc import Iterable, Sequence

import dagster as dg

from resources import panel


def lengths_picture(counts: Iterable[tuple[int, int]]) -> dg.MarkdownMetadataValue:
    """Returns a histogram of the tokens in a document.

    Args:
        counts: pairs of a power of two and how many documents are that long or longer, but below
            the next power; pairs of several splits add up.
    """
    from modeling.data.pictures import histogram

    totals: Counter[int] = Counter()
    for power, count in counts:
        totals[power] += count
    svg = histogram(sorted(totals.items()), "tokens in a document", "documents")
    return panel.picture("document lengths", svg.encode(), "image/svg+xml")


def loss_picture(losses: Sequence[float]) -> dg.MarkdownMetadataValue:
    """Returns the curve of the losses of updates 1, 2, ..."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=90)
    return panel.picture("loss", written.getvalue(), "image/png")
