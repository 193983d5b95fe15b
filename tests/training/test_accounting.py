"""Speed and the account of time, against a clock that the test sets."""

import json
import logging
import os

import pytest

from modeling.models.config import MODEL_PRESETS
from modeling.training.accounting import (
    CAUSES,
    Ledger,
    Meter,
    ModelShape,
    read_ledger,
    time_spent,
)


class Clock:
    """Seconds that pass only when told to; the time of day is 1,000,000 s ahead."""

    def __init__(self):
        self.now = 0.0

    def ledger(self, path):
        return Ledger(path, wall=lambda: self.now + 1e6, tick=lambda: self.now)

    def spend(self, ledger, cause, seconds):
        with ledger.spending(cause):
            self.now += seconds


@pytest.fixture
def clock():
    return Clock()


def test_flops_per_token_follow_the_papers_formula():
    shape = ModelShape(
        num_parameters=1000, num_layers=2, num_heads=3, head_size=5, sequence_length=7
    )
    assert shape.flops_per_token() == 6 * 1000 + 12 * 2 * 3 * 5 * 7
    # Position t sees t + 1 keys: 1 + 2 + ... + 7 = 28 of the 49 that the full formula counts.
    assert shape.flops_per_token(causal=True) == 6 * 1000 + 12 * 2 * 3 * 5 * 28 / 7


def test_gpt2_small_needs_the_flops_that_are_published_for_it():
    """124.4 million weights, 0.79 million of which are a table of 1,024 positions."""
    shape = ModelShape.of(
        MODEL_PRESETS["gpt2-small"],
        num_parameters=124_439_808,
        sequence_length=1024,
        vocab_size=50_257,
    )
    assert shape.num_parameters == 123_653_376
    assert shape.flops_per_token() == 6 * 123_653_376 + 12 * 12 * 768 * 1024
    assert shape.flops_per_token() == pytest.approx(855e6, rel=1e-3)


def test_every_second_of_a_run_is_accounted_for(tmp_path, clock):
    with clock.ledger(tmp_path / "time.jsonl") as ledger:
        clock.spend(ledger, "restore", 2)
        ledger.launched(0)
        clock.spend(ledger, "compile", 10)
        with ledger.stepping():
            clock.now += 5  # the first step
            ledger.stalled("loader", 1.0)
            ledger.write(1)
            clock.now += 20
            clock.spend(ledger, "evaluation", 3)
            clock.now += 7
            clock.spend(ledger, "checkpoint", 4)
            ledger.write(2)
        clock.now += 0.5
    spent = read_ledger(tmp_path / "time.jsonl")
    expected = {"restore": 2, "compile": 10, "steps": 31, "loader": 1, "evaluation": 3,
                "checkpoint": 4, "other": 0.5}  # fmt: skip
    assert {cause: s for cause, s in spent.by_cause.items() if s} == expected
    assert spent.total_s == clock.now == 51.5
    assert spent.goodput == 31 / 51.5
    assert spent.launches == 1


def test_steps_that_had_to_be_made_again_are_no_goodput(tmp_path, clock):
    """Killed after step 30 with a checkpoint of step 20; 100 s later another process goes on."""
    path = tmp_path / "time.jsonl"
    first = clock.ledger(path)
    first.launched(0)
    with first.stepping():
        for step in (10, 20, 30):
            clock.now += 8
            first.write(step)
        clock.now += 6  # of which nothing is written down any more
    clock.now += 100
    with clock.ledger(path) as second:
        clock.spend(second, "restore", 1)
        second.launched(20)
        with second.stepping():
            clock.now += 16
            second.write(40)
        assert second.time == read_ledger(path)
    spent = read_ledger(path)
    assert {cause: s for cause, s in spent.by_cause.items() if s} == {
        "steps": 16 + 16, "redone": 8, "down": 106, "restore": 1,
    }  # fmt: skip
    assert spent.launches == 2
    assert spent.total_s == clock.now
    assert spent.goodput == 32 / 147


