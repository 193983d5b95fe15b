"""Averages of weights, skipped updates, short rows, and each optimizer in a run that is resumed."""

import dataclasses
import hashlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import cache_key

from haliax import Axis
from modeling.experiment import ConfigError
from modeling.models.trained import load_model
from modeling.training.averages import initial_averages, next_averages
from modeling.training.compile_cache import open_compile_cache
from modeling.training.config import BatchSchedule, LengthSchedule, LengthStage, SkipStepConfig
from modeling.training.leaves import named_leaves
from modeling.training.observer import Silent
from modeling.training.spikes import SpikeHistory
from modeling.training.step import compile_step
from modeling.training.trainer import make_plan, train

sys.path.insert(0, str(Path(__file__).parent))
import driver

ADAFACTOR = {"type": "adafactor", "smallest_factored": 8, "learning_rate": 0.2}
MUON, LION = {"type": "muon"}, {"type": "lion", "learning_rate": 1e-3}
SOPHIA = {"estimate_every": 2, "estimate_rows": 4}
SMALL = {"hidden_dim": 16, "num_layers": 1, "num_heads": 2}


def weights_over_time(count):
    """One weight after each update, in bfloat16 to show that averages are not."""
    draw = np.random.default_rng(1).normal(size=(count, 3))
    return [jnp.asarray(w, jnp.bfloat16) for w in draw]


def averages_over_time(trainer, weights):
    averages = initial_averages(trainer, {"w": weights[0] + 9})
    update = jax.jit(lambda averages, w, n: next_averages(trainer, averages, {"w": w}, n))
    found = []
    for n, w in enumerate(weights, 1):
        averages = update(averages, w, jnp.int32(n))
        found.append({name: np.asarray(tree["w"]) for name, tree in averages.items()})
    return found


def test_averages_are_exact_and_forget_the_initial_weights():
    count = 10
    trainer = driver.experiment(
        trainer={"num_train_steps": count, "ema": {"decay": 0.7}, "tail_average": {"start": 0.4}}
    ).trainer
    weights = weights_over_time(count)
    found = averages_over_time(trainer, weights)
    w = np.asarray([np.asarray(x, np.float64) for x in weights])
    for n in range(1, count + 1):
        shares = 0.7 ** np.arange(n - 1, -1, -1.0)
        expected = (shares[:, None] * w[:n]).sum(0) / shares.sum()
        assert found[n - 1]["ema"].dtype == np.float32
        np.testing.assert_allclose(found[n - 1]["ema"], expected, rtol=1e-4, atol=1e-5)
        tail = w[n - 1] if n <= 4 else w[4:n].mean(0)
        np.testing.assert_allclose(found[n - 1]["tail_average"], tail, rtol=1e-4, atol=1e-5)


def judged(config, losses, norms):
    """Which updates are left out, by the program; and by the docstring, in NumPy."""
    history = SpikeHistory.empty(config)
    judge = jax.jit(lambda h, n, loss, norm: h.judge(config, n, loss, norm))
    found = []
    for n, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        is_spike, history = judge(history, jnp.int32(n), jnp.float32(loss), jnp.float32(norm))
        found.append(bool(is_spike))
    expected = []
    for n in range(len(losses)):
        recent = [x[max(n - config.window, 0) : n] for x in (losses, norms)]
        out = [x[n] > r.mean() + config.sigmas * r.std() for x, r in zip((losses, norms), recent,
               strict=True)] if n >= config.window else [False]  # fmt: skip
        expected.append(any(out))
    assert int(history.skipped) == sum(found)
    return found, expected


def test_an_update_is_left_out_that_stands_out_from_the_window_before():
    draw = np.random.default_rng(0)
    losses, norms = draw.normal(3.0, 0.1, 60), draw.normal(1.0, 0.1, 60)
    losses[5] = 9.0  # in the first window, where nothing is judged
    losses[30] = 5.0
    norms[40] = 4.0
    losses[45:] += 4.0  # a new normal: left out until it fills the window
    found, expected = judged(SkipStepConfig(sigmas=4.0, window=8), losses, norms)
    assert found == expected
    assert found[30]
    assert found[40]
    assert found[45]
    assert sum(found) < 6
    assert not any(found[48:])


class Watch(Silent):
    """Dies while it hears of one update, as a machine would; the next is under way by then."""

    def __init__(self, dies_at=None):
        self.dies_at = dies_at
        self.reports = []

    def step(self, report):
        self.reports.append(report)
        if report.step == self.dies_at:
            raise ConnectionError("the machine is gone")


