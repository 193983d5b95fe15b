"""`levanter verify`: is an artifact what its record says that it is? Made again, and compared.

The asset is materialized anew, by the very code that made it, in a scratch store that holds only
the inputs on its record and in an instance that remembers nothing; then the two content ids are
compared. The catalog must still say what the record says: `levanter why` tells what differs.

A Hugging Face export can be checked anywhere, without store or catalog (`offline`): its card lists
the SHA-256 of every file, and `sha256sum` gives the same.
"""

import contextlib
import dataclasses
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from modeling.artifacts import (
    Artifact,
    ArtifactStore,
    differing_leaves,
    link_or_copy,
)
from modeling.difference import differences
from modeling.experiment import Catalog
from modeling.inventory import INVENTORY, file_sha256
from modeling.notes import sealed_bytes, write_whole
from pipelines.build import build_defs
from pipelines.pools import held
from resources import materializations
from resources.io_manager import ReferenceIOManager, ReferenceIOManagerFactory, scope_of
from resources.materializations import Materialization
from resources.store import StoreResource

_CARD = "README.md"
_CARD_ROW = re.compile(r"^\| `([^`]+)` \| `([0-9a-f]{64})` \|$", re.MULTILINE)


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
    key: dg.AssetKey,
    instance: dg.DagsterInstance,
    store: ArtifactStore,
    catalog: Catalog,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> Verdict:
    """Makes what an asset's last materialization is on record for again, and compares.

    Raises:
        UnverifiableError: it was never made, the catalog now says something else, or making it
            failed.
    """
    home = Path(os.environ["DAGSTER_HOME"])
    with tempfile.TemporaryDirectory(prefix="verify-", dir=home) as directory:
        scratch = StoreResource(url=directory)
        defs = build_defs(
            catalog, store=scratch, io_manager=ReferenceIOManagerFactory(url=directory)
        )
        made = unchanged(key, instance, defs)
        record = store.record(made.recipe_id, made.numerics)
        inputs = _copy_inputs(store, record, scratch.open())
        with pools_held(key, instance, defs, say):
            new = _make_again(key, defs, scratch.open(), inputs)
    return Verdict(
        record["content_id"],
        new["content_id"],
        tuple(differing_leaves(record["leaves"], new["leaves"])),
        record["numerics"]["id"],
        tuple(map(str, differences(record["numerics"]["class"], new["numerics"]["class"]))),
    )


def verify_export(directory: Path) -> list[str]:
    """Returns what is wrong with an exported model, by the digests in its own card.

    Raises:
        UnverifiableError: there is no card, or it lists no files.
    """
    card = directory / _CARD
    if not card.is_file():
        raise UnverifiableError(f"{directory}: has no {_CARD}; give an exported model's directory.")
    listed = dict(_CARD_ROW.findall(card.read_text(encoding="utf-8").partition("## Files")[2]))
    if not listed:
        raise UnverifiableError(f"{card}: lists no files with their SHA-256 under `## Files`.")
    present = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}
    faults = []
    for name, expected in sorted(listed.items()):
        if name not in present:
            faults.append(f"{name} is missing")
        elif (found := file_sha256(directory / name)) != expected:
            faults.append(f"{name} has SHA-256 {found[:12]}, the card says {expected[:12]}")
    extra = present - set(listed) - {_CARD, INVENTORY}
    return faults + [f"{name} is not on the card" for name in sorted(extra)]


def unchanged(
    key: dg.AssetKey, instance: dg.DagsterInstance, defs: dg.Definitions
) -> Materialization:
    """Returns the last materialization of an asset that the catalog still defines as it did then.

    Raises:
        UnverifiableError: it was never made, or the catalog now says something else.
    """
    name, made = key.to_user_string(), materializations.latest(instance, key)
    if made is None:
        raise UnverifiableError(f"{name} has never been materialized here; see `levanter status`.")
    graph = defs.resolve_asset_graph()
    if not graph.has(key):
        raise UnverifiableError(f"{name} is not in the catalog any more.")
    node = graph.get(key)
    if node.code_version == made.code_version:
        return made
    config = node.metadata[materializations.CONFIG].value
    changes = materializations.definition_changes(made, node.code_version or "", config)
    raise UnverifiableError(
        f"{name}: the catalog says something else than when it was made: {'; '.join(changes)}. "
        f"Change it back, or materialize the asset, and verify then."
    )


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
    return {given["kind"]: copied[given["kind"], given["content_id"]] for given in own}


def _linked(source: str, target: str) -> None:
    link_or_copy(Path(source), Path(target))


def _make_again(
    key: dg.AssetKey, defs: dg.Definitions, store: ArtifactStore, inputs: Mapping[str, Artifact]
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
            raise UnverifiableError(f"{key.to_user_string()} could not be made again: {why}")
    return store.record(again.recipe_id, again.numerics)
