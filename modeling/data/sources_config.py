"""Where documents come from, which are kept and which held out. Imports no JAX."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, Tag

from modeling.canonical import NOT_IDENTITY, added_later
from modeling.data.formats_config import Format
from modeling.fields import STRICT, RegularExpression, is_commit, type_or

Place = Annotated[str, Field(min_length=1)]
"""A path, pattern or URL; an empty one would be the whole directory that a process is in."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthFilter:
    """Keeps documents of some lengths; a bound that is not given keeps all."""

    type: Literal["length"]
    min_characters: Annotated[int, Field(ge=0)] | None = None
    max_characters: Annotated[int, Field(ge=0)] | None = None
    min_bytes: Annotated[int, Field(ge=0)] | None = None
    max_bytes: Annotated[int, Field(ge=0)] | None = None
    """Of UTF-8."""

    identity_tag: ClassVar[str] = "filter.length/1"
    __pydantic_config__ = STRICT


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegexFilter:
    """Keeps documents in whose text, or in one of whose fields, a pattern is found; or the others.

    A field that is no string is searched as the JSON that it is.
    """

    type: Literal["regex"]
    pattern: RegularExpression
    """`(?i)` and the like may begin it."""
    field: str | None = None
    keep: Literal["matching", "others"] = "matching"

    identity_tag: ClassVar[str] = "filter.regex/1"
    __pydantic_config__ = STRICT


@dataclasses.dataclass(frozen=True, kw_only=True)
class DuplicatesFilter:
    """Keeps the first of equal texts, over all sources of the corpus that have this filter.

    It holds 16 bytes of each text's digest in memory.
    """

    type: Literal["duplicates"]

    identity_tag: ClassVar[str] = "filter.duplicates/1"
    __pydantic_config__ = STRICT