def test_an_account_survives_a_torn_line(tmp_path, clock, caplog):
    path = tmp_path / "time.jsonl"
    ledger = clock.ledger(path)
    ledger.launched(0)
    with ledger.stepping():
        clock.now += 4
        ledger.write(1)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"until": 1000009.0, "st')
    with caplog.at_level(logging.WARNING):
        again = clock.ledger(path)
    assert path.read_bytes() == whole
    assert "24 bytes" in caplog.text
    again.launched(1)
    assert again.time.by_cause["steps"] == 4
    assert [json.loads(line).get("resumed_from") for line in path.read_text().splitlines()] == [
        0, None, 1,
    ]  # fmt: skip


@pytest.mark.parametrize("tail", [b"\0\0\0\0", b"[1]\n", b'{"launch": 3}\n', b"\xff\n"])
def test_what_is_no_line_of_a_ledger_ends_it(tmp_path, tail):
    path = tmp_path / "time.jsonl"
    path.write_bytes(b'{"began": 5.0, "resumed_from": 0}\n' + tail)
    assert read_ledger(path).launches == 1


def test_a_clock_that_was_set_back_between_processes_takes_no_time_away():
    lines = [
        {"began": 100.0, "resumed_from": 0},
        {"until": 104.0, "step": 1, "spent": {"steps": 4.0}},
        {"began": 50.0, "resumed_from": 1},
        {"until": 53.0, "step": 2, "spent": {"steps": 3.0}},
    ]
    spent = time_spent(lines)
    assert (spent.by_cause["steps"], spent.by_cause["down"]) == (7.0, 0.0)
    assert spent.goodput == 1.0


def test_an_account_that_has_not_begun_is_empty(tmp_path):
    (tmp_path / "time.jsonl").write_bytes(b"")
    spent = read_ledger(tmp_path / "time.jsonl")
    assert (spent.total_s, spent.goodput, spent.launches) == (0.0, 0.0, 0)
    assert set(spent.by_cause) == set(CAUSES)


def test_each_line_is_on_its_way_to_disk_as_soon_as_it_is_written(tmp_path, clock, monkeypatch):
    """Nothing is buffered in the process, so a kill loses no line."""
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    path = tmp_path / "time.jsonl"
    ledger = clock.ledger(path)
    ledger.launched(0)
    assert len(path.read_text().splitlines()) == len(synced) == 1
    ledger.write(1)
    assert len(path.read_text().splitlines()) == 2
    assert len(synced) == 1
    ledger.sync()
    assert len(synced) == 2


def test_an_unknown_cause_is_refused(clock):
    with pytest.raises(ValueError, match=r"cause: 'lunch' is not one of \['steps'"):
        clock.ledger(None).add("lunch", 1.0)


def test_speed_is_measured_over_steps_and_their_wait_for_data_alone(clock):
    ledger = clock.ledger(None)
    meter = Meter(ledger, flops_per_token=1e6, peak_flops=1e9)
    clock.spend(ledger, "compile", 50)
    with ledger.stepping():
        clock.now += 4
        ledger.write(10)
        first = meter.lap(800, 10)
        clock.now += 1
        ledger.stalled("loader", 1.0)
        clock.now += 3
        clock.spend(ledger, "checkpoint", 9)
        ledger.write(20)
        second = meter.lap(1600, 10)
    assert (first.tokens_per_second, first.mfu, first.loader_share) == (200.0, 0.2, 0.0)
    assert (second.tokens_per_second, second.mfu, second.loader_share) == (400.0, 0.4, 0.25)
    assert (first.seconds_per_step, second.seconds_per_step) == (0.4, 0.4)
    assert meter.overall.tokens_per_second == 300.0
    assert meter.overall.seconds_per_step == 0.4
    unknown = Meter(ledger, flops_per_token=1e6, peak_flops=None)
    assert unknown.overall.mfu is None