def test_everything_that_a_run_keeps_besides_its_weights_survives_a_death(tmp_path):
    """Sophia's curvature and probes, averages, the window of figures, and rows that grow."""
    experiment = driver.experiment(
        model={"resid_pdrop": 0.1},
        optimizer={"type": "sophia_g", **SOPHIA},
        trainer={
            "num_train_steps": 7,
            "log_every_steps": 1,
            "save_every_steps": 4,
            "ema": {"decay": 0.9},
            "tail_average": {"start": 3},
            "skip_step": {"window": 8},
            "sequence_length_schedule": [
                {"start_step": 0, "length": 8}, {"start_step": 5, "length": 16},
            ],
        },
    )  # fmt: skip
    cache, watch = driver.counting_cache(), Watch()
    with open_compile_cache(tmp_path / "programs") as programs:
        whole = train(experiment, cache, driver.workspace(tmp_path / "whole"), observer=watch,
                      compile_cache=programs)  # fmt: skip
        broken = driver.workspace(tmp_path / "broken")
        with pytest.raises(ConnectionError):
            train(experiment, cache, broken, observer=Watch(6), compile_cache=programs)
        again = dataclasses.replace(broken, output=tmp_path / "again")
        again.output.mkdir()
        resumed = train(experiment, cache, again, compile_cache=programs)
    assert resumed.facts["resumed_from"] == 4
    assert resumed.leaves == whole.leaves
    reports = watch.reports
    assert set(whole.roots) == {"parameters", "parameters.ema", "parameters.tail_average"}
    assert len(set(whole.roots.values())) == 3
    for weights in ("ema", "tail_average"):
        model = load_model(again.output, experiment, weights)
        for path, array, _ in named_leaves(model):
            found = hashlib.sha256(np.asarray(array).tobytes()).hexdigest()
            assert found == whole.leaves[f"averages.{weights}.{path}"]
    kinds = {path.split(".")[0] for path in whole.leaves}
    assert kinds == {"step", "model", "opt_state", "key", "averages", "spikes"}
    name = "transformer.ln_f.weight"
    for path in (f"opt_state.sophia.hessian.{name}", f"averages.ema.{name}",
                 f"averages.tail_average.{name}", "spikes.losses"):  # fmt: skip
        assert path in whole.leaves
    assert [report.tokens for report in reports] == [64, 128, 192, 256, 320, 448, 576]
    assert whole.facts["tokens"] == 576
    assert all(0 < report.figures["clipped_share"] <= 1 for report in reports)
    assert reports[-1].figures["skipped_steps"] == 0
    assert "clipped_share" in str(reports[-1])


def compiled(optimizer, model=None, **trainer):
    experiment = driver.experiment(optimizer=optimizer, model=model or {}, trainer=trainer)
    plan = make_plan(experiment, driver.counting_cache())
    step = compile_step(
        plan.blueprint, experiment.optimizer, experiment.trainer, plan.layout,
        Batch=plan.batch_axis(0), Pos=plan.Pos,
    )  # fmt: skip
    return plan, step


def losses_of(plan, step, count=4, *, elastic=False):
    key, losses = jax.random.PRNGKey(0), []
    arrays = plan.blueprint.initialize(plan.make, key, elastic=elastic)
    cache = driver.counting_cache()
    for number in range(count):
        rows = cache.rows("train", np.arange(8 * number, 8 * number + 8))
        arrays, metrics = step.run(arrays, jax.device_put(rows, step.batch_sharding))
        losses.append(float(metrics.loss))
    return losses, arrays


@pytest.mark.parametrize(
    "optimizer",
    [
        ADAFACTOR,
        MUON,
        pytest.param({"type": "sophia_g", **SOPHIA}, marks=pytest.mark.slow),
        pytest.param({"type": "sophia_h", **SOPHIA}, marks=pytest.mark.slow),
    ],
    ids=lambda optimizer: optimizer["type"],
)
def test_layouts_agree_and_state_is_split_as_parameters_are(optimizer):
    found = {}
    layouts = {
        "one": {"mesh": {"data": 1}},
        "both": {
            "mesh": {"data": 2, "model": 2},
            "axis_resources": {"batch": "data", "heads": "model", "mlp": "model"},
        },
    }
    for name, layout in layouts.items():
        pieces = 2 if optimizer["type"].startswith("sophia") else 1
        plan, step = compiled(optimizer, num_microbatches=pieces, **layout)
        found[name], arrays = losses_of(plan, step)
    np.testing.assert_allclose(found["both"], found["one"], rtol=3e-4)
    assert found["one"][-1] < found["one"][0]

    ways = {"embed": 2, "heads": 2, "mlp": 2}
    state = plan.blueprint.unflatten(arrays)
    for path, array, axes in named_leaves({"opt_state": state.opt_state}):
        split = array.size // array.addressable_shards[0].data.size
        expected = np.prod([ways.get(axis, 1) for axis in axes or ()])
        assert split == expected, f"{path} over {axes}"