Filter = Annotated[LengthFilter | RegexFilter | DuplicatesFilter, Field(discriminator="type")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Holds out documents by a stable hash of their id, so that adding one moves no other."""

    type: Literal["hash"] = dataclasses.field(default="hash", metadata=added_later("hash"))
    fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.02

    identity_tag: ClassVar[str] = "validation.hash/1"
    __pydantic_config__ = STRICT


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationFiles:
    """Holds out whole files, which are read like those of the source; all others are trained on."""

    type: Literal["files"]
    paths: Annotated[tuple[Place, ...], Field(min_length=1)] = dataclasses.field(
        metadata=NOT_IDENTITY
    )
    """Whether or not the source's own paths name them too; the listing says which they are."""

    identity_tag: ClassVar[str] = "validation.files/1"
    __pydantic_config__ = STRICT


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationSplit:
    """Holds out a split of a Hugging Face dataset."""

    type: Literal["split"]
    split: str = "validation"

    identity_tag: ClassVar[str] = "validation.split/1"
    __pydantic_config__ = STRICT


Validation = Annotated[
    Annotated[ValidationConfig, Tag("hash")]
    | Annotated[ValidationFiles, Tag("files")]
    | Annotated[ValidationSplit, Tag("split")],
    type_or("hash"),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractSource:
    """What every source may say of its documents and of its mistakes."""

    filters: tuple[Filter, ...] = dataclasses.field(default=(), metadata=added_later(()))
    """In this order; a document has to pass all."""
    validation: Validation | None = dataclasses.field(default=None, metadata=added_later(None))
    """How documents of this source are held out; None: as the dataset says."""
    record: Format | None = dataclasses.field(default=None, metadata=NOT_IDENTITY)
    """What a record of this source is; None: what the dataset's `format` says. Of it the corpus
    depends on what is read, and the tokens on how that is rendered (`DatasetConfig.formats`)."""
    on_error: Literal["fail", "skip"] = dataclasses.field(
        default="fail", metadata=added_later("fail")
    )
    """Whether a bad record, or a damaged file as a whole, is left out, counted and listed; and when
    it is tokenized, a document that has no ids, as its chat template refuses it."""
    max_skipped: Annotated[int, Field(ge=0)] = dataclasses.field(
        default=100, metadata=added_later(100)
    )
    """How many may be left out before it is an error after all: of the corpus, and again when it
    is tokenized."""
    max_document_bytes: Annotated[int, Field(ge=1)] = dataclasses.field(
        default=2**30, metadata=added_later(2**30)
    )
    """A longer one is a mistake, such as lost line ends."""
    max_expansion: Annotated[int, Field(ge=1)] = dataclasses.field(
        default=100, metadata=added_later(100)
    )
    """How many times its stored bytes a file may hold, past its first MiB."""
    sha256: Mapping[str, Sha256] = dataclasses.field(default_factory=dict, metadata=NOT_IDENTITY)
    """What files must be, by logical path."""
    listing_sha256: Sha256 | None = dataclasses.field(default=None, metadata=NOT_IDENTITY)
    """What the listing must be, as the asset shows it under `listing`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PyStdlibSource(AbstractSource):
    """The running interpreter's own standard-library sources, one document a file."""

    type: Literal["pystdlib"]

    identity_tag: ClassVar[str] = "source.pystdlib/1"
    __pydantic_config__ = STRICT


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackageSource(AbstractSource):
    """The Python sources of an installed package, one document a file; it is not imported."""

    type: Literal["package"]
    package: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]

    identity_tag: ClassVar[str] = "source.package/1"
    __pydantic_config__ = STRICT


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilesSource(AbstractSource):
    """Files of documents, by paths, globs or URLs."""

    type: Literal["files"]
    paths: Annotated[tuple[Place, ...], Field(min_length=1)] = dataclasses.field(
        metadata=NOT_IDENTITY
    )
    """Files, directories, globs, `{a,b}`, `{00..17}`, fsspec URLs; their listing is what counts."""
    format: Literal["text", "paragraphs", "jsonl", "json", "parquet", "arrow", "ids"] = "text"
    """A document is a file, a paragraph of a text (blank lines part them), a JSON line, an object
    of a JSON array, a row of a table, or what stands between separators in a flat array of ids."""
    text_field: str = "text"
    """The field of a JSON object, or the column of a table, that holds the document."""
    id_field: str | None = dataclasses.field(default=None, metadata=added_later(None))
    """The field with a document's own id, which then decides where it is held out; None: its file
    and place there are its id. Ids are unique in a source: 16 bytes of each one's digest are held
    in memory to see that."""

    identity_tag: ClassVar[str] = "source.files/1"
    __pydantic_config__ = STRICT


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFaceSource(AbstractSource):
    """A split of a dataset, read by `datasets`, which runs no code of the dataset's."""

    type: Literal["huggingface"]
    id: str | None = None
    """`owner/name` on the hub."""
    revision: str | None = None
    """The commit of `id` in 40 hex digits; a branch or tag could move."""
    path: Place | None = dataclasses.field(default=None, metadata=NOT_IDENTITY)
    """A local directory of data files instead of `id`; its files' listing is what counts."""
    name: str | None = None
    """The configuration, where the dataset has several."""
    split: str = "train"
    streaming: bool = dataclasses.field(default=False, metadata=NOT_IDENTITY)
    """Reads what is needed instead of copying all of it into the cache below `HF_HOME` first."""
    text_field: str = "text"
    id_field: str | None = None

    identity_tag: ClassVar[str] = "source.huggingface/1"
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        """Refuses what would not be the same data tomorrow."""
        if (self.id is None) == (self.path is None):
            raise ValueError("give either `id` (on the hub) or `path` (a local directory).")
        if self.path is not None and self.revision is not None:
            raise ValueError("a local directory has no `revision`; leave it out.")
        if self.id is not None and not is_commit(self.revision):
            raise ValueError(
                f"`revision` {self.revision!r} is no commit: a branch or tag can move. Pin it by "
                f"the 40 hex digits that `git ls-remote https://huggingface.co/datasets/{self.id}` "
                f"shows."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedDatasetSource(AbstractSource):
    """What `datasets` has saved with `save_to_disk`."""

    type: Literal["saved_dataset"]
    path: Place = dataclasses.field(metadata=NOT_IDENTITY)
    """The directory; its files' listing is what counts."""
    split: str | None = None
    """Where several are saved."""
    text_field: str = "text"
    id_field: str | None = None

    identity_tag: ClassVar[str] = "source.saved_dataset/1"
    __pydantic_config__ = STRICT


def check_source(name: str, source: AbstractSource, default: Validation) -> None:
    """Refuses fields where records have none, and ways to hold out that a source cannot go."""
    has_records = not isinstance(source, PyStdlibSource | PackageSource)
    if isinstance(source, FilesSource):
        has_records = source.format not in ("text", "paragraphs", "ids")
    named = [filter.field for filter in source.filters if isinstance(filter, RegexFilter)]
    fields = [field for field in (*named, getattr(source, "id_field", None)) if field]
    if fields and not has_records:
        raise ValueError(f"{name}: its documents are texts alone, without a field {fields[0]!r}.")
    validation = source.validation or default
    is_dataset = isinstance(source, HuggingFaceSource | SavedDatasetSource)
    if isinstance(validation, ValidationFiles) and not isinstance(source, FilesSource):
        raise ValueError(f"{name}: `validation: {{type: files}}` goes with `type: files` alone.")
    if isinstance(validation, ValidationSplit) and not is_dataset:
        raise ValueError(
            f"{name}: `validation: {{type: split}}` goes with datasets, which have splits."
        )


Source = Annotated[
    PyStdlibSource | PackageSource | FilesSource | HuggingFaceSource | SavedDatasetSource,
    Field(discriminator="type"),
]
SourceName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
