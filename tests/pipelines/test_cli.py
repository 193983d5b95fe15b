"""The `levanter` command as a person types it: what it prints and makes, and its exit codes."""

import hashlib
import json
import re
import subprocess
import sys

import dagster as dg
import pytest
import yaml

from modeling.experiment import ConfigError
from pipelines.cli import dotted_overrides, main, make_parser
from pipelines.instance import CHECKOUT
from tests.pipelines.conftest import REMADE, VOCABULARY

MODEL_STAGES = ["tiny/checkpoint", "tiny/eval_report", "tiny/hf_model"]
DATA_STAGES = [
    "tales/raw_corpus",
    "tales/tokenizer",
    "tales/tokenized_corpus",
    "tales/token_cache/L32",
]


def states(printed: str) -> dict[str, str]:
    """Returns each asset's state from the table that `run` and `status` print."""
    lines = printed[printed.index("content id") :].splitlines()
    words = [line.split() for line in lines]
    return {w[0]: w[1] for w in words if len(w) > 1 and w[0] in MODEL_STAGES + DATA_STAGES}


class TestCommandLine:
    def test_help_teaches_without_loading_the_orchestrator(self):
        code = (
            "import sys; from pipelines.cli import main\n"
            "try: main(['--help'])\nexcept SystemExit as end: assert end.code == 0\n"
            "assert not {'dagster', 'jax', 'pydantic', 'pyarrow'} & set(sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        for example in (
            "levanter run nano",
            "levanter train --model",
            "levanter lineage nano/hf_model",
        ):
            assert example in done.stdout

    @pytest.mark.parametrize("command", ["run", "train", "status", "lineage", "ui"])
    def test_each_command_has_its_own_help(self, command, capsys):
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0
        assert len(capsys.readouterr().out.splitlines()) > 4

    def test_steps_to_profile_are_a_field_of_the_trainer(self, monkeypatch):
        from pipelines import run

        called = []
        monkeypatch.setattr(run, "run", lambda *what, **how: called.append(what) or 0)
        words = ["run", "nano", "--set", "trainer.seed=3", "--profile-steps", "5..10"]
        arguments = make_parser().parse_args(words)
        assert arguments.call(arguments) == 0
        assert called == [("nano", ["trainer.seed=3", "trainer.profile_steps=5..10"])]

    def test_dotted_options_become_overrides(self):
        words = ["--trainer.seed", "3", "--optimizer.learning_rate=1e-3", "--sequence_length", "64"]
        assert dotted_overrides(words) == [
            "trainer.seed=3",
            "optimizer.learning_rate=1e-3",
            "sequence_length=64",
        ]

    @pytest.mark.parametrize("words", [["trainer.seed", "3"], ["--trainer.seed"], ["-x", "1"]])
    def test_words_that_are_no_options_are_refused(self, words):
        with pytest.raises(ValueError, match="option"):
            dotted_overrides(words)

    @pytest.mark.parametrize(
        ("words", "says"),
        [
            (["run", "nowhere"], "no experiment is named 'nowhere'; there are ['tiny']"),
            (["run", "tiny", "--set", "trainer.stps=3"], "trainer.stps: no such field"),
            (["run", "tiny", "--set", "trainer.mesh={data: 2"], "not valid YAML"),
            (["lineage", "tiny/nothing"], "no such asset has been materialized"),
            (["lineage", "ffffffff"], "names no artifact"),
            (["train", "--model", "gpt9", "--dataset", "tales"], "--model gpt9: not one of"),
            (["train", "--model", "gpt2-nano"], "give a model and a dataset"),
            (
                ["train", "--model", "gpt2-nano", "--dataset", "nowhere/"],
                "neither one of ['tales']",
            ),
            (["train", "--config_path", "nowhere.yaml"], "nowhere.yaml: no such file"),
            (
                [
                    "train",
                    "--model=gpt2-nano",
                    "--dataset=tales",
                    "--dataset.validation.fraction=0.1",
                ],
                "'tales' is a dataset of the catalog",
            ),
        ],
    )
    def test_what_a_user_got_wrong_is_told_in_a_line(self, chain, words, says, capsys):
        with chain.instance():
            assert main(words) == 2
        told = capsys.readouterr().err
        assert says in told
        assert "Traceback" not in told


