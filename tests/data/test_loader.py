"""The loader: batches by step, the same from any start, and a background thread that ends."""

import threading
from itertools import islice

import numpy as np
import pytest

from modeling.data.cache import TokenCache
from modeling.data.loader import TrainLoader
from modeling.data.order import RowOrder
from modeling.training.config import DataOrderConfig

ORDER = DataOrderConfig(seed=5, era_rows=100)


@pytest.fixture
def token_cache(chain):
    return TokenCache.open(chain.cache_dir, chain.tokenized_dir)


@pytest.fixture
def loader(token_cache):
    return TrainLoader(token_cache, ORDER, 7)


def background_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_a_batch_is_the_rows_that_the_order_gives(loader, token_cache):
    order = RowOrder(ORDER, token_cache.num_rows("train"), token_cache.content_id)
    for step in (0, 1, 10**6):
        expected = token_cache.rows("train", order.rows_at(7 * step, 7))
        assert np.array_equal(loader.batch(step).tokens, expected.tokens)


def test_an_epoch_draws_every_row_once(token_cache):
    num_rows = token_cache.num_rows("train")
    every = TrainLoader(token_cache, ORDER, num_rows)
    rows = token_cache.rows("train", np.arange(num_rows)).tokens
    for step in range(2):
        batch = every.batch(step).tokens
        assert sorted(batch.tolist()) == sorted(rows.tolist())
        assert batch.tolist() != rows.tolist()


def test_resuming_at_every_step_gives_the_same_batches(loader):
    with loader.stream(0) as batches:
        whole = [rows.tokens for rows in islice(batches, 12)]
    for start in range(12):
        with loader.stream(start, prefetch=3) as batches:
            assert batches.cursor == loader.cursor(start) == 7 * start
            rest = [rows.tokens for rows in islice(batches, 12 - start)]
            assert batches.cursor == 84
        assert np.array_equal(rest, whole[start:])


def test_leaving_the_stream_leaves_no_thread(loader):
    assert not background_threads()
    with loader.stream(0) as batches:
        next(batches)
        assert background_threads()
    assert not background_threads()

    def fail():
        with loader.stream(0) as batches:
            next(batches)
            raise KeyError("the consumer's own error")

    with pytest.raises(KeyError):
        fail()
    assert not background_threads()


def test_an_error_in_the_background_reaches_the_consumer_at_its_step(loader, monkeypatch):
    make_batch = loader.batch

    def fails_at_three(step):
        if step == 3:
            raise OSError("the disk is gone")
        return make_batch(step)

    monkeypatch.setattr(loader, "batch", fails_at_three)
    with loader.stream(0, prefetch=5) as batches:
        assert len(list(islice(batches, 3))) == 3
        with pytest.raises(OSError, match="the disk is gone"):
            next(batches)
    assert not background_threads()


def test_at_most_the_prefetch_is_made_ahead(loader, monkeypatch):
    made = []
    make_batch = loader.batch
    monkeypatch.setattr(loader, "batch", lambda step: made.append(step) or make_batch(step))
    with loader.stream(10, prefetch=4) as batches:
        next(batches)
    assert made[0] == 10
    assert len(made) <= 5


def test_a_stream_is_used_inside_its_with_statement(loader):
    with pytest.raises(ValueError, match="not open"):
        next(loader.stream(0))
    with pytest.raises(ValueError, match="at least"):
        loader.stream(0, prefetch=0)
