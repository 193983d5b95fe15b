"""What starting a training process loads, and what showing its products does not."""

import json
import subprocess
import sys

import pytest

HEAVY = {"ray", "transformers", "datasets", "wandb", "matplotlib", "torch", "dagster", "pandas"}
MAKERS = {"tokenizers", "jinja2", "modeling.data.tokenized", "modeling.data.corpus"}
"""What only those need who make a token cache: training reads one."""
RARE = {"haliax.einsums", "haliax.fft", "haliax.nn.conv", "haliax.nn.pool", "haliax.poly"}


LATER = {"optax", "pyarrow", "tensorstore", "modeling.data.cache"}
"""What is not needed before a run begins: models are read and pictured without it."""


@pytest.fixture(scope="module")
def loaded() -> set[str]:
    script = """
import json, sys
import modeling.training.trainer, resources.stages
json.dump(sorted(sys.modules), sys.stdout)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300
    )
    return set(json.loads(done.stdout))


@pytest.mark.parametrize(
    "needless", [HEAVY, MAKERS, RARE, LATER], ids=["heavy", "makers", "rare", "later"]
)
def test_a_trainer_loads_nothing_that_training_does_not_need(loaded, needless):
    assert "jax" in loaded
    assert not loaded & needless


def test_what_is_on_record_is_shown_without_the_library_that_computed_it():
    script = (
        "import sys\n"
        "import modeling.evaluation.results, modeling.pictures, modeling.training.history\n"
        "import modeling.training.reading, modeling.data.cache, modeling.data.examples\n"
        "assert not {'jax', 'equinox', 'haliax'} & set(sys.modules), sorted(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
