"""The core promise: a run that is killed anywhere and started again ends with the same bits.

Everything runs in real processes, in the environment that `numerics.environment` pins. Dropout and
accumulation are on in every layout, and the batch grows after the third step. A process that dies
costs a whole start, so that all that died in one layout are resumed by one process, one after
another.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from modeling import numerics
from modeling.training import faults
from modeling.training.preemption import EXIT_CODE

sys.path.insert(0, str(Path(__file__).parent))
import driver

MODEL = {"resid_pdrop": 0.1, "attn_pdrop": 0.1, "embed_pdrop": 0.1}
FSDP = {"mesh": {"data": 4}}
TENSOR_PARALLEL = {
    "mesh": {"data": 2, "model": 2},
    "axis_resources": {"batch": "data", "heads": "model", "mlp": "model"},
}
ONE = {"mesh": {"data": 1}}
LAYOUTS = {"one": ONE, "fsdp": FSDP, "tensor parallel": TENSOR_PARALLEL}


GROWING_BATCH = [{"start_step": 0, "size": 8}, {"start_step": 3, "size": 16}]


def fields(layout, **trainer):
    common = {"num_microbatches": 2, "train_batch_size": GROWING_BATCH}
    return {"model": MODEL, "trainer": common | LAYOUTS[layout] | trainer}


class Processes:
    """Starts drivers that share compiled programs."""

    def __init__(self, directory):
        self.directory = directory
        self.number = 0

    def start(self, experiment, workspaces, *, fault=None, compile_cache=True):
        self.number += 1
        path = self.directory / f"cases-{self.number}.json"
        extra = {"compile_cache": str(self.directory / "compiled")} if compile_cache else {}
        cases = [{"workspace": str(self.directory / name), "experiment": experiment} | extra
                 for name in workspaces]  # fmt: skip
        path.write_text(json.dumps(cases))
        env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX", "XLA", "LEVANTER"))}
        env |= numerics.environment(driver.experiment(**experiment).trainer, "cpu")
        env |= {faults.VARIABLE: fault} if fault else {}
        return subprocess.Popen(
            [sys.executable, driver.__file__, str(path)],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def results(self, experiment, workspaces, **options):
        return self.finish(self.start(experiment, workspaces, **options))

    def finish(self, process):
        out, err = process.communicate()
        assert process.returncode == 0, err[-4000:]
        assert not err, f"a clean run says nothing: {err[-4000:]}"
        return [json.loads(line) for line in out.splitlines()]

    def killed(self, experiment, faults_by_workspace):
        """Starts one process for each workspace, all at once, and sees each of them die."""
        running = [(fault, self.start(experiment, [workspace], fault=fault))
                   for workspace, fault in faults_by_workspace.items()]  # fmt: skip
        for fault, process in running:
            out, err = process.communicate()
            assert process.returncode == -signal.SIGKILL, f"not killed at {fault}: {out} {err}"


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    return Processes(tmp_path_factory.mktemp("bitwise"))


@pytest.fixture(scope="module")
def uninterrupted(processes):
    """The result of each layout, started once and never disturbed."""
    running = {name: processes.start(fields(name), [f"{name}-reference"]) for name in LAYOUTS}
    return {name: processes.finish(process)[0] for name, process in running.items()}


def assert_same_run(found, expected):
    assert found["losses"] == expected["losses"]
    differing = [k for k, v in expected["leaves"].items() if found["leaves"].get(k) != v]
    assert not differing
    assert found["content_id"] == expected["content_id"]
    assert found["roots"] == expected["roots"]


def test_two_processes_give_the_same_bits_compiled_anew_or_not(processes, uninterrupted):
    """The reference filled the cache of compiled programs; this one must not read it."""
    (again,) = processes.results(fields("fsdp"), ["again"], compile_cache=False)
    assert_same_run(again, uninterrupted["fsdp"])
    assert again["facts"]["resumed_from"] == 0


def test_a_run_killed_at_any_named_point_ends_with_the_same_bits(processes, uninterrupted):
    survives = {  # the steps of the newest checkpoint that may and must be found again
        "after-step@5": (2, 4),  # the one of step 4 may still be being written
        "before-write@4": (2,),
        "during-write@4": (2,),
        "before-commit@4": (2,),
        "after-commit@4": (4,),
        "before-finish@6": (6,),
    }
    assert {point.split("@")[0] for point in survives} == set(faults.POINTS)
    processes.killed(fields("fsdp"), {point: point for point in survives})
    resumed = processes.results(fields("fsdp"), list(survives))
    for (point, steps), result in zip(survives.items(), resumed, strict=True):
        assert result["facts"]["resumed_from"] in steps, point
        assert_same_run(result, uninterrupted["fsdp"])


@pytest.mark.parametrize("layout", ["one", "tensor parallel"])
def test_other_layouts_resume_with_the_same_bits_too(processes, uninterrupted, layout):
    processes.killed(fields(layout), {f"{layout}-killed": "during-write@4"})
    (resumed,) = processes.results(fields(layout), [f"{layout}-killed"])
    assert resumed["facts"]["resumed_from"] == 2
    assert_same_run(resumed, uninterrupted[layout])


def test_layouts_agree_on_losses_closely_but_are_told_apart(uninterrupted):
    losses = {
        name: [float.fromhex(loss) for loss in result["losses"]]
        for name, result in uninterrupted.items()
    }
    for name in LAYOUTS:
        np.testing.assert_allclose(losses[name], losses["one"], rtol=2e-5)
    assert losses["one"][-1] < losses["one"][0]


def wait_for(process, condition):
    deadline = time.monotonic() + 120
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            out, err = process.communicate()
            raise AssertionError(f"the run ended too early ({process.returncode}): {out} {err}")
        time.sleep(0.01)


LONG = {"num_train_steps": 160, "save_every_steps": 5}


def test_kills_at_random_moments_and_a_preemption_leave_no_trace(processes):
    """One run is killed twice and preempted once; where it was hit is printed on failure."""
    seed = int.from_bytes(os.urandom(4), "big")
    moments = random.Random(seed)
    experiment, space = fields("one", **LONG), processes.directory / "long"
    for _ in range(2):
        process, before = processes.start(experiment, ["long"]), newest_step(space)
        wait_for(process, lambda before=before: newest_step(space) > before)
        time.sleep(moments.uniform(0.0, 0.3))
        assert process.poll() is None, "the run must be long enough to be hit"
        process.kill()
        process.communicate()

    process, before = processes.start(experiment, ["long"]), newest_step(space)
    wait_for(process, lambda: newest_step(space) > before)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == EXIT_CODE, err[-4000:]
    stopped = newest_step(space)
    assert f"preempted after step {stopped}" in err
    assert before < stopped < LONG["num_train_steps"]

    resumed, reference = processes.results(experiment, ["long", "long-reference"])
    assert resumed["facts"]["resumed_from"] == stopped, f"seed {seed}"
    assert reference["facts"]["resumed_from"] == 0
    assert_same_run(resumed, reference)


def test_an_elastic_run_has_the_same_bits_on_any_number_of_devices(processes):
    """On one device, on two, and killed on two to be finished by one; dropout is on."""

    def on(devices):
        trainer = {"mesh": {"data": devices}, "num_microbatches": 1}
        trainer |= {"reproducibility": "elastic", "elastic_shards": 4}
        return {"model": MODEL, "trainer": trainer}

    reference = processes.start(on(1), ["elastic-one"])
    processes.killed(on(2), {"elastic-moved": "during-write@4"})
    (one,) = processes.finish(reference)
    (moved,) = processes.results(on(1), ["elastic-moved"])
    assert moved["facts"]["resumed_from"] == 2
    assert_same_run(moved, one)
    (two,) = processes.results(on(2), ["elastic-two"])
    assert two["facts"]["num_devices"] == 2
    assert_same_run(two, one)


def newest_step(directory):
    committed = [path.parent.name for path in directory.rglob("step-*/COMMIT")]
    return max((int(name.split("-")[1].split(".")[0]) for name in committed), default=0)


def test_an_unknown_point_is_refused(monkeypatch):
    monkeypatch.setenv(faults.VARIABLE, "half-way@3")
    with pytest.raises(ValueError, match=r"half-way@3.*after-step"):
        faults.reach("after-step", 3)
    monkeypatch.setenv(faults.VARIABLE, "after-step@4")
    faults.reach("after-step", 3)
    faults.reach("before-write", 4)