def table(text: str) -> dict[str, tuple[str, str]]:
    """Returns state and content id of each asset in a table of `run` or `status`."""
    words = [line.split() for line in text.splitlines()]
    return {w[0]: (w[1], w[2]) for w in words if len(w) > 2 and w[0] in MODEL_STAGES + DATA_STAGES}


def documented(pattern: str) -> str:
    """Returns the block of the page on identity that holds what a pattern says."""
    page = (CHECKOUT / "docs" / "lineage.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```\w*\n(.*?)```", page, re.S)
    (found,) = [block for block in blocks if re.search(pattern, block)]
    return found


class TestRun:
    def test_a_fresh_experiment_runs_nothing(self, chain, first_run, capfd):
        with chain.instance() as instance:
            before = instance.get_runs_count()
            assert main(["run", "tiny"]) == 0
            assert instance.get_runs_count() == before
        printed = capfd.readouterr().out
        assert "all 7 assets are fresh; nothing to do" in printed
        assert states(printed) == dict.fromkeys(DATA_STAGES + MODEL_STAGES, "fresh")
        shown = chain.metadata_of(first_run)
        for asset in DATA_STAGES + MODEL_STAGES:
            assert shown[asset]["content_id"][:12] in printed
        model = chain.store.local("hf_model", shown["tiny/hf_model"]["content_id"])
        assert f"Hugging Face model  {model}" in printed.replace("\n", "")
        assert "Sample (after 'the ')" in printed

    def test_one_changed_field_makes_only_what_depends_on_it(self, other_instance, capfd):
        with other_instance.instance():
            assert main(["run", "tiny"]) == 0
            assert states(capfd.readouterr().out) == dict.fromkeys(
                DATA_STAGES + MODEL_STAGES, "reused"
            )
            assert main(["run", "tiny", "--set", "evaluation.sample_tokens=4"]) == 0
        assert states(capfd.readouterr().out) == dict.fromkeys(
            DATA_STAGES + MODEL_STAGES, "fresh"
        ) | {"tiny/eval_report": "built"}

    def test_another_vocabulary_makes_tokenizer_and_all_below_anew(
        self, changed, changed_run, capfd
    ):
        assert changed.was(changed_run) == dict.fromkeys(DATA_STAGES + MODEL_STAGES, "built") | {
            "tales/raw_corpus": "reused"
        }
        with changed.instance():
            assert main(["run", "tiny", "--set", VOCABULARY]) == 0
        printed = capfd.readouterr().out
        assert states(printed) == {"tales/raw_corpus": "fresh"} | dict.fromkeys(
            REMADE, "built"
        ) | dict.fromkeys(MODEL_STAGES, "reused")
        exported = changed_run.asset_value(dg.AssetKey(["tiny", "hf_model"]))
        assert changed.artifact("tiny", "hf_model").content_id == exported.content_id
        told, found = table(documented(r"tiny/hf_model +built")), table(printed)
        assert list(told) == DATA_STAGES + MODEL_STAGES
        for asset in DATA_STAGES:  # those of models depend on the machine
            assert told[asset][1] == found[asset][1], "docs/lineage.md"

    def test_a_new_file_in_the_source_is_noticed(self, other_instance, capfd):
        with other_instance.instance():
            assert main(["run", "tiny"]) == 0
            added = other_instance.texts / "added.txt"
            added.write_text("Once upon a time there was one more tale.\n" * 5)
            try:
                capfd.readouterr()
                assert main(["status", "tiny"]) == 0
            finally:
                added.unlink()
        printed = capfd.readouterr().out
        assert "tales/raw_corpus: 1 of its files is new: " in printed
        assert states(printed) == {"tales/raw_corpus": "stale"} | dict.fromkeys(
            DATA_STAGES[1:] + MODEL_STAGES, "upstream"
        )

    def test_a_failed_stage_is_named_and_the_code_is_1(self, empty_chain, capfd):
        with empty_chain.instance():
            changes = [
                "--set",
                "dataset.sequence_lengths=[32, 100000]",
                "--set",
                "sequence_length=100000",
            ]
            assert main(["run", "tiny", *changes]) == 1
        printed = capfd.readouterr().out
        assert "failed" in printed
        assert "tales/token_cache/L100000" in printed
        assert "Everything that was printed is in" in printed

    def test_a_check_that_has_not_passed_is_not_forgotten(self, other_instance, capfd):
        with other_instance.instance() as instance:
            assert main(["run", "tiny"]) == 0
            key = dg.AssetCheckKey(dg.AssetKey(["tales", "tokenizer"]), "round_trips")
            made = instance.get_latest_materialization_event(key.asset_key)
            failed = dg.AssetCheckEvaluation(
                asset_key=key.asset_key, check_name=key.name, passed=False, metadata={}
            )
            instance.report_runless_asset_event(failed)
            assert made is not None
            capfd.readouterr()
            assert main(["status", "tiny"]) == 0
            printed = capfd.readouterr().out
            assert "tales/tokenizer: it has not passed the check round_trips" in printed
            assert main(["run", "tiny"]) == 0
            assert states(capfd.readouterr().out)["tales/tokenizer"] == "reused"
            assert main(["status", "tiny"]) == 0
        assert "Everything is fresh." in capfd.readouterr().out


