"""The loss of every step of a run, kept in each checkpoint so that it survives being resumed.

    losses.json   {"losses": [l1, l2, ...]}: item n - 1 is the loss, in nats per token, of the batch
                  that update n was made from, before that update

    evaluations.json   {"evaluations": [{"step": n, "losses": {split: nats}}]}: losses on validation
                       rows after n updates, if any were taken

JSON holds each float32 exactly, as the shortest decimal of its double. No JAX is imported here.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LOSSES = "losses.json"
EVALUATIONS = "evaluations.json"


def to_json(losses: Sequence[float]) -> dict[str, Any]:
    """Returns what `losses.json` holds."""
    return {"losses": list(losses)}


def read_losses(directory: Path) -> list[float]:
    """Returns the losses of steps 1, 2, ... of the checkpoint in `directory`."""
    content: Mapping[str, Any] = json.loads((directory / LOSSES).read_text(encoding="utf-8"))
    return [float(loss) for loss in content["losses"]]


def read_evaluations(directory: Path) -> list[dict[str, Any]]:
    """Returns the losses on validation rows up to the checkpoint in `directory`, by step."""
    path = directory / EVALUATIONS
    return json.loads(path.read_text(encoding="utf-8"))["evaluations"] if path.exists() else []


def curve(losses: Sequence[float], points: int = 200) -> list[list[int | float]]:
    """Returns at most `points` pairs of step and loss, evenly spaced, both ends included."""
    last = len(losses) - 1
    if last < points:
        chosen = range(last + 1)
    else:
        chosen = sorted({round(i * last / (points - 1)) for i in range(points)})
    return [[index + 1, losses[index]] for index in chosen]
