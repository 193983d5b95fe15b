"""The loader: batches by step, the same from any start, and a background thread that ends."""

import threading
from itertools import islice
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from modeling.data.cache import TokenCache
from modeling.data.loader import TrainLoader, rows_of_process
from modeling.data.mixture import data_order
from modeling.data.order import EpochLimitError, RowOrder
from modeling.data.rows import Columns, Rows
from modeling.training.config import BatchSchedule, BatchStage, DataOrderConfig, MixtureConfig

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
    order = RowOrder(lambda wanted: token_cache.num_rows("train"), seed=5, era_rows=100)
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


class ThreeSources:
    """Rows that say in their tokens which source and row they are, with a loss mask."""

    splits = ("train/code", "train/web", "validation/code")
    sequence_length = 3
    columns = Columns(loss_mask=True)

    def __init__(self):
        self.asked = []

    def known_rows(self, split, wanted):
        return {"train/code": 40, "train/web": 100, "validation/code": 5}[split]

    def share(self, split):
        return self.known_rows(split, 0)

    def rows(self, split, indices):
        self.asked.append((split, indices.tolist()))
        source = {"train/code": 1, "train/web": 2, "validation/code": 3}[split]
        tokens = np.stack([np.full(len(indices), source), indices, -indices], axis=1)
        return Rows(tokens.astype(np.int32), loss_mask=tokens % 2 == 0)

    def stop_waiting(self):
        pass


MIXED = DataOrderConfig(
    era_rows=16, mixture=MixtureConfig(weights={"code": 1.0, "web": 3.0}, block_rows=8)
)
STAGES = BatchSchedule([BatchStage(start_step=0, size=4), BatchStage(start_step=3, size=8)])


def identities(rows):
    """Returns (source, row) of each row, making sure that its columns belong together."""
    assert np.array_equal(rows.loss_mask, rows.tokens % 2 == 0)
    assert np.array_equal(rows.tokens[:, 2], -rows.tokens[:, 1])
    assert rows.segment_ids is None
    return [tuple(row[:2]) for row in rows.tokens.tolist()]


def test_rows_of_several_sources_stand_where_the_mixture_puts_them():
    source = ThreeSources()
    loader = TrainLoader(source, MIXED, STAGES)
    sources = {"code": lambda wanted: 40, "web": lambda wanted: 100}
    order = data_order(MIXED, sources, STAGES, {"code": 40, "web": 100})
    for step in (0, 2, 3, 9, 40):
        expected = {}
        for draw in order.draws(loader.cursor(step), STAGES.size(step)):
            number = {"code": 1, "web": 2}[draw.source]
            expected |= {p: (number, r) for p, r in zip(draw.places, draw.rows, strict=True)}
        found = identities(loader.batch(step))
        assert found == [expected[place] for place in range(STAGES.size(step))]
    assert {split for split, _ in source.asked} == {"train/code", "train/web"}
    eight = [of for step in (0, 1) for of, _ in identities(loader.batch(step))]
    assert sorted(eight) == [1] * 2 + [2] * 6, "one block of eight rows"


def test_a_process_reads_its_own_rows_of_a_batch_and_no_others():
    source = ThreeSources()
    loader = TrainLoader(source, MIXED, STAGES)
    whole = identities(loader.batch(5))
    for wanted in ([0, 1], [6, 7, 2], [], list(range(8))):
        source.asked.clear()
        part = loader.batch(5, np.array(wanted, np.int64))
        assert identities(part) == [whole[place] for place in wanted]
        assert sum(len(rows) for _, rows in source.asked) == len(wanted)


def test_a_stream_of_parts_asks_for_the_part_of_each_batch_size():
    loader = TrainLoader(ThreeSources(), MIXED, STAGES)
    with loader.stream(2, rows=lambda size: np.arange(size // 2, size)) as batches:
        for step in (2, 3, 4):
            whole = identities(loader.batch(step))
            assert identities(next(batches)) == whole[len(whole) // 2 :]
        assert batches.cursor == 3 * 4 + 2 * 8


@pytest.mark.parametrize("axes", [("data", None), (None, None), (("model", "data"), None)])
def test_the_rows_of_a_process_are_those_its_devices_hold(axes):
    devices = np.array(jax.devices()).reshape(4, 2)
    sharding = NamedSharding(Mesh(devices, ("data", "model")), PartitionSpec(*axes))
    assert rows_of_process(sharding, 8, 16).tolist() == list(range(8))
    # As if this were a process of a larger job, that has the first two devices alone.
    indices = sharding.addressable_devices_indices_map((8, 16))
    first = [jax.devices()[0], jax.devices()[1]]
    held = sorted({row for device in first for row in range(8)[indices[device][0]]})
    mine = SimpleNamespace(
        addressable_devices_indices_map=lambda shape: {d: indices[d] for d in first}
    )
    assert rows_of_process(mine, 8, 16).tolist() == held


def test_a_stream_that_waits_can_be_left():
    """The rows of step 2 never come; whoever trains is asked to stop meanwhile."""
    ended = threading.Event()

    class Waits(ThreeSources):
        def known_rows(self, split, wanted):
            if wanted > 16:
                assert ended.wait(30)
                raise KeyError("nobody waits any more")
            return 16

        def stop_waiting(self):
            ended.set()

    config = DataOrderConfig(
        era_rows=4, mixture=MixtureConfig(weights={"code": 1.0, "web": 1.0}, block_rows=8)
    )
    asked = []
    with TrainLoader(Waits(), config, 16).stream(0) as batches:
        assert all(batches.take(lambda: False) is not None for _ in range(2))
        assert batches.take(lambda: len(asked) == 1 or asked.append("once")) is None
        assert batches.step == 2
    assert not background_threads()


def test_too_many_epochs_are_refused_before_any_work():
    loader = TrainLoader(ThreeSources(), MIXED, STAGES)
    assert loader.epochs(3 + 16) == {"code": pytest.approx(35 / 40), "web": pytest.approx(1.05)}
    loader.require_epochs(3 + 16, 2)
    with pytest.raises(EpochLimitError, match=r"19 steps draw .* source 'web' 1\.05 times"):
        loader.require_epochs(3 + 16, 1)
