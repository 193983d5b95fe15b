"""The artifact store: each product is a directory of files, found by recipe, named by content.

    objects/<kind>/<content_id>/                    the bytes, shared by all recipes that yield them
    objects/<kind>/<content_id>/INVENTORY.json      path, size and SHA-256 of each file; comes last.
                                                    On object stores also `at`: the directory beside
                                                    it where the files are, of one upload alone
    recipes/<recipe_id>/<numerics>/artifact.json    the record: recipe, inputs, content id, SHA-256
                                                    of the inventory, facts, provenance; sealed,
                                                    see `notes`
    aliases/<name>                                  a content id, for people
    work/<recipe_id>/<numerics>/                    progress of unfinished builds, for any retry
    leases/<recipe_id>/<numerics>.json              who builds now, see `leases`
    verified/<host>/<kind>/<content_id>.json        what a machine has verified, see `inventory`

A *recipe id* is known before anything runs: it digests kind, transform version, parameters and the
content ids of the inputs. A *content id* is the root of what came out. Equal recipe found = nothing
is computed; equal content from another recipe = nothing downstream changes. `numerics` is `exact`,
or, for products of floating-point training, the digest of the numerics class, since another device
may round differently. What was begun in one class and ended in another has a class of its own that
tells both, and is found by the latter where nothing was made in it alone.

A build writes into a fresh directory, which is inventoried, synced and renamed into `objects`; the
record follows last, so a reader never sees half an artifact. Object stores rename nothing: there
each upload has a directory of its own, and the inventory that is first says which one counts. So
two writers of one recipe end with one object, whatever they do meanwhile. What is removed loses its
name first, and has it given back if a record names it by then: see `collection`.
"""

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from modeling import canonical, faults, leases
from modeling.inventory import (
    INVENTORY,
    DamagedArtifactError,
    Verified,
    inventory_of,
    read_inventory,
    require_none,
)
from modeling.notes import (
    Note,
    is_attempt,
    json_bytes,
    make_directory,
    sealed_bytes,
    sync_directory,
    sync_tree,
    unsealed,
    write_whole,
)
from modeling.progress import Report, ignore

_LOG = logging.getLogger(__name__)
EXACT = "exact"
BEFORE = "before"
"""In a class on record: the classes that had the work before it."""
UPLOAD = "upload-"
"""Begins the name of the directory of one upload to an object store."""
PINS = "pins"
"""In a build's progress, `D/pins/X.json` keeps all `D/X.*` after the build has ended."""
FETCHED = "fetched"
"""Where on this machine copies of a remote store's step checkpoints are, for tools."""
WORKER_LOCK = "worker.lock"
"""Beside a build's progress: held by the process that works there, its parent dead or not."""
_KIND = re.compile(r"[a-z][a-z0-9_]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_RECORD_FIELDS = frozenset(
    ("kind", "content_id", "recipe_id", "recipe", "numerics", "roots", "leaves", "facts",
     "provenance", "inventory")
)  # fmt: skip


class ReproducibilityError(RuntimeError):
    """The same recipe in the same numerics class gave other bytes than the ones on record."""


class DiskFullError(OSError):
    """There is no space for what a build writes; what it had committed is kept."""


@dataclasses.dataclass(frozen=True)
class Input:
    """One input of a recipe: an artifact, and the id of the part that the recipe depends on."""

    kind: str
    content_id: str
    used: str
    """The content id, or the root of the part read: a checkpoint's parameters, say."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How an artifact is made, before it is made."""

    kind: str
    version: int
    """The transform's version: raised by hand when the same inputs would give other bytes."""
    params: Any
    """A tagged record or plain tree: everything, defaults filled in, that can change the result."""
    inputs: Mapping[str, Input] = dataclasses.field(default_factory=dict)

    @property
    def id(self) -> str:
        """SHA-256 over kind, version, parameters and the input ids that are used."""
        used = {name: item.used for name, item in self.inputs.items()}
        return canonical.digest(f"recipe/{self.kind}/{self.version}", [self.params, used])

    def plain(self) -> dict[str, Any]:
        """Returns the recipe as records hold it."""
        return {
            "version": self.version,
            "params": canonical.plain(self.params),
            "inputs": {name: dataclasses.asdict(item) for name, item in self.inputs.items()},
        }


