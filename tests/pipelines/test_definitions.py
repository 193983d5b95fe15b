"""The definitions load fast, are complete, and follow the catalog and the environment."""

import dataclasses
import json
import subprocess
import sys

import dagster as dg
import pytest

from modeling.experiment import ConfigError, load_catalog
from pipelines.build import CATALOG, build_defs, catalog_from_environment
from pipelines.jobs import experiment_of

HEAVY = ("jax", "equinox", "optax", "wandb", "matplotlib", "pyarrow", "tokenizers", "torch")
LOAD = f"""
import sys
from pipelines.definitions import defs
import dagster as dg
dg.Definitions.validate_loadable(defs)
print([name for name in {HEAVY!r} if name in sys.modules])
"""


@pytest.fixture(scope="module")
def defs():
    return build_defs(load_catalog(CATALOG))


def test_loading_imports_neither_jax_nor_anything_else_heavy():
    done = subprocess.run(
        [sys.executable, "-c", LOAD], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.strip() == "[]"


def test_an_experiments_job_takes_all_above_it_and_no_other_length(defs):
    keys = defs.resolve_job_def("nano").asset_layer.executable_asset_keys
    names = {key.to_user_string() for key in keys}
    assert "pystdlib/raw_corpus" in names
    assert "nano/hf_model" in names
    assert "pystdlib/token_cache/L256" not in names
    data = defs.resolve_job_def("pystdlib__data").asset_layer.executable_asset_keys
    assert {key.path[0] for key in data} == {"pystdlib"}


UNITS = {
    "nano__tokenize": "pystdlib/token_cache/L128",
    "nano__pretrain": "nano/checkpoint",
    "nano__evaluate": "nano/eval_report",
    "nano__export": "nano/hf_model",
}


@pytest.mark.parametrize("job", UNITS)
def test_the_job_of_a_unit_takes_just_what_its_asset_is_made_of(defs, job):
    graph = defs.resolve_asset_graph()
    wanted = dg.AssetSelection.assets(UNITS[job]).upstream().resolve(graph)
    layer = defs.resolve_job_def(job).asset_layer
    assert set(layer.executable_asset_keys) == wanted
    assert {check.asset_key for check in layer.asset_graph.asset_check_keys} == wanted
    assert experiment_of(job) == "nano"


def test_an_experiment_that_is_named_like_a_job_is_refused():
    catalog = load_catalog(CATALOG)
    clash = {"nano__export": catalog.experiments["nano"]}
    with pytest.raises(ConfigError, match=r"'nano__export': .* not end in __export"):
        build_defs(dataclasses.replace(catalog, experiments=clash))


def test_overrides_from_the_environment_change_just_the_code_versions_they_concern(defs):
    overrides = json.dumps({"nano": ["dataset.tokenizer.vocab_size=512"]})
    changed = build_defs(catalog_from_environment({"LEVANTER_OVERRIDES": overrides}))
    before, after = (
        {key: one.resolve_asset_graph().get(key).code_version
         for key in one.resolve_asset_graph().get_all_asset_keys()}
        for one in (defs, changed)
    )  # fmt: skip
    assert [key.to_user_string() for key in before if before[key] != after[key]] == [
        "pystdlib/tokenizer"
    ]


@pytest.mark.parametrize(
    "text", ["{", '["nano"]', '{"nano": "trainer.seed=1"}', '{"nano": [1]}'],
    ids=["no-json", "no-mapping", "no-list", "no-text"],
)  # fmt: skip
def test_malformed_overrides_are_told(text):
    with pytest.raises(ConfigError, match="LEVANTER_OVERRIDES"):
        catalog_from_environment({"LEVANTER_OVERRIDES": text})


def test_a_catalog_that_is_none_is_told(tmp_path):
    with pytest.raises(ConfigError, match="LEVANTER_CATALOG"):
        catalog_from_environment({"LEVANTER_CATALOG": str(tmp_path)})


def test_an_unknown_resource_is_told():
    with pytest.raises(TypeError, match="lancher"):
        build_defs(load_catalog(CATALOG), lancher=None)


def test_definitions_validate(defs):
    dg.Definitions.validate_loadable(defs)
