"""What a run writes, tells and refuses; what it does bit for bit is in `test_bitwise`."""

import concurrent.futures
import dataclasses
import json
import logging
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modeling.artifacts import DiskFullError, Progress
from modeling.experiment import ConfigError
from modeling.models.lm import build_model
from modeling.models.trained import load_model
from modeling.training import checkpoint, history, retention, trainer
from modeling.training.accounting import read_ledger
from modeling.training.compile_cache import open_compile_cache
from modeling.training.continuation import require_same_science, science_of
from modeling.training.leaves import named_leaves, snapshot
from modeling.training.manifest import PIECE_BYTES, CheckpointError, array_sha256
from modeling.training.peak import Peak
from modeling.training.pins import pinned
from modeling.training.reading import verify
from modeling.training.restoring import restore_parameters
from modeling.training.retention import open_checkpoints
from modeling.training.trainer import NonFiniteError, train

sys.path.insert(0, str(Path(__file__).parent))
import driver


class Recorder:
    """An observer that remembers, and checks which thread it is told in."""

    def __init__(self):
        self.events = []

    def _hear(self, name, *what):
        assert threading.current_thread() is threading.main_thread()
        self.events.append((name, *what))

    def resumed(self, step, directory):
        self._hear("resumed", step)

    def refused(self, reason):
        self._hear("refused", reason)

    def warned(self, text):
        self._hear("warned", text)

    def started(self, start):
        self._hear("started", start)

    def step(self, report):
        self._hear("step", report)

    def saved(self, step, directory):
        assert (Path(directory) / "COMMIT").exists()
        self._hear("saved", step)

    def wrote(self, what, step, path):
        assert Path(path).exists()
        self._hear("wrote", what, step, Path(path))

    def evaluated(self, step, losses):
        self._hear("evaluated", step, losses)

    def finished(self, facts):
        self._hear("finished", facts)

    def named(self, name):
        return [event[1] for event in self.events if event[0] == name]


@pytest.fixture(scope="module")
def compile_cache(tmp_path_factory):
    with open_compile_cache(tmp_path_factory.mktemp("compiled")) as cache:
        yield cache


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compile_cache):
    """A run to its end: workspace, result, what was told."""
    space, observer = driver.workspace(tmp_path_factory.mktemp("run")), Recorder()
    built = train(
        driver.experiment(), driver.counting_cache(), space,
        observer=observer, compile_cache=compile_cache, peak=Peak(1e9, "measured"),
    )  # fmt: skip
    return space, built, observer


def test_the_output_is_a_checkpoint_with_its_experiment_model_and_losses(finished):
    space, built, _ = finished
    manifest = verify(space.output)
    assert (manifest.step, manifest.cursor) == (6, {"rows": 48})
    assert built.content_id == manifest.content_id
    assert built.roots == manifest.roots == {"parameters": manifest.parameters}
    assert built.leaves == manifest.digests
    assert len([path for path in built.leaves if path.startswith("opt_state.adam.mu.")]) == 16

    described = json.loads((space.output / "model.json").read_text())
    assert described == {
        "model": dataclasses.asdict(driver.experiment().model),
        "vocab_size": driver.VOCAB,
        "sequence_length": driver.LENGTH,
    }
    written = json.loads((space.output / "experiment.json").read_text())
    assert written["trainer"]["save_every_steps"] == 2

    losses = history.read_losses(space.output)
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert built.facts["loss_curve"] == [[n, loss] for n, loss in enumerate(losses, 1)]
    assert (built.facts["loss_first"], built.facts["loss_last"]) == (losses[0], losses[-1])
    assert built.facts["tokens"] == 6 * 8 * driver.LENGTH
    json.dumps(built.facts, allow_nan=False)


def test_the_weights_come_back_as_a_model_without_optimizer_or_mesh(finished):
    space, built, _ = finished
    experiment = driver.experiment()

    def make(key):
        from haliax import Axis

        axes = Axis("vocab", driver.VOCAB), Axis("position", driver.LENGTH)
        return build_model(experiment.model, *axes, key=key)

    template = jax.eval_shape(make, jax.random.PRNGKey(0))
    model = restore_parameters(space.output, template)
    leaves = list(named_leaves(model))
    assert sum(array.size for _, array, _ in leaves) == built.facts["num_parameters"]
    for path, array, _ in leaves:
        assert built.leaves[f"model.{path}"] == array_sha256(np.asarray(array))


