"""What only a GPU can show: `pytest -m gpu tests/training/test_gpu.py`, where there is one.

Every run is a process in the environment that the launcher would give it. A process on a GPU begins
with seconds of CUDA, so that there are few.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from modeling import faults, numerics

sys.path.insert(0, str(Path(__file__).parent))
import driver

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="this machine has no NVIDIA GPU"),
]
HALF = {"mp": "p=f32,c=bf16"}
MODELS = {
    "gpt2": {"hidden_dim": 64},  # heads of 32
    "llama": {"type": "llama", "hidden_dim": 64, "num_kv_heads": 1, "mlp_dim": 96},
}


def run(directory, model, fault=None, platform="gpu", **trainer):
    """Trains a tiny model in a process of its own; returns its result, or None if it is killed."""
    case = {
        "workspace": str(directory),
        "experiment": {"model": model, "trainer": HALF | trainer},
    }
    directory.mkdir(exist_ok=True)
    cases = directory / "cases.json"
    cases.write_text(json.dumps([case]))
    pinned = numerics.environment(driver.experiment(**case["experiment"]).trainer, platform)
    asked = {} if fault is None else {faults.VARIABLE: fault}
    done = subprocess.run(
        [sys.executable, driver.__file__, str(cases)],
        env=numerics.inherited(os.environ) | pinned | asked, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode == 0) == (fault is None), done.stderr[-3000:]
    return json.loads(done.stdout) if done.returncode == 0 else None


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_twice_the_same_run_and_one_that_was_killed_have_the_same_bits(tmp_path, model):
    cudnn = model | {"attention": "cudnn"}
    first = run(tmp_path / "first", cudnn)
    assert run(tmp_path / "second", cudnn)["content_id"] == first["content_id"]
    run(tmp_path / "killed", cudnn, "during-write@4")
    resumed = run(tmp_path / "killed", cudnn)
    assert resumed["facts"]["resumed_from"] == 2
    assert (resumed["content_id"], resumed["losses"]) == (first["content_id"], first["losses"])


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_cudnns_attention_trains_as_xlas_does(tmp_path, model):
    losses = {
        by: [float.fromhex(x) for x in run(tmp_path / by, model | {"attention": by})["losses"]]
        for by in ("cudnn", "xla")
    }
    assert losses["cudnn"] == pytest.approx(losses["xla"], rel=2e-2)
    assert losses["cudnn"][-1] < losses["cudnn"][0]


def test_without_fixed_order_it_trains_too(tmp_path):
    free = run(tmp_path / "free", MODELS["gpt2"], deterministic=False)
    fixed = run(tmp_path / "fixed", MODELS["gpt2"])
    wanted = [float.fromhex(loss) for loss in fixed["losses"]]
    assert [float.fromhex(x) for x in free["losses"]] == pytest.approx(wanted, rel=2e-2)