class TestStatusAndLineage:
    def test_a_changed_vocabulary_is_shown_through_all_layers(self, chain, first_run, capfd):
        overrides = json.dumps(chain.overrides("dataset.tokenizer.vocab_size=300"))
        with chain.instance(LEVANTER_OVERRIDES=overrides):
            assert main(["status", "tiny"]) == 0
            printed = capfd.readouterr().out
            assert main(["why", "tiny/hf_model"]) == 0
            why = capfd.readouterr().out
        assert states(printed) == {
            "tales/raw_corpus": "fresh",
            "tales/tokenizer": "stale",
        } | dict.fromkeys([*DATA_STAGES[2:], *MODEL_STAGES], "upstream")
        told = documented("levanter status tiny")
        assert {a: told for a, told in table(told).items() if a in DATA_STAGES} == {
            a: found for a, found in table(printed).items() if a in DATA_STAGES
        }
        causes = re.findall(r"^\S+: .*", told, re.M)
        assert causes == re.findall(r"^\S+: .*", printed, re.M)
        assert why.splitlines()[:3] == told.splitlines()[-3:]
        assert causes[0] == "tales/tokenizer: tokenizer.vocab_size 320 -> 300"

    def test_lineage_leads_from_the_model_to_the_corpus(self, chain, first_run, capfd):
        with chain.instance():
            assert main(["lineage", "tiny/hf_model"]) == 0
            tree = capfd.readouterr().out.splitlines()
            content_id = chain.metadata_of(first_run)["tiny/hf_model"]["content_id"]
            assert main(["lineage", content_id[:10], "--json"]) == 0
        shown = chain.metadata_of(first_run)
        expected = [
            ("", "hf_model", "tiny/hf_model"),
            ("├─ ", "checkpoint", "tiny/checkpoint"),
            ("│  └─ ", "token_cache", "tales/token_cache/L32"),
            ("│     └─ ", "tokenized_corpus", "tales/tokenized_corpus"),
            ("│        ├─ ", "corpus: raw_corpus", "tales/raw_corpus"),
            ("│        │  ├─ ", "00.txt", None),
            ("│        │  ├─ ", "01.txt", None),
            ("│        │  ├─ ", "02.txt", None),
            ("│        │  └─ ", "and 57 more: --json lists every file", None),
            ("│        └─ ", "tokenizer", "tales/tokenizer"),
            ("│           └─ ", "corpus: raw_corpus", "tales/raw_corpus"),
            ("└─ ", "tokenizer", "tales/tokenizer"),
        ]
        assert len(tree) == len(expected)
        for line, (branch, title, asset) in zip(tree, expected, strict=True):
            told = f" {shown[asset]['content_id'][:12]}" if asset else ""
            assert line.startswith(f"{branch}{title}{told}")
        assert [n for n, line in enumerate(tree) if line.endswith("(as above)")] == [10, 11]
        node = json.loads(capfd.readouterr().out)
        assert node["content_id"] == content_id
        assert node["inputs"]["checkpoint"]["content_id"] == shown["tiny/checkpoint"]["content_id"]
        while "corpus" not in node["inputs"]:
            node = next(iter(node["inputs"].values()))
        text = (chain.texts / "07.txt").read_bytes()
        files = node["inputs"]["corpus"]["files"]
        assert (len(files), files["07.txt"]) == (60, hashlib.sha256(text).hexdigest())


