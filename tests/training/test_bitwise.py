"""The core promise: a run that is killed anywhere and started again ends with the same bits.

Everything runs in real processes, in the environment that `numerics.environment` pins, forked by a
nursery that has imported JAX but touched no device (`driver`). What runs in one process has the
policy of real runs, parameters in float32 and computation in bfloat16; elastic runs and crews have
float32. Dropout is on everywhere, and accumulation wherever it is not the elastic shards that
accumulate. A run is killed many times over: each life goes on where the one before was hit, and the
last one must end with the content id, the losses and the leaves of a run that nobody disturbed.
"""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from modeling import faults, numerics
from modeling.training import history
from modeling.training.preemption import EXIT_AT_ONCE, EXIT_CODE

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
import driver
from catalogue import trial

MODEL = {"resid_pdrop": 0.1, "attn_pdrop": 0.1, "embed_pdrop": 0.1}
STEPS = 12
POLICY = "p=f32,c=bfloat16"
LAYOUTS = {
    "one": {"mesh": {"data": 1}, "xla_flags": []},  # compiled as for users
    "fsdp": {"mesh": {"data": 4}},
    "tensor parallel": {
        "mesh": {"data": 2, "model": 2},
        "axis_resources": {"batch": "data", "heads": "model", "mlp": "model"},
    },
}


def fields(layout, **trainer):
    return {
        "model": MODEL,
        "trainer": {"num_train_steps": STEPS, "num_microbatches": 2, "mp": POLICY}
        | LAYOUTS[layout]
        | trainer,
    }


def elastic(devices, processes=1):
    trainer = {"num_train_steps": STEPS, "mesh": {"data": devices}, "processes": processes}
    # Every device compiles for itself, and each kind of dropout doubles what there is to compile.
    model = {"resid_pdrop": 0.1}
    return {"model": model, "trainer": trainer | {"reproducibility": "elastic"}}


class Life:
    """One process of the nursery."""

    def __init__(self, nursery, pid, path):
        self._nursery, self.pid, self._path = nursery, pid, path
        self._code = None

    def poll(self, *, block=False):
        if self._code is None:
            self._code = self._nursery.ask({"wait": self.pid, "block": block})
        return self._code

    def wait(self):
        return self.poll(block=True)

    def signal(self, number):
        os.kill(self.pid, number)

    @property
    def is_paused(self):
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2].startswith("T")

    @property
    def out(self):
        return Path(f"{self._path}.out").read_text()

    @property
    def err(self):
        # Gloo says how many it has met, whoever asks.
        lines = Path(f"{self._path}.err").read_text().splitlines()
        return "\n".join(line for line in lines if not line.startswith("[Gloo]"))

    def results(self):
        assert self.wait() == 0, self.err[-4000:]
        assert not self.err, f"a clean run says nothing: {self.err[-4000:]}"
        return [json.loads(line) for line in self.out.splitlines() if line.startswith("{")]


