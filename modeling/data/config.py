"""What a dataset is: its sources, tokenizer, lengths, and who encodes. Imports no JAX."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from modeling.canonical import NOT_IDENTITY, added_later
from modeling.data.formats_config import Format, TextFormat
from modeling.data.sources_config import (
    Source,
    SourceName,
    Validation,
    ValidationConfig,
    check_source,
)
from modeling.data.tokenizers_config import TokenizerConfig
from modeling.fields import STRICT

Owner = Annotated[str, Field(pattern=r"^(team:[A-Za-z0-9_-]+|[^@\s]+@[^@\s]+\.[^@\s]+)$")]
"""`team:data`, or a mail address."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizationConfig:
    """How documents become ids; special tokens are appended as ids, never as text."""

    append_bos: bool = False
    append_eos: bool = True

    identity_tag: ClassVar[str] = "tokenization/1"
    __pydantic_config__ = STRICT


Packing = Literal["concat", "documents"]
LongDocuments = Literal["split", "truncate", "drop"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenCacheConfig:
    """How tokens become rows; in a dataset's file, a bare number is its `length`."""

    length: Annotated[int, Field(ge=8, le=2**20)]
    """Tokens in a row."""
    packing: Packing = "concat"
    """`concat` cuts the stream of all documents; `documents` lays whole ones side by side."""
    long_documents: LongDocuments = "split"
    """What packing does with documents longer than a row: several pieces, the first one alone, or
    none. Concatenation splits."""
    layout: Literal["view", "copy"] = dataclasses.field(default="view", metadata=NOT_IDENTITY)
    """`copy` makes, beside the view, files that stand alone and that `datasets` opens."""

    identity_tag: ClassVar[str] = "token_cache/1"
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        """Refuses what would be ignored."""
        if self.packing == "concat" and self.long_documents != "split":
            raise ValueError(
                f"long_documents: {self.long_documents!r} is for packing: documents; "
                f"concatenation cuts documents wherever a row ends"
            )

    @property
    def name(self) -> str:
        """The last part of its asset's key: `L1024`, or `L1024_documents`."""
        return f"L{self.length}" if self.packing == "concat" else f"L{self.length}_{self.packing}"


def _as_cache(value: Any) -> Any:
    is_length = isinstance(value, int) and not isinstance(value, bool)
    return {"length": value} if is_length else value


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalCompute:
    """This process encodes."""

    type: Literal["local"] = "local"

    identity_tag: ClassVar[str] = "compute.local/1"
    __pydantic_config__ = STRICT


@dataclasses.dataclass(frozen=True, kw_only=True)
class RayCompute:
    """Tasks of a Ray cluster encode, one started here for the purpose unless there is one."""

    type: Literal["ray"]
    address: str | None = None
    """Of a running cluster (`auto`, `ray://head:10001`); None starts one in this machine."""
    max_workers: Annotated[int, Field(ge=1)] | None = None
    """Tasks at a time; None takes as many as there are processors."""

    identity_tag: ClassVar[str] = "compute.ray/1"
    __pydantic_config__ = STRICT


Compute = Annotated[
    LocalCompute | RayCompute,
    Field(discriminator="type"),
    BeforeValidator(lambda value: {"type": value} if isinstance(value, str) else value),
]
"""Where documents are encoded; `ray` alone is short for `{type: ray}`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """One dataset file: a corpus, its tokenizer, and the rows that its tokens are laid into."""

    tokenizer: TokenizerConfig
    sequence_lengths: Annotated[
        tuple[Annotated[TokenCacheConfig, BeforeValidator(_as_cache)], ...], Field(min_length=1)
    ] = dataclasses.field(metadata=NOT_IDENTITY)
    """The token caches."""
    source: Source | None = None
    """The one source of documents."""
    sources: Mapping[SourceName, Source] = dataclasses.field(
        default_factory=dict, metadata=added_later({})
    )
    """Several by name, instead of one; each has splits of its own, `train/<name>`."""
    validation: Validation = dataclasses.field(default=ValidationConfig())
    """How documents are held out, of sources that do not say it themselves."""
    tokenization: TokenizationConfig = TokenizationConfig()
    format: Format = dataclasses.field(default=TextFormat(), metadata=added_later(TextFormat()))
    unit_bytes: Annotated[int, Field(ge=1, le=2**30)] = dataclasses.field(
        default=64 * 2**20, metadata=NOT_IDENTITY
    )
    """Bytes of text that are encoded and committed at a time; training on demand begins with the
    units of its first era."""
    compute: Compute = dataclasses.field(default=LocalCompute(), metadata=NOT_IDENTITY)
    description: str = dataclasses.field(default="", metadata=NOT_IDENTITY)
    owners: tuple[Owner, ...] = dataclasses.field(default=("team:lm",), metadata=NOT_IDENTITY)
    """Who answers for its assets."""

    identity_tag: ClassVar[str] = "dataset/1"
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        """Refuses two answers to where documents come from, and caches that share a name."""
        if (self.source is None) == (not self.sources):
            raise ValueError(
                "give either `source` (one) or `sources` (several by name), exactly one of both."
            )
        for name, source in self.named_sources.items():
            check_source(f"sources.{name}" if name else "source", source, self.validation)
        kinds = {one.type for one in self.formats.values()}
        if "ids" in kinds and len(kinds) > 1:
            raise ValueError(
                f"sources: records are of formats {sorted(kinds)}; ids have no tokenizer here, and "
                f"the others need one. Make them two datasets, or tokenize all of them here."
            )
        names = [cache.name for cache in self.sequence_lengths]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"sequence_lengths: two token caches would be named {name!r}; keep one, or "
                    f"give the other a dataset file of its own"
                )

    @property
    def formats(self) -> Mapping[str, Format]:
        """What a record of each source is; the name of an only one is empty."""
        return {name: source.record or self.format for name, source in self.named_sources.items()}

    @property
    def max_skipped(self) -> Mapping[str, int]:
        """The sources of which documents that cannot be tokenized are left out, and how many may.

        Texts always can.
        """
        return {
            name: source.max_skipped
            for name, source in self.named_sources.items()
            if source.on_error == "skip" and self.formats[name].type != "text"
        }

    @property
    def has_loss_mask(self) -> bool:
        """Whether tokens are told apart into those to be predicted and others."""
        return not all(one.learns_all for one in self.formats.values())

    def cache(self, length: int, packing: Packing) -> TokenCacheConfig:
        """Returns how the rows of a token cache are made, by what tells it from the others."""
        wanted = length, packing
        (found,) = [
            cache for cache in self.sequence_lengths if (cache.length, cache.packing) == wanted
        ]
        return found

    @property
    def named_sources(self) -> Mapping[str, Source]:
        """The sources by name; the name of an only one is empty."""
        return self.sources if self.source is None else {"": self.source}
