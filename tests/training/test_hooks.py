"""What is done beside the updates: it tells the truth, and training does not know of it."""

import gzip
import html
import json
import logging
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from haliax import Axis
from modeling.data.rows import Rows
from modeling.evaluation.report import row_losses
from modeling.models.lm import build_model
from modeling.training import history
from modeling.training.compile_cache import open_compile_cache
from modeling.training.feasibility import profiled_steps
from modeling.training.restoring import restore_parameters
from modeling.training.trainer import train

sys.path.insert(0, str(Path(__file__).parent))
import driver
from test_trainer import Recorder

HOOKS = {"eval_every_steps": 4, "eval_max_rows": 11, "pictures_every_steps": 3,
         "profile_steps": "2..3"}  # fmt: skip
LAYOUT = {"mesh": {"data": 2}}


class TwoSources(driver.CountingCache):
    """Validation rows of two sources, whose losses differ."""

    @property
    def splits(self):
        return ("train", "validation/empty", "validation/even", "validation/odd")

    def num_rows(self, split):
        return {"train": driver.ROWS, "validation/empty": 0}.get(split, 30)

    def rows(self, split, indices):
        place = {"train": (1, 0), "validation/even": (2, 0), "validation/odd": (2, 1)}[split]
        return Rows(self.tokens[indices * place[0] + place[1]])


def hostile(ids):
    return f"<script>{ids[0]}</script>"


def run(directory, compile_cache, *, decode=hostile, cache=None, **trainer):
    space, observer = driver.workspace(directory), Recorder()
    built = train(
        driver.experiment(trainer=LAYOUT | trainer),
        cache or TwoSources(driver.LENGTH, driver.ROWS),
        space,
        observer=observer,
        compile_cache=compile_cache,
        decode=decode,
    )
    return space, built, observer


@pytest.fixture(scope="module")
def compile_cache(tmp_path_factory):
    with open_compile_cache(tmp_path_factory.mktemp("compiled")) as cache:
        yield cache


@pytest.fixture(scope="module")
def hooked(tmp_path_factory, compile_cache):
    return run(tmp_path_factory.mktemp("hooked"), compile_cache, **HOOKS)


def test_hooks_change_no_bit_of_training(hooked, tmp_path, compile_cache):
    _, plain, observer = run(tmp_path, compile_cache, decode=None)
    assert plain.content_id == hooked[1].content_id
    assert plain.leaves == hooked[1].leaves
    assert observer.named("wrote") == observer.named("evaluated") == []
    assert "validation_loss" not in plain.facts


def test_losses_are_taken_split_by_split_at_the_steps_asked_for_and_the_last(hooked):
    """Against the losses that the finished model gives row by row, without batches or meshes."""
    space, built, observer = hooked
    told = [event[1:] for event in observer.events if event[0] == "evaluated"]
    assert [step for step, _ in told] == [4, 6]
    Vocab, Pos = Axis("vocab", driver.VOCAB), Axis("position", driver.LENGTH)
    template = jax.eval_shape(
        lambda key: build_model(driver.experiment().model, Vocab, Pos, key=key),
        jax.random.PRNGKey(0),
    )
    model = restore_parameters(space.output, template)
    cache = TwoSources(driver.LENGTH, driver.ROWS)
    indices = np.arange(11) * 30 // 11
    expected = {
        split: row_losses(model, cache.rows(split, indices), 11).mean()
        for split in ("validation/even", "validation/odd")
    }
    assert told[-1][1] == pytest.approx(expected, rel=1e-5)
    assert expected["validation/even"] != pytest.approx(expected["validation/odd"], rel=1e-3)
    assert built.facts["validation_loss"] == told[-1][1]
    assert history.read_evaluations(space.output) == [
        {"step": step, "losses": losses} for step, losses in told
    ]
    assert built.facts["seconds"].keys() >= {"evaluation", "pictures", "profile"}


