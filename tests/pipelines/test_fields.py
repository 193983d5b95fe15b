"""For every field of the YAML: which assets a change of it makes stale, and that no other one is.

The fields are found by reflection, each in every class that can stand at its place, so that a new
one cannot be forgotten: unless a rule below speaks of it, the test fails. Compared are the code
versions, which are what Dagster compares. That it does, and what follows for the assets below, is
asked of an instance to which the materializations of the definitions were reported: for all fields
together that change no result, and for one of each stage.
"""

import dataclasses
import re
import types
import typing
from collections.abc import Iterator, Mapping

import dagster as dg
import pytest

from modeling import recipes
from modeling.data.config import DatasetConfig, TokenCacheConfig
from modeling.data.sources_config import PyStdlibSource
from modeling.experiment import ExperimentConfig, load_catalog
from pipelines.build import build_defs
from pipelines.instance import CHECKOUT
from pipelines.staleness import stale_assets
from resources import materializations

CATALOG = CHECKOUT / "tests" / "catalogs" / "tiny"

NOTHING: frozenset[str] = frozenset()
CORPUS, TOKENIZER, TOKENS, CACHE, CHECKPOINT, REPORT, EXPORT = (
    frozenset({kind})
    for kind in (
        "raw_corpus", "tokenizer", "tokenized_corpus", "token_cache", "checkpoint", "eval_report",
        "hf_model",
    )
)  # fmt: skip
LAYOUT = "mesh|processes|axis_resources|parameter_axis_resources|cpu_threads|xla_flags"
RECORD = r"dataset\.(format|sources?\.record)"
RULES = [
    # Pins say what must be found, and compute how it is worked out: neither changes what is found.
    (r"dataset\.sources?\.(sha256|listing_sha256|streaming)", NOTHING),
    # Where files lie is found out by what they hold, and a path may carry a password.
    (r"dataset\.((sources?\.)?validation|sources?)\.paths?", NOTHING),
    (r"dataset\.tokenizer\.path", NOTHING),
    (r"dataset\.tokenizer\..*", TOKENIZER),
    (r"dataset\.tokenization\..*", TOKENS),
    # What is read of a record is the corpus; how it becomes a text is a matter of the tokens.
    (rf"{RECORD}\.(messages|prompt|completion|context)_fields?", CORPUS),
    (rf"{RECORD}\.(field|separator_id|dtype)", CORPUS),
    (rf"{RECORD}\.type", CORPUS | TOKENS),
    (rf"{RECORD}\.(template|variables|loss|separator)", TOKENS),
    (r"dataset\.(sources?|validation)(\..*)?", CORPUS),
    (r"dataset\.(compute|unit_bytes|description|owners)(\..*)?", NOTHING),
    (r"dataset\.sequence_lengths\.layout", NOTHING),  # a copy is an asset beside the view
    (r"dataset\.sequence_lengths\..*", CACHE),
    (r"experiment\.(dataset|description|owners)", NOTHING),  # another dataset is another parent
    (r"experiment\.(sequence_length|packing)", NOTHING),  # likewise
    (r"experiment\.trainer\.mp", CHECKPOINT | REPORT),
    (rf"experiment\.trainer\.({LAYOUT})", CHECKPOINT),
    (r"experiment\.trainer\.data_order\.max_epochs", NOTHING),  # a guard
    (r"experiment\.trainer\.initialize_from\.allow_changed", NOTHING),  # likewise
    (r"experiment\.trainer\.(save|keep|log|eval|pictures|profile|preemption)_.*", NOTHING),
    (r"experiment\.trainer\.(keep\..*|begin_anew_if_damaged|other_numerics)", NOTHING),
    (r"experiment\.(trainer|model|optimizer)(\..*)?", CHECKPOINT),
    (r"experiment\.evaluation\..*", REPORT),
    (r"experiment\.export\..*", EXPORT),
]


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of one class, at one place of the YAML."""

    owners: tuple[type, ...]
    """The classes from the file's own down to the field's."""
    names: tuple[str, ...]
    """The fields that lead through them."""

    def __str__(self) -> str:
        root = "dataset" if self.owners[0] is DatasetConfig else "experiment"
        return ".".join([root, *self.names])

    @property
    def id(self) -> str:
        return f"{self} of {self.owners[-1].__name__}"


def classes_of(kind) -> list[type]:
    """Returns the configuration classes that a type can hold, whatever is around them."""
    if typing.get_origin(kind) is typing.Annotated:
        return classes_of(typing.get_args(kind)[0])
    if dataclasses.is_dataclass(kind):
        return [kind]
    return [found for inner in typing.get_args(kind) for found in classes_of(inner)]


def fields_below(owners, names=()) -> Iterator[Field]:
    for field in dataclasses.fields(owners[-1]):
        below = classes_of(field.type)
        if not below or any(not classes_of(one) for one in alternatives(field.type)):
            yield Field(owners, (*names, field.name))  # a plain value can stand here
        for one in below:
            yield from fields_below((*owners, one), (*names, field.name))


def alternatives(kind) -> list:
    """Returns the members of a union but None, or the type itself."""
    while typing.get_origin(kind) is typing.Annotated:
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        inner = [alternatives(one) for one in typing.get_args(kind) if one is not type(None)]
        return [one for several in inner for one in several]
    return [kind]


def example(kind, given=None):
    """Returns some value of a type; of the class of `given` that value itself, wherever it is."""
    for one in alternatives(kind):
        if given is None or type(given) in classes_of(one):
            break
    if given is not None and type(given) is one:
        return given
    origin, arguments = typing.get_origin(one), typing.get_args(one)
    if origin is typing.Literal:
        return arguments[0]
    if origin is tuple:
        return (example(arguments[0], given),)
    if origin is not None and issubclass(origin, Mapping):
        return {"name": example(arguments[1], given)}
    if dataclasses.is_dataclass(one):
        return instance(one)
    return {bool: True, int: 3, float: 0.25, str: "some"}[one]


def instance(owner, **given):
    """Returns a configuration of a class, made of examples where it has no defaults.

    What a class says of several fields together does not matter to who reads one of them.
    """
    made = object.__new__(owner)
    for field in dataclasses.fields(owner):
        if field.name in given:
            value = given[field.name]
        elif (owner, field.name) == (TokenCacheConfig, "packing"):
            value = "documents"  # where all fields of a cache count
        elif field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            value = example(field.type)
        object.__setattr__(made, field.name, value)
    if owner is DatasetConfig and made.source is None and not made.sources:
        object.__setattr__(made, "source", PyStdlibSource(type="pystdlib"))
    return made


def changed(field):
    """Returns two configurations that differ in this field alone; None if it has but one value."""
    owner, name = field.owners[-1], field.names[-1]
    before = instance(owner)
    kind = {one.name: one.type for one in dataclasses.fields(owner)}[name]
    other = another(getattr(before, name), kind)
    if other is None:
        return None
    values = {one.name: getattr(before, one.name) for one in dataclasses.fields(owner)}
    return [at_place(field, made) for made in (before, instance(owner, **values | {name: other}))]


def at_place(field, made=None):
    """Returns the configuration of a file in which `made`, of the field's class, stands."""
    made = instance(field.owners[-1]) if made is None else made
    for owner, name in zip(reversed(field.owners[:-1]), reversed(field.names[:-1]), strict=True):
        kind = {one.name: one.type for one in dataclasses.fields(owner)}[name]
        made = instance(owner, **{name: example(kind, made)})
    return made


