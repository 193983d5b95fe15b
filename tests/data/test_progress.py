"""Progress reports: throttled by the given clock, with a rate that knows what was done before."""

from modeling.progress import Meter, Progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_reports_are_at_least_an_interval_apart_and_the_last_always_comes():
    clock, reports = Clock(), []
    meter = Meter(reports.append, "tokenize", 100, "documents", clock=clock)
    for _ in range(100):
        clock.now += 0.1
        meter.advance(1)
    meter.finish()
    assert 9 <= len(reports) <= 11
    assert reports[-1].done == 100
    assert reports[-1].eta_s == 0.0


def test_rate_counts_this_attempt_only_and_eta_what_is_left():
    clock, reports = Clock(), []
    meter = Meter(reports.append, "train", 100, "steps", clock=clock)
    meter.skip(50)
    clock.now += 5.0
    meter.advance(10)
    assert reports == [Progress("train", 60, 100, "steps", rate=2.0, eta_s=20.0)]
    assert str(reports[0]) == "train: 60 of 100 steps (60%), 2 steps/s, 20 s left"


def test_no_rate_no_eta():
    reports = []
    Meter(reports.append, "scan", 0, "files", clock=Clock()).finish()
    assert reports == [Progress("scan", 0, 0, "files", rate=0.0, eta_s=None)]
