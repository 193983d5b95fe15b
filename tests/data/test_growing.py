"""A growing cache: the rows of the finished one as they come, waits that end, what is proved."""

import json
import shutil
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from modeling.artifacts import Workspace, write_durably
from modeling.data import cache, corpus, growing, packing, token_files, tokenized
from modeling.data.cache import TokenCache
from modeling.data.config import TokenCacheConfig, TokenizationConfig
from modeling.data.corpus import TEXT
from modeling.data.formats_config import SupervisedFormat
from modeling.data.growing import Demand, GrowingCache, Vocabulary, WaitingEndedError
from modeling.data.ledger import STREAM_FILE
from modeling.data.loader import TrainLoader
from modeling.data.sources_config import FilesSource, ValidationConfig
from modeling.training.config import DataOrderConfig

LENGTH = 16
ORDER = DataOrderConfig(seed=3, era_rows=40)


class Build:
    """A tokenization in a thread of its own that makes one unit each time it is let."""

    def __init__(self, chain, root, document_format=TEXT):
        self.document_format = document_format
        self.has_loss_mask = document_format is not TEXT
        self.space = Workspace(root / "progress", root / "output")
        self.handoff = root / "handoff"
        for directory in (self.space.progress, self.space.output, self.handoff):
            directory.mkdir(parents=True)
        self.waiting = threading.Event()
        self.go = threading.Semaphore(0)
        self.free = False
        self.built = None
        self.paced = []
        self.first = "train"
        self.thread = threading.Thread(target=self.run, args=(chain,))

    def run(self, chain):
        self.built = tokenized.build(
            TokenizationConfig(),
            chain.corpus_dir,
            chain.tokenizer_dir,
            self.space,
            document_format=self.document_format,
            unit_bytes=1500,
            pace=self.pace,
        )
        self.waiting.set()

    def pace(self, tokens, left):
        self.paced.append(dict(tokens))
        self.left = left
        self.waiting.set()
        if not self.free:
            assert self.go.acquire(timeout=120)
        return self.first if self.first in left else left[0]

    def units(self, count):
        """Makes some units and returns when the next one is waited with."""
        for _ in range(count):
            assert self.waiting.wait(120)
            self.waiting.clear()
            self.go.release()
        assert self.waiting.wait(120)

    def end(self):
        self.free = True
        self.go.release()
        self.thread.join(120)

    def finish(self, published):
        self.end()
        shutil.copytree(self.space.output, published)
        shutil.rmtree(self.space.progress)
        write_durably(self.handoff / growing.FINISHED_FILE, {"tokenized_corpus": str(published)})

    def cache(self, chain, *, splits=("train",), report=lambda line: None, **config):
        manifest = token_files.Manifest.read(chain.tokenized_dir)
        return GrowingCache(
            self.space.progress,
            self.handoff,
            {split: manifest.splits[split].text_bytes for split in splits},
            config=TokenCacheConfig(length=LENGTH, **config),
            vocabulary=Vocabulary(manifest.vocab_size, manifest.eos_id, self.has_loss_mask),
            report=report,
        )


@pytest.fixture
def build(chain, tmp_path):
    made = Build(chain, tmp_path)
    made.thread.start()
    yield made
    made.end()


@pytest.fixture
def finished(chain):
    return TokenCache.open(chain.cache_dir, chain.tokenized_dir)


