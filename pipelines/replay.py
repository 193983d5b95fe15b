"""`levanter verify CHECKPOINT --steps k..n`: do updates k + 1 to n, made again, give what was kept?

Training goes on in a scratch directory from a copy of the checkpoint of step k, and is ended once
step n is saved. Compared are the loss of each update between and the digest of every array at n,
with the checkpoint of step n that was kept. The last step is the artifact itself; earlier ones are
there if `trainer.keep` or a pin has kept them. Step 0, how training began, needs no checkpoint.
"""

import dataclasses
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from assets.checkpoint import training_files
from modeling import canonical
from modeling.artifacts import (
    ArtifactStore,
    Workspace,
    differing_leaves,
    numerics_digest,
)
from modeling.difference import differences
from modeling.experiment import ExperimentConfig
from pipelines.copies import complete
from pipelines.pools import held
from pipelines.recorded import RUN, UnreadableRecordError, recorded_experiment
from pipelines.verify import UnverifiableError
from resources.launcher import LauncherResource
from resources.pools import ACCELERATOR
from resources.store import StoreResource

if TYPE_CHECKING:
    from modeling.training.manifest import Manifest

_STEPS = re.compile(r"(\d+)\.\.(\d+)")


@dataclasses.dataclass(frozen=True)
class Replay:
    """What making some updates again has shown."""

    first: int
    """The step that it went on from."""
    last: int
    expected: str
    """Content id of the state at the last step, as it was kept."""
    found: str
    num_leaves: int
    differing_leaves: tuple[str, ...]
    differing_losses: tuple[tuple[int, float, float], ...]
    """Step, loss that was kept, loss found."""
    numerics: str
    """The id of the class on record."""
    numerics_changes: tuple[str, ...]

    @staticmethod
    def of(
        steps: tuple[int, int],
        kept: "tuple[Manifest, Sequence[float]]",
        found: "tuple[Manifest, Sequence[float]]",
        record: Mapping[str, Any],
        numerics: Mapping[str, Any],
    ) -> "Replay":
        """Compares two states after the second of `steps`, and the losses that led there.

        Args:
            steps: the one gone on from, and the last one.
            kept: the state that was kept, and the losses of updates 1, 2, ...
            found: what came out now.
            record: of the artifact.
            numerics: the class here.
        """
        first, last = steps
        updates = zip(range(1, last + 1), kept[1], found[1], strict=True)
        return Replay(
            first,
            last,
            kept[0].content_id,
            found[0].content_id,
            len(found[0].leaves),
            tuple(differing_leaves(kept[0].digests, found[0].digests)),
            tuple((step, one, two) for step, one, two in updates if step > first and one != two),
            record["numerics"]["id"],
            tuple(map(str, differences(record["numerics"]["class"], numerics))),
        )

    @property
    def is_equal(self) -> bool:
        """Whether every array and every loss is the same."""
        return self.expected == self.found and not self.differing_losses

    def lines(self) -> Iterator[str]:
        """Yields the verdict in words."""
        updates = f"updates {self.first + 1} to {self.last}, made again from step {self.first}"
        if self.is_equal:
            yield (
                f"Verified: {updates}, give the same {self.last - self.first} losses and the same "
                f"{self.num_leaves} arrays; step {self.last} is {self.found}."
            )
        else:
            yield f"NOT the same: {updates}, give {self.found[:12]} for {self.expected[:12]}."
            if self.differing_losses:
                step, kept, found = self.differing_losses[0]
                yield f"  The first loss that differs is that of step {step}: {kept} -> {found}."
            if self.differing_leaves:
                name, *more = self.differing_leaves
                yield f"  The first array that differs is `{name}` ({len(more)} more do)."
        if self.numerics_changes:
            yield f"  Another numerics class: {'; '.join(self.numerics_changes)}."
        elif not self.is_equal:
            yield f"  The numerics class is the same, {self.numerics[:12]}."


def parse_steps(text: str) -> tuple[int, int]:
    """Returns k and n of `k..n`."""
    match = _STEPS.fullmatch(text)
    if match is None or int(match[1]) >= int(match[2]):
        raise UnverifiableError(
            f"--steps {text}: expected FIRST..LAST with FIRST below LAST, such as 100..200."
        )
    return int(match[1]), int(match[2])


