"""Pictures of artifacts, as the metadata panel shows them."""

from collections import Counter
from collections.abc import Iterable, Sequence

import dagster as dg

from modeling import pictures
from resources import panel


def lengths_picture(counts: Iterable[tuple[int, int]]) -> dg.MarkdownMetadataValue:
    """Returns a histogram of the tokens in a document.

    Args:
        counts: pairs of a power of two and how many documents are that long or longer, but below
            the next power; pairs of several splits add up.
    """
    totals: Counter[int] = Counter()
    for power, count in counts:
        totals[power] += count
    svg = pictures.histogram(sorted(totals.items()), "tokens in a document", "documents")
    return panel.picture("document lengths", svg.encode(), "image/svg+xml")


def loss_picture(losses: Sequence[float]) -> dg.MarkdownMetadataValue:
    """Returns the curve of the losses of updates 1, 2, ..."""
    svg = pictures.curve(losses, "step", "loss (nats per token)")
    return panel.picture("loss", svg.encode(), "image/svg+xml")
