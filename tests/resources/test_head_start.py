"""What tokenization beside a training goes on with, how far ahead it may be, and the pool slot."""

import json
import logging
import threading
from types import SimpleNamespace

import dagster as dg
import pytest

from resources.head_start import _Pacer
from resources.pools import PoolSlot

ROW, MOST = 32, 64  # tokens of a row; rows that a source may be ahead
ROWS = ROW * (MOST + 1)  # tokens that are too far ahead


class Held:
    """Tokenization beside a training whose demand the test makes up."""

    def __init__(self, directory, caplog, splits):
        self.directory = directory
        self.training = SimpleNamespace(is_alive=True)
        self.caplog = caplog
        context = SimpleNamespace(log=logging.getLogger("held"))
        self.pace = _Pacer(context, lambda: self.training, directory, splits, ROW, MOST)

    def demand(self, process=1, waits_for=None, **rows):
        attempt = self.directory / "part"
        attempt.write_text(json.dumps({"rows": rows, "waits_for": waits_for}))
        attempt.replace(self.directory / f"demand-{process}.json")

    def paused(self, tokens, end):
        """Returns what is gone on with after a pause that only `end` ends."""
        found = []
        thread = threading.Thread(target=lambda: found.append(self.pace(tokens, tuple(tokens))))
        self.caplog.clear()
        thread.start()
        while thread.is_alive() and not self.caplog.messages:
            thread.join(0.001)
        assert thread.is_alive(), f"it went on with {found} and did not pause"
        end()
        thread.join(120)
        assert not thread.is_alive()
        return found[0]

    def goes_on_with(self, tokens, left=None):
        self.caplog.clear()
        split = self.pace(tokens, tuple(tokens) if left is None else left)
        assert not self.caplog.messages
        return split


@pytest.fixture
def held(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    return lambda *splits: Held(tmp_path, caplog, splits)


def test_tokenization_waits_when_it_is_as_far_ahead_as_it_may(held):
    one = held("train")
    assert one.goes_on_with({"train": ROW * MOST}) == "train", "nothing is asked for yet"
    one.demand(train=0)
    assert one.goes_on_with({"train": ROW * MOST}) == "train"
    assert one.paused({"train": ROWS}, end=lambda: one.demand(train=1)) == "train"
    assert "it is 65 rows ahead of training, and 64 rows are the most" in one.caplog.text
    assert one.goes_on_with({"train": ROWS}) == "train"


def test_tokenization_is_not_held_when_training_ends_waits_or_wants_all(held):
    one = held("train")
    far = {"train": ROWS * 9}
    assert one.paused(far, end=lambda: setattr(one.training, "is_alive", False)) == "train"
    assert one.goes_on_with(far) == "train"
    one.training.is_alive = True
    one.demand(train=2**62)
    assert one.goes_on_with(far) == "train"
    one.demand(train=5, waits_for="train")  # rows are laid out later than tokens are made
    assert one.goes_on_with(far) == "train"
    one.demand(process=2, train=7)
    assert one.goes_on_with(far) == "train", "one of two processes waits"
    one.demand(train=5)
    assert one.paused(far, end=lambda: one.demand(waits_for="train")) == "train"


def test_tokenization_without_training_is_not_held(held):
    one = held("train")
    one.training = None
    assert one.goes_on_with({"train": ROWS * 9}) == "train"


def test_the_source_that_training_waits_for_is_made_first_and_else_the_one_least_ahead(held):
    two = held("train/a", "train/b")
    at = {"train/a": ROW * 4, "train/b": ROW * 2, "validation/a": 0}
    assert two.goes_on_with(at) == "train/b"
    two.demand(**{"train/a": 3, "train/b": 0})
    assert two.goes_on_with(at) == "train/a"
    two.demand(**{"train/a": 3, "train/b": 0}, waits_for="train/b")
    assert two.goes_on_with(at) == "train/b"
    assert two.goes_on_with(at, left=("train/a", "validation/a")) == "train/a"
    far = dict.fromkeys(at, ROWS * 3)
    assert two.goes_on_with(far, left=("validation/a",)) == "validation/a"
    two.demand(**{"train/a": 3, "train/b": 2**62})
    assert two.goes_on_with(far) == "train/b", "it lags, however far the other is"
    assert (
        two.paused(
            {"train/a": ROWS * 3},
            end=lambda: two.demand(**{"train/a": 2**62, "train/b": 2**62}),
        )
        == "train/a"
    )


def test_sources_as_far_take_turns(held):
    two = held("train/a", "train/b")
    begun = {"train/a": 0, "train/b": 0}  # as long as nothing is committed
    assert [two.goes_on_with(begun) for _ in range(4)] == ["train/a", "train/b"] * 2


def test_splits_that_training_evaluates_on_come_before_all(held):
    tokens = {"train": 0, "validation": ROWS * 9}
    assert held("train", "validation").goes_on_with(tokens) == "validation"
    assert held("train", "validation").goes_on_with(tokens, left=("train",)) == "train"
    assert held("train").goes_on_with(tokens) == "train"


@pytest.fixture
def instance(tmp_path):
    with dg.instance_for_test(
        temp_dir=str(tmp_path),
        overrides={"concurrency": {"pools": {"default_limit": 1, "granularity": "op"}}},
    ) as made:
        yield made


def test_a_slot_claimed_ahead_is_that_of_the_step_and_of_no_other_run(instance):
    def slot(number):
        run = dg.DagsterRun(job_name="job", run_id=f"{number:08d}-0000-4000-8000-000000000000")
        return PoolSlot(instance, run, "tiny__checkpoint", "accelerator")

    first, other = slot(1), slot(2)
    assert first.claim()
    assert first.claim(), "asking again changes nothing"
    assert slot(1).claim(), "as the executor asks for the step itself"
    assert not other.claim()
    (limit,) = instance.event_log_storage.get_pool_limits()
    assert (limit.name, limit.limit) == ("accelerator", 1)
    first.free()
    assert slot(2).claim()
    slot(3).free()
    assert not slot(1).claim(), "what was freed without a claim freed nothing"