def test_a_vocabulary_is_split_with_the_rows_that_it_lacks(finished, compile_cache, tmp_path):
    """61 ids over two devices: as on one device, and never a change in the row that is no id."""
    split = {"mesh": {"data": 2, "model": 2}, "eval_every_steps": 3, "pictures_every_steps": 6,
             "axis_resources": {"batch": "data", "vocab": "model"}}  # fmt: skip
    with pytest.raises(ValueError, match=r"61 rows .* over 2 .*model\.vocab_pad_multiple: 2,"):
        trainer.make_plan(driver.experiment(trainer=split), driver.counting_cache())

    experiment = driver.experiment(trainer=split, model={"vocab_pad_multiple": 2})
    space = driver.workspace(tmp_path)
    built = train(
        experiment, driver.counting_cache(), space,
        compile_cache=compile_cache, decode=lambda ids: str(list(ids)),
    )  # fmt: skip
    np.testing.assert_allclose(
        history.read_losses(space.output), history.read_losses(finished[0].output), rtol=1e-5
    )
    assert built.facts["num_parameters"] == finished[1].facts["num_parameters"]
    table = load_model(space.output, experiment).head.rearrange(("vocab", "embed")).array
    assert table.shape[0] == driver.VOCAB + 1
    assert not np.any(table[driver.VOCAB :])
    assert np.all(np.any(table[: driver.VOCAB], axis=1))


def test_the_observer_hears_it_in_order_and_in_its_own_thread(finished):
    _, built, observer = finished
    assert observer.events[0][0] == "started"
    start = observer.events[0][1]
    assert (start.num_steps, start.first_step, start.num_devices) == (6, 1, 1)
    assert start.num_parameters == built.facts["num_parameters"]
    decayed = {path.split(".", 3)[-1] for path in start.parameter_groups.decayed}
    assert decayed == {"attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight",
                       "mlp.c_proj.weight"}  # fmt: skip
    reports = observer.named("step")
    assert [report.step for report in reports] == [1, 2, 4, 6]
    assert reports[-1].eta_s == 0
    assert all(report.tokens_per_second > 0 for report in reports)
    assert reports[-1].tokens == built.facts["tokens"]
    assert "step 6 of 6: loss" in str(reports[-1])
    assert observer.named("saved") == [2, 4, 6]
    assert observer.events[-1] == ("finished", built.facts)


def test_the_learning_rate_told_is_that_of_the_update(finished):
    """Two steps of warmup to 1e-2: the first update is made at half, the last at a tenth."""
    rates = {report.step: report.learning_rate for report in finished[2].named("step")}
    assert rates[1] == pytest.approx(5e-3)
    assert rates[2] == pytest.approx(1e-2)
    assert rates[6] == pytest.approx(1e-3)


def test_speed_and_the_account_of_time_are_told_and_kept(finished):
    space, built, observer = finished
    facts = built.facts
    per_token = facts["model_flops_per_token"]
    assert facts["mfu"] == pytest.approx(facts["tokens_per_second"] * per_token / 1e9)
    for report in observer.named("step"):
        assert report.mfu == pytest.approx(report.tokens_per_second * per_token / 1e9)
        assert 0 <= report.loader_share <= 1
        assert 0 < report.goodput < 1, "compilation is no goodput"
    assert "MFU" in str(observer.named("step")[0])
    start = observer.named("started")[0]
    assert start.memory.arguments > 3 * 4 * facts["num_parameters"], "weights and two moments"

    (path,) = space.progress.rglob("time.jsonl")
    spent = read_ledger(path)
    assert spent.launches >= 1
    assert {"steps", "compile", "restore", "checkpoint"} <= {
        c for c, s in spent.by_cause.items() if s
    }
    assert facts["seconds"]["compile"] == pytest.approx(facts["compile_s"], abs=1e-3)
    tokens_per_s = facts["tokens"] / (facts["seconds"]["steps"] + facts["seconds"].get("loader", 0))
    assert facts["tokens_per_second"] == pytest.approx(tokens_per_s, rel=0.05)


