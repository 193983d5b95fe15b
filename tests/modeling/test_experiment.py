"""Dataset and experiment files: what is accepted, what is refused, and how the refusal reads."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from modeling import recipes
from modeling.canonical import digest
from modeling.data.tokenizers_config import BpeTokenizerConfig
from modeling.experiment import Catalog, ConfigError, ExperimentConfig, load_catalog, validate

DATASET = """
source: {type: files, paths: [corpus/*.txt]}
tokenizer: {type: bpe, vocab_size: 300}
sequence_lengths: [16, 32]
"""
EXPERIMENT = """
dataset: tiny
sequence_length: 16
model: {preset: gpt2-nano, num_layers: 2}
trainer: {num_train_steps: 10, train_batch_size: 4}
"""


@pytest.fixture
def catalog_dir(tmp_path: Path) -> Path:
    for folder, name, text in [("datasets", "tiny", DATASET), ("experiments", "base", EXPERIMENT)]:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{name}.yaml").write_text(text)
    return tmp_path


def write_experiment(catalog_dir: Path, text: str, name: str = "base") -> None:
    (catalog_dir / "experiments" / f"{name}.yaml").write_text(text)


def test_catalogs_join_and_name_everything_once(catalog_dir: Path, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "experiments").mkdir()
    write_experiment(other, EXPERIMENT, "mine")
    assert set(load_catalog([catalog_dir, other]).experiments) == {"base", "mine"}
    write_experiment(other, EXPERIMENT, "base")
    with pytest.raises(ConfigError, match="has this name already"):
        load_catalog([catalog_dir, other])
    (other / "experiments" / "base.yaml").rename(other / "experiments" / "tiny.yaml")
    with pytest.raises(ConfigError, match="has this name too"):
        load_catalog([catalog_dir, other])


def test_defaults_are_filled_in(catalog_dir: Path):
    catalog = load_catalog(catalog_dir)
    assert catalog.datasets["tiny"].tokenization.append_eos is True
    experiment = catalog.experiments["base"]
    assert (experiment.model.num_layers, experiment.model.hidden_dim) == (2, 128)
    assert experiment.trainer.mesh == {"data": 1}


def test_the_shipped_catalog_loads_without_jax():
    code = (
        "import sys; from pathlib import Path; from modeling.experiment import load_catalog;"
        "c = load_catalog(Path('pipelines')); assert 'nano' in c.experiments;"
        "assert not {'jax', 'dagster', 'tokenizers', 'pyarrow'} & set(sys.modules)"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_variants_extend_one_another_field_by_field(catalog_dir: Path):
    write_experiment(catalog_dir, "extends: base\ntrainer: {num_train_steps: 20}\n", "longer")
    write_experiment(catalog_dir, "extends: longer\nmodel: {num_layers: 3}\n", "deeper")
    deeper = load_catalog(catalog_dir).experiments["deeper"]
    assert (deeper.trainer.num_train_steps, deeper.trainer.train_batch_size) == (20, 4)
    assert (deeper.model.num_layers, deeper.model.hidden_dim) == (3, 128)


def test_overrides_reach_the_experiment_and_its_dataset(catalog_dir: Path):
    texts = [
        "trainer.num_train_steps=50",
        "optimizer.learning_rate=1e-3",
        "dataset.tokenizer.vocab_size=400",
    ]
    catalog = load_catalog(catalog_dir, {"base": texts})
    assert catalog.experiments["base"].trainer.num_train_steps == 50
    assert catalog.experiments["base"].optimizer.learning_rate == 0.001
    assert catalog.datasets["tiny"].tokenizer.vocab_size == 400


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            "trainer.num_train_stps=4",
            "trainer.num_train_stps: no such field; did you mean `num_train_steps`?",
        ),
        (
            "trainer.num_train_steps=0",
            "trainer.num_train_steps: Input should be greater than or equal to 1",
        ),
        (
            "trainer.num_train_steps=10.0",
            "trainer.num_train_steps: Input should be a valid integer",
        ),
        ("trainer.seed=true", "trainer.seed: Input should be a valid integer"),
        ("trainer.mp=3", "trainer.mp: Input should be a valid string (found 3)"),
        ("model.hidden_dim=130", "hidden_dim 130 is not a multiple of num_heads 4"),
        ("model=gpt9", "model: 'gpt9' is not one of ['gpt2-large'"),
        ("sequence_length=64", "packing: concat is not built by dataset 'tiny' (['L16', 'L32'])"),
        ("packing=documents", "16 with packing: documents is not built by dataset 'tiny'"),
        (
            "dataset.sequence_lengths=[16, {length: 16}]",
            "two token caches would be named 'L16'",
        ),
        (
            "dataset.sequence_lengths=[{length: 16, long_documents: drop}]",
            "long_documents: 'drop' is for packing: documents",
        ),
        ("dataset.sequence_lengths=[4]", "sequence_lengths.0.length: Input should be greater"),
        ("dataset.sequence_lengths=[16.5]", "sequence_lengths.0: Input should be an object"),
        (
            "dataset.tokenizer.vocab_size=many",
            "tiny.yaml: tokenizer.vocab_size: Input should be a valid integer",
        ),
        ("dataset.source.type=ftp", "tiny.yaml: source: Input tag 'ftp'"),
        (
            "dataset.source.paths=[]",
            "tiny.yaml: source.paths: Tuple should have at least 1 item",
        ),
        ("optimizer.learning_rate=-1.0", "optimizer.learning_rate: Input should be greater than 0"),
        ("optimizer.type=sgd", "optimizer: Input tag 'sgd'"),
        ("optimizer={type: lion, beta: 0.9}", "optimizer.beta: no such field; did you mean `beta"),
        (
            "optimizer.schedule={type: wsd, decay: 1.5}",
            "optimizer.schedule.decay: Input should be less than or equal to 1 (found 1.5)",
        ),
        (
            "optimizer.schedule={type: cycles, cycles: [a]}",
            "optimizer.schedule.cycles.0: Input should be a valid integer (found 'a')",
        ),
        (
            "optimizer.undecayed=['(']",
            "optimizer.undecayed.0: Value error, '(' is no regular expression",
        ),
        (
            "trainer.sequence_length_schedule=[{start_step: 0, lenght: 8}]",
            "trainer.sequence_length_schedule.0.lenght: no such field; did you mean `length`?",
        ),
        ("optimizer.schedule.warmup=5000", "base.yaml: optimizer.schedule.warmup: 5000 steps, but"),
        ("trainer.tail_average.start=5000", "base.yaml: trainer.tail_average.start: 5000 steps"),
        ("trainer.mesh.data=7", "base.yaml: trainer.train_batch_size: "),
        ("trainer.axis_resources.mlp=date", "axis_resources: `mlp: date` names a mesh axis that"),
        (
            "trainer.axis_resources.head=data",
            "base.yaml: trainer.axis_resources: no array of this model has an axis `head` (did "
            "you mean `heads`?)",
        ),
        (
            "trainer.parameter_axis_resources={group: data}",
            "parameter_axis_resources: no array of this model has an axis `group`",
        ),
        ("trainer.processes=3", "base.yaml: trainer.processes: 3 processes cannot share the 1 dev"),
        ("trainer.reproducibility=elastic\ntrainer.elastic_shards=6", "6 must be a power of two"),
        ("trainer.mp='p=f32,c=bf16,o=f32'", "base.yaml: trainer.mp: 'p=f32,c=bf16,o=f32': 'o=f32'"),
        ("trainer.profile_steps=8..9999", "base.yaml: trainer.profile_steps: 8..9999 is no part"),
        (
            "trainer.train_batch_size=[{start_step: 0, size: 8}, {start_step: 9999, size: 16}]",
            "base.yaml: trainer.train_batch_size.1.start_step: 9999, but the run ends with update",
        ),
        (
            "trainer.sequence_length_schedule=[{start_step: 0, length: 9999}]",
            "base.yaml: trainer.sequence_length_schedule.0.length: 9999 tokens, but rows have",
        ),
        ("optimizer={type: sophia_g, estimate_rows: 7}", "base.yaml: optimizer.estimate_rows: 7 "),
        ("no-equals-sign", "--set no-equals-sign: expected section.field=value"),
    ],
)
def test_mistakes_are_named_by_file_and_field(catalog_dir: Path, change: str, says: str):
    with pytest.raises(ConfigError) as caught:
        load_catalog(catalog_dir, {"base": change.split("\n")})
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("dataset: tiny\ndataset: tiny\n", "the key 'dataset' stands twice"),
        ("dataset: &a tiny\nsequence_length: *a\n", "aliases are not allowed"),
        ("dataset: !!python/object:os.system tiny\n", "could not determine a constructor"),
        ("- dataset\n", "expected a mapping of fields, found list"),
        ("dataset: [tiny\n", "not valid YAML"),
        ("extends: nowhere\n", "nowhere.yaml: no such file"),
        ("extends: base\n", "goes round in a circle"),
        ("extends: ../base\n", "is not the name of a file beside this one"),
        (EXPERIMENT.replace("tiny", "other"), "dataset: 'other' is not one of ['tiny']"),
        ("sequence_length: 16\n", "dataset: this field is required"),
    ],
)
def test_broken_files_are_named(catalog_dir: Path, text: str, says: str):
    write_experiment(catalog_dir, text)
    with pytest.raises(ConfigError, match=r"(base|nowhere)\.yaml") as caught:
        load_catalog(catalog_dir)
    assert says in str(caught.value)


def test_all_mistakes_of_a_file_are_reported_at_once(catalog_dir: Path):
    with pytest.raises(ConfigError) as caught:
        load_catalog(
            catalog_dir, {"base": ["trainer.mp=3", "trainer.seed=-1", "model.num_layers=0"]}
        )
    assert len(str(caught.value).splitlines()) == 3
    with pytest.raises(ConfigError) as caught:
        load_catalog(catalog_dir, {"base": ["optimizer.schedule.warmup=5000", "trainer.mp=bf16"]})
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[1] for line in lines] == ["trainer.mp", "optimizer.schedule.warmup"]


def test_steps_and_fractions_are_told_apart_by_type(catalog_dir: Path):
    steps = load_catalog(catalog_dir, {"base": ["optimizer.schedule.warmup=1"]})
    share = load_catalog(catalog_dir, {"base": ["optimizer.schedule.warmup=1.0"]})
    assert type(steps.experiments["base"].optimizer.schedule.warmup) is int
    assert type(share.experiments["base"].optimizer.schedule.warmup) is float


def test_a_resolved_experiment_survives_the_trip_through_json(catalog_dir: Path):
    import json

    experiment = load_catalog(catalog_dir).experiments["base"]
    assert (
        validate(ExperimentConfig, json.loads(json.dumps(dataclasses.asdict(experiment))), "job")
        == experiment
    )


class TestCodeVersions:
    """Which stages a changed field makes stale; the first table of the lineage promise."""

    STAGES = (
        "raw_corpus",
        "tokenizer",
        "tokenized_corpus",
        "checkpoint",
        "eval_report",
        "hf_model",
    )

    def versions(self, catalog: Catalog) -> dict[str, str]:
        dataset, experiment = catalog.datasets["tiny"], catalog.experiments["base"]
        params = (
            recipes.corpus_params(dataset),
            recipes.tokenizer_params(dataset),
            recipes.tokenized_params(dataset),
            recipes.checkpoint_code_params(experiment),
            recipes.evaluation_params(experiment),
            recipes.export_params(experiment),
        )
        return {
            stage: recipes.code_version(stage, p)
            for stage, p in zip(self.STAGES, params, strict=True)
        }

    @pytest.mark.parametrize(
        ("change", "stale"),
        [
            ("dataset.source.paths=[elsewhere/*.txt]", set()),
            ("dataset.validation.fraction=0.5", {"raw_corpus"}),
            ("dataset.tokenizer.vocab_size=301", {"tokenizer"}),
            ("dataset.tokenization.append_eos=false", {"tokenized_corpus"}),
            ("dataset.description=words", set()),
            ("dataset.sequence_lengths=[16, 32, 64]", set()),
            ("model.num_layers=3", {"checkpoint"}),
            ("optimizer.learning_rate=1e-5", {"checkpoint"}),
            ("trainer.num_train_steps=11", {"checkpoint"}),
            ("trainer.mesh={data: 2}", {"checkpoint"}),
            ("trainer.data_order.seed=1", {"checkpoint"}),
            ("trainer.mp=p=f32,c=f32", {"checkpoint", "eval_report"}),
            ("trainer.save_every_steps=7", set()),
            ("trainer.log_every_steps=7", set()),
            ("evaluation.batch_size=8", {"eval_report"}),
            ("export.dtype=bfloat16", {"hf_model"}),
            ("description=words", set()),
        ],
    )
    def test_a_field_touches_the_stages_that_read_it(
        self, catalog_dir: Path, change: str, stale: set[str]
    ):
        before = self.versions(load_catalog(catalog_dir))
        after = self.versions(load_catalog(catalog_dir, {"base": [change]}))
        assert {stage for stage in self.STAGES if before[stage] != after[stage]} == stale

    def test_moving_files_changes_no_recipe_while_their_listing_stays(self, catalog_dir: Path):
        here = load_catalog(catalog_dir).datasets["tiny"]
        there = load_catalog(
            catalog_dir, {"base": ["dataset.source.paths=[moved/*.txt]"]}
        ).datasets["tiny"]
        listing = digest("listing", ["a.txt", 3])
        assert recipes.corpus_recipe(here, listing).id == recipes.corpus_recipe(there, listing).id
        assert (
            recipes.corpus_recipe(here, listing).id
            != recipes.corpus_recipe(here, digest("l", [])).id
        )


def test_vocabulary_must_hold_the_bytes():
    with pytest.raises(
        ConfigError, match="vocab_size: Input should be greater than or equal to 257"
    ):
        validate(BpeTokenizerConfig, {"type": "bpe", "vocab_size": 256}, "dataset")