def test_pictures_show_the_text_escaped_and_end_with_the_result(hooked):
    space, _, observer = hooked
    drawn = {step: path for what, step, path in _wrote(observer) if what == "picture"}
    assert list(drawn) == [3, 6]
    assert [path.name for path in drawn.values()] == ["step-000003.html", "step-000006.html"]
    first = TwoSources(driver.LENGTH, driver.ROWS).rows("validation/even", np.arange(1)).tokens[0]
    pages = [(space.output / "pictures" / path.name).read_text() for path in drawn.values()]
    for page in pages:
        assert "<script" not in page
        for token in first:
            assert html.escape(hostile([token])) in page
    assert pages[0] != pages[1].replace("Step 6", "Step 3"), "the model has learned between them"


def test_a_profile_holds_the_steps_that_were_asked_for(hooked):
    """The trace as Perfetto reads it: JSON with events by name."""
    space, _, observer = hooked
    ((_, step, path),) = [event for event in _wrote(observer) if event[0] == "profile"]
    assert (step, path.name, path.parent.name) == (3, "trace.json.gz", "steps-2-3")
    kept = space.output / "profiles" / "steps-2-3" / "trace.json.gz"
    events = json.loads(gzip.decompress(kept.read_bytes()))["traceEvents"]
    steps = [event for event in events if event.get("name") == "train"]
    assert sorted(int(event["args"]["step_num"]) for event in steps) == [2, 3]
    operations = [e for e in events if e.get("ph") == "X" and "fusion" in str(e.get("name"))]
    assert operations, "what the device did is there"
    assert all(event["ts"] >= min(step["ts"] for step in steps) for event in operations)


def _wrote(observer):
    return [event[1:] for event in observer.events if event[0] == "wrote"]


def test_a_resumed_run_keeps_the_losses_taken_before(hooked, tmp_path, compile_cache, caplog):
    """Its state is that of step 4; the profile asked for lies before it."""
    space = driver.workspace(tmp_path)
    before = next(hooked[0].progress.rglob("step-000004.*"))
    target = space.progress / before.relative_to(hooked[0].progress)
    target.parent.mkdir(parents=True)
    before.rename(target)
    with caplog.at_level(logging.WARNING):
        _, built, observer = run(tmp_path, compile_cache, **HOOKS)
    assert built.facts["resumed_from"] == 4
    assert built.content_id == hooked[1].content_id
    assert [event[1] for event in observer.events if event[0] == "evaluated"] == [6]
    assert [e["step"] for e in history.read_evaluations(driver_output(tmp_path))] == [4, 6]
    assert "steps 2 to 3 are made already" in caplog.text


def driver_output(directory):
    return sorted(directory.glob("output-*"))[-1]


def test_a_hook_that_fails_ends_the_run(tmp_path, compile_cache):
    def broken(ids):
        raise RuntimeError("no such id")

    with pytest.raises(RuntimeError, match="no such id"):
        run(tmp_path, compile_cache, decode=broken, pictures_every_steps=2)


def test_what_cannot_be_done_is_refused_before_training(tmp_path, compile_cache):
    class NothingHeldOut(TwoSources):
        def num_rows(self, split):
            return driver.ROWS if split == "train" else 0

    empty = NothingHeldOut(driver.LENGTH, driver.ROWS)
    with pytest.raises(ValueError, match=r"no validation split .* Raise validation.fraction"):
        run(tmp_path / "empty", compile_cache, cache=empty, eval_every_steps=2)
    with pytest.raises(ValueError, match=r"pictures_every_steps: .* needs the tokenizer"):
        run(tmp_path / "mute", compile_cache, decode=None, pictures_every_steps=2)
    with pytest.raises(ValueError, match=r"profile_steps: 5\.\.7 is no part of .*1\.\.6"):
        run(tmp_path / "late", compile_cache, profile_steps="5..7")


def test_steps_to_profile_are_counted_from_one_and_include_both_ends():
    assert list(profiled_steps("5..7", 10)) == [5, 6, 7]
    assert list(profiled_steps(None, 10)) == []
    for text in ("0..3", "7..5"):
        with pytest.raises(ValueError, match=rf"profile_steps: {text} is no part"):
            profiled_steps(text, 10)