def test_a_finished_run_trains_no_more(finished):
    space, built, _ = finished
    observer = Recorder()
    again = dataclasses.replace(space, output=space.output.with_name("again"))
    again.output.mkdir()
    repeated = train(driver.experiment(), driver.counting_cache(), again, observer=observer)
    assert (repeated.content_id, repeated.roots) == (built.content_id, built.roots)
    assert [event[0] for event in observer.events] == ["resumed", "finished"]
    assert repeated.facts["resumed_from"] == 6
    verify(again.output)


def test_a_file_that_no_manifest_names_is_neither_read_nor_published(
    finished, compile_cache, tmp_path
):
    own = driver.workspace(tmp_path)
    shutil.copytree(finished[0].progress / "checkpoints", own.progress / "checkpoints")
    (directory,) = (own.progress / "checkpoints").iterdir()
    planted = {"evaluations": [{"step": 6, "losses": {"validation": 0.0}}]}
    for path in directory.glob("step-*"):
        (path / history.EVALUATIONS).write_text(json.dumps(planted))
    built = train(driver.experiment(), driver.counting_cache(), own, compile_cache=compile_cache)
    assert (built.facts["resumed_from"], "validation_loss" in built.facts) == (6, False)
    assert not (own.output / history.EVALUATIONS).exists(), "nor published"


@pytest.mark.parametrize("ended", [True, False], ids=["to be published", "to be gone on with"])
def test_a_damaged_array_is_told_and_the_run_goes_on_from_the_one_before_or_not_at_all(
    finished, compile_cache, tmp_path, caplog, ended
):
    """The sizes of all files are right: nothing is known before the array is read."""
    own = driver.workspace(tmp_path)
    shutil.copytree(finished[0].progress / "checkpoints", own.progress / "checkpoints")
    (directory,) = (own.progress / "checkpoints").iterdir()
    before, last = sorted(directory.glob("step-*"))
    if not ended:
        shutil.rmtree(last)
    damaged = max((last if ended else before).rglob("c*"), key=lambda path: path.stat().st_size)
    raw = damaged.read_bytes()
    damaged.write_bytes(bytes([raw[0] ^ 1]) + raw[1:])
    observer, told = Recorder(), {}
    if not ended:
        with pytest.raises(
            CheckpointError, match=r"None of the 1 checkpoints .* does not begin an"
        ):
            train(driver.experiment(), driver.counting_cache(), own, compile_cache=compile_cache)
        told = {"trainer": {"begin_anew_if_damaged": True}}
    built = train(
        driver.experiment(**told), driver.counting_cache(), own,
        observer=observer, compile_cache=compile_cache,
    )  # fmt: skip
    assert observer.named("resumed") == ([4] if ended else [])
    assert built.content_id == finished[1].content_id
    assert f"DAMAGED CHECKPOINT: {damaged} holds other values" in caplog.text


def test_the_checkpoints_of_another_experiment_are_not_taken_for_ones_own(finished):
    space, _, _ = finished
    longer = driver.experiment(trainer={"num_train_steps": 8})
    differs = r"of another experiment: trainer\.num_train_steps 6 -> 8\."
    with pytest.raises(CheckpointError, match=differs):
        train(longer, driver.counting_cache(), space)
    how_told = driver.experiment(trainer={"log_every_steps": 1}, description="same science")
    assert train(how_told, driver.counting_cache(), space).facts["resumed_from"] == 6


class EarlyCache(driver.CountingCache):
    """A cache before it is complete, of which it is known what a run has read."""

    def evidence(self):
        return {"sequence_length": driver.LENGTH, "splits": {"train": {"rows": 9, "root": "ab"}}}


class CompleteCache(driver.CountingCache):
    """The same cache in the end, or another one."""

    def __init__(self, why):
        super().__init__(driver.LENGTH, driver.ROWS)
        self.why = why

    def refusal(self, seen):
        return super().refusal(seen) if "token_cache" in seen else self.why


