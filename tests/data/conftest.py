"""A small corpus with everything that hurts, and the artifacts made of it, once a session."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from modeling.artifacts import Built, Workspace
from modeling.data import cache, corpus, tokenized, tokenizer
from modeling.data.config import TokenCacheConfig, TokenizationConfig
from modeling.data.sources_config import FilesSource, ValidationConfig
from modeling.data.tokenizers_config import BpeTokenizerConfig

MakeWorkspace = Callable[[str], Workspace]

HOSTILE = [
    "It's we'll they've I'D don'T 'tis '' 's 'sx ''s s's",
    "tabs\t\tand \u00a0 \u3000 spaces   \n\n  end   ",
    "<|endoftext|> is text here <|endoftext|>",
    "naïve e\u0301 日本語 한국어 🎉👩\u200d👩\u200d👧 ²³½ ٣٤٥ \U0010ffff\x00\x1c\x85",
    "x = 1234567890\n\tif y:\r\n\t\treturn  (a+b)*c  # ___\n",
]


def words(seed: int, count: int) -> str:
    """Returns text with a skewed vocabulary, so that there is something to merge."""
    draw = random.Random(seed)
    lexicon = ["def", "return", "self", "the", "value", "_name", "(x)", "==", "42", ":\n   ", "of"]
    return " ".join(draw.choice(lexicon[: draw.randint(1, len(lexicon))]) for _ in range(count))


def write_corpus(directory: Path) -> None:
    directory.mkdir()
    for index in range(40):
        text = words(index, 30 + 17 * index) + HOSTILE[index % len(HOSTILE)]
        (directory / f"doc-{index:02d}.txt").write_text(text, encoding="utf-8", newline="")


def workspace_in(root: Path) -> MakeWorkspace:
    def make(name: str) -> Workspace:
        made = Workspace(root / name / "progress", root / name / "output")
        made.progress.mkdir(parents=True, exist_ok=True)
        made.output.mkdir()
        return made

    return make


@pytest.fixture
def make_workspace(tmp_path: Path) -> MakeWorkspace:
    return workspace_in(tmp_path)


class Chain:
    """Each stage's output directory and what its builder said."""

    def __init__(self, root: Path) -> None:
        make = workspace_in(root)
        write_corpus(root / "source")
        self.source = FilesSource(type="files", paths=(str(root / "source" / "*.txt"),))
        self.validation = ValidationConfig(fraction=0.2)
        self.listing = corpus.scan(self.source, validation=self.validation)
        workspaces = {name: make(name) for name in ("corpus", "tokenizer", "tokenized", "cache")}
        self.corpus_dir = workspaces["corpus"].output
        self.tokenizer_dir = workspaces["tokenizer"].output
        self.tokenized_dir = workspaces["tokenized"].output
        self.cache_dir = workspaces["cache"].output
        self.corpus = corpus.build(self.source, self.listing, workspaces["corpus"])
        config = BpeTokenizerConfig(type="bpe", vocab_size=300)
        self.tokenizer = tokenizer.build(config, self.corpus_dir, workspaces["tokenizer"])
        self.tokenized: Built = tokenized.build(
            TokenizationConfig(),
            self.corpus_dir,
            self.tokenizer_dir,
            workspaces["tokenized"],
            unit_bytes=4000,
        )
        self.cache = cache.build(
            TokenCacheConfig(length=16),
            self.tokenized_dir,
            workspaces["cache"],
            tokenized_id=self.tokenized.content_id,
            tokenizer_id=self.tokenizer.content_id,
        )

    def tokens(self, split: str, *, eos: bool = True) -> list[int]:
        """Returns the split's token stream, encoded one document at a time."""
        encoder = tokenizer.Tokenizer.load(self.tokenizer_dir)
        end = [encoder.eos_id] if eos else []
        stream = []
        for document in corpus.documents(self.corpus_dir, split):
            stream += encoder.encode(document.text) + end
        return stream


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return Chain(tmp_path_factory.mktemp("chain"))
