"""The asset graph: its edges, and what each asset says of itself before it was ever made."""

from pathlib import Path

import pytest

from modeling import recipes
from modeling.experiment import ConfigError, load_catalog, load_experiment
from pipelines.build import CATALOG, build_defs
from resources.materializations import kind_of

ROOT = Path(__file__).parents[2]


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


@pytest.fixture(scope="module")
def all_kinds(tmp_path_factory):
    """The graph of a catalog with every kind of asset: each tokenizer, packing and layout."""
    root = tmp_path_factory.mktemp("catalog")
    for name in ("datasets", "experiments"):
        (root / name).mkdir()
    tokenizers = {
        "bpe": "{type: bpe, vocab_size: 600}",
        "wordpiece": "{type: wordpiece, vocab_size: 600}",
        "unigram": "{type: unigram, vocab_size: 600}",
        "pretrained": "{type: pretrained, path: somewhere}",
        "passthrough": "{type: passthrough, vocab_size: 600, eos_id: 0}",
    }
    for name, tokenizer in tokenizers.items():
        ids = "format: {type: ids}\n" if name == "passthrough" else ""
        (root / "datasets" / f"{name}.yaml").write_text(
            f"description: All of {name}.\nowners: [team:{name}, {name}@example.com]\n"
            f"source: {{type: files, paths: [a.txt]}}\n{ids}tokenizer: {tokenizer}\n"
            "sequence_lengths: [{length: 8, layout: copy}, {length: 8, packing: documents}]\n"
        )
    (root / "experiments" / "run.yaml").write_text(
        "description: The run.\ndataset: bpe\nsequence_length: 8\n"
        "trainer: {num_train_steps: 1, train_batch_size: 1}\n"
    )
    return build_defs(load_catalog(root)).resolve_asset_graph()


def test_the_catalog_has_every_kind(all_kinds):
    kinds = {kind_of(key) for key in all_kinds.get_all_asset_keys()}
    assert kinds == set(recipes.VERSIONS)


def test_a_stranger_finds_what_each_asset_is_whose_and_where_its_code_is(all_kinds):
    for key in all_kinds.get_all_asset_keys():
        node, name = all_kinds.get(key), key.path[0]
        assert node.group_name == name
        about = "The run." if name == "run" else f"All of {name}."
        told, _, last = node.description.rpartition("\n\n")
        assert len(told) > 30, "what it is"
        assert last == f"`{name}`: {about}"
        owners = ["team:lm"] if name == "run" else [f"team:{name}", f"{name}@example.com"]
        assert list(node.owners) == owners
        assert node.kinds
        assert node.code_version.startswith(f"{recipes.VERSIONS[kind_of(key)]}-")
        assert node.metadata["config"].value is not None
        code = node.metadata["dagster/code_references"].code_references[0]
        lines = Path(code.file_path).read_text().splitlines()[code.line_number - 1 :]
        assert Path(code.file_path).parent == ROOT / "assets"
        assert lines[0].strip().startswith(("@stage(", "def ")), code


def test_every_asset_has_a_check_that_says_what_holds_and_stops_what_follows(all_kinds):
    for key in all_kinds.get_all_asset_keys():
        assert all_kinds.get_check_keys_for_assets({key})
    for key in all_kinds.asset_check_keys:
        check = all_kinds.get(key)
        assert check.blocking
        assert len(check.description) > 30


def test_an_owner_that_dagster_would_refuse_is_named(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text(
        "dataset: a\nsequence_length: 8\nowners: [me]\n"
        "trainer: {num_train_steps: 1, train_batch_size: 1}\n"
    )
    with pytest.raises(ConfigError, match=r"some\.yaml: owners\.0: .*found 'me'"):
        load_experiment(path)


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
