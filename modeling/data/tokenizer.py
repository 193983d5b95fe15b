"""The tokenizer artifact, wherever its vocabulary comes from, and the one way to use it.

    tokenizer.json        canonical `tokenizers` JSON, with padding and truncation off
    special_tokens.json   text and id of each token with a role, `eos` at least:
                          {"eos": {"token": ..., "id": ...}, "bos": ..., "pad": ...}
    chat_template.jinja   the template that came with the tokenizer, if one did
    probe.json            the ids of hostile texts, checked at each load against the library in use
    passthrough.json      instead of all these, where documents are ids already: {"vocab_size": ...,
                          "eos_id": ..., "bos_id": ...}

The content id covers the JSON (keys sorted), the special tokens and the template. Texts are encoded
without special tokens in them (`modeling.data.unspelled`): a document that spells `<|endoftext|>`
ends no document.
Nor does a post-processor add any: what begins and ends a document is said by `tokenization`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models

from modeling import canonical
from modeling.artifacts import Built, Workspace, write_durably
from modeling.data import corpus, pretrained
from modeling.data.pieces import pieces
from modeling.data.splits import TRAIN
from modeling.data.tokenizers_config import (
    BpeTokenizerConfig,
    PassthroughTokenizerConfig,
    PretrainedTokenizerConfig,
    TokenizerConfig,
    UnigramTokenizerConfig,
    WordPieceTokenizerConfig,
)
from modeling.data.unspelled import Unspelled
from modeling.data.vocabularies import (
    CONTINUES,
    END_OF_TEXT,
    train_bpe,
    train_unigram,
    train_wordpiece,
)
from modeling.progress import Meter, Report, ignore

TOKENIZER_FILE = "tokenizer.json"
SPECIAL_TOKENS_FILE = "special_tokens.json"
PROBE_FILE = "probe.json"
TEMPLATE_FILE = "chat_template.jinja"
PASSTHROUGH_FILE = "passthrough.json"
_TRAIN_BATCH_DOCUMENTS = 256
_TRAIN_BATCH_BYTES = 1 << 22
_TRAIN_PIECE_BYTES = 1 << 19  # the library holds 256 of them at once

PROBE_TEXTS = (
    "",
    " ",
    "   \n\n\t  x",
    "Hello, world! It's we'll they've I'D don'T",
    "def f(x):\n    return x  # no\n\n\n",
    "1234567890 3.14159e-10 0xDEADBEEF ²³½ ٣٤٥",
    "naïve café NAÏVE e\u0301 ﬁ ß ẞ İstanbul",
    "日本語 한국어 中文。「」 ไทย हिन्दी עברית العربية",
    "🎉👩\u200d👩\u200d👧\u200d👦🏳️\u200d🌈 \U0010ffff \ufffd \ufeff",
    "a\u00a0b\u2003c\u3000d\u2028e\x85f\x1cg\x00h",
    "<|endoftext|> <|endoftext|>",
    "trailing space \r\n \r \t",
    "''' \"\"\" ``` --- === ///___***",
    "a" * 300 + "\n" + " " * 300 + "!" * 300,
)


@dataclass(frozen=True)
class PassthroughTokenizer:
    """A vocabulary that documents of ids were made with; nothing here knows its texts."""

    vocab_size: int
    eos_id: int
    bos_id: int | None

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the ids in decimal, since no text is known."""
        return " ".join(map(str, ids))


