"""The listing of a corpus: every file of its sources, by digest, as it is now.

A listing is made anew by each run and for each status, so a new, changed or vanished file is seen;
its root is what the recipe of a corpus takes in. What lies on the hub at a commit cannot change and
is listed by what pins it. Files can be pinned too: `sha256` says what single files must be,
`listing_sha256` what all of a source must be.
"""

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import fsspec

from modeling import canonical
from modeling.data.digests import DigestMemo, DigestSession
from modeling.data.hub import commit_digest, dataset_path, dataset_splits
from modeling.data.reading import is_held_out
from modeling.data.sources import (
    FoundFile,
    SourceError,
    SourceFile,
    StoredFile,
    find_files,
    matching_files,
    unique_files,
)
from modeling.data.sources_config import (
    FilesSource,
    HuggingFaceSource,
    PackageSource,
    PyStdlibSource,
    SavedDatasetSource,
    Source,
    Validation,
    ValidationConfig,
    ValidationFiles,
)
from modeling.data.splits import VALIDATION, split_name
from modeling.urls import public_url

Sources = Source | Mapping[str, Source]
"""One source, or several by name."""


@dataclass(frozen=True)
class Listing:
    """The files of all sources, each sorted by logical path, and how documents are held out."""

    files: tuple[SourceFile, ...]
    validation: Validation
    source_names: tuple[str, ...]
    """In order; one that is empty where there is a single source."""

    @property
    def root(self) -> str:
        """Digest over (path, size, SHA-256) of every file: what the recipe of a corpus takes in."""
        return listing_root(self.files)

    def of_source(self, name: str) -> tuple[SourceFile, ...]:
        """Returns the files of one source."""
        prefix = f"{name}/" if name else ""
        return tuple(file for file in self.files if file.logical_path.startswith(prefix))

    @property
    def roots(self) -> str | dict[str, str]:
        """What `listing_sha256` of each source may pin it to."""
        by_name = {name: listing_root(self.of_source(name)) for name in self.source_names}
        return by_name.get("", by_name)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that a corpus of these files has, if empty ones; train before validation."""
        return tuple(split_name(held, name) for held in (False, True) for name in self.source_names)


def scan(sources: Sources, *, validation: Validation, memo: DigestMemo | None = None) -> Listing:
    """Lists and digests the files that sources have now.

    Args:
        sources: one, or several by name.
        validation: how documents are held out, unless a source says it.
        memo: knows the digests of files that have not changed; None: every file is read.

    Raises:
        SourceError: nothing matches, or a file is unreadable, empty, or not what it is pinned to.
    """
    by_name = named(sources)
    with contextlib.nullcontext() if memo is None else memo.session() as known:
        files = [file for name in by_name for file in _scan(name, by_name[name], validation, known)]
    return Listing(tuple(files), validation, tuple(by_name))


@dataclass(frozen=True)
class Look:
    """What a corpus seems to consist of, as far as that is seen without reading."""

    digest: str
    """Over names and hints; no part of any identity."""
    num_files: int


def glance(sources: Sources, *, validation: Validation) -> Look:
    """Looks at what files sources have now.

    Raises:
        SourceError: a source cannot be listed, as nothing matches or its store does not answer.
    """
    seen = []
    for name, source in named(sources).items():
        by = source.validation or validation
        if isinstance(source, HuggingFaceSource) and source.id is not None:
            seen += [
                [name, split, commit_digest(source, split)] for split in dataset_splits(source, by)
            ]
            continue
        paths = _paths(source, by)
        try:
            for path in paths:
                # A process that looks again and again would be told what it was told first.
                if "://" in path:
                    fsspec.url_to_fs(path)[0].invalidate_cache()
            for file, held_out in _found(source, by):
                seen.append([name, file.logical_path, held_out, file.hint()])
        except SourceError:
            raise
        except Exception as error:
            # Of whatever type: each kind of store has its own for not being reached.
            told = ", ".join(map(public_url, paths)) or source
            raise SourceError(
                f"{told}: cannot be listed: {type(error).__name__}: {error}"
            ) from error
    return Look(canonical.digest("look/1", seen), len(seen))


def _paths(source: Source, validation: Validation) -> list[str]:
    """Returns the paths, patterns and URLs that a source consists of."""
    match source:
        case FilesSource():
            paths = list(source.paths)
        case HuggingFaceSource() | SavedDatasetSource():
            paths = [source.path] if source.path is not None else []
        case _:
            paths = []
    return paths + (list(validation.paths) if isinstance(validation, ValidationFiles) else [])


def named(sources: Sources) -> dict[str, Source]:
    """Returns the sources by name, in order; the name of an only one is empty."""
    by_name = sources if isinstance(sources, Mapping) else {"": sources}
    return {name: by_name[name] for name in sorted(by_name)}


def _scan(
    name: str, source: Source, default: Validation, memo: DigestSession | None
) -> list[SourceFile]:
    """Returns the files of one source as they are now."""
    validation = source.validation or default
    if isinstance(source, HuggingFaceSource) and source.id is not None:
        return [
            SourceFile(
                logical_path=_prefixed(name, dataset_path(source, split)),
                size=0,
                sha256=commit_digest(source, split),
                split=None if held_out is None else split_name(held_out, name),
                held_out=held_out,
                location="",
            )
            for split, held_out in dataset_splits(source, validation).items()
        ]
    files = [
        _digested(name, source, found, validation, held_out, memo)
        for found, held_out in _found(source, validation)
    ]
    if not files:
        raise SourceError(f"{source}: has no files.")
    _require_pinned(name, source, files)
    return files


def _found(source: Source, validation: Validation) -> list[tuple[FoundFile, bool | None]]:
    """Returns a source's files, and which are held out as a whole or trained on as a whole."""
    if not isinstance(validation, ValidationFiles):
        return [(file, None) for file in find_files(source)]
    held_out = {file.location: file for file in matching_files(validation.paths)}
    renamed = [
        replace(file, logical_path=f"{VALIDATION}/{file.logical_path}")
        for file in held_out.values()
    ]
    trained = [file for file in find_files(source) if file.location not in held_out]
    files = unique_files([*trained, *renamed])
    return [(file, file.location in held_out) for file in files]


