"""What a dataset is: source, validation split, tokenizer, sequence lengths. Imports no JAX."""

import dataclasses
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from modeling.canonical import NOT_IDENTITY

STRICT = ConfigDict(extra="forbid", strict=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PyStdlibSource:
    """The running interpreter's own standard-library sources, one document a file."""

    type: Literal["pystdlib"]

    identity_tag: ClassVar[str] = "source.pystdlib/1"
    __pydantic_config__ = STRICT


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilesSource:
    """Files of documents, by paths, globs or URLs."""

    type: Literal["files"]
    paths: Annotated[tuple[str, ...], Field(min_length=1)] = dataclasses.field(
        metadata=NOT_IDENTITY
    )
    """Files, directories, globs, `{a,b}`, `{00..17}`, fsspec URLs; their listing is what counts."""
    format: Literal["text", "paragraphs", "jsonl", "json", "parquet", "arrow"] = "text"
    """A document is a file, a paragraph of a text (blank lines part them), a JSON line, an object
    of a JSON array, or a row of a table."""
    text_field: str = "text"
    """The field of a JSON object, or the column of a table, that holds the document."""

    identity_tag: ClassVar[str] = "source.files/1"
    __pydantic_config__ = STRICT


Source = Annotated[PyStdlibSource | FilesSource, Field(discriminator="type")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Holds out documents by a stable hash of their path, so that adding one moves no other."""

    fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.02

    identity_tag: ClassVar[str] = "validation.hash/1"
    __pydantic_config__ = STRICT


@dataclasses.dataclass(frozen=True, kw_only=True)
class BpeTokenizerConfig:
    """Byte-level BPE trained on the training split, with GPT-2's pre-tokenizer pattern."""

    type: Literal["bpe"]
    vocab_size: Annotated[int, Field(ge=257, le=2**20)]
    """Ids in all: 256 bytes, the merges, and the special token `<|endoftext|>`."""
    min_frequency: Annotated[int, Field(ge=1)] = 2

    identity_tag: ClassVar[str] = "tokenizer.bpe/1"
    __pydantic_config__ = STRICT


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizationConfig:
    """How documents become ids; special tokens are appended as ids, never as text."""

    append_bos: bool = False
    append_eos: bool = True

    identity_tag: ClassVar[str] = "tokenization/1"
    __pydantic_config__ = STRICT


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """One dataset file: a corpus, its tokenizer, and the sequence lengths to cut it at."""

    source: Source
    tokenizer: BpeTokenizerConfig
    sequence_lengths: Annotated[
        tuple[Annotated[int, Field(ge=8, le=2**20)], ...], Field(min_length=1)
    ] = dataclasses.field(metadata=NOT_IDENTITY)
    validation: ValidationConfig = ValidationConfig()
    tokenization: TokenizationConfig = TokenizationConfig()
    description: str = dataclasses.field(default="", metadata=NOT_IDENTITY)

    identity_tag: ClassVar[str] = "dataset/1"
    __pydantic_config__ = STRICT