def test_rows_are_drawn_while_others_are_written_and_are_those_of_the_finished_cache(
    chain, build, finished, tmp_path
):
    """Every batch of two epochs; most of the first one before the last unit is made."""
    num_rows = finished.num_rows("train")
    whole = TrainLoader(finished, ORDER, 10)
    loader = TrainLoader(build.cache(chain), ORDER, 10)
    build.units(12)
    committed = build.paced[-1]["train"] // LENGTH
    eras = committed // 40
    assert 2 <= eras < num_rows // 40, "some eras are there and some are not"
    before = eras * 4
    for step in range(before):
        assert np.array_equal(loader.batch(step).tokens, whole.batch(step).tokens)
    assert Demand.read(build.handoff) == ({"train": eras * 40}, ())
    assert build.built is None, "the build has not ended"

    waits = threading.Thread(target=loader.batch, args=(before,))
    waits.start()
    while not Demand.read(build.handoff).waited_for:
        pass
    assert Demand.read(build.handoff) == ({"train": (eras + 1) * 40}, ("train",))
    build.finish(tmp_path / "published")
    waits.join(120)
    assert not waits.is_alive()
    for step in range(before, 2 * num_rows // 10 + 1):
        assert np.array_equal(loader.batch(step).tokens, whole.batch(step).tokens)
    assert loader.epochs(num_rows) == {"": 10.0}


def supervised_chain(chain, root, make_workspace):
    """Prompts with completions, with the tokenizer of the texts."""
    records = [
        {"prompt": f"{n} " + "the value of " * (n % 7), "completion": "self == 42 " * (1 + n % 5)}
        for n in range(300)
    ]
    (root / "records.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    paths = (str(root / "records.jsonl"),)
    source = FilesSource(type="files", paths=paths, format="jsonl")
    listing = corpus.scan(source, validation=ValidationConfig(fraction=0.1))
    spaces = [make_workspace(name) for name in ("records", "record tokens")]
    document_format = SupervisedFormat(type="supervised")
    corpus.build(source, listing, spaces[0], document_format=document_format)
    made = SimpleNamespace(corpus_dir=spaces[0].output, tokenizer_dir=chain.tokenizer_dir)
    made.tokenized_dir = spaces[1].output
    tokenized.build(
        TokenizationConfig(),
        made.corpus_dir,
        made.tokenizer_dir,
        spaces[1],
        document_format=document_format,
    )
    return made, document_format


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_rows_with_segments_and_masks_are_drawn_while_others_are_written(
    packed, masked, chain, tmp_path, make_workspace, monkeypatch
):
    """Windows of packing are made small; then rows of each kind, half of them before the end."""
    monkeypatch.setattr(packing, "WINDOW_TOKENS", 1)
    monkeypatch.setattr(packing, "WINDOW_ROWS", 8)
    material, document_format = chain, TEXT
    if masked:
        material, document_format = supervised_chain(chain, tmp_path, make_workspace)
    config = TokenCacheConfig(length=LENGTH, packing="documents" if packed else "concat")
    space = make_workspace("rows")
    cache.build(config, material.tokenized_dir, space, tokenized_id="", tokenizer_id="")
    finished = TokenCache.open(space.output, material.tokenized_dir)
    whole = TrainLoader(finished, ORDER, 10)
    assert whole.columns == (packed, packed or masked)

    build = Build(material, tmp_path, document_format)
    build.thread.start()
    try:
        rows = build.cache(material, packing=config.packing)
        loader = TrainLoader(rows, ORDER, 10)
        build.units(8)
        steps = 2 * finished.num_rows("train") // 10
        for step in range(4):
            assert_same(loader.batch(step), whole.batch(step))
        assert build.built is None, "the build has not ended"
        seen = rows.evidence()
        assert 40 <= seen["splits"]["train"]["rows"] < finished.num_rows("train")
        assert ("segment_ids" in seen["splits"]["train"]) == packed
        assert finished.refusal(seen) is None
        for column in set(seen["splits"]["train"]) - {"rows"}:
            other = json.loads(json.dumps(seen))
            other["splits"]["train"][column] = "0" * 64
            assert "are not those that it read" in str(finished.refusal(other))
        build.finish(tmp_path / "published")
        for step in range(4, steps):
            assert_same(loader.batch(step), whole.batch(step))
        assert rows.num_rows("train") == finished.num_rows("train")
        assert rows.refusal(seen) is None
        assert finished.refusal(rows.evidence()) is None
    finally:
        build.end()


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or np.array_equal(ours, theirs)


def test_a_split_that_is_made_first_is_whole_before_the_others(chain, build, finished):
    build.first = "validation"
    rows = build.cache(chain, splits=("train", "validation"))
    counted = []
    waits = threading.Thread(target=lambda: counted.append(rows.num_rows("validation")))
    waits.start()
    build.units(1)
    while "validation" in build.left:
        build.units(1)
    waits.join(120)
    assert counted == [finished.num_rows("validation")]
    assert build.paced[-1]["train"] == 0, "nothing to train on is tokenized yet"
    indices = np.arange(counted[0])
    assert_same(rows.rows("validation", indices), finished.rows("validation", indices))


def test_a_wait_says_how_far_it_is_and_can_be_ended(chain, build, monkeypatch):
    monkeypatch.setattr(growing, "_FIRST_TOLD_S", 0.0)
    lines = []
    rows = build.cache(chain, report=lines.append)
    build.units(5)
    found = []

    def wait():
        with pytest.raises(WaitingEndedError, match=r"1,000,000 rows of split `train`"):
            rows.known_rows("train", 10**6)
        found.append("ended")

    waits = threading.Thread(target=wait)
    waits.start()
    while not lines:
        pass
    rows.stop_waiting()
    waits.join(120)
    assert found == ["ended"]
    assert "of 1,000,000 of split `train` are tokenized" in lines[0]
    with pytest.raises(IndexError, match=r"rows are written"):
        rows.rows("train", np.array([10**6]))


def test_work_on_a_growing_cache_is_taken_up_on_the_finished_one_alone(
    chain, build, finished, tmp_path, make_workspace
):
    rows = build.cache(chain)
    build.units(8)
    rows.known_rows("train", 40)
    seen = rows.evidence()
    assert 40 <= seen["splits"]["train"]["rows"] < finished.num_rows("train")
    assert rows.refusal(seen) is None
    assert finished.refusal(seen) is None, "the view has been cut into other shards"
    space = make_workspace("copy")
    cache.copy(chain.cache_dir, chain.tokenized_dir, space)
    copied = TokenCache.open(space.output)
    assert copied.refusal(seen) is None
    assert finished.refusal(finished.evidence()) is None

    other = json.loads(json.dumps(seen))
    other["splits"]["train"]["root"] = "0" * 64
    assert "are not those that it read" in str(finished.refusal(other))
    other["splits"]["train"]["rows"] = 10**6
    assert "it read 1,000,000 rows of split `train`, which has" in str(finished.refusal(other))
    assert "rows of 32 tokens, these have 16" in str(
        finished.refusal({**seen, "sequence_length": 32})
    )
    assert "which there is no more" in str(
        finished.refusal({**seen, "splits": {"train/web": seen["splits"]["train"]}})
    )
    assert "it read token cache" in str(finished.refusal({"token_cache": "ab" * 32}))


def test_a_finished_corpus_that_does_not_begin_with_what_was_read_is_refused(
    chain, build, tmp_path
):
    rows = build.cache(chain)
    build.units(8)
    rows.known_rows("train", 40)
    build.finish(tmp_path / "published")
    manifest = tmp_path / "published" / token_files.MANIFEST_FILE
    content = json.loads(manifest.read_text())
    content["splits"]["train"]["shards"].reverse()
    manifest.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="does not begin with the documents that were committed"):
        rows.known_rows("train", 10**6)


def test_half_a_line_of_the_stream_is_not_read(chain, build):
    build.units(6)
    rows = build.cache(chain)
    stream = build.space.progress / STREAM_FILE
    whole = stream.read_bytes()
    stream.write_bytes(whole[:-30])
    assert rows.known_rows("train", 1) > 0
    stream.write_bytes(whole)