@dataclasses.dataclass(frozen=True)
class Built:
    """What a builder says of the files it has written to `Workspace.output`."""

    content_id: str
    roots: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Ids of parts that a downstream recipe may depend on instead of the whole."""
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Plain JSON for people: counts, losses, sizes. Outside every identity."""
    leaves: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Digest of each named part of the content, to say which one differs."""
    numerics_before: Sequence[Mapping[str, Any]] = ()
    """What was done in other numerics classes, in order, before this one went on with it."""
    stored: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Files of the output that a remote store has already, byte for byte: their paths there."""


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A published artifact: where it is, what it is, and which recipe asked for it."""

    kind: str
    content_id: str
    recipe_id: str
    numerics: str
    uri: str
    roots: Mapping[str, str]
    facts: Mapping[str, Any]

    def as_input(self, root: str | None = None) -> Input:
        """Returns this artifact as an input, depending on all of it or on one named root."""
        if root is not None and root not in self.roots:
            raise ValueError(
                f"{self.kind} {self.content_id[:12]} has no root `{root}`; "
                f"it has {sorted(self.roots)}."
            )
        return Input(
            self.kind, self.content_id, self.content_id if root is None else self.roots[root]
        )


@dataclasses.dataclass(frozen=True)
class Progress:
    """What an unfinished build has left."""

    local: Path
    """A directory, which need not exist."""
    remote: str | None = None
    """Where the store is remote, the URL of what was sent there."""


@dataclasses.dataclass(frozen=True)
class Workspace:
    """The directories of one build."""

    progress: Path
    """Survives crashes: a retry of the recipe, from any entry route, finds what was committed."""
    output: Path
    """Empty and fresh: its files become the artifact."""
    remote: str | None = None
    """Where the store is remote, the URL of a progress that other machines see, too."""
    elsewhere: tuple[Progress, ...] = ()
    """The progress of the same recipe, or under what stood in for it, in other numerics classes,
    where nobody is at work."""

    def remote_path(self, path: Path) -> str | None:
        """Returns the URL, if any, that stands for a path within `progress`."""
        return self.remote and f"{self.remote}/{path.relative_to(self.progress).as_posix()}"


Build = Callable[[Workspace], Built]


class ArtifactStore:
    """Artifacts under one fsspec URL, a local directory by default."""

    def __init__(
        self, url: str, *, scratch: Path | None = None, terms: leases.Terms | None = None
    ) -> None:
        """Opens the store at `url`, which need not exist yet.

        Args:
            url: a directory, or an fsspec URL.
            scratch: where builds happen and copies are kept when `url` is remote; required there.
            terms: how long to wait for others who build the same.
        """
        # Listings that are kept show others' work as it was.
        self.filesystem, root = fsspec.url_to_fs(url, use_listings_cache=False)
        self._terms = terms or leases.Terms()
        self.root = str(root).rstrip("/")
        """The store's path within `filesystem`."""
        self.url = url
        self.is_local = isinstance(self.filesystem, LocalFileSystem)
        if not self.is_local and scratch is None:
            raise ValueError(
                f"The store {url} is remote; give a local `scratch` directory for builds."
            )
        self.scratch = Path(self.root) if self.is_local or scratch is None else scratch
        """Where builds happen on this machine, and copies of remote objects are."""
        self._verified = Verified(self.scratch)

    def find(self, recipe: Recipe, numerics: str = EXACT) -> Artifact | None:
        """Returns the artifact on record for `recipe` in this class, if its bytes are there.

        If there is none that was made in this class alone: one that was begun in another.
        """
        path = self.record_path(recipe.id, numerics)
        paths = [path] if self.filesystem.exists(path) else []
        if numerics != EXACT:
            found = self.filesystem.glob(f"{self.root}/recipes/{recipe.id}/*/artifact.json")
            paths += sorted(set(map(str, found)) - {path})
        for place in paths:
            record = self.read_record(place)
            if place != path and record["numerics"].get("ended_in") != numerics:
                continue
            artifact = self.from_record(record)
            if self.contains(artifact.kind, artifact.content_id):
                return artifact
        return None

    def contains(self, kind: str, content_id: str) -> bool:
        """Whether the whole object is stored."""
        return self.filesystem.exists(f"{self.object_path(kind, content_id)}/{INVENTORY}")

    def materialize(
        self,
        recipe: Recipe,
        build: Build,
        *,
        numerics: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
        begun_as: Sequence[Recipe] = (),
        report: Report = ignore,
    ) -> tuple[Artifact, bool]:
        """Returns the artifact of `recipe` and whether it had to be built.

        Those who want the same recipe wait for each other, see `leases`; those who build at the
        same time for all that end with the object that was published first.

        Args:
            recipe: what to make of which inputs.
            build: makes it.
            numerics: the numerics class, for products of floating-point training.
            provenance: goes on record.
            begun_as: stand-ins for `recipe` from before its inputs were known; the progress that
                was made under one of them is gone on with, and that of another numerics class is
                shown to `build` as is that of `recipe`.
            report: hears who is waited for.
        """
        numerics_id = numerics_digest(numerics)
        if (found := self.find(recipe, numerics_id)) is not None:
            return found, False
        with self._exclusive(recipe, numerics_id, report) as work:
            if (found := self.find(recipe, numerics_id)) is not None:
                return found, False
            for dead in work.glob("attempt-*"):
                shutil.rmtree(dead)
            progress, output = work / "progress", work / f"attempt-{uuid.uuid4().hex[:12]}"
            self._adopt(begun_as, numerics_id, progress)
            self._adopt_remote(begun_as, numerics_id, recipe.id)
            progress.mkdir(parents=True, exist_ok=True)
            output.mkdir()
            begun = (recipe.id, *(stand_in.id for stand_in in begun_as))
            elsewhere = self._elsewhere(begun, numerics_id, report)
            space = Workspace(progress, output, self._remote_progress(work), elsewhere)
            with needing_space(f"files of {recipe.kind} {recipe.id[:12]}", work):
                built = build(space)
                artifact = self.publish(
                    recipe, output, built, numerics=numerics, provenance=provenance
                )
                faults.reach("after-record", recipe.kind)
            self.clear_work(recipe.id, numerics_id)
            return artifact, True

    def clear_work(self, recipe_id: str, numerics: str) -> None:
        """Removes what is left of a finished build, here and in the store, but what is pinned."""
        for filesystem, root in self.places_of_work(recipe_id, numerics):
            for path in unpinned(filesystem, root):
                filesystem.rm(path, recursive=True)

    def places_of_work(self, recipe_id: str, numerics: str) -> list[tuple[Any, str]]:
        """Returns file system and path of the work of a recipe: here and, if remote, there."""
        place = f"work/{recipe_id}/{numerics}"
        here = LocalFileSystem(), str(self.scratch / place)
        return [here] if self.is_local else [here, (self.filesystem, f"{self.root}/{place}")]

    def _remote_progress(self, work: Path) -> str | None:
        if self.is_local:
            return None
        return f"{self.url.rstrip('/')}/{work.relative_to(self.scratch).as_posix()}/progress"

    def _elsewhere(
        self, recipe_ids: Sequence[str], numerics: str, report: Report
    ) -> tuple[Progress, ...]:
        """Returns the progress of other numerics classes that nobody goes on with now."""
        if numerics == EXACT:
            return ()
        return tuple(p for it in recipe_ids for p in self._of_other_classes(it, numerics, report))

    def _of_other_classes(
        self, recipe_id: str, numerics: str, report: Report
    ) -> Iterator[Progress]:
        here = self.scratch / "work" / recipe_id
        names = {path.parent.name for path in here.glob("*/progress")}
        if not self.is_local:
            there = f"{self.root}/work/{recipe_id}"
            names |= {str(p).split("/")[-2] for p in self.filesystem.glob(f"{there}/*/progress")}
        for name in sorted(names - {numerics}):
            if self.filesystem.exists(self.record_path(recipe_id, name)):
                continue  # done; what is left of it was pinned
            work = self._work(recipe_id, name)
            lease = self._lease(recipe_id, name)
            if leases.has_ended(lease, work.with_suffix(".lock"), self._terms):
                yield Progress(work / "progress", self._remote_progress(work))
            else:
                report(
                    f"The same is being made in another numerics class, {name[:12]}, by "
                    f"{leases.holder_of(lease) or 'another process'}; it is left alone."
                )

    def publish(
        self,
        recipe: Recipe,
        output: Path,
        built: Built,
        *,
        numerics: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> Artifact:
        """Moves the files of `output` into the store and puts `built` on record.

        Raises:
            ReproducibilityError: this recipe and numerics class are on record with other content.
        """
        ended_in, numerics_id = {}, numerics_digest(numerics)
        if built.numerics_before:
            # Bits of two roundings are those of neither class, so they make one of their own.
            ended_in = {"ended_in": numerics_id}
            numerics = {**(numerics or {}), BEFORE: list(map(dict, built.numerics_before))}
            numerics_id = numerics_digest(numerics)
        record_path = self.record_path(recipe.id, numerics_id)
        record = {
            "kind": recipe.kind,
            "content_id": built.content_id,
            "recipe_id": recipe.id,
            "recipe": recipe.plain(),
            "numerics": {"id": numerics_id, "class": dict(numerics or {})} | ended_in,
            "roots": dict(built.roots),
            "leaves": dict(built.leaves),
            "facts": dict(built.facts),
            "provenance": dict(provenance or {}),
        }
        note = Note(self.filesystem, record_path)
        if (on_record := note.read()) is not None:
            _refuse_other_content(parse_record(on_record, record_path), record)
        while True:
            self._store_object(recipe.kind, built.content_id, output, built.stored)
            faults.reach("before-record", recipe.kind)
            # It may have been stored before, and be collected as garbage until its record is there.
            try:
                record["inventory"] = self._sound_inventory(recipe.kind, built.content_id)
            except FileNotFoundError:
                continue
            artifact = self._put_on_record(note, record)
            if self.contains(recipe.kind, built.content_id):
                shutil.rmtree(output, ignore_errors=True)
                return artifact

    def _put_on_record(self, note: Note, record: Mapping[str, Any]) -> Artifact:
        """Writes the record of an object that is stored, unless it is there."""
        if not note.create(sealed_bytes(record)):
            # There since before, or another writer was quicker.
            on_record = self.read_record(note.path)
            _refuse_other_content(on_record, record)
            if on_record["inventory"] == record["inventory"]:
                return self.from_record(on_record)
            note.replace(sealed_bytes(record))  # its object was lost, and has been made again
        return self.from_record(record)

    def _sound_inventory(self, kind: str, content_id: str) -> str:
        """Returns the digest of an object's inventory, which no record is to bless if damaged."""
        path = self.object_path(kind, content_id)
        raw = self.filesystem.cat_file(f"{path}/{INVENTORY}")
        _read_inventory(path, raw)
        return hashlib.sha256(raw).hexdigest()

    def local(self, kind: str, content_id: str, *, verified: bool = True) -> Path:
        """Returns a local directory with the object's files, each as it was published.

        What has been verified before on this machine, and not changed since, is not read again: see
        `inventory`. A copy of a remote object that is damaged is replaced by another one.

        Args:
            kind: of the object.
            content_id: of the object.
            verified: whether it has to be whole; otherwise the caller looks for himself.

        Raises:
            DamagedArtifactError: the object, or one of its files, is not (wholly) there.
        """
        source = self.object_path(kind, content_id)
        if not self.contains(kind, content_id):
            raise DamagedArtifactError(
                f"{source}/{INVENTORY}: no such object. Rebuild it by materializing its asset "
                f"again, which moves away what is left of it."
            )
        target = self.scratch / "objects" / kind / content_id
        is_here = self.is_local or (target / INVENTORY).exists()
        if is_here and not verified:
            return target
        found = self._verified.faults(target, kind, content_id) if is_here else []
        if self.is_local:
            require_none(self._with_culprit(found, kind, content_id), target)
        elif found or not is_here:
            self._replace_copy(source, target, "; ".join(found))
        return target

    def _with_culprit(self, found: list[str], kind: str, content_id: str) -> list[str]:
        """Returns the faults of an object, headed by its inventory if that is what was damaged."""
        if not found:
            return []
        records = self.records_by_object().get((kind, content_id), [])
        promised = {record["inventory"] for record in records}
        if not promised or self.inventory_sha256(kind, content_id) in promised:
            return found
        return [f"{INVENTORY} has other bytes than its record says", *found]

    def _replace_copy(self, source: str, target: Path, fault: str) -> None:
        """Copies and checks a remote object; who reads a damaged copy keeps reading it."""
        attempt = target.with_name(f"{target.name}.{uuid.uuid4().hex[:12]}")
        inventory = self.filesystem.cat_file(f"{source}/{INVENTORY}")
        attempt.mkdir(parents=True)
        try:
            (attempt / INVENTORY).write_bytes(inventory)
            entries = _read_inventory(source, inventory)["files"]
            self._fetch(_files_of(source, inventory), entries, attempt)
            require_none(self._verified.faults(attempt, target.parent.name, target.name), attempt)
        except DamagedArtifactError as error:
            shutil.rmtree(attempt)
            raise DamagedArtifactError(
                f"the object stored at {source} is damaged: {error}"
            ) from None
        if fault:
            _LOG.warning("%s: %s; copied again from %s.", target, fault, source)
            damaged = target.with_name(f"{target.name}.{uuid.uuid4().hex[:12]}")
            target.rename(damaged)
            shutil.rmtree(damaged)
        with contextlib.suppress(OSError):  # another process has copied it at the same time
            attempt.rename(target)
        shutil.rmtree(attempt, ignore_errors=True)

    def _fetch(self, source: str, entries: Sequence[Mapping[str, Any]], target: Path) -> None:
        """Copies the files of an inventory: a listing may come late, and lack some of them."""
        names = [entry["path"] for entry in entries]
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
        remote = [f"{source}/{name}" for name in names]
        try:
            self.filesystem.get(remote, [str(target / name) for name in names])
        except FileNotFoundError:
            lost = [path for path in remote if not self.filesystem.exists(path)]
            raise DamagedArtifactError(f"{', '.join(lost)} is missing.") from None

    def inventory_sha256(self, kind: str, content_id: str) -> str:
        """Returns the digest of an object's inventory: records hold it, so that no file is free."""
        path = f"{self.object_path(kind, content_id)}/{INVENTORY}"
        return hashlib.sha256(self.filesystem.cat_file(path)).hexdigest()

    def content_ids(self, kind: str) -> list[str]:
        """Returns the content ids of all whole objects of a kind, sorted."""
        _require(_KIND, kind, "artifact kind")
        inventories = self.filesystem.glob(f"{self.root}/objects/{kind}/*/{INVENTORY}")
        return sorted(str(path).split("/")[-2] for path in inventories)

    def read_file(self, kind: str, content_id: str, path: str) -> bytes:
        """Returns the bytes of one file of an object, unchecked."""
        return self.filesystem.cat_file(f"{self.files_path(kind, content_id)}/{path}")

    def fetch_file(self, kind: str, content_id: str, path: str, target: Path) -> None:
        """Puts one file of an object at `target`, linked where that can be, else copied; unchecked.

        Raises:
            FileNotFoundError: the object has no such file.
        """
        source = f"{self.files_path(kind, content_id)}/{path}"
        if self.is_local:
            link_or_copy(Path(source), target)
        else:
            self.filesystem.get_file(source, str(target))

    def records(self) -> Iterator[dict[str, Any]]:
        """Yields every record, in the order of recipe ids."""
        for path in sorted(self.filesystem.glob(f"{self.root}/recipes/*/*/artifact.json")):
            yield self.read_record(path)

    def records_by_object(self) -> dict[tuple[str, str], list[dict[str, Any]]]:
        """Returns the records of each artifact, by kind and content id."""
        return by_object(self.records())

    def record(self, recipe_id: str, numerics: str = EXACT) -> dict[str, Any]:
        """Returns the record of one recipe, provenance included."""
        return self.read_record(self.record_path(recipe_id, numerics))

    def read_record(self, path: str) -> dict[str, Any]:
        """Returns what the record at a path within `filesystem` says.

        Raises:
            DamagedArtifactError: it is not as it was written, or not where it was written.
        """
        return parse_record(self.filesystem.cat_file(path), path)

    def _read_alias(self, name: str) -> str:
        path = f"{self.root}/aliases/{name}"
        try:
            content_id = json.loads(self.filesystem.cat_file(path))["content_id"]
            _require(_DIGEST, content_id, "content id")
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedArtifactError(
                f"{path} is damaged ({error}). Set it again with `levanter alias`, or remove it."
            ) from error
        return content_id

    def set_alias(self, name: str, content_id: str) -> None:
        """Points the name `name`, for people, at a content id."""
        _require(_ALIAS, name, "alias")
        _require(_DIGEST, content_id, "content id")
        note = Note(self.filesystem, f"{self.root}/aliases/{name}")
        note.replace(json_bytes({"content_id": content_id}))

    def aliases(self) -> dict[str, str]:
        """Returns the content id of each alias, by name."""
        paths = sorted(self.filesystem.glob(f"{self.root}/aliases/*"))
        names = [path.rpartition("/")[2] for path in paths]
        return {name: self._read_alias(name) for name in names if not is_attempt(name)}

    def resolve(self, reference: str) -> str:
        """Returns the content id meant by an alias, or by six or more of its first digits."""
        return self.resolve_object(reference)[1]

    def resolve_object(self, reference: str, *, kind: str | None = None) -> tuple[str, str]:
        """Returns the kind and content id of the artifact on record that a reference means.

        Args:
            reference: an alias, or six or more digits of a content id; `KIND:` may stand before it,
                as artifacts of two kinds can have one content, as a token cache and its copy do.
            kind: that it has to be of, if only one makes sense.

        Raises:
            ValueError: it names none, or several, which are then listed.
        """
        prefix, colon, name = reference.rpartition(":")
        wanted = prefix if colon else kind
        alias = f"{self.root}/aliases/{name}"
        if _ALIAS.fullmatch(name) and self.filesystem.exists(alias):
            digits = self._read_alias(name)
        else:
            digits = name
        objects = {(record["kind"], record["content_id"]) for record in self.records()}
        fitting = sorted(one for one in objects if len(digits) >= 6 and one[1].startswith(digits))
        matches = [one for one in fitting if wanted in (None, one[0])]
        if len(matches) == 1:
            return matches[0]
        told = ", ".join(f"{kind}:{found[:16]}" for kind, found in (matches or fitting)[:5])
        if not fitting:
            found = "no artifact"
        elif not matches:
            found = f"no {wanted}, but {told},"
        else:
            found = f"{len(matches)} artifacts ({told})"
        raise ValueError(
            f"`{reference}` names {found} in {self.url}; give an alias, or more of a content id, "
            f"or its kind with it as in `checkpoint:c0ffee`."
        )

    def object_path(self, kind: str, content_id: str) -> str:
        """Returns where an object is, or would be, within `filesystem`."""
        _require(_KIND, kind, "artifact kind")
        _require(_DIGEST, content_id, "content id")
        return f"{self.root}/objects/{kind}/{content_id}"

    def files_path(self, kind: str, content_id: str) -> str:
        """Returns the directory of an object's files within `filesystem`.

        Raises:
            FileNotFoundError: there is no such object.
        """
        path = self.object_path(kind, content_id)
        if self.is_local:
            return path
        return _files_of(path, self.filesystem.cat_file(f"{path}/{INVENTORY}"))

    def record_path(self, recipe_id: str, numerics: str) -> str:
        """Returns where a record is, or would be, within `filesystem`."""
        _require(_DIGEST, recipe_id, "recipe id")
        if numerics != EXACT:
            _require(_DIGEST, numerics, "numerics id")
        return f"{self.root}/recipes/{recipe_id}/{numerics}/artifact.json"

    def builders(self, recipe_id: str) -> list[leases.Holder]:
        """Returns who builds a recipe, in any numerics class, by the leases that they renew."""
        paths = sorted(self.filesystem.glob(f"{self.root}/leases/{recipe_id}/*.json"))
        holders = [leases.holder_of(Note(self.filesystem, path)) for path in paths]
        return [holder for holder in holders if holder is not None]

    def _lease(self, recipe_id: str, numerics: str) -> Note:
        return Note(self.filesystem, f"{self.root}/leases/{recipe_id}/{numerics}.json")

    @contextlib.contextmanager
    def begin(
        self,
        stand_in: Recipe,
        numerics: Mapping[str, Any] | None = None,
        report: Report = ignore,
    ) -> Iterator[Workspace]:
        """Yields a workspace for a recipe whose inputs are not known yet; nothing is published.

        What is left in its `progress` is taken up by `materialize(..., begun_as=[stand_in])`.
        """
        with self._exclusive(stand_in, numerics_digest(numerics), report) as work:
            for dead in work.glob("attempt-*"):
                shutil.rmtree(dead)
            space = Workspace(
                work / "progress",
                work / f"attempt-{uuid.uuid4().hex[:12]}",
                self._remote_progress(work),
                self._elsewhere([stand_in.id], numerics_digest(numerics), report),
            )
            space.progress.mkdir(parents=True, exist_ok=True)
            space.output.mkdir()
            yield space

    def _adopt(self, begun_as: Sequence[Recipe], numerics: str, progress: Path) -> None:
        for stand_in in begun_as:
            if progress.exists():
                return
            work = self._work(stand_in.id, numerics)
            with work.with_suffix(".lock").open("a+") as handle:
                fcntl.flock(handle, fcntl.LOCK_EX)
                if (work / "progress").exists():
                    with (work / WORKER_LOCK).open("w") as lock:
                        fcntl.flock(lock, fcntl.LOCK_EX)  # until a dying worker has saved
                        progress.parent.mkdir(parents=True, exist_ok=True)
                        (work / "progress").rename(progress)
                    shutil.rmtree(work)

    def _adopt_remote(self, begun_as: Sequence[Recipe], numerics: str, recipe_id: str) -> None:
        """Moves what a stand-in has in a remote store, `COMMIT`s last; cut off, it is done anew."""
        if self.is_local:
            return
        target = f"{self.root}/work/{recipe_id}/{numerics}"
        for stand_in in begun_as:
            source = f"{self.root}/work/{stand_in.id}/{numerics}"
            self.filesystem.invalidate_cache()
            files = [str(path) for path in self.filesystem.find(source)]
            for path in sorted(files, key=lambda path: (path.endswith("/COMMIT"), path)):
                moved = f"{target}{path.removeprefix(source)}"
                self.filesystem.makedirs(moved.rpartition("/")[0], exist_ok=True)
                self.filesystem.pipe_file(moved, self.filesystem.cat_file(path))
            if files:
                self.filesystem.rm(source, recursive=True)

    @contextlib.contextmanager
    def _exclusive(self, recipe: Recipe, numerics: str, report: Report) -> Iterator[Path]:
        """Yields the work directory, which is nobody else's meanwhile, under a lease."""
        work = self._work(recipe.id, numerics)
        with leases.held(
            self._lease(recipe.id, numerics),
            work.with_suffix(".lock"),
            self._terms,
            inputs=[[given.kind, given.content_id] for given in recipe.inputs.values()],
            doing=lambda: _told_progress(work / "progress"),
            report=report,
        ):
            yield work

    def _work(self, recipe_id: str, numerics: str) -> Path:
        """Returns the work directory of a recipe.

        Each numerics class has its own, so that a run that is killed and resumed keeps to one; a
        build that has none may go on with another's, and says so: see `Workspace.elsewhere`.
        """
        work = self.scratch / "work" / recipe_id / numerics
        work.parent.mkdir(parents=True, exist_ok=True)
        return work

    def from_record(self, record: Mapping[str, Any]) -> Artifact:
        """Returns the artifact that a record of this store is about."""
        kind, content_id = record["kind"], record["content_id"]
        uri = self.filesystem.unstrip_protocol(self.object_path(kind, content_id))
        return Artifact(
            kind,
            content_id,
            record["recipe_id"],
            record["numerics"]["id"],
            uri,
            record["roots"],
            record["facts"],
        )

    def _store_object(
        self, kind: str, content_id: str, output: Path, stored: Mapping[str, str]
    ) -> None:
        """Makes `output` the object, or leaves it if the same content has been stored before."""
        target = self.object_path(kind, content_id)
        if not output.is_dir():
            raise DamagedArtifactError(
                f"{target} was removed as soon as it was stored. Run again: it is made anew."
            )
        (output / INVENTORY).unlink(missing_ok=True)
        described = inventory_of(output, kind, content_id)
        if not self.is_local:
            described["at"] = f"{UPLOAD}{uuid.uuid4().hex[:12]}"
        faults.reach("before-inventory", kind)
        write_durably(output / INVENTORY, described)
        faults.reach("before-sync", kind)
        if self.contains(kind, content_id):
            return
        if self.is_local:
            sync_tree(output)
            faults.reach("before-store", kind)
            make_directory(Path(target).parent)
            self._place(output, Path(target))
            sync_directory(Path(target).parent)
        else:
            self._upload(output, target, described, stored)
            shutil.rmtree(output)

    def _place(self, output: Path, target: Path) -> None:
        """Gives a whole object its name, which is free or that of the same object."""
        try:
            output.rename(target)
        except OSError:
            if (target / INVENTORY).exists():
                return
            if not target.exists():
                raise
            self._move_remains(target)
            output.rename(target)

    def _move_remains(self, target: Path) -> None:
        """Moves away what is left of an object that an interrupted copy, or loss, has spoiled."""
        away = set_aside_path(self.root, target.parent.name, target.name)
        Path(away).parent.mkdir(parents=True, exist_ok=True)
        _LOG.warning("%s has no %s: moved to %s.", target, INVENTORY, away)
        target.rename(away)

    def _upload(
        self,
        output: Path,
        target: str,
        described: Mapping[str, Any],
        stored: Mapping[str, str],
    ) -> None:
        names = [f"{described['at']}/{entry['path']}" for entry in described["files"]]
        for entry, name in zip(described["files"], names, strict=True):
            place = f"{target}/{name}"
            self.filesystem.makedirs(place.rpartition("/")[0], exist_ok=True)
            source = stored.get(entry["path"])
            if source is None or not self._is_copied(source, place, entry["size"]):
                self.filesystem.put_file(str(output / entry["path"]), place)
            faults.reach("during-upload", described["kind"])
        if not Note(self.filesystem, f"{target}/{INVENTORY}").create(json_bytes(described)):
            for name in names:  # another was first
                self.filesystem.rm_file(f"{target}/{name}")

    def _is_copied(self, source: str, place: str, num_bytes: int) -> bool:
        """Copies a file within the store; returns whether it could be, and is whole."""
        try:
            self.filesystem.cp_file(source, place)
        except (FileNotFoundError, NotImplementedError) as error:
            _LOG.info("%s cannot be copied (%s): it is sent again.", source, error)
            return False
        return self.filesystem.info(place)["size"] == num_bytes


def unpinned(filesystem: Any, root: str) -> list[str]:
    """Returns what of a finished build's work no pin keeps: whole directories where it can.

    Args:
        filesystem: that of fsspec where the work is.
        root: its directory there.
    """
    if not filesystem.exists(root):
        return []
    filesystem.invalidate_cache()
    files = [str(path) for path in filesystem.find(root)]
    pins = [path for path in files if path.endswith(".json") and path.split("/")[-2] == PINS]
    # `D/pins/X.json` is about all that begins with `D/X.`.
    kept = tuple(path.removesuffix("json").replace(f"/{PINS}/", "/") for path in pins)
    staying = {path for path in files if path in pins or path.startswith(kept)}
    needed = {"/".join(path.split("/")[:n]) for path in staying for n in range(path.count("/") + 1)}
    if root not in needed:
        return [root]
    found = set()
    for path in set(files) - staying:
        while (parent := path.rpartition("/")[0]) not in needed:
            path = parent
        found.add(path)
    return sorted(found)


def set_aside_path(root: str, kind: str, content_id: str) -> str:
    """Returns where in a store to keep an object that is no good, to be looked into."""
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S%f")
    return f"{root}/set_aside/{kind}/{content_id}.{stamp}"


def is_key(kind: str, content_id: str) -> bool:
    """Whether these may be the names of an object's directories."""
    return bool(_KIND.fullmatch(kind) and _DIGEST.fullmatch(content_id))


def parse_record(raw: bytes, path: str) -> dict[str, Any]:
    """Returns what the bytes of a record say.

    Args:
        raw: the bytes.
        path: where they were read, which says what the record is of.

    Raises:
        DamagedArtifactError: it is not as it was written, or not where it was written.
    """
    place = path.split("/")[-3], path.split("/")[-2]
    try:
        record = unsealed(raw, fields=_RECORD_FIELDS)
        found = record["recipe_id"], record["numerics"]["id"]
        if found != place:
            raise ValueError(f"it is the record of {found}, and lies under {place}")
        inputs = record["recipe"]["inputs"].values()
        keys = [(item["kind"], item["content_id"]) for item in (record, *inputs)]
        if not all(is_key(*key) for key in keys):
            raise ValueError(f"{keys} name no objects")
        _require(_DIGEST, record["inventory"], "digest of an inventory")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedArtifactError(
            f"{path} is damaged ({error}). Restore it from a copy, or remove it: its recipe is "
            f"then computed again."
        ) from error
    return record


def reference_bytes(artifact: Artifact) -> bytes:
    """Returns an artifact as references hold it, of which Dagster instances keep one an asset."""
    return sealed_bytes(dataclasses.asdict(artifact))


def parse_reference(raw: bytes, path: str) -> Artifact:
    """Returns what the reference at `path` says.

    Raises:
        DamagedArtifactError: it is not as it was written.
    """
    fields = [field.name for field in dataclasses.fields(Artifact)]
    try:
        artifact = Artifact(**unsealed(raw, fields=fields))
        if not is_key(artifact.kind, artifact.content_id):
            raise ValueError(f"{artifact.kind!r} {artifact.content_id!r} names no object")
    except (ValueError, TypeError) as error:
        raise DamagedArtifactError(
            f"{path} is damaged ({error}). Materialize its asset again, or remove it."
        ) from error
    return artifact


def by_object(records: Iterable[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Returns records by the kind and content id that they are about, in the order given."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        found.setdefault((record["kind"], record["content_id"]), []).append(record)
    return found


def numerics_digest(numerics: Mapping[str, Any] | None) -> str:
    """Returns the id of a numerics class; `exact` for products that no rounding can change."""
    return EXACT if numerics is None else canonical.digest("numerics/1", dict(numerics))


def link_or_copy(source: Path, target: Path) -> None:
    """Gives a file a second name, and where the file system has no hard links, a second copy."""
    try:
        target.hardlink_to(source)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)


@contextlib.contextmanager
def needing_space(what: str, where: Path) -> Iterator[None]:
    """Says of a write for which there is no space what was written, and where.

    Raises:
        DiskFullError: the disk, the quota or the largest size of a file is used up.
    """
    try:
        yield
    except DiskFullError:
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DiskFullError(
            error.errno,
            f"no space for {what} ({os.strerror(error.errno)}). What was committed is kept: free "
            f"space, and run again",
            str(where),
        ) from error


def differing_leaves(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Returns the sorted names of the parts that two records do not have in common."""
    return [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]


def write_durably(path: Path, value: Mapping[str, Any]) -> None:
    """Writes `value` as JSON so that a crash leaves the old file or the whole new one, on disk."""
    write_whole(path, json_bytes(value))


def _read_inventory(object_path: str, raw: bytes) -> dict[str, Any]:
    kind, content_id = object_path.split("/")[-2:]
    try:
        return read_inventory(raw, (kind, content_id))
    except ValueError as error:
        raise DamagedArtifactError(
            f"{object_path}/{INVENTORY} is {error}. Restore it from a copy, or move the object "
            f"away with `levanter fsck --set-aside`, and run again."
        ) from None


def _files_of(object_path: str, inventory: bytes) -> str:
    """Returns where the files of a remote object are."""
    at = _read_inventory(object_path, inventory).get(
        "at", "."
    )  # beside the inventory, before uploads had their own
    return object_path if at == "." else f"{object_path}/{at}"


def _told_progress(directory: Path) -> str:
    """Returns how much a build has committed, and what last."""
    newest, name, num_bytes = 0.0, "", 0
    for parent, _, files in os.walk(directory):
        for path in (Path(parent) / file for file in files):
            with contextlib.suppress(FileNotFoundError):  # work in hand
                found = path.stat()
                num_bytes += found.st_size
                newest, name = max((newest, name), (found.st_mtime, str(path)))
    if not name:
        return "nothing committed yet"
    return f"{num_bytes:,} bytes committed, last {Path(name).relative_to(directory)}"


def _refuse_other_content(on_record: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    if on_record["content_id"] == record["content_id"]:
        return
    differing = differing_leaves(on_record["leaves"], record["leaves"])
    where = (
        f" First difference: `{differing[0]}` ({len(differing)} of {len(record['leaves'])} differ)."
        if differing
        else ""
    )
    raise ReproducibilityError(
        f"{record['kind']} of recipe {record['recipe_id'][:12]} gave content "
        f"{record['content_id'][:12]}, but {on_record['content_id'][:12]} is on record for the "
        f"same recipe and numerics class.{where} "
        f"Nothing was overwritten."
    )


def _require(pattern: re.Pattern[str], text: str, what: str) -> None:
    if not pattern.fullmatch(text):
        raise ValueError(f"{text!r} is not a valid {what} (it must match {pattern.pattern}).")
