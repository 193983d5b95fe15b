"""How far tokenization may be ahead of a training begun early, and when it is not held up."""

import json
import logging
import threading
from types import SimpleNamespace

import pytest

from modeling.data.growing import DEMAND_FILE
from modeling.experiment import load_catalog
from resources.head_start import HeadStartResource
from tests.pipelines.conftest import CATALOG

ROW, ERA = 32, 32  # tokens of a row, rows of an era, of the tiny experiment


class Held:
    """Tokenization beside a training whose demand the test makes up."""

    def __init__(self, directory, caplog):
        self.demand_file = directory / DEMAND_FILE
        self.training = SimpleNamespace(is_alive=True)
        self.caplog = caplog
        resource = HeadStartResource(max_eras_ahead=2)
        resource._running, resource._handoff = self.training, directory
        context = SimpleNamespace(log=logging.getLogger("held"))
        experiment = load_catalog(CATALOG).experiments["tiny"]
        assert experiment.trainer.data_order.era_rows == ERA
        assert experiment.sequence_length == ROW
        self.pace = resource._pace(context, experiment)

    def demand(self, **rows):
        attempt = self.demand_file.with_suffix(".part")
        attempt.write_text(json.dumps(rows))
        attempt.replace(self.demand_file)

    def pauses(self, tokens, end):
        """Whether it pauses at this many tokens; if so, `end` must end that."""
        thread = threading.Thread(target=self.pace, args=(tokens,))
        self.caplog.clear()
        thread.start()
        while thread.is_alive() and not self.caplog.messages:
            thread.join(0.001)
        paused = thread.is_alive() or bool(self.caplog.messages)
        if paused:
            end()
        thread.join(30)
        assert not thread.is_alive()
        return paused


@pytest.fixture
def held(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    return Held(tmp_path, caplog)


def test_tokenization_waits_at_the_most_eras_ahead_until_training_asks_for_more(held):
    held.demand(train=0)
    assert not held.pauses({"train": ROW * ERA * 2, "validation": 0}, end=None)
    more = {"train": ROW * (ERA * 2 + 1), "validation": 0}
    assert held.pauses(more, end=lambda: held.demand(train=ERA))
    assert "it is 65 rows ahead of training, and 2 eras, 64 rows, is the most" in held.caplog.text
    assert not held.pauses(more, end=None)


def test_tokenization_is_not_held_when_training_ends_or_wants_all(held):
    held.demand(train=0)
    far = {"train": ROW * ERA * 100}
    assert held.pauses(far, end=lambda: setattr(held.training, "is_alive", False))
    assert not held.pauses(far, end=None)
    held.training.is_alive = True
    held.demand(train=2**62)
    assert not held.pauses(far, end=None)


def test_a_source_that_lags_behind_is_made_however_far_the_others_are(held):
    held.demand(**{"train/code": 0, "train/web": 0})
    ahead = {"train/code": ROW * ERA * 100, "train/web": ROW, "validation/code": 0}
    assert not held.pauses(ahead, end=None)
    both = dict.fromkeys(("train/code", "train/web"), ROW * ERA * 100)
    assert held.pauses(both, end=lambda: held.demand(**{"train/code": 2**62, "train/web": 0}))