@pytest.mark.parametrize("why", [None, "the first 9 rows of split `train` are not those"])
def test_work_on_an_incomplete_cache_is_gone_on_with_or_refused_aloud(
    why, finished, tmp_path, compile_cache
):
    space, observer = driver.workspace(tmp_path), Recorder()
    early = EarlyCache(driver.LENGTH, driver.ROWS)
    train(driver.experiment(), early, space, compile_cache=compile_cache)
    again = dataclasses.replace(space, output=tmp_path / "again")
    again.output.mkdir()
    built = train(
        driver.experiment(), CompleteCache(why), again,
        observer=observer, compile_cache=compile_cache,
    )  # fmt: skip
    assert built.content_id == finished[1].content_id
    assert built.facts["resumed_from"] == (6 if why is None else 0)
    refused = observer.named("refused")
    if why is None:
        assert not refused
        return
    assert "IS REFUSED, and training begins anew" in refused[0]
    assert why in refused[0]
    assert json.loads((again.output / "manifest.json").read_text())["config"]["data"] == {
        "token_cache": "c0" * 32
    }


def test_work_on_another_complete_cache_is_not_taken_for_ones_own(finished):
    other = driver.counting_cache()
    other.content_id = "d1" * 32
    with pytest.raises(CheckpointError, match=r"belongs to other data: it read token cache c0c0"):
        train(driver.experiment(), other, finished[0])


def continued(finished, tmp_path, compile_cache, cache=None, **fields):
    """A run of its own that begins with the finished one's checkpoint."""
    space, built, _ = finished
    trainer = {
        "num_train_steps": 8,
        "initialize_from": {"checkpoint": built.content_id} | fields.pop("how", {}),
    }
    experiment = driver.experiment(**driver.merged({"trainer": trainer}, fields))
    return train(
        experiment, cache or driver.counting_cache(), driver.workspace(tmp_path),
        compile_cache=compile_cache, initial=space.output,
    )  # fmt: skip


def test_a_run_goes_on_from_anothers_checkpoint_with_what_may_differ(
    finished, tmp_path, compile_cache
):
    changed = {
        "how": {"allow_changed": ["optimizer"]},
        "optimizer": {"learning_rate": 2e-3},
    }
    built = continued(finished, tmp_path, compile_cache, **changed)
    assert built.facts["resumed_from"] == 6
    assert built.facts["steps"] == 8
    first = finished[1].facts["loss_curve"]
    assert built.facts["loss_curve"][:6] == first


def test_what_differs_is_named_by_field_and_refused_unless_told(finished, tmp_path):
    with pytest.raises(CheckpointError) as error:
        continued(
            finished, tmp_path, None, model={"num_layers": 3}, optimizer={"learning_rate": 2e-3}
        )
    assert "model.num_layers 2 -> 3; optimizer.learning_rate 0.01 -> 0.002. " in str(error.value)
    assert "num_train_steps" not in str(error.value), "which may always differ"
    other = driver.counting_cache()
    other.content_id = "d1" * 32
    with pytest.raises(CheckpointError, match=r"belongs to other data: .*name\s+`data` in"):
        continued(finished, tmp_path / "b", None, cache=other)
    with pytest.raises(CheckpointError, match=r"num_train_steps: 6, .* 6 updates already"):
        continued(finished, tmp_path / "c", None, trainer={"num_train_steps": 6})
    with pytest.raises(CheckpointError, match=r"trainer\.initialize_from names e2e2"):
        continued(finished, tmp_path / "d", None, how={"checkpoint": "e2" * 32})
    with pytest.raises(ConfigError, match=r"allow_changed names \['data'\]; leave one of them out"):
        continued(finished, tmp_path, None, how={"weights_only": True, "allow_changed": ["data"]})


def test_another_type_of_optimizer_is_refused_by_name_and_by_its_state(finished, tmp_path):
    other = {"optimizer": {"type": "lion", "learning_rate": 1e-3}}
    with pytest.raises(CheckpointError, match=r"optimizer optim\.adamw/1 -> optim\.lion/1"):
        continued(finished, tmp_path / "a", None, **other)
    with pytest.raises(CheckpointError, match=r"holds another state .*`opt_state\.adam\.count` is"):
        continued(finished, tmp_path / "b", None, how={"allow_changed": ["optimizer"]}, **other)


