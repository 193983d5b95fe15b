"""What a dataset is: source, format, validation split, tokenizer, lengths. Imports no JAX."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from modeling.canonical import NOT_IDENTITY, added_later

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
    format: Literal["text", "paragraphs", "jsonl", "json", "parquet", "arrow", "ids"] = "text"
    """A document is a file, a paragraph of a text (blank lines part them), a JSON line, an object
    of a JSON array, a row of a table, or what stands between separators in a flat array of ids."""
    text_field: str = "text"
    """The field of a JSON object, or the column of a table, that holds the document."""

    identity_tag: ClassVar[str] = "source.files/1"
    __pydantic_config__ = STRICT


Source = Annotated[PyStdlibSource | FilesSource, Field(discriminator="type")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFormat:
    """A record is a text, every token of which is learned."""

    type: Literal["text"] = "text"

    identity_tag: ClassVar[str] = "format.text/1"
    __pydantic_config__ = STRICT

    def reading(self) -> Mapping[str, Any]:
        """What of this decides which documents a corpus holds."""
        return {}

    def rendering(self) -> Mapping[str, Any]:
        """What of this decides which tokens a document becomes."""
        return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """A record is a list of messages; a template says how they are written."""

    type: Literal["chat"]
    messages_field: str = "messages"
    """The field with the list of `{"role": ..., "content": ...}`."""
    context_fields: tuple[str, ...] = ()
    """Fields that the template reads beside the messages, such as `tools`; a record may lack them.
    """
    template: str | None = None
    """Jinja, as in a Hugging Face `chat_template`; None takes the tokenizer's own. A file is named
    by `template_file: PATH` instead, relative to the dataset's file."""
    variables: Mapping[str, str | int | float | bool] = dataclasses.field(default_factory=dict)
    """What else the template may read, the same for every document."""
    loss: Literal["assistant", "all"] = "assistant"
    """Learns what the template puts between `{% generation %}` and `{% endgeneration %}`, or all.
    """

    identity_tag: ClassVar[str] = "format.chat/1"
    __pydantic_config__ = STRICT

    def reading(self) -> Mapping[str, Any]:
        """What of this decides which documents a corpus holds."""
        return {"type": "chat", "fields": [self.messages_field, *self.context_fields]}

    def rendering(self) -> Mapping[str, Any]:
        """What of this decides which tokens a document becomes."""
        return {
            "type": "chat",
            "template": self.template,
            "variables": dict(self.variables),
            "loss": self.loss,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupervisedFormat:
    """A record is a prompt and its completion, of which the completion alone is learned."""

    type: Literal["supervised"]
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    separator: str = ""
    """Text between the two; it belongs to the prompt."""

    identity_tag: ClassVar[str] = "format.supervised/1"
    __pydantic_config__ = STRICT

    def reading(self) -> Mapping[str, Any]:
        """What of this decides which documents a corpus holds."""
        return {"type": "supervised", "fields": [self.prompt_field, self.completion_field]}

    def rendering(self) -> Mapping[str, Any]:
        """What of this decides which tokens a document becomes."""
        return {"type": "supervised", "separator": self.separator}


@dataclasses.dataclass(frozen=True, kw_only=True)
class IdsFormat:
    """A record is a list of ids, tokenized elsewhere; it takes `tokenizer: {type: passthrough}`."""

    type: Literal["ids"]
    field: str = "input_ids"
    """The field or column with the list, where the source has records."""
    separator_id: Annotated[int, Field(ge=0)] | None = None
    """The id that ends each document of a flat file of ids; it is no part of the document."""
    dtype: Literal["uint16", "uint32"] | None = None
    """Of a flat file without a header, little endian; `.npy` files say it themselves."""

    identity_tag: ClassVar[str] = "format.ids/1"
    __pydantic_config__ = STRICT

    def reading(self) -> Mapping[str, Any]:
        """What of this decides which documents a corpus holds."""
        return {
            "type": "ids",
            "fields": [self.field],
            "separator_id": self.separator_id,
            "dtype": self.dtype,
        }

    def rendering(self) -> Mapping[str, Any]:
        """What of this decides which tokens a document becomes."""
        return {"type": "ids"}


Format = Annotated[
    TextFormat | ChatFormat | SupervisedFormat | IdsFormat, Field(discriminator="type")
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Holds out documents by a stable hash of their path, so that adding one moves no other."""

    fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.02

    identity_tag: ClassVar[str] = "validation.hash/1"
    __pydantic_config__ = STRICT


Pattern = Literal["gpt2", "llama3", "o200k"]
"""By whose regular expression text is split into pre-tokens, over which no token reaches."""
SpecialTokens = tuple[Annotated[str, Field(min_length=1)], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BpeTokenizerConfig:
    """Byte-level BPE trained on the training split."""

    type: Literal["bpe"]
    vocab_size: Annotated[int, Field(ge=257, le=2**20)]
    """Ids in all: 256 bytes, the merges, and the special token `<|endoftext|>`."""
    min_frequency: Annotated[int, Field(ge=1)] = 2
    pattern: Pattern = dataclasses.field(default="gpt2", metadata=added_later("gpt2"))
    special_tokens: SpecialTokens = dataclasses.field(default=(), metadata=added_later(()))
    """Further special tokens, for chat templates; their ids follow that of `<|endoftext|>`."""

    identity_tag: ClassVar[str] = "tokenizer.bpe/1"
    __pydantic_config__ = STRICT


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordPieceTokenizerConfig:
    """Byte-level WordPiece trained on the training split: the longest known piece, repeatedly."""

    type: Literal["wordpiece"]
    vocab_size: Annotated[int, Field(ge=514, le=2**20)]
    """Ids in all: 256 bytes that begin a word, 256 that continue one, longer pieces, and the
    special tokens `<|endoftext|>` and `<|unknown|>`, which stands for nothing."""
    min_frequency: Annotated[int, Field(ge=1)] = 2
    pattern: Pattern = "gpt2"
    special_tokens: SpecialTokens = ()

    identity_tag: ClassVar[str] = "tokenizer.wordpiece/1"
    __pydantic_config__ = STRICT


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnigramTokenizerConfig:
    """Byte-level Unigram trained on the training split: the likeliest pieces (Kudo 2018)."""

    type: Literal["unigram"]
    vocab_size: Annotated[int, Field(ge=257, le=2**20)]
    """Ids in all: 256 bytes, longer pieces, and the special token `<|endoftext|>`."""
    max_piece_bytes: Annotated[int, Field(ge=2, le=64)] = 16
    pattern: Pattern = "gpt2"
    special_tokens: SpecialTokens = ()

    identity_tag: ClassVar[str] = "tokenizer.unigram/1"
    __pydantic_config__ = STRICT


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainedTokenizerConfig:
    """A tokenizer made elsewhere: files, or a repository of the Hugging Face hub at a commit."""

    type: Literal["pretrained"]
    path: str | None = dataclasses.field(default=None, metadata=NOT_IDENTITY)
    """A `tokenizer.json`, or a directory with one; what it holds counts, not where it lies."""
    hub: str | None = None
    """`owner/name` on the hub, together with `revision`."""
    revision: str | None = None
    """The commit, as 40 hexadecimal digits: a branch or tag may move."""
    bos_token: str | None = None
    """These three go before what the tokenizer's own files say."""
    eos_token: str | None = None
    pad_token: str | None = None

    identity_tag: ClassVar[str] = "tokenizer.pretrained/1"
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        if (self.path is None) == (self.hub is None):
            raise ValueError("set either `path` or `hub` (with `revision`).")
        if self.hub is None and self.revision is not None:
            raise ValueError("`revision` goes with `hub`, not with `path`.")
        if self.hub is not None and not re.fullmatch(r"[0-9a-f]{40}", self.revision or ""):
            raise ValueError(
                f"`revision` {self.revision!r} is not the 40 hexadecimal digits of a commit; a "
                f"branch or tag may move, and then nobody could tell which tokenizer this was. "
                f"The repository's history on the hub shows its commits."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassthroughTokenizerConfig:
    """Declares the vocabulary of documents that are ids already; it takes `format: {type: ids}`."""

    type: Literal["passthrough"]
    vocab_size: Annotated[int, Field(ge=1, le=2**32)]
    eos_id: Annotated[int, Field(ge=0)]
    bos_id: Annotated[int, Field(ge=0)] | None = None

    identity_tag: ClassVar[str] = "tokenizer.passthrough/1"
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        for name, token_id in (("eos_id", self.eos_id), ("bos_id", self.bos_id)):
            if token_id is not None and token_id >= self.vocab_size:
                raise ValueError(
                    f"`{name}` {token_id} is not below `vocab_size` {self.vocab_size}."
                )


TrainedTokenizerConfig = BpeTokenizerConfig | WordPieceTokenizerConfig | UnigramTokenizerConfig
TokenizerConfig = Annotated[
    TrainedTokenizerConfig | PretrainedTokenizerConfig | PassthroughTokenizerConfig,
    Field(discriminator="type"),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizationConfig:
    """How documents become ids; special tokens are appended as ids, never as text."""

    append_bos: bool = False
    append_eos: bool = True

    identity_tag: ClassVar[str] = "tokenization/1"
    __pydantic_config__ = STRICT


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
    """One dataset file: a corpus, its tokenizer, and the sequence lengths to cut it at."""

    source: Source
    tokenizer: TokenizerConfig
    sequence_lengths: Annotated[
        tuple[Annotated[int, Field(ge=8, le=2**20)], ...], Field(min_length=1)
    ] = dataclasses.field(metadata=NOT_IDENTITY)
    validation: ValidationConfig = ValidationConfig()
    tokenization: TokenizationConfig = TokenizationConfig()
    format: Format = dataclasses.field(default=TextFormat(), metadata=added_later(TextFormat()))
    compute: Compute = dataclasses.field(default=LocalCompute(), metadata=NOT_IDENTITY)
    description: str = dataclasses.field(default="", metadata=NOT_IDENTITY)

    identity_tag: ClassVar[str] = "dataset/1"
    __pydantic_config__ = STRICT
