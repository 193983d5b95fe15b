"""What a dataset is: source, format, validation split, tokenizer, lengths. Imports no JAX."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, Tag

from modeling.canonical import NOT_IDENTITY, added_later
from modeling.fields import STRICT, RegularExpression, is_commit, type_or

Owner = Annotated[str, Field(pattern=r"^(team:[A-Za-z0-9_-]+|[^@\s]+@[^@\s]+\.[^@\s]+)$")]
"""`team:data`, or a mail address."""
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
    paths: Annotated[tuple[str, ...], Field(min_length=1)] = dataclasses.field(
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
class TextFormat:
    """A record is a text, every token of which is learned."""

    type: Literal["text"] = "text"

    identity_tag: ClassVar[str] = "format.text/1"
    __pydantic_config__ = STRICT

    @property
    def learns_all(self) -> bool:
        """Whether every token of a document is to be predicted."""
        return True

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

    @property
    def learns_all(self) -> bool:
        """Whether every token of a document is to be predicted."""
        return self.loss == "all"

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

    @property
    def learns_all(self) -> bool:
        """Whether every token of a document is to be predicted."""
        return False

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

    @property
    def learns_all(self) -> bool:
        """Whether every token of a document is to be predicted."""
        return True

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
    """Whether a bad record, or a damaged file as a whole, is left out, counted and listed."""
    max_skipped: Annotated[int, Field(ge=0)] = dataclasses.field(
        default=100, metadata=added_later(100)
    )
    """How many may be left out before it is an error after all."""
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
    paths: Annotated[tuple[str, ...], Field(min_length=1)] = dataclasses.field(
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
    and place there are its id."""

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
    path: str | None = dataclasses.field(default=None, metadata=NOT_IDENTITY)
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
    path: str = dataclasses.field(metadata=NOT_IDENTITY)
    """The directory; its files' listing is what counts."""
    split: str | None = None
    """Where several are saved."""
    text_field: str = "text"
    id_field: str | None = None

    identity_tag: ClassVar[str] = "source.saved_dataset/1"
    __pydantic_config__ = STRICT


def _check_source(name: str, source: AbstractSource, default: Validation) -> None:
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
        if self.hub is not None and not is_commit(self.revision):
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
    validation: Validation = ValidationConfig()
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
            _check_source(f"sources.{name}" if name else "source", source, self.validation)
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