def another(value, kind):
    """Returns another value of a type than this one; None if there is none."""
    literals = [
        argument
        for one in alternatives(kind)
        if typing.get_origin(one) is typing.Literal
        for argument in typing.get_args(one)
    ]
    if others := [one for one in literals if one != value]:
        return others[0]
    if literals:
        return None
    plain = [one for one in alternatives(kind) if not classes_of(one)]
    if value is None or dataclasses.is_dataclass(value):
        return example(plain[0])
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return value + 0.125
        case str():
            return f"{value}x"
        case tuple():
            return (*value, *example(plain[0]))
        case Mapping():
            return {**value, "another": next(iter(example(plain[0]).values()))}
    raise TypeError(f"no other value than {value!r} is known of {kind}")


def versions(config) -> dict[str, str]:
    """Returns the code version of each stage that reads a file."""
    if isinstance(config, DatasetConfig):
        params = {
            "raw_corpus": recipes.corpus_params(config),
            "tokenizer": recipes.tokenizer_params(config),
            "tokenized_corpus": recipes.tokenized_params(config),
        }
        if config.sequence_lengths:
            params["token_cache"] = recipes.cache_params(config.sequence_lengths[0])
    else:
        params = {
            "checkpoint": recipes.checkpoint_code_params(config),
            "eval_report": recipes.evaluation_params(config),
            "hf_model": recipes.export_params(config),
        }
    return {kind: recipes.code_version(kind, one) for kind, one in params.items()}