ELASTIC = {"reproducibility": "elastic", "elastic_shards": 2}


@pytest.mark.parametrize(
    ("optimizer", "layouts"),
    [
        ({"type": "adamw"}, [{"ema": {"decay": 0.5}}]),
        (
            {"type": "sophia_g", **SOPHIA},  # an estimate is due at the update that is skipped
            [ELASTIC | {"mesh": {"data": count}} for count in (1, 2)],
        ),
    ],
    ids=["fast", "elastic"],
)
def test_a_skipped_update_leaves_weights_and_optimizer_as_they_were(optimizer, layouts):
    """And an elastic run is the same on any number of devices, before it and after."""
    found = [skipped_and_then_not(optimizer, **layout) for layout in layouts]
    for path in found[0]:
        assert all(np.array_equal(one[path], found[0][path]) for one in found), path


def skipped_and_then_not(optimizer, **layout):
    """Checks an update that stands out, and returns the state after one more, which does not."""
    plan, step = compiled(optimizer, model=SMALL, skip_step={"window": 8}, **layout)
    arrays = plan.blueprint.initialize(
        plan.make, jax.random.PRNGKey(0), elastic="reproducibility" in layout
    )
    state = plan.blueprint.unflatten(arrays)
    quiet = SpikeHistory(
        jnp.full(8, 1.0) + 1e-3 * jnp.arange(8.0), jnp.full(8, 99.0), jnp.asarray(3, jnp.int32)
    )
    state = dataclasses.replace(state, step=jnp.asarray(8, jnp.int32), spikes=quiet)
    before = {path: np.asarray(x) for path, x, _ in named_leaves(state)}
    rows = driver.counting_cache().rows("train", np.arange(8))
    arrays, metrics = step.run(
        [jax.device_put(np.asarray(a), s) for a, s in
         zip(plan.blueprint.flatten(state), plan.blueprint.shardings.values(), strict=True)],
        jax.device_put(rows, step.batch_sharding),
    )  # fmt: skip
    assert float(metrics.loss) > 3, "the loss of an untrained model stands out from 1"
    assert int(metrics.figures["skipped_steps"]) == 4
    after = {path: np.asarray(x) for path, x, _ in named_leaves(plan.blueprint.unflatten(arrays))}
    for path in before:
        if path.startswith(("model.", "opt_state.", "key")):
            np.testing.assert_array_equal(after[path], before[path], err_msg=path)
    assert int(after["step"]) == 9
    assert after["spikes.losses"][0] == np.float32(metrics.loss)
    arrays, metrics = step.run(arrays, jax.device_put(rows, step.batch_sharding))
    assert int(metrics.figures["skipped_steps"]) == 4
    state = plan.blueprint.unflatten(arrays)
    last = {path: np.asarray(x) for path, x, _ in named_leaves(state)}
    name = "model.transformer.ln_f.weight"
    assert not np.array_equal(last[name], before[name])
    return last


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Compiled programs, of which those for one device serve every device."""
    with pytest.MonkeyPatch.context() as patch:
        for name, function in driver.keys_for_any_device().items():
            patch.setattr(cache_key, name, function)
        with open_compile_cache(tmp_path_factory.mktemp("programs")) as programs:
            yield programs


@pytest.mark.parametrize(
    ("optimizer", "devices"),
    [
        ({**MUON, "newton_schulz_steps": 1}, (1, 4)),
        ({"type": "sophia_g", "estimate_every": 3, "estimate_rows": 4}, (1, 2)),
        pytest.param(ADAFACTOR, (1, 2, 4), marks=pytest.mark.slow),
        pytest.param(MUON, (2, 4), marks=pytest.mark.slow),
        pytest.param({"type": "sophia_h", **SOPHIA}, (1, 2, 4), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_optimizer_gives_the_same_bits_on_any_number_of_devices(programs, optimizer, devices):
    """The whole state after updates with and without an estimate of curvature."""
    found = []
    for count in devices:
        plan, step = compiled(
            optimizer, model=SMALL, mesh={"data": count}, reproducibility="elastic",
            elastic_shards=4,
        )  # fmt: skip
        losses, arrays = losses_of(plan, step, elastic=True)
        assert {len(array.sharding.device_set) for array in arrays} == {count}
        found.append((losses, [np.asarray(array).tobytes() for array in arrays]))
        programs.publish()
    losses, arrays = found[0]
    assert losses[-1] < losses[0]
    paths = list(plan.blueprint.shardings)
    for other_losses, other_arrays in found[1:]:
        assert other_losses == losses
        both = zip(paths, arrays, other_arrays, strict=True)
        assert [path for path, a, b in both if a != b] == []


def test_an_elastic_estimate_needs_rows_for_every_shard():
    with pytest.raises(ValueError, match=r"estimate_rows: 2 .* 4 logical shards"):
        compiled(
            {"type": "sophia_g", "estimate_rows": 2}, reproducibility="elastic", elastic_shards=4
        )


def test_tokens_are_counted_across_changes_of_length_and_batch():
    lengths = LengthSchedule(
        [LengthStage(start_step=0, length=8), LengthStage(start_step=3, length=16)], 16
    )
    batches = BatchSchedule(driver.experiment(
        trainer={"train_batch_size": [{"start_step": 0, "size": 2}, {"start_step": 2, "size": 4}]}
    ).trainer.train_batch_size)  # fmt: skip
    assert [lengths.length(n) for n in range(5)] == [8, 8, 8, 16, 16]
    per_step = [2 * 8, 2 * 8, 4 * 8, 4 * 16, 4 * 16]
    found = [lengths.tokens(n, batches) for n in range(6)]
    assert found == [sum(per_step[:n]) for n in range(6)]
    assert LengthSchedule([], 16).tokens(2, batches) == 2 * 2 * 16


@pytest.mark.parametrize(
    ("stages", "error", "message"),
    [
        (
            [{"start_step": 0, "length": 32}],
            ConfigError,
            r"schedule\.0\.length: 32 .* rows have 16",
        ),
        ([{"start_step": 2, "length": 8}], ConfigError, r"stages must begin at step 0"),
        ([], ConfigError, r"sequence_length_schedule: Tuple should have at least 1 item"),
    ],
)
def test_a_schedule_of_lengths_that_cannot_be_is_refused(stages, error, message):
    with pytest.raises(error, match=message):
        make_plan(
            driver.experiment(trainer={"sequence_length_schedule": stages}),
            driver.counting_cache(),
        )


@pytest.mark.parametrize(
    "mp",
    [
        pytest.param("p=f32,c=bf16", marks=pytest.mark.slow),
        "p=f32,c=f16",
        pytest.param("p=bf16,c=bf16", marks=pytest.mark.slow),
        pytest.param("p=bf16,c=f32", marks=pytest.mark.slow),
    ],
)
def test_every_precision_learns(mp):
    plan, step = compiled({**LION, "lr_multipliers": {"ln_f": 0.5}}, mp=mp)
    losses, arrays = losses_of(plan, step)
    assert losses[-1] < losses[0]
    stored = {x.dtype.name for x in jax.tree.leaves(plan.blueprint.unflatten(arrays).model)}
    assert stored == {"float32" if mp.startswith("p=f32") else "bfloat16"}


@pytest.mark.parametrize("section", ["evaluation", "export"])
def test_weights_of_an_average_that_nobody_keeps_are_refused(section):
    kept = driver.experiment(trainer={"ema": {}}, **{section: {"weights": "ema"}})
    assert getattr(kept, section).weights == "ema"
    with pytest.raises(ConfigError, match=rf"{section}\.weights: ema needs trainer\.ema"):
        driver.experiment(**{section: {"weights": "ema"}})


def test_short_rows_are_the_beginnings_of_the_same_rows():
    rows = driver.counting_cache().rows("train", np.arange(3))
    first = rows.first(8)
    np.testing.assert_array_equal(first.tokens, rows.tokens[:, :8])
    assert first.segment_ids is None
    assert Axis("position", 8) == make_plan(
        driver.experiment(trainer={"sequence_length_schedule": [{"start_step": 0, "length": 8}]}),
        driver.counting_cache(),
    ).row_axis(0)