class Nursery:
    """Starts lives that share compiled programs."""

    def __init__(self, directory):
        self.directory = directory
        self._number = 0
        self._said = directory / "nursery.err"
        with self._said.open("w") as said:
            self._process = subprocess.Popen(
                [sys.executable, driver.__file__, "--nursery"],
                env=bare_environment() | numerics.environment(driver.experiment().trainer, "cpu"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
            )

    def ask(self, order):
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            pytest.fail(f"the nursery has ended: {self._said.read_text()[-4000:]}")

    def close(self):
        self._process.stdin.close()
        self._process.stdout.close()
        assert self._process.wait() == 0, self._said.read_text()[-4000:]

    def cases(self, experiment, workspaces, **more):
        self._number += 1
        path = self.directory / f"cases-{self._number}.json"
        cases = [{"workspace": str(self.directory / name), "experiment": experiment} | more
                 for name in workspaces]  # fmt: skip
        path.write_text(json.dumps(cases))
        return path

    def crew(self, experiment, workspace, *, fault=None, faulty=0):
        """Starts all processes of a run; `faulty` is the index of the one that has the fault."""
        trainer = driver.experiment(**experiment).trainer
        lives, address = [], f"127.0.0.1:{free_port()}"
        for index in range(trainer.processes):
            seat = {"index": index, "count": trainer.processes, "address": address}
            path = self.cases(
                experiment, [workspace], compile_cache=str(self.directory / "compiled"),
                **({"seat": seat} if trainer.processes > 1 else {}),
            )  # fmt: skip
            environment = numerics.environment(trainer, "cpu")
            if fault and index == faulty:
                environment |= {faults.VARIABLE: fault}
            order = {"environment": environment, "cases": str(path)}
            pid = self.ask(order | {"out": f"{path}.out", "err": f"{path}.err"})
            lives.append(Life(self, pid, path))
        return lives

    def start(self, experiment, workspace, **options):
        (life,) = self.crew(experiment, workspace, **options)
        return life

    def result(self, experiment, workspace):
        first, *others = self.crew(experiment, workspace)
        (result,) = first.results()
        assert all(life.wait() == 0 for life in others)
        return result

    def killed(self, experiment, workspace, fault, faulty=0):
        """Runs until the fault, and kills the rest of the crew as the launcher would."""
        lives = self.crew(experiment, workspace, fault=fault, faulty=faulty)
        code = lives[faulty].wait()
        assert code == -signal.SIGKILL, f"not killed at {fault}: {code} {lives[faulty].err}"
        for life in lives:
            if life.poll() is None:
                life.signal(signal.SIGKILL)
                life.wait()


def bare_environment():
    return {k: v for k, v in os.environ.items() if not k.startswith(("JAX", "XLA", "LEVANTER"))}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    made = Nursery(tmp_path_factory.mktemp("bitwise"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def uninterrupted(nursery):
    """The result of each layout, started once and never disturbed."""
    return {name: nursery.result(fields(name), f"{name}-reference") for name in LAYOUTS}


def assert_same_run(found, expected):
    assert found["losses"] == expected["losses"]
    differing = [k for k, v in expected["leaves"].items() if found["leaves"].get(k) != v]
    assert not differing
    assert found["content_id"] == expected["content_id"]
    assert found["roots"] == expected["roots"]


def newest_step(directory):
    # No walk: it would fail in a directory that is retired meanwhile.
    commits = directory.glob("progress/checkpoints/*/step-*/COMMIT")
    committed = [path.parent.name for path in commits]
    return max((int(name.split("-")[1].split(".")[0]) for name in committed), default=0)


def test_fresh_interpreters_that_compile_anew_give_the_same_bits(nursery, uninterrupted):
    """No fork, no cache of compiled programs, nothing of JAX patched: as the launcher starts them.

    The first is killed while it commits the checkpoint of step 6.
    """
    experiment = fields("one")
    variables = numerics.environment(driver.experiment(**experiment).trainer, "cpu")
    command = [sys.executable, driver.__file__, str(nursery.cases(experiment, ["anew"]))]

    def run(**more):
        env = bare_environment() | variables | more
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    with trial("at `before-commit`", "training"):
        died = run(**{faults.VARIABLE: "before-commit@6"})
        assert died.returncode == -signal.SIGKILL, died.stderr
        assert newest_step(nursery.directory / "anew") == 4
    done = run()
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout)
    assert_same_run(again, uninterrupted["one"])
    assert again["facts"]["resumed_from"] == 4


CHAINS = {
    # Each life's end, and the step that the next one may and must go on from.
    "fsdp": (
        ("during-write@2", (0,)),
        ("after-step@3", (0, 2)),  # the checkpoint of step 2 may still be being written
        ("before-write@4", (0, 2)),
        ("before-commit@4", (2,)),
        ("after-commit@6", (6,)),
        ("during-retention@8", (8,)),
        ("after-step@9", (8,)),
        ("before-finish@12", (12,)),
    ),
    "one": (
        ("after-step@1", (0,)),
        ("before-commit@2", (0,)),
        ("during-write@6", (4,)),
        ("during-retention@8", (8,)),
        ("after-commit@12", (12,)),
    ),
    "tensor parallel": (
        ("before-write@2", (0,)),
        ("during-write@4", (2,)),
        ("after-step@7", (4, 6)),
        ("during-retention@10", (10,)),
        ("before-commit@12", (10,)),
    ),
}


@pytest.mark.parametrize("layout", CHAINS)
def test_a_run_killed_over_and_over_ends_with_the_same_bits(nursery, uninterrupted, layout):
    space = f"{layout}-killed"
    for fault, survives in CHAINS[layout]:
        with trial(f"at `{fault.split('@')[0]}`", "training"):
            nursery.killed(fields(layout), space, fault)
            assert newest_step(nursery.directory / space) in survives, fault
    result = nursery.result(fields(layout), space)
    assert result["facts"]["resumed_from"] in CHAINS[layout][-1][1]
    assert_same_run(result, uninterrupted[layout])


def test_every_named_point_is_died_at():
    reached = {fault.split("@")[0] for chain in CHAINS.values() for fault, _ in chain}
    assert reached == set(faults.TRAINING)


def test_layouts_learn_alike(uninterrupted):
    """As closely as bfloat16 has it, whose numbers are 2^-8 apart; exactly: see `test_layouts`."""
    losses = {
        name: [float.fromhex(loss) for loss in result["losses"]]
        for name, result in uninterrupted.items()
    }
    for name in LAYOUTS:
        np.testing.assert_allclose(losses[name], losses["one"], rtol=2**-8)
    assert losses["one"][-1] < losses["one"][0]


@pytest.fixture(scope="module")
def elastic_reference(nursery):
    return nursery.result(elastic(1), "elastic-one")


def test_an_elastic_run_may_move_to_any_number_of_devices_and_processes(nursery, elastic_reference):
    """On two devices, then four, then two processes of two, one of which dies, then eight."""
    space = "elastic-moved"
    nursery.killed(elastic(2), space, "during-write@4")
    nursery.killed(elastic(4), space, "before-commit@6")
    nursery.killed(elastic(4, processes=2), space, "during-write@8", faulty=1)
    assert newest_step(nursery.directory / space) == 6
    moved = nursery.result(elastic(8), space)
    assert (moved["facts"]["resumed_from"], moved["facts"]["num_devices"]) == (6, 8)
    assert_same_run(moved, elastic_reference)


def test_two_processes_give_the_bits_of_one(nursery, elastic_reference):
    crew = nursery.result(elastic(4, processes=2), "elastic-crew")
    assert crew["facts"]["resumed_from"] == 0
    assert_same_run(crew, elastic_reference)
    assert nursery.result(elastic(4), "elastic-four")["content_id"] == crew["content_id"]


def wait_for(life, condition):
    deadline = time.monotonic() + 120
    while not condition():
        ended = life.poll() is not None
        assert not ended, f"the run ended too early ({life.poll()}): {life.err}"
        assert time.monotonic() < deadline
        time.sleep(0.01)


LONG = {"num_train_steps": 240, "save_every_steps": 10}


def test_kills_at_random_moments_and_preemptions_leave_no_trace(nursery):
    """One run is killed three times and asked to end once; the seed is printed on failure."""
    seed = int.from_bytes(os.urandom(4), "big")
    moments = random.Random(seed)
    experiment, space = fields("one", **LONG), nursery.directory / "long"
    for _ in range(3):
        with trial("at a random moment", "training"):
            life, before = nursery.start(experiment, "long"), newest_step(space)
            wait_for(life, lambda before=before: newest_step(space) > before)
            time.sleep(moments.uniform(0.0, 0.2))
            assert life.poll() is None, "the run must be long enough to be hit"
            life.signal(signal.SIGKILL)
            life.wait()
            assert newest_step(space) >= before

    life, before = nursery.start(experiment, "long"), newest_step(space)
    wait_for(life, lambda: newest_step(space) > before)
    life.signal(signal.SIGTERM)
    assert life.wait() == EXIT_CODE, life.err[-4000:]
    stopped = newest_step(space)
    assert f"preempted after step {stopped}" in life.err
    assert before < stopped < LONG["num_train_steps"]

    resumed = nursery.result(experiment, "long")
    assert resumed["facts"]["resumed_from"] == stopped, f"seed {seed}"
    assert_same_run(resumed, nursery.result(experiment, "long-reference"))


def test_a_signal_to_one_process_makes_all_of_them_save_and_exit(nursery):
    """Two processes in the fast mode; then the same mesh goes on, with the same bits.

    The interrupted run also takes losses on validation rows, each once, which change nothing.
    """

    def crew_of_two(**trainer):
        two = {"processes": 2, "mesh": {"data": 2}, "mp": "p=f32,c=f32"}
        return fields("fsdp", num_train_steps=30, **two, **trainer)

    looking, space = crew_of_two(eval_every_steps=4, eval_max_rows=6), nursery.directory / "crew"
    first, second = nursery.crew(looking, "crew", fault="after-step@10:pause", faulty=1)
    wait_for(first, lambda: second.is_paused)
    second.signal(signal.SIGTERM)
    second.signal(signal.SIGCONT)
    assert (first.wait(), second.wait()) == (EXIT_CODE, EXIT_CODE), first.err + second.err
    stopped = newest_step(space)
    for life in (first, second):
        assert f"preempted after step {stopped}" in life.err
    resumed = nursery.result(looking, "crew")
    assert resumed["facts"]["resumed_from"] == stopped < 30
    assert_same_run(resumed, nursery.result(crew_of_two(), "crew-reference"))
    (output,) = (path.parent for path in space.glob("output-*/COMMIT"))
    taken = history.read_evaluations(output)
    assert [one["step"] for one in taken] == [4, 8, 12, 16, 20, 24, 28, 30]
    assert taken[-1]["losses"]["validation"] < taken[0]["losses"]["validation"]


@pytest.mark.parametrize("grace_s", [30.0, 0.01], ids=["a second signal", "the time is over"])
def test_a_process_that_cannot_wait_exits_at_once_and_loses_only_what_was_not_saved(
    nursery, grace_s
):
    """The writer of the checkpoint is stopped half-way, as by a disk that does not answer."""
    experiment = fields("one", **LONG, preemption_grace_s=grace_s)
    name = f"stuck-{grace_s}"
    life = nursery.start(experiment, name, fault="during-write@20:stop")
    wait_for(life, lambda: newest_step(nursery.directory / name) > 0)
    life.signal(signal.SIGTERM)
    if grace_s > 1:
        time.sleep(0.2)
        assert life.poll() is None, "it waits for the checkpoint"
        life.signal(signal.SIGTERM)
    assert life.wait() == EXIT_AT_ONCE
    assert "without saving" in life.err
    assert newest_step(nursery.directory / name) == 10


def test_an_unknown_point_is_refused(monkeypatch):
    monkeypatch.setenv(faults.VARIABLE, "half-way@3")
    with pytest.raises(ValueError, match=r"half-way@3.*after-step"):
        faults.reach("after-step", 3)
    monkeypatch.setenv(faults.VARIABLE, "after-step@4:EMPTY")
    with pytest.raises(ValueError, match="EMPTY"):
        faults.reach("after-step", 3)
    monkeypatch.setenv(faults.VARIABLE, "after-step@4:ENOSPC")
    with pytest.raises(OSError, match="No space left"):
        faults.reach("after-step", 4)
    monkeypatch.setenv(faults.VARIABLE, "after-step@4")
    faults.reach("after-step", 3)
    faults.reach("before-write", 4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(int(os.environ.get("SOAK_SEEDS", "20"))))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_soak(nursery, uninterrupted, layout, seed):
    """Six lives, each ended at a random point that is still before it."""
    draw, space, points = random.Random(seed), f"soak-{layout}-{seed}", []
    for _ in range(6):
        ahead = range(newest_step(nursery.directory / space) + 1, STEPS + 1)
        saved = [step for step in ahead if step % 2 == 0]
        steps = dict.fromkeys(faults.TRAINING, saved)
        steps |= {"after-step": ahead, "before-finish": [STEPS]}
        point = draw.choice([point for point in faults.TRAINING if steps[point]])
        life = nursery.start(fields(layout), space, fault=f"{point}@{draw.choice(steps[point])}")
        if life.wait() == 0:
            break  # nothing was retired at that step
        assert life.wait() == -signal.SIGKILL, life.err
        points.append(point)
    with contextlib.ExitStack() as counted:
        for point in points:
            counted.enter_context(trial(f"at `{point}`", "training"))
        assert_same_run(nursery.result(fields(layout), space), uninterrupted[layout])
