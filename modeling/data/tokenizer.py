"""A byte-level BPE tokenizer trained on the corpus, and the one way to use a tokenizer.

    tokenizer.json        canonical `tokenizers` JSON, with padding and truncation off
    special_tokens.json   text and id of `bos` and `eos`: {"eos": {"token": ..., "id": ...}, ...}
    probe.json            the ids of hostile texts, checked at each load against the library in use

The content id covers the JSON (keys sorted) and the special tokens. Texts are encoded without
looking for special tokens in them: a document that spells `<|endoftext|>` ends no document.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from modeling import canonical
from modeling.artifacts import Built, Workspace, write_durably
from modeling.data import corpus
from modeling.data.config import BpeTokenizerConfig
from modeling.progress import Meter, Report, ignore

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"
SPECIAL_TOKENS_FILE = "special_tokens.json"
PROBE_FILE = "probe.json"
_TRAIN_BATCH_DOCUMENTS = 256

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


class Tokenizer:
    """Text to ids and back; the same ids for the same text, always."""

    def __init__(self, backend: tokenizers.Tokenizer, *, bos_token: str, eos_token: str) -> None:
        """Wraps `backend`, whose padding and truncation are turned off.

        Args:
            bos_token: what may begin a document; as in GPT-2 it may be the one that ends it.
            eos_token: what ends a document.
        """
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True
        self.backend = backend
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.bos_id = _id_of(backend, bos_token)
        self.eos_id = _id_of(backend, eos_token)
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        """The number of rows that an embedding needs: one more than the largest id."""

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """Opens a built tokenizer and checks that it still gives the ids that it gave then.

        Raises:
            ValueError: the installed `tokenizers` encodes a probe text to other ids.
        """
        special = json.loads((directory / SPECIAL_TOKENS_FILE).read_text(encoding="utf-8"))
        backend = tokenizers.Tokenizer.from_file(str(directory / TOKENIZER_FILE))
        tokenizer = cls(
            backend, bos_token=special["bos"]["token"], eos_token=special["eos"]["token"]
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
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text, using the library's threads."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`, special tokens spelled out."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def token_byte_lengths(self) -> np.ndarray:
        """Returns how many UTF-8 bytes each id stands for; 0 for special tokens and unused ids.

        Raises:
            ValueError: the tokenizer is not byte-level, so that ids have no bytes of their own.
        """
        if not isinstance(self.backend.decoder, decoders.ByteLevel):
            raise ValueError(
                f"bytes of a token are known for byte-level tokenizers, not for a decoder "
                f"{self.backend.decoder}."
            )
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, token_id in self.backend.get_vocab(with_added_tokens=True).items():
            lengths[token_id] = len(token)  # each byte is spelled as one character
        for token_id, added in self.backend.get_added_tokens_decoder().items():
            lengths[token_id] = 0 if added.special else len(added.content.encode())
        return lengths


def build(
    config: BpeTokenizerConfig,
    corpus_dir: Path,
    workspace: Workspace,
    *,
    report: Report = ignore,
) -> Built:
    """Trains the tokenizer on the training split alone.

    Raises:
        ValueError: the corpus gives fewer merges than `vocab_size` asks for.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = _training_texts(corpus_dir, report)
    backend.train_from_iterator(texts, trainer=trainer)
    tokenizer = Tokenizer(backend, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(
            f"tokenizer.vocab_size: {config.vocab_size} ids were asked for, but the training split "
            f"gives {tokenizer.vocab_size} at min_frequency {config.min_frequency}. Lower "
            f"vocab_size or min_frequency, or add documents."
        )
    return save(tokenizer, workspace.output)


def save(tokenizer: Tokenizer, directory: Path) -> Built:
    """Writes `tokenizer` in its canonical form and returns what it is."""
    backend_json = json.loads(tokenizer.backend.to_str()) | {"padding": None, "truncation": None}
    special = {
        "bos": {"token": tokenizer.bos_token, "id": tokenizer.bos_id},
        "eos": {"token": tokenizer.eos_token, "id": tokenizer.eos_id},
    }
    probe = {
        "tokenizers": tokenizers.__version__,
        "texts": list(PROBE_TEXTS),
        "ids": [tokenizer.encode(text) for text in PROBE_TEXTS],
    }
    # `sort_keys` would bury the vocabulary's order by id, which readers of the file rely on.
    text = json.dumps(backend_json, indent=2, ensure_ascii=False)
    (directory / TOKENIZER_FILE).write_text(text + "\n", encoding="utf-8")
    write_durably(directory / SPECIAL_TOKENS_FILE, special)
    write_durably(directory / PROBE_FILE, probe)
    facts = {"vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id}
    return Built(_content_id(backend_json, special), facts=facts)


def _id_of(backend: tokenizers.Tokenizer, token: str) -> int:
    token_id = backend.token_to_id(token)
    if token_id is None:
        raise ValueError(f"the tokenizer has no token {token!r} to mark a document's bounds with.")
    return token_id


def _training_texts(corpus_dir: Path, report: Report) -> Iterator[list[str]]:
    total = corpus.num_documents(corpus_dir, corpus.TRAIN)
    meter = Meter(report, "tokenizer", total, "documents")
    batch: list[str] = []
    for document in corpus.documents(corpus_dir, corpus.TRAIN):
        batch.append(document.text)
        if len(batch) == _TRAIN_BATCH_DOCUMENTS:
            yield batch
            batch = []
        meter.advance(1)
    yield batch
    meter.finish()


def _content_id(backend_json: dict[str, Any], special: dict[str, Any]) -> str:
    # Hashed as bytes, since the canonical encoding of texts would merge tokens equal under NFC.
    text = json.dumps(backend_json, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return canonical.digest("tokenizer/1", {"json": text.encode(), "special_tokens": special})
