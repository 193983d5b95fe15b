"""What the eval report measures. No JAX is imported here."""

import dataclasses
from typing import ClassVar

from modeling.canonical import added_later
from modeling.fields import STRICT, Positive
from modeling.training.config import WeightsChoice


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Perplexity and bits per byte over the validation rows, and greedy samples."""

    batch_size: Positive = 16
    max_rows: Positive | None = None
    """Takes this many validation rows, evenly spaced, of each source its share and at least one;
    all of them when absent."""
    prompts: tuple[str, ...] = ("def __init__(self", "class Test", "for i in range(")
    """None ends in a space: byte-level BPE begins a word with its space, so one alone is rare."""
    sample_tokens: Positive = 64
    weights: WeightsChoice = dataclasses.field(default="last", metadata=added_later("last"))
    """Of the last update, or the average that `trainer.ema` or `trainer.tail_average` keeps."""

    identity_tag: ClassVar[str] = "evaluation/1"
    __pydantic_config__ = STRICT
