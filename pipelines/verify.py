"""`levanter verify`: is an artifact what its record says that it is? Made again, and compared.

The asset is materialized anew, by the very code that made it, in a scratch store that holds only
the inputs on its record and in an instance that remembers nothing; then the two content ids are
compared. What to make is read from the records too (`recorded`): the catalog may have changed, or
may never have had it.
"""

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from modeling import recipes
from modeling.artifacts import (
    Artifact,
    ArtifactStore,
    differing_leaves,
    link_or_copy,
)
from modeling.difference import differences
from modeling.experiment import Catalog
from modeling.notes import sealed_bytes, write_whole
from pipelines.build import build_defs
from pipelines.pools import held
from pipelines.recorded import UnreadableRecordError, recorded_catalog
from resources import materializations
from resources.io_manager import ReferenceIOManager, ReferenceIOManagerFactory, scope_of
from resources.store import StoreResource


class UnverifiableError(ValueError):
    """There is nothing to compare with, or it cannot be made again here."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What making an artifact again has shown."""

    expected: str
    """Content id on record."""
    found: str
    differing_leaves: tuple[str, ...]
    numerics: str
    """The id of the class on record."""
    numerics_changes: tuple[str, ...]
    """Fields of the numerics class that are otherwise here: other bits are then no error."""

    @property
    def is_equal(self) -> bool:
        """Whether the same content came out."""
        return self.expected == self.found

    def lines(self) -> Iterator[str]:
        """Yields the verdict in words."""
        if self.is_equal:
            yield f"Verified: made again, it has the same content id, {self.found}."
        else:
            yield f"NOT the same: {self.found[:12]} came out, {self.expected[:12]} is on record."
            if self.differing_leaves:
                first, *more = self.differing_leaves
                yield f"  The first part that differs is `{first}` ({len(more)} more do)."
        if self.numerics_changes:
            yield f"  Another numerics class: {'; '.join(self.numerics_changes)}."
        elif not self.is_equal:
            yield f"  The numerics class is the same, {self.numerics[:12]}."


def verify(
    record: Mapping[str, Any],
    instance: dg.DagsterInstance,
    store: ArtifactStore,
    today: Catalog,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> Verdict:
    """Makes what is on record again, from its records, and compares.

    Args:
        record: of the artifact.
        instance: in whose pools a place is held meanwhile.
        store: which has its inputs, and is only read.
        today: the catalog, which says where files lie: nothing else is taken from it.
        say: hears what is waited for.

    Raises:
        UnverifiableError: its records cannot be read as a configuration, this version would make
            something else of them, or making it failed.
    """
    home = Path(os.environ["DAGSTER_HOME"])
    with tempfile.TemporaryDirectory(prefix="verify-", dir=home) as directory:
        scratch = StoreResource(url=directory)
        try:
            catalog, key = recorded_catalog(store, record, today)
        except UnreadableRecordError as error:
            raise UnverifiableError(f"{_told(record)}: {error}") from None
        defs = build_defs(
            catalog, store=scratch, io_manager=ReferenceIOManagerFactory(url=directory)
        )
        inputs = _copy_inputs(store, record, scratch.open())
        with pools_held(key, instance, defs, say):
            new = _make_again(key, defs, scratch.open(), inputs, record)
    return Verdict(
        record["content_id"],
        new["content_id"],
        tuple(differing_leaves(record["leaves"], new["leaves"])),
        record["numerics"]["id"],
        tuple(map(str, differences(record["numerics"]["class"], new["numerics"]["class"]))),
    )


def _told(record: Mapping[str, Any]) -> str:
    return f"{record['kind']} {record['content_id'][:12]}"


def record_of_asset(
    key: dg.AssetKey, instance: dg.DagsterInstance, store: ArtifactStore
) -> dict[str, Any]:
    """Returns the record of what an asset is now.

    Raises:
        UnverifiableError: it was never made.
    """
    made = materializations.latest(instance, key)
    if made is None:
        raise UnverifiableError(
            f"{key.to_user_string()} has never been materialized here; see `levanter status`."
        )
    return store.record(made.recipe_id, made.numerics)


@contextlib.contextmanager
def pools_held(
    key: dg.AssetKey,
    instance: dg.DagsterInstance,
    defs: dg.Definitions,
    say: Callable[[str], None],
) -> Iterator[None]:
    """Holds a place in the pools of an asset, as a run that makes it does."""
    with contextlib.ExitStack() as stack:
        for pool in sorted(defs.resolve_asset_graph().get(key).pools or ()):
            stack.enter_context(held(instance, pool, say))
        yield


def _copy_inputs(
    store: ArtifactStore, record: Mapping[str, Any], scratch: ArtifactStore
) -> dict[str, Artifact]:
    """Puts all that an artifact was made of into another store, and returns its own inputs."""
    known = store.records_by_object()
    own = [*record["recipe"]["inputs"].values()]
    waiting, copied = [*own], {}
    while waiting:
        given = waiting.pop()
        key = given["kind"], given["content_id"]
        if key in copied:
            continue
        if key not in known:
            raise UnverifiableError(
                f"its input {key[0]} {key[1][:12]} has no record in {store.url}; see "
                f"`levanter fsck`."
            )
        above = known[key][-1]
        shutil.copytree(store.local(*key), scratch.object_path(*key), copy_function=_linked)
        path = Path(scratch.record_path(above["recipe_id"], above["numerics"]["id"]))
        path.parent.mkdir(parents=True)
        write_whole(path, sealed_bytes(above))
        copied[key] = scratch.from_record(above)
        waiting += above["recipe"]["inputs"].values()
    return {
        given["kind"]: copied[given["kind"], given["content_id"]]
        for role, given in record["recipe"]["inputs"].items()
        if role != recipes.INITIAL_CHECKPOINT
    }


def _linked(source: str, target: str) -> None:
    link_or_copy(Path(source), Path(target))


def _make_again(
    key: dg.AssetKey,
    defs: dg.Definitions,
    store: ArtifactStore,
    inputs: Mapping[str, Artifact],
    record: Mapping[str, Any],
) -> dict[str, Any]:
    """Materializes the asset in the scratch store and returns its new record."""
    with dg.DagsterInstance.ephemeral() as instance:
        references = ReferenceIOManager(store.url, scope_of(instance))
        for parent in defs.resolve_asset_graph().get(key).parent_keys:
            references.remember(parent, inputs[materializations.kind_of(parent)])
        result = defs.resolve_implicit_global_asset_job_def().execute_in_process(
            instance=instance, asset_selection=[key], raise_on_error=False
        )
        again = materializations.latest(instance, key)
        if again is None:
            errors = [event.step_failure_data.error for event in result.get_step_failure_events()]
            why = "; ".join(str(error.message).strip() for error in errors if error)
            raise UnverifiableError(f"{_told(record)} could not be made again: {why}")
    new = store.record(again.recipe_id, again.numerics)
    if new["recipe_id"] != record["recipe_id"]:
        changes = "; ".join(map(str, differences(record["recipe"], new["recipe"])))
        raise UnverifiableError(
            f"{_told(record)} cannot be made here as it was: {changes}. Verify it with the version "
            f"of the code and of the libraries on its record, and from the files that it was of."
        )
    return new
