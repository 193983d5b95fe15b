"""Which tokenizer encodes: one trained here, one made elsewhere, or none. Imports no JAX."""

import dataclasses
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from modeling.canonical import NOT_IDENTITY, added_later
from modeling.fields import STRICT, is_commit

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
