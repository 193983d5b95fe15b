"""A growing cache: the rows of the finished one as they come, waits that end, what is proved."""

import json
import shutil
import threading

import numpy as np
import pytest

from modeling.artifacts import Workspace, write_durably
from modeling.data import cache, growing, tokenized
from modeling.data.cache import TokenCache
from modeling.data.config import TokenizationConfig
from modeling.data.growing import GrowingCache, WaitingEndedError
from modeling.data.ledger import STREAM_FILE
from modeling.data.loader import TrainLoader
from modeling.training.config import DataOrderConfig

LENGTH = 16
ORDER = DataOrderConfig(seed=3, era_rows=40)


class Build:
    """A tokenization in a thread of its own that makes one unit each time it is let."""

    def __init__(self, chain, root):
        self.space = Workspace(root / "progress", root / "output")
        self.handoff = root / "handoff"
        for directory in (self.space.progress, self.space.output, self.handoff):
            directory.mkdir(parents=True)
        self.waiting = threading.Event()
        self.go = threading.Semaphore(0)
        self.free = False
        self.built = None
        self.paced = []
        self.thread = threading.Thread(target=self.run, args=(chain,))

    def run(self, chain):
        self.built = tokenized.build(
            TokenizationConfig(),
            chain.corpus_dir,
            chain.tokenizer_dir,
            self.space,
            unit_bytes=1500,
            pace=self.pace,
        )
        self.waiting.set()

    def pace(self, tokens):
        self.paced.append(dict(tokens))
        self.waiting.set()
        if not self.free:
            assert self.go.acquire(timeout=60)

    def units(self, count):
        """Makes some units and returns when the next one is waited with."""
        for _ in range(count):
            assert self.waiting.wait(60)
            self.waiting.clear()
            self.go.release()
        assert self.waiting.wait(60)

    def finish(self, published):
        self.free = True
        self.go.release()
        self.thread.join(60)
        shutil.copytree(self.space.output, published)
        shutil.rmtree(self.space.progress)
        write_durably(self.handoff / growing.FINISHED_FILE, {"tokenized_corpus": str(published)})

    def cache(self, chain, **options):
        manifest = tokenized.Manifest.read(chain.tokenized_dir)
        return GrowingCache(
            self.space.progress,
            self.handoff,
            ("train",),
            sequence_length=LENGTH,
            vocab_size=manifest.vocab_size,
            dtype=np.dtype(manifest.dtype),
            report=options.get("report", lambda line: None),
        )


@pytest.fixture
def build(chain, tmp_path):
    made = Build(chain, tmp_path)
    made.thread.start()
    yield made
    made.free = True
    made.go.release()
    made.thread.join(60)


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
    demand = json.loads((build.handoff / growing.DEMAND_FILE).read_text())
    assert demand == {"train": eras * 40}
    assert build.built is None, "the build has not ended"

    waits = threading.Thread(target=loader.batch, args=(before,))
    waits.start()
    build.finish(tmp_path / "published")
    waits.join(60)
    assert not waits.is_alive()
    for step in range(before, 2 * num_rows // 10 + 1):
        assert np.array_equal(loader.batch(step).tokens, whole.batch(step).tokens)
    assert loader.epochs(num_rows) == {"": 10.0}


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
    waits.join(60)
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
    manifest = tmp_path / "published" / tokenized.MANIFEST_FILE
    content = json.loads(manifest.read_text())
    content["splits"]["train"]["tokens_root"] = "0" * 64
    manifest.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="does not begin with the tokens that were committed"):
        rows.known_rows("train", 10**6)


def test_half_a_line_of_the_stream_is_not_read(chain, build):
    build.units(6)
    rows = build.cache(chain)
    stream = build.space.progress / STREAM_FILE
    whole = stream.read_bytes()
    stream.write_bytes(whole[:-30])
    assert rows.known_rows("train", 1) > 0
    stream.write_bytes(whole)