def _digested(
    name: str,
    source: Source,
    found: FoundFile,
    validation: Validation,
    held_out: bool | None,
    memo: DigestSession | None,
) -> SourceFile:
    known = memo.find(found) if memo is not None else None
    if known is None:
        stamp = found.stamp()
        with StoredFile(found, max_expansion=source.max_expansion) as stored:
            stored.drain()
        known = stored.num_bytes, stored.sha256.hexdigest()
        if memo is not None:
            memo.keep(found, stamp, *known)
    size, sha256 = known
    if size == 0 and isinstance(source, FilesSource) and source.on_error == "fail":
        raise SourceError(f"{found.shown}: empty; take it out of `source.paths`.")
    named = replace(found, logical_path=_prefixed(name, found.logical_path))
    split = None
    if held_out is not None:
        split = split_name(held_out, name)
    elif _is_one_document(source) and isinstance(validation, ValidationConfig):
        split = split_name(is_held_out(named.document_path, validation), name)
    return SourceFile(named.logical_path, size, sha256, split, held_out, found.location)


def _is_one_document(source: Source) -> bool:
    """Whether each file of a source is a document."""
    if isinstance(source, FilesSource):
        return source.format == "text"
    return isinstance(source, PyStdlibSource | PackageSource)


def _require_pinned(name: str, source: Source, files: list[SourceFile]) -> None:
    """Checks the files against the digests that the configuration pins them to."""
    by_path = {file.logical_path: file for file in files}
    for path, pinned in source.sha256.items():
        file = by_path.get(_prefixed(name, path))
        if file is None:
            raise SourceError(
                f"source.sha256: pins {path!r}, which is not among the files: "
                f"{[known.removeprefix(_prefixed(name, '')) for known in list(by_path)[:5]]}..."
            )
        if file.sha256 != pinned:
            raise SourceError(
                f"{public_url(file.location)}: has SHA-256 {file.sha256}, but source.sha256 "
                f"pins it to {pinned}. Restore the file, or pin what it is now."
            )
    root = listing_root(files)
    if source.listing_sha256 not in (None, root):
        raise SourceError(
            f"{f'sources.{name}' if name else 'source'}: its {len(files)} files have the listing "
            f"{root}, but listing_sha256 pins it to {source.listing_sha256}. Restore them, or pin "
            f"what they are now."
        )


def _prefixed(name: str, path: str) -> str:
    return f"{name}/{path}" if name else path


def listing_root(files: Iterable[SourceFile]) -> str:
    """Returns the digest over (path, size, SHA-256) of every file."""
    return canonical.digest("listing/1", file_rows(files))


def file_rows(files: Iterable[SourceFile]) -> list[list[Any]]:
    """Returns what identities take in of files."""
    return [
        [file.logical_path, file.size, file.sha256]
        + ([] if file.held_out is None else [split_name(file.held_out, "")])
        for file in files
    ]
