"""Whether a run may go on from a checkpoint: what has changed since, field by field.

A checkpoint's manifest holds the *science* of its run: all that decides the result but the rows, as
plain data. A run goes on from its own checkpoint with the same science and rows alone, and from
another run's where `trainer.initialize_from` names it and, by field or section, what has changed.
Another numerics class is said and allowed there: the same experiment, rounded otherwise.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modeling import canonical, recipes
from modeling.data.loader import TrainingData
from modeling.difference import Difference, differences
from modeling.experiment import ExperimentConfig
from modeling.training.config import TOKENIZER, InitializeFromConfig
from modeling.training.manifest import CheckpointError, Manifest
from modeling.training.other_classes import classes_before
from modeling.training.reading import inspect

_log = logging.getLogger(__name__)
_DATA = "data"
"""What `allow_changed` calls the rows, of which the cache tells whether they are the same."""
_FREE = ("trainer.num_train_steps", "trainer.initialize_from")
"""What differs whenever a run begins with the end of another one."""


def science_of(experiment: ExperimentConfig) -> dict[str, Any]:
    """Returns all that decides the result of a run but its rows and the numerics class."""
    return canonical.plain(recipes.checkpoint_params(experiment))


def require_same_science(directory: Path, manifest: Manifest, science: Mapping[str, Any]) -> None:
    """Raises `CheckpointError` if the checkpoint is of another experiment, naming what differs."""
    if found := _changes(directory, manifest, science):
        raise CheckpointError(
            f"{directory} is of another experiment: {_listed(found)}. Give each its own workspace; "
            f"or go on from its checkpoint on purpose with trainer.initialize_from."
        )


def require_same_class(directory: Path, manifest: Manifest, numerics: str) -> None:
    """Raises `CheckpointError` if another numerics class has a part in a run's own checkpoint."""
    if found := classes_before(manifest, numerics):
        raise CheckpointError(
            f"{directory} was made in the numerics class {found[-1]['class']} until step "
            f"{found[-1]['until']}, and this is {numerics}, which rounds otherwise. To keep to one "
            f"class, remove it; to go on with both, set trainer.other_numerics: continue."
        )


def verified_beginning(
    directory: Path, experiment: ExperimentConfig, cache: TrainingData, numerics: str
) -> Manifest:
    """Returns the manifest of the checkpoint to begin with, once all is as it must be.

    But for the values of its arrays, which whoever restores them verifies.

    Args:
        directory: the files of the checkpoint that `trainer.initialize_from` names.
        experiment: the one to begin.
        cache: its rows.
        numerics: its numerics class.

    Raises:
        CheckpointError: it is another checkpoint or damaged, or more has changed than may.
    """
    wanted = experiment.trainer.initialize_from
    assert wanted is not None
    manifest = inspect(directory)
    if manifest.content_id != wanted.checkpoint:
        raise CheckpointError(
            f"{directory} is the checkpoint {manifest.content_id}, but trainer.initialize_from "
            f"names {wanted.checkpoint}."
        )
    if wanted.goes_on:
        _require_allowed(directory, manifest, wanted, science_of(experiment))
        _require_same_rows(directory, manifest, wanted, cache)
        num_steps = experiment.trainer.num_train_steps
        if manifest.step >= num_steps:
            raise CheckpointError(
                f"trainer.num_train_steps: {num_steps}, but the checkpoint of "
                f"trainer.initialize_from has made {manifest.step} updates already; ask for more."
            )
    before = manifest.config.get("numerics", "that is not on record")
    if before != numerics:
        _log.warning(
            "%s was made in the numerics class %s, and this is %s: its experiment goes on, with "
            "other rounding than an uninterrupted run's.", directory, before, numerics,
        )  # fmt: skip
    return manifest


def _require_allowed(
    directory: Path, manifest: Manifest, wanted: InitializeFromConfig, science: Mapping[str, Any]
) -> None:
    found = _changes(directory, manifest, science)
    allowed = (*_FREE, *wanted.allow_changed)
    refused = [one for one in found if not any(_is_within(one.path, field) for field in allowed)]
    if refused:
        raise CheckpointError(
            f"{directory} is of another experiment: {_listed(refused)}. Set them back, name them "
            f"in trainer.initialize_from.allow_changed, take its weights alone with "
            f"weights_only: true, or some arrays with `only`."
        )
    unused = [
        field
        for field in wanted.allow_changed
        if field not in (_DATA, TOKENIZER) and not any(_is_within(one.path, field) for one in found)
    ]
    if unused:
        _log.warning("trainer.initialize_from.allow_changed: nothing differs in %s.", unused)


def _require_same_rows(
    directory: Path, manifest: Manifest, wanted: InitializeFromConfig, cache: TrainingData
) -> None:
    why = cache.refusal(manifest.config["data"])
    if why is not None and _DATA not in wanted.allow_changed:
        raise CheckpointError(
            f"{directory} belongs to other data: {why}. To go on with other rows, name `{_DATA}` "
            f"in trainer.initialize_from.allow_changed."
        )


def _changes(
    directory: Path, manifest: Manifest, science: Mapping[str, Any]
) -> Sequence[Difference]:
    before = manifest.config["science"]
    if not isinstance(before, Mapping):
        raise CheckpointError(
            f"{directory} was written by an earlier version, which kept a digest of its experiment "
            f"and no fields to compare. Remove it to begin anew, or take its weights alone with "
            f"trainer.initialize_from and weights_only: true."
        )
    return differences(before, science)


def _listed(found: Sequence[Difference]) -> str:
    return "; ".join(map(str, found))


def _is_within(path: str, field: str) -> bool:
    return path == field or path.startswith(f"{field}.")