class TestTrain:
    @pytest.fixture
    def small(self):
        return [
            "--trainer.num_train_steps", "8", "--trainer.train_batch_size", "4",
            "--optimizer.learning_rate", "0.01",
            "--model.num_layers", "1", "--model.hidden_dim", "16", "--sequence_length", "32",
            "--evaluation.max_rows", "2", "--evaluation.sample_tokens", "2",
            "--dataset.tokenizer.vocab_size", "300",
            "--trainer.xla_flags", "[--xla_backend_optimization_level=0]",
        ]  # fmt: skip

    def test_text_in_a_folder_becomes_a_model(self, empty_chain, small, capfd, tmp_path):
        variables = {"LEVANTER_CATALOG": "", "LEVANTER_OVERRIDES": ""}
        command = ["train", "--model", "gpt2-nano", "--dataset", str(empty_chain.texts), *small]
        with empty_chain.instance(**variables):
            assert main(command) == 0
        printed = capfd.readouterr().out
        assert "7 of 7 assets to make" in printed
        assert len(re.findall(r"^ \S+/\S+ +built +[0-9a-f]{12} ", printed, re.M)) == 7
        assert "loss" in printed
        assert "logits within" in printed
        assert "Hugging Face model" in printed
        [experiment] = (empty_chain.home / "catalog" / "experiments").glob("*.yaml")
        written = yaml.safe_load(experiment.read_text())
        assert written["model"] == {"preset": "gpt2-nano", "num_layers": 1, "hidden_dim": 16}
        assert written["trainer"]["num_train_steps"] == 8

        [dataset] = (empty_chain.home / "catalog" / "datasets").glob("*.yaml")
        assert yaml.safe_load(dataset.read_text())["tokenizer"]["vocab_size"] == 300

        # The same from a file, which now finds everything made.
        copy = tmp_path / experiment.name
        copy.write_text(experiment.read_text())
        with empty_chain.instance(**variables):
            assert main(["train", "--config_path", str(copy)]) == 0
        assert "nothing to do" in capfd.readouterr().out


def test_an_experiment_of_the_catalog_is_not_overwritten(chain, tmp_path):
    from modeling.experiment import load_catalog
    from pipelines.build import CATALOG
    from pipelines.quickstart import write_experiment

    path = tmp_path / "nano.yaml"
    path.write_text((CATALOG / "experiments" / "nano.yaml").read_text())
    with pytest.raises(ConfigError, match="ships with the catalog"):
        write_experiment(
            tmp_path,
            load_catalog(CATALOG),
            model=None,
            dataset=None,
            config_path=path,
            overrides=[],
        )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("play.txt", "paragraphs"),
        ("", "text"),
        ("*.txt", "text"),
        ("lines.jsonl.zst", "jsonl"),
        ("part-*.jsonl", "jsonl"),
        ("list.json", "json"),
        ("table.parquet", "parquet"),
    ],
)
def test_the_format_of_a_path_is_seen_from_its_name(tmp_path, name, expected):
    from modeling.experiment import load_catalog, load_dataset
    from pipelines.build import CATALOG
    from pipelines.quickstart import write_experiment

    (tmp_path / "play.txt").write_text("Enter a ghost.")
    path = f"{tmp_path}/{name}"
    if "*" not in name and name:
        (tmp_path / name).touch()
    write_experiment(
        tmp_path / "home",
        load_catalog(CATALOG),
        model="gpt2-nano",
        dataset=path,
        config_path=None,
        overrides=[],
    )
    [written] = (tmp_path / "home" / "catalog" / "datasets").glob("*.yaml")
    source = load_dataset(written).source
    assert source.format == expected
    assert source.paths == (path.rstrip("/"),)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["trainer.num_train_stepz=5"], "no such field"),
        (["sequence_length=512"], "is not built by dataset"),
    ],
)
def test_a_mistake_leaves_no_file_that_stops_later_commands(tmp_path, overrides, says):
    from modeling.experiment import load_catalog
    from pipelines.build import CATALOG
    from pipelines.quickstart import write_experiment

    def write(texts):
        catalog = load_catalog([CATALOG, tmp_path / "catalog"])
        names = {"model": "gpt2-nano", "dataset": "pystdlib", "config_path": None}
        return write_experiment(tmp_path, catalog, **names, overrides=texts)

    with pytest.raises(ConfigError, match=says):
        write(overrides)
    assert write(["trainer.num_train_steps=5"]) == "gpt2_nano_pystdlib"
    written = (tmp_path / "catalog/experiments/gpt2_nano_pystdlib.yaml").read_text()
    with pytest.raises(ConfigError, match=says):
        write(overrides)
    assert (tmp_path / "catalog/experiments/gpt2_nano_pystdlib.yaml").read_text() == written