EVERY = [*fields_below((DatasetConfig,)), *fields_below((ExperimentConfig,))]
FIELDS = [field for field in EVERY if changed(field) is not None]


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.id)
def test_a_field_concerns_just_the_stages_that_read_it(field):
    before, after = map(versions, changed(field))
    stale = {kind for kind in before if before[kind] != after[kind]}
    assert stale == expected_of(field)


def expected_of(field):
    expected = [stages for pattern, stages in RULES if re.fullmatch(pattern, str(field))]
    assert expected, f"{field.id}: say in RULES which stages read it"
    return expected[0]


def test_another_class_concerns_just_the_stages_that_read_its_fields():
    """What `type: bpe` chooses between: the only value of that field, so it is in no row above."""
    chosen = [field for field in EVERY if field.names[-1] == "type"]
    places = {field.names: field for field in chosen}
    assert len(places) > 10
    for names, one in places.items():
        classes = {field.owners[-1]: field for field in chosen if field.names == names}
        found = [versions(at_place(field)) for field in classes.values()]
        for other in found[1:]:
            stale = {kind for kind in other if other[kind] != found[0][kind]}
            assert stale <= expected_of(one), (names, classes)


def test_the_fields_are_those_of_the_files():
    names = {str(field) for field in FIELDS}
    assert len(names) > 100
    assert {"dataset.tokenizer.vocab_size", "experiment.optimizer.schedule.warmup"} <= names
    assert {"experiment.trainer.mesh", "dataset.source.paths"} <= names


KEYS = {
    key[1]: "/".join(key)
    for key in (
        ("tales", "raw_corpus"), ("tales", "tokenizer"), ("tales", "tokenized_corpus"),
        ("tales", "token_cache", "L32_documents"), ("tiny", "checkpoint"), ("tiny", "eval_report"),
        ("tiny", "hf_model"),
    )
}  # fmt: skip
BELOW = {
    "raw_corpus": TOKENIZER | TOKENS | CACHE | CHECKPOINT | REPORT | EXPORT,
    "tokenizer": TOKENS | CACHE | CHECKPOINT | REPORT | EXPORT,
    "tokenized_corpus": CACHE | CHECKPOINT | REPORT | EXPORT,
    "token_cache": CHECKPOINT | REPORT | EXPORT,
    "checkpoint": REPORT | EXPORT,
}
CACHES = (
    "dataset.sequence_lengths=[{length: 32, packing: documents}, {length: 64, packing: documents}]"
)
BASE = ("dataset.source.paths=[/a/*.txt]", CACHES, "packing=documents")


def definitions(*changes):
    return build_defs(load_catalog(CATALOG, {"tiny": [*BASE, *changes]}))