def test_some_arrays_are_taken_and_the_others_begin_anew(finished, tmp_path, compile_cache):
    """Under another optimizer, whose state the checkpoint cannot have."""
    lion = {"optimizer": {"type": "lion", "learning_rate": 1e-3}}
    how = {"only": ["model", "key", "step"], "allow_changed": ["optimizer"]}
    built = continued(finished, tmp_path / "a", compile_cache, how=how, **lion)
    assert (built.facts["resumed_from"], built.facts["steps"]) == (6, 8)
    assert built.facts["loss_curve"][:6] == finished[1].facts["loss_curve"]
    how = {"only": ["model"]}
    begun = continued(finished, tmp_path / "b", compile_cache, how=how)
    weights = continued(finished, tmp_path / "c", compile_cache, how={"weights_only": True})
    assert begun.facts["resumed_from"] == 0
    assert begun.leaves == weights.leaves, "which says the same in other words"


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [
        ({"only": ["modle"]}, CheckpointError, r"only: `modle` is no array of"),
        ({"only": ["step", "model"]}, CheckpointError, r"optimizer\.learning_rate 0\.01 -> 0\.002"),
        ({"only": ["model"], "weights_only": True}, ConfigError, r"leave one of them out"),
        ({"only": ["model"], "allow_changed": ["data"]}, ConfigError, r"`only` without `step`"),
        ({"only": []}, ConfigError, "only"),
    ],
)
def test_a_list_of_arrays_that_makes_no_sense_is_refused(finished, tmp_path, how, error, says):
    with pytest.raises(error, match=says):
        continued(finished, tmp_path, None, how=how, optimizer={"learning_rate": 2e-3})


def test_a_run_that_goes_on_unchanged_is_the_run_it_goes_on_from(finished, tmp_path, compile_cache):
    space, whole, _ = finished
    (step_4,) = space.progress.glob("checkpoints/*/step-000004.*")
    content_id = verify(step_4).content_id
    experiment = driver.experiment(trainer={"initialize_from": {"checkpoint": content_id}})
    own = driver.workspace(tmp_path)
    built = train(
        experiment, driver.counting_cache(), own, compile_cache=compile_cache, initial=step_4
    )
    assert built.facts["resumed_from"] == 4
    assert built.leaves == whole.leaves
    assert built.content_id == whole.content_id
    again = train(experiment, driver.counting_cache(), own, initial=step_4)
    assert again.facts["resumed_from"] == 6, "its own checkpoints come first"
    with pytest.raises(ValueError, match="go together"):
        train(experiment, driver.counting_cache(), own)


def test_a_checkpoint_that_kept_no_fields_of_its_experiment_is_refused(finished):
    manifest = verify(finished[0].output)
    old = dataclasses.replace(manifest, config=manifest.config | {"science": "5c" * 32})
    with pytest.raises(CheckpointError, match="written by an earlier version"):
        require_same_science(finished[0].output, old, science_of(driver.experiment()))


def test_a_checkpoint_of_another_numerics_class_is_said_and_allowed(
    finished, tmp_path, compile_cache, caplog
):
    with caplog.at_level(logging.WARNING):
        built = continued(
            finished, tmp_path, compile_cache,
            how={"weights_only": True},
            trainer={"cpu_threads": 3, "num_train_steps": 6, "seed": 1},
        )  # fmt: skip
    assert "was made in the numerics class" in caplog.text
    assert (built.facts["resumed_from"], built.facts["steps"]) == (0, 6)
    learned, untrained = finished[1].facts["loss_last"], finished[1].facts["loss_first"]
    assert abs(built.facts["loss_first"] - learned) < 0.5 * (untrained - learned)


