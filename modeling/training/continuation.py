"""Whether a run may go on from a checkpoint: what has changed since, field by field.

A checkpoint's manifest holds the *science* of its run: all that decides the result but the rows, as
plain data. Going on with another science is refused, naming each
field that differs, unless `initialize_from.allow_changed` names it or a section it is in. Another
numerics class is said and allowed: the same experiment, rounded otherwise.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modeling import canonical, recipes
from modeling.difference import differences
from modeling.experiment import ExperimentConfig
from modeling.training.manifest import CheckpointError, Manifest

_log = logging.getLogger(__name__)
DATA = "data"
"""What `allow_changed` calls the rows, of which the cache tells whether they are the same."""


def science_of(experiment: ExperimentConfig) -> dict[str, Any]:
    """Returns all that decides the result of a run but its rows and the numerics class."""
    return canonical.plain(recipes.checkpoint_params(experiment))


def require_same_science(
    directory: Path, manifest: Manifest, science: Mapping[str, Any], allowed: Sequence[str] = ()
) -> None:
    """Raises `CheckpointError`, naming each field that differs and may not."""
    found = differences(manifest.config["science"], science)
    refused = [d for d in found if not any(_within(d.path, a) for a in allowed)]
    if refused:
        raise CheckpointError(
            f"{directory} is of another experiment: {'; '.join(map(str, refused))}. Give each its "
            f"own workspace; or go on from this one with other settings, by its content id in "
            f"trainer.initialize_from and the fields above in its allow_changed."
        )
    unused = [a for a in allowed if a != DATA and not any(_within(d.path, a) for d in found)]
    if unused:
        _log.warning("trainer.initialize_from.allow_changed: nothing differs in %s.", unused)


def tell_other_numerics(directory: Path, manifest: Manifest, numerics: str) -> None:
    """Says so if a checkpoint was made in another numerics class."""
    before = manifest.config["numerics"]
    if before != numerics:
        _log.warning(
            "%s was made in the numerics class %s, and this is %s: the same experiment goes on, "
            "with other rounding than an uninterrupted run's.", directory, before, numerics,
        )  # fmt: skip


def _within(path: str, field: str) -> bool:
    return path == field or path.startswith(f"{field}.")
