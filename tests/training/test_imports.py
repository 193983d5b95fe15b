"""What starting a training process loads."""

import json
import subprocess
import sys

HEAVY = {"ray", "transformers", "datasets", "wandb", "matplotlib", "torch", "dagster", "pandas"}
SCRIPT = """
import json, sys
import modeling.training.trainer, resources.stages
json.dump(sorted(name for name in sys.modules if "." not in name), sys.stdout)
"""


def test_a_trainer_loads_nothing_that_training_does_not_need():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=300
    )
    loaded = set(json.loads(done.stdout))
    assert "jax" in loaded
    assert not loaded & HEAVY