def test_work_of_another_numerics_class_is_gone_on_with_and_on_record(
    finished, caplog, tmp_path, compile_cache
):
    """Its newest checkpoint is damaged; a death later, the run still knows where it comes from."""
    shutil.copytree(finished[0].progress / "checkpoints", tmp_path / "other" / "checkpoints")
    (directory,) = (tmp_path / "other" / "checkpoints").iterdir()
    shutil.rmtree(max(directory.glob("step-*")) / "arrays" / "step")
    other = Progress(tmp_path / "nobody"), Progress(tmp_path / "other")
    space = dataclasses.replace(driver.workspace(tmp_path / "own"), elsewhere=other)
    before = [{"class": directory.name, "until": 4}]

    def trained(number, **fields):
        observer, output = Recorder(), space.output.with_name(f"output-{number}")
        output.mkdir(exist_ok=True)
        built = train(
            driver.experiment(trainer={"cpu_threads": 3} | fields), driver.counting_cache(),
            dataclasses.replace(space, output=output),
            observer=observer, compile_cache=compile_cache,
        )  # fmt: skip
        return built, observer.named("resumed"), observer.named("warned")

    built, resumed, (told,) = trained(0)
    assert resumed == [4]
    assert f"{directory.name} until step 4" in told
    assert f"DAMAGED CHECKPOINT: {directory}" in caplog.text
    assert list(built.numerics_before) == before
    assert built.leaves == finished[1].leaves, "these two round alike"
    assert verify(space.output).config["numerics_before"] == before

    again, resumed, warned = trained(1)
    assert (resumed, list(again.numerics_before), len(warned)) == ([6], before, 1)

    with pytest.raises(CheckpointError, match=rf"class {directory.name} until step 4"):
        trained(2, other_numerics="begin_anew")
    shutil.rmtree(space.progress)
    alone, resumed, (told,) = trained(3, other_numerics="begin_anew")
    assert (resumed, list(alone.numerics_before)) == ([], [])
    assert "leaves alone; training begins at step 0" in told


def test_saves_by_the_clock_are_temporary_and_change_no_bit(finished, tmp_path, compile_cache):
    saving = {"save_every_steps": None, "save_interval": "0.001s", "keep": [{"every": 3}]}
    space, observer = driver.workspace(tmp_path), Recorder()
    built = train(
        driver.experiment(trainer=saving), driver.counting_cache(), space,
        observer=observer, compile_cache=compile_cache,
    )  # fmt: skip
    assert built.content_id == finished[1].content_id
    saved = observer.named("saved")
    assert {3, 6} <= set(saved), "the rule that keeps says to save, too"
    directory = trainer.checkpoint_directory(space, driver.experiment())
    left = {int(path.name[5:11]) for path in directory.glob("step-*")}
    assert left == {3, *saved[-2:]}
    assert saved[-1] == 6
    assert set(pinned(directory)) == {3, 6}


@pytest.mark.parametrize("by_devices", [False, True])
def test_what_is_saved_is_the_state_of_its_step_whoever_copies_it_and_however_slow_the_disk(
    finished, tmp_path, compile_cache, monkeypatch, by_devices
):
    """Updates go on while a save of each is written; the memory that it is written from is one."""

    def slow(*args):
        time.sleep(0.003)
        return write_chunk(*args)

    write_chunk = checkpoint.write_chunk
    monkeypatch.setattr(checkpoint, "write_chunk", slow)
    monkeypatch.setattr(trainer._Run, "_copies_on_devices", by_devices)
    fields = {"save_every_steps": 1, "keep_checkpoints": 6}
    experiment, space = driver.experiment(trainer=fields), driver.workspace(tmp_path)
    train(experiment, driver.counting_cache(), space, compile_cache=compile_cache)
    found = trainer.checkpoint_directory(space, experiment).glob("step-*")
    ids = {(made := verify(path)).step: made.content_id for path in found}
    others = trainer.checkpoint_directory(finished[0], driver.experiment()).glob("step-*")
    expected = {(made := verify(path)).step: made.content_id for path in others}
    assert len(set(ids.values())) == len(ids) == 6
    assert expected.items() <= ids.items()
    assert max(expected) == 6