class Tokenizer:
    """Text to ids and back; the same ids for the same text, always."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token: str | None,
        eos_token: str,
        named_tokens: Mapping[str, str] | None = None,
        chat_template: str | None = None,
    ) -> None:
        """Wraps `backend`, whose padding and truncation are turned off.

        Args:
            backend: the library's tokenizer.
            bos_token: what may begin a document; as in GPT-2 it may be the one that ends it.
            eos_token: what ends a document.
            named_tokens: tokens with other roles, such as `pad`.
            chat_template: Jinja that came with the tokenizer.
        """
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True
        self.backend = backend
        self.named_tokens = dict(named_tokens or {}) | {"eos": eos_token}
        """The text of each token with a role: `eos`, and `bos`, `pad` and others where known."""
        if bos_token is not None:
            self.named_tokens["bos"] = bos_token
        for token in self.named_tokens.values():
            _id_of(backend, token)
        self.chat_template = chat_template
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.bos_id = None if bos_token is None else _id_of(backend, bos_token)
        self.eos_id = _id_of(backend, eos_token)
        self.texts = Unspelled(backend, self.special_tokens)
        """Gives what encodes texts, which `backend` alone would find special tokens in."""
        self.vocab_size = 1 + _largest_id(self.texts.setup)
        """The number of rows that an embedding needs: one more than the largest id."""

    @property
    def special_tokens(self) -> dict[str, int]:
        """The id of every token that no text spells: those marked special, or with a role."""
        added = self.backend.get_added_tokens_decoder()
        special = {token.content: index for index, token in added.items() if token.special}
        named = {token: _id_of(self.backend, token) for token in self.named_tokens.values()}
        return special | named

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """Opens a built tokenizer and checks that it still gives the ids that it gave then.

        Raises:
            ValueError: the installed `tokenizers` encodes a probe text to other ids.
        """
        special = json.loads((directory / SPECIAL_TOKENS_FILE).read_text(encoding="utf-8"))
        named = {name: entry["token"] for name, entry in special.items()}
        backend = tokenizers.Tokenizer.from_file(str(directory / TOKENIZER_FILE))
        template = directory / TEMPLATE_FILE
        tokenizer = cls(
            backend,
            bos_token=named.pop("bos", None),
            eos_token=named.pop("eos"),
            named_tokens=named,
            chat_template=template.read_text(encoding="utf-8") if template.exists() else None,
        )
        probe = json.loads((directory / PROBE_FILE).read_text(encoding="utf-8"))
        for text, expected in zip(probe["texts"], probe["ids"], strict=True):
            if (found := tokenizer.encode(text)) != expected:
                raise ValueError(
                    f"{directory}: `tokenizers` {tokenizers.__version__} encodes {text!r} to "
                    f"{found}, but {expected} when it was built with {probe['tokenizers']}. "
                    f"Install that version, or build the tokenizer again."
                )
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, with no special token added or recognized."""
        return self.texts.for_texts([text]).encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text, using the library's threads."""
        backend = self.texts.for_texts(texts)
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`, special tokens spelled out."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def token_byte_lengths(self) -> np.ndarray | None:
        """Returns how many UTF-8 bytes each id stands for; 0 for special tokens and unused ids.

        None for a tokenizer that is not byte-level, whose ids have no bytes of their own.
        """
        model = self.backend.model
        is_wordpiece = isinstance(model, models.WordPiece)
        is_byte_level = isinstance(self.backend.decoder, decoders.ByteLevel)
        if not is_byte_level and not (
            is_wordpiece and model.continuing_subword_prefix == CONTINUES
        ):
            return None
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, token_id in self.backend.get_vocab(with_added_tokens=True).items():
            # Each byte is spelled as one character.
            lengths[token_id] = len(token.removeprefix(CONTINUES))
        for token_id, added in self.backend.get_added_tokens_decoder().items():
            lengths[token_id] = 0 if added.special else len(added.content.encode())
        return lengths


def load_tokenizer(directory: Path) -> Tokenizer | PassthroughTokenizer:
    """Opens a built tokenizer artifact, of text or of ids."""
    declared = directory / PASSTHROUGH_FILE
    if not declared.exists():
        return Tokenizer.load(directory)
    return PassthroughTokenizer(**json.loads(declared.read_text(encoding="utf-8")))


def file_digests(config: TokenizerConfig) -> dict[str, str]:
    """Returns the digest of each file that `config` names by a path, as found now."""
    return pretrained.file_digests(config) if isinstance(config, PretrainedTokenizerConfig) else {}


def files_root(digests: Mapping[str, str]) -> str | None:
    """Returns the digest of files that are named by a path; None where none are."""
    return pretrained.files_root(digests) if digests else None


def build(
    config: TokenizerConfig,
    corpus_dir: Path | None,
    workspace: Workspace,
    *,
    report: Report = ignore,
) -> Built:
    """Trains a tokenizer on the training split alone, or takes the one that is named.

    Args:
        config: says which.
        corpus_dir: what to train on; None for one that is not trained here.
        workspace: where to write.
        report: told of the progress.

    Raises:
        ValueError: the corpus is too small for `vocab_size`, or the named files are no tokenizer.
    """
    match config:
        case PretrainedTokenizerConfig():
            return _taken(config, workspace.output)
        case PassthroughTokenizerConfig():
            declared = PassthroughTokenizer(config.vocab_size, config.eos_id, config.bos_id)
            return _save_passthrough(declared, workspace.output)
    assert corpus_dir is not None
    texts = _training_texts(corpus_dir, report)
    match config:
        case BpeTokenizerConfig():
            backend = train_bpe(config, texts)
        case WordPieceTokenizerConfig():
            backend = train_wordpiece(config, texts)
        case UnigramTokenizerConfig():
            backend = train_unigram(config, texts)
    tokenizer = Tokenizer(backend, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
    return save(tokenizer, workspace.output)


def _taken(config: PretrainedTokenizerConfig, directory: Path) -> Built:
    found = pretrained.load_pretrained(config)
    named = dict(found.named_tokens)
    tokenizer = Tokenizer(
        found.backend,
        bos_token=named.pop("bos", None),
        eos_token=named.pop("eos"),
        named_tokens=named,
        chat_template=found.chat_template,
    )
    leaves = {f"files/{name}": digest for name, digest in found.digests.items()}
    return replace(save(tokenizer, directory), leaves=leaves)


def save(tokenizer: Tokenizer, directory: Path) -> Built:
    """Writes `tokenizer` in its canonical form and returns what it is."""
    backend_json = json.loads(tokenizer.backend.to_str()) | {"padding": None, "truncation": None}
    special = {
        name: {"token": token, "id": _id_of(tokenizer.backend, token)}
        for name, token in tokenizer.named_tokens.items()
    }
    probe = {
        "tokenizers": tokenizers.__version__,
        "texts": list(PROBE_TEXTS),
        "ids": [tokenizer.encode(text) for text in PROBE_TEXTS],
    }
    # `sort_keys` would bury the vocabulary's order by id, which readers of the file rely on.
    text = json.dumps(backend_json, indent=2, ensure_ascii=False)
    (directory / TOKENIZER_FILE).write_text(text + "\n", encoding="utf-8")
    if tokenizer.chat_template is not None:
        (directory / TEMPLATE_FILE).write_text(tokenizer.chat_template, encoding="utf-8")
    write_durably(directory / SPECIAL_TOKENS_FILE, special)
    write_durably(directory / PROBE_FILE, probe)
    facts = {"vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id}
    return Built(tokenizer_content_id(backend_json, special, tokenizer.chat_template), facts=facts)


def _save_passthrough(declared: PassthroughTokenizer, directory: Path) -> Built:
    write_durably(directory / PASSTHROUGH_FILE, asdict(declared))
    facts = {"vocab_size": declared.vocab_size, "eos_id": declared.eos_id}
    return Built(canonical.digest("tokenizer.passthrough/1", asdict(declared)), facts=facts)


def _largest_id(setup: Mapping[str, Any]) -> int:
    """Returns the largest id that a tokenizer, as JSON, gives."""
    vocab = setup["model"]["vocab"]
    of_model = vocab.values() if isinstance(vocab, dict) else range(len(vocab))  # Unigram's places
    return max(chain(of_model, (token["id"] for token in setup["added_tokens"])))


def _id_of(backend: tokenizers.Tokenizer, token: str) -> int:
    token_id = backend.token_to_id(token)
    if token_id is None:
        raise ValueError(f"the tokenizer has no token {token!r} to mark a document's bounds with.")
    return token_id


def _training_texts(corpus_dir: Path, report: Report) -> Iterator[list[str]]:
    """Yields the text to learn from, a few megabytes at a time.

    Documents are cut where pre-tokens part, by any of our patterns, so that one of any length takes
    little memory and gives the same words.
    """
    total = corpus.num_documents(corpus_dir, TRAIN)
    meter = Meter(report, "tokenizer", total, "documents")
    batch: list[str] = []
    num_bytes = 0
    for document in corpus.texts(corpus_dir, TRAIN):
        for piece in pieces(document, _TRAIN_PIECE_BYTES):
            batch.append(piece.decode())
            num_bytes += len(piece)
            if num_bytes >= _TRAIN_BATCH_BYTES or len(batch) == _TRAIN_BATCH_DOCUMENTS:
                yield batch
                batch, num_bytes = [], 0
        meter.advance(1)
    yield batch
    meter.finish()


def tokenizer_content_id(
    backend_json: dict[str, Any], special: dict[str, Any], chat_template: str | None
) -> str:
    """Returns the content id of a tokenizer.

    Args:
        backend_json: the content of its `tokenizer.json`.
        special: token and id of each role.
        chat_template: that it came with, if it did.
    """
    # Hashed as bytes, since the canonical encoding of texts would merge tokens equal under NFC.
    text = json.dumps(backend_json, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    content: dict[str, Any] = {"json": text.encode(), "special_tokens": special}
    if chat_template is not None:
        content["chat_template"] = chat_template.encode()
    return canonical.digest("tokenizer/1", content)