class TestTokenizerOfTrain:
    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    def write(self, home, tokenizer, *overrides, dataset="pystdlib"):
        from modeling.experiment import load_catalog, load_dataset, load_experiment
        from pipelines.build import CATALOG
        from pipelines.quickstart import write_experiment

        catalog = load_catalog([CATALOG, home / "catalog"])
        name = write_experiment(
            home, catalog, model="gpt2-nano", dataset=dataset, config_path=None,
            overrides=list(overrides), tokenizer=tokenizer,
        )  # fmt: skip
        experiment = load_experiment(home / "catalog" / "experiments" / f"{name}.yaml")
        if (path := home / "catalog" / "datasets" / f"{experiment.dataset}.yaml").exists():
            return load_dataset(path)
        return catalog.datasets[experiment.dataset]

    def test_each_way_to_name_one_is_what_the_dataset_says(self, tmp_path, monkeypatch):
        (tmp_path / "made").mkdir()
        (tmp_path / "made" / "tokenizer.json").touch()
        monkeypatch.chdir(tmp_path)
        home = tmp_path / "home"
        for text, path in (("made", "made"), ("made/tokenizer.json", "made/tokenizer.json")):
            tokenizer = self.write(home, text).tokenizer
            assert (tokenizer.type, tokenizer.path) == ("pretrained", str(tmp_path / path))
        tokenizer = self.write(home, f"owner/name@{self.COMMIT}").tokenizer
        assert (tokenizer.hub, tokenizer.revision) == ("owner/name", self.COMMIT)
        for kind in ("bpe", "wordpiece", "unigram"):
            tokenizer = self.write(home, f"{kind}:1024").tokenizer
            assert (tokenizer.type, tokenizer.vocab_size) == (kind, 1024)

    @pytest.mark.parametrize("dataset", ["pystdlib", "texts"])
    def test_other_experiments_on_the_texts_keep_theirs(self, dataset, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "texts").mkdir()
        first = self.write(tmp_path, None, dataset=dataset)
        other = self.write(tmp_path, "unigram:1024", "sequence_length=64", dataset=dataset)
        more = self.write(tmp_path, "unigram:1024", "sequence_length=32", dataset=dataset)
        assert self.write(tmp_path, None, dataset=dataset) == first
        assert other.source == more.source == first.source
        assert other.validation == first.validation
        assert (first.tokenizer.type, more.tokenizer.type) == ("bpe", "unigram")
        assert [cache.length for cache in more.sequence_lengths] == [32, 64]

    @pytest.mark.parametrize(
        ("tokenizer", "says"),
        [
            ("no/such/dir", "expected an existing directory or tokenizer.json"),
            ("owner/name", "OWNER/NAME@COMMIT"),
            ("owner/name@main", "revision` 'main' is not the 40 hexadecimal digits of a commit"),
            ("bpe", "such as bpe:8192"),
            ("bpe:12", "tokenizer.vocab_size"),
        ],
    )
    def test_what_names_none_is_told_and_leaves_no_file(self, tokenizer, says, tmp_path):
        with pytest.raises(ConfigError, match=says):
            self.write(tmp_path, tokenizer)
        assert not list(tmp_path.rglob("*.yaml"))