@pytest.fixture(scope="module")
def reported():
    """An instance that has been told that each asset was made as the definitions have it."""
    graph = definitions().resolve_asset_graph()
    with dg.DagsterInstance.ephemeral() as instance:
        events = {}
        for key in graph.toposorted_asset_keys:
            node, name = graph.get(key), key.to_user_string()
            tags = {"dagster/code_version": node.code_version, "dagster/data_version": name}
            for parent in node.parent_keys:
                above = parent.to_user_string()
                tags |= {
                    f"dagster/input_data_version/{above}": above,
                    f"dagster/input_event_pointer/{above}": str(events[parent]),
                }
            metadata = {"content_id": name, materializations.CONFIG: node.metadata["config"]}
            made = dg.AssetMaterialization(key, metadata=metadata, tags=tags)
            instance.report_runless_asset_event(made)
            (record,) = instance.fetch_materializations(key, limit=1).records
            events[key] = record.storage_id
        yield instance


def stale_after(instance, *changes):
    """Returns what is stale by itself, and what is because of something above it, of `tiny`."""
    graph_keys = set(KEYS.values())
    found = {
        key.to_user_string(): why
        for key, why in stale_assets(definitions(*changes), instance).items()
        if key.to_user_string() in graph_keys
    }
    return {
        status: {name: why.causes for name, why in found.items() if why.status == status}
        for status in {why.status for why in found.values()} | {"STALE", "UPSTREAM"}
    }


CHANGES_NOTHING = (
    "dataset.source.paths=[/elsewhere/*.txt, 'https://user:secret@example.com/x?token=other']",
    "dataset.source.sha256={a.txt: " + 64 * "a" + "}", "dataset.source.listing_sha256=" + 64 * "b",
    "dataset.compute=ray", "dataset.unit_bytes=4096", "dataset.description=other",
    "dataset.owners=[team:other]", "description=other", "owners=[team:other]",
    "trainer.log_every_steps=1", "trainer.save_every_steps=5", "trainer.keep=[{every: 3}]",
    "trainer.data_order.max_epochs=99", "trainer.profile_steps=2..3",
)  # fmt: skip


def test_what_changes_no_result_makes_nothing_stale_all_of_it_together(reported):
    assert stale_after(reported) == {"STALE": {}, "UPSTREAM": {}}
    assert stale_after(reported, *CHANGES_NOTHING) == {"STALE": {}, "UPSTREAM": {}}


@pytest.mark.parametrize(
    ("change", "stages", "cause"),
    [
        ("dataset.validation.fraction=0.5", CORPUS, "validation.fraction 0.1 -> 0.5"),
        ("dataset.tokenizer.vocab_size=400", TOKENIZER, "tokenizer.vocab_size 320 -> 400"),
        ("dataset.tokenization.append_bos=true", TOKENS,
         "tokenization.append_bos False -> True"),
        (CACHES.replace("documents}", "documents, long_documents: drop}", 1), CACHE,
         "long_documents split -> drop"),
        ("trainer.seed=5", CHECKPOINT, "trainer.seed 0 -> 5"),
        ("trainer.mesh={data: 1}", CHECKPOINT, "layout.mesh.data"),
        ("sequence_length=64", CHECKPOINT, "has a new dependency on"),
        ("trainer.mp=p=f32,c=bfloat16", CHECKPOINT | REPORT, "mp "),
        ("evaluation.sample_tokens=3", REPORT, "evaluation.sample_tokens 8 -> 3"),
        ("export.dtype=bfloat16", EXPORT, "export.dtype float32 -> bfloat16"),
    ],
)  # fmt: skip
def test_a_field_of_a_stage_makes_it_stale_and_what_is_below_follow(
    reported, change, stages, cause
):
    found = stale_after(reported, change)
    assert set(found["STALE"]) == {KEYS[kind] for kind in stages}
    following = {KEYS[below] for kind in stages for below in BELOW.get(kind, NOTHING)}
    assert set(found["UPSTREAM"]) == following - set(found["STALE"])
    for causes in found["STALE"].values():
        assert cause in "; ".join(causes)


def test_the_code_versions_of_the_table_are_those_of_the_definitions():
    catalog = load_catalog(CATALOG, {"tiny": BASE})
    graph = definitions().resolve_asset_graph()
    shown = {kind: graph.get(dg.AssetKey(key.split("/"))).code_version
             for kind, key in KEYS.items()}  # fmt: skip
    assert versions(catalog.datasets["tales"]) | versions(catalog.experiments["tiny"]) == shown