def test_a_failing_write_ends_the_run_at_the_next_step(tmp_path, compile_cache, monkeypatch):
    class AtOnce(ThreadPoolExecutor):
        def submit(self, *args):
            future = super().submit(*args)
            concurrent.futures.wait([future])
            return future

    monkeypatch.setattr(retention, "ThreadPoolExecutor", AtOnce)
    monkeypatch.setenv("LEVANTER_FAULT", "during-write@2:ENOSPC")
    observer = Recorder()
    with pytest.raises(DiskFullError, match="checkpoint of step 2"):
        train(
            driver.experiment(trainer={"log_every_steps": 1}), driver.counting_cache(),
            driver.workspace(tmp_path), observer=observer, compile_cache=compile_cache,
        )  # fmt: skip
    assert observer.named("step")[-1].step == 2


def test_a_second_trainer_on_the_same_progress_is_refused(tmp_path):
    space, experiment = driver.workspace(tmp_path), driver.experiment()
    directory = trainer.checkpoint_directory(space, experiment)
    with (
        open_checkpoints(directory, keep=2),
        pytest.raises(CheckpointError, match="in use by another trainer"),
    ):
        train(experiment, driver.counting_cache(), space)


def test_rows_of_another_length_are_refused(tmp_path):
    cache = driver.counting_cache(length=32)
    with pytest.raises(ValueError, match=r"sequence_length: .* asks for 16.*rows of 32"):
        train(driver.experiment(), cache, driver.workspace(tmp_path))


def test_a_loss_that_is_no_number_stops_the_run_at_its_step_and_saves_nothing_of_it(
    tmp_path, compile_cache
):
    space = driver.workspace(tmp_path)
    wild = driver.experiment(
        optimizer={"learning_rate": 1e38, "max_grad_norm": 1e30, "schedule": {"warmup": 0}},
        trainer={"save_every_steps": 1},
    )
    with pytest.raises(NonFiniteError, match=r"step [123]: .*`?\w+") as error:
        train(wild, driver.counting_cache(), space, compile_cache=compile_cache)
    failed_at = int(str(error.value).split(":")[0].split()[1])
    saved = [int(p.name[5:11]) for p in space.progress.rglob("step-*") if (p / "COMMIT").exists()]
    assert all(step < failed_at for step in saved)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_number_that_is_none_is_found_wherever_it_is_in_the_state(dtype):
    state = {"counts": jnp.arange(3), "w": jnp.ones((3, PIECE_BYTES // 2), dtype)}
    trainer._require_finite_state(7, snapshot(state))
    for index in ((0, 0), (1, 5), (2, -1)):
        spoiled = state | {"w": state["w"].at[index].set(jnp.inf)}
        with pytest.raises(NonFiniteError, match="step 7: `w` is not finite"):
            trainer._require_finite_state(7, snapshot(spoiled))


def test_the_first_gradient_that_is_not_finite_is_named():
    metrics = trainer.Metrics(
        jnp.asarray(2.0), jnp.asarray(1.0), jnp.asarray(0.1), jnp.asarray([1.0, jnp.nan, jnp.inf])
    )
    with pytest.raises(NonFiniteError, match=r"step 7: the loss is 2.0.*`up.weight`.*first of 2"):
        trainer.require_finite(7, metrics, ("embed", "up.weight", "up.bias"))
    overflow = dataclasses.replace(metrics, loss=jnp.asarray(jnp.inf), gradient_squares=jnp.ones(3))
    with pytest.raises(NonFiniteError, match=r"step 7: the loss is inf"):
        trainer.require_finite(7, overflow, ("embed", "up.weight", "up.bias"))


def test_the_curve_has_both_ends_and_at_most_two_hundred_points():
    losses = [float(n) for n in range(1, 1001)]
    points = history.curve(losses)
    assert len(points) == 200
    assert (points[0], points[-1]) == ([1, 1.0], [1000, 1000.0])
    assert all(step == loss for step, loss in points)
    assert history.curve(losses[:3]) == [[1, 1.0], [2, 2.0], [3, 3.0]]


def test_losses_are_written_without_losing_a_bit(tmp_path):
    losses = [float(np.float32(x)) for x in (0.1, 1 / 3, 4.129408836364746, 1e-30)]
    (tmp_path / "losses.json").write_text(json.dumps(history.to_json(losses)))
    assert history.read_losses(tmp_path) == losses
