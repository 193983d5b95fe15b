"""The asset graph: its edges, and what each asset says of itself before it was ever made."""

import pytest

from modeling.experiment import load_catalog
from pipelines.build import CATALOG, build_defs


@pytest.fixture(scope="module")
def defs():
    return build_defs(load_catalog(CATALOG))


def test_the_graph_is_the_chain(defs):
    graph = defs.resolve_asset_graph()
    parents = {
        key.to_user_string(): {parent.to_user_string() for parent in graph.get(key).parent_keys}
        for key in graph.get_all_asset_keys()
    }
    assert parents == {
        "pystdlib/raw_corpus": set(),
        "pystdlib/tokenizer": {"pystdlib/raw_corpus"},
        "pystdlib/tokenized_corpus": {"pystdlib/raw_corpus", "pystdlib/tokenizer"},
        "pystdlib/token_cache/L128": {"pystdlib/tokenized_corpus"},
        "pystdlib/token_cache/L256": {"pystdlib/tokenized_corpus"},
        "nano/checkpoint": {"pystdlib/token_cache/L128"},
        "nano/eval_report": {"nano/checkpoint"},
        "nano/hf_model": {"nano/checkpoint"},
    }


def test_every_asset_has_group_description_code_version_and_a_blocking_check(defs):
    graph = defs.resolve_asset_graph()
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        assert node.group_name == key.path[0]
        assert node.description
        assert node.code_version
        assert graph.get_check_keys_for_assets({key})
    for key in graph.asset_check_keys:
        check = graph.get(key)
        assert check.blocking
        assert check.description


def test_stages_that_start_jax_share_the_pool(defs):
    graph = defs.resolve_asset_graph()
    pools = {key.to_user_string(): graph.get(key).pools for key in graph.get_all_asset_keys()}
    assert {key for key, names in pools.items() if "accelerator" in names} == {
        "nano/checkpoint", "nano/eval_report", "nano/hf_model"
    }  # fmt: skip


def test_the_catalog_shows_what_a_stage_is_made_of(defs):
    graph = defs.resolve_asset_graph()
    shown = {key.path[-1]: graph.get(key).metadata["config"].value
             for key in graph.get_all_asset_keys()}  # fmt: skip
    assert shown["tokenizer"]["tokenizer"]["vocab_size"] == 4096
    assert shown["L256"]["sequence_length"] == 256
    assert shown["checkpoint"]["optimizer"]["beta2"] == 0.95, "defaults are filled in"
    assert shown["checkpoint"]["layout"]["mesh"] == {"data": 2}
    assert shown["hf_model"]["export"]["dtype"] == "float32"