def replay(
    record: Mapping[str, Any],
    steps: tuple[int, int],
    instance: dg.DagsterInstance,
    store: ArtifactStore,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> Replay:
    """Makes the updates after the first of `steps` up to the second again, and compares.

    Args:
        record: of the checkpoint, which says how it was trained.
        steps: the one to go on from, and the last one.
        instance: in whose pools a place is held meanwhile.
        store: which has its inputs.
        say: hears what is waited for.

    Raises:
        UnverifiableError: there is no such checkpoint, its records cannot be read as a
            configuration, or training failed.
    """
    told = f"{record['kind']} {record['content_id'][:12]}"
    if record["kind"] != "checkpoint":
        raise UnverifiableError(f"{told}: only a checkpoint has steps.")
    first, last = steps
    kept = kept_steps(store, record, wanted=steps)
    for step in {first, last} - {0}:
        if step not in kept:
            raise UnverifiableError(
                f"{told}: no checkpoint of step {step} was kept; there are those "
                f"of {sorted(kept)}. Step 0, the beginning, needs none; a run keeps further "
                f"ones by `trainer.keep`, or where they are pinned."
            )
    launcher, resource = LauncherResource(), StoreResource(url=store.url)
    try:
        experiment = recorded_experiment(store, record)
    except UnreadableRecordError as error:
        raise UnverifiableError(f"{told}: {error}") from None
    cache = resource.input_of(store.from_record(record), "token_cache")
    files = training_files(experiment, cache, resource)
    numerics = canonical.plain(launcher.numerics(experiment))
    with tempfile.TemporaryDirectory(prefix="verify-", dir=os.environ["DAGSTER_HOME"]) as scratch:
        space = Workspace(Path(scratch) / "progress", Path(scratch) / "output")
        own = space.progress / "checkpoints" / numerics_digest(numerics)[:16]
        own.mkdir(parents=True)
        space.output.mkdir()
        if first:
            shutil.copytree(kept[first], own / kept_name(first))
        with held(instance, ACCELERATOR, say):
            train_until(last, RUN, experiment, files, launcher, space)
        return Replay.of(steps, _state(kept[last]), _state(_saved(own, last)), record, numerics)


def kept_name(step: int) -> str:
    """Returns the name under which a copy of a checkpoint is found again."""
    from modeling.training.pins import COPIED, attempt_name

    return attempt_name(step, COPIED)


def kept_steps(
    store: ArtifactStore, record: Mapping[str, Any], *, wanted: Collection[int]
) -> dict[int, Path]:
    """Returns the checkpoints of a run that are there, by step: its result, and those pinned.

    Args:
        store: where to look.
        record: of the result.
        wanted: steps that are copied here if they are in a remote store alone.
    """
    from modeling.training.reading import read_manifest

    found = {}
    for copy in complete(store, record["recipe_id"], record["numerics"]["id"]):
        if copy.step not in found and (copy.path or copy.step in wanted):
            found[copy.step] = copy.local(store)
    result = store.local(record["kind"], record["content_id"])
    return found | {read_manifest(result).step: result}


def train_until(
    step: int,
    name: str,
    experiment: ExperimentConfig,
    files: Mapping[str, Path],
    launcher: LauncherResource,
    space: Workspace,
) -> None:
    """Trains in `space`, from what is there or from the beginning, until `step` is saved."""
    trainer = dataclasses.replace(
        experiment.trainer,
        save_every_steps=step,
        save_interval=None,
        keep=(),
        pictures_every_steps=None,
        profile_steps=None,
    )
    job = launcher.job(
        "replay", name, dataclasses.replace(experiment, trainer=trainer), space, until=step,
        numerics={}, **files,
    )  # fmt: skip
    running = launcher.start(job, hear=lambda line: None)
    try:
        running.wait()
    except (dg.Failure, dg.RetryRequested) as error:
        raise UnverifiableError(f"{name}/checkpoint could not be made again: {error}") from error
    except BaseException:
        running.stop()
        raise


def _state(directory: Path) -> "tuple[Manifest, list[float]]":
    from modeling.training.history import read_losses
    from modeling.training.reading import read_manifest

    return read_manifest(directory), read_losses(directory)


def _saved(directory: Path, step: int) -> Path:
    from modeling.training.reading import COMMIT

    (commit,) = directory.glob(f"{kept_name(step).partition('.')[0]}.*/{COMMIT}")
    return commit.parent
