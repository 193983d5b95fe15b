"""For every field of the YAML: which assets a change of it makes stale, and that no other one is.

The fields are found by reflection, each in every class that can stand at its place, so that a new
one cannot be forgotten: unless a rule below speaks of it, the test fails. What follows from a stale
asset is another matter (`test_staleness`): here is who reads the field.
"""

import dataclasses
import re
import types
import typing
from collections.abc import Iterator, Mapping

import pytest

from modeling import recipes
from modeling.data.config import DatasetConfig, TokenCacheConfig
from modeling.data.sources_config import PyStdlibSource
from modeling.experiment import ExperimentConfig

NOTHING: frozenset[str] = frozenset()
CORPUS, TOKENIZER, TOKENS, CACHE, CHECKPOINT, REPORT, EXPORT = (
    frozenset({kind})
    for kind in (
        "raw_corpus", "tokenizer", "tokenized_corpus", "token_cache", "checkpoint", "eval_report",
        "hf_model",
    )
)  # fmt: skip
LAYOUT = "mesh|processes|axis_resources|parameter_axis_resources|cpu_threads"
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
    (r"experiment\.trainer\.(keep\..*|begin_anew_if_damaged)", NOTHING),
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
    pair = [before, instance(owner, **values | {name: other})]
    for owner, name in zip(reversed(field.owners[:-1]), reversed(field.names[:-1]), strict=True):
        kind = {one.name: one.type for one in dataclasses.fields(owner)}[name]
        pair = [instance(owner, **{name: example(kind, inner)}) for inner in pair]
    return pair


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
        for cache in config.sequence_lengths:
            params["token_cache"] = recipes.cache_params(cache)
    else:
        params = {
            "checkpoint": recipes.checkpoint_code_params(config),
            "eval_report": recipes.evaluation_params(config),
            "hf_model": recipes.export_params(config),
        }
    return {kind: recipes.code_version(kind, one) for kind, one in params.items()}


FIELDS = [*fields_below((DatasetConfig,)), *fields_below((ExperimentConfig,))]


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.id)
def test_a_field_concerns_just_the_stages_that_read_it(field):
    pair = changed(field)
    if pair is None:
        return  # `type: bpe` has no other value; another class is another identity
    before, after = map(versions, pair)
    stale = {kind for kind in before if before[kind] != after[kind]}
    expected = [stages for pattern, stages in RULES if re.fullmatch(pattern, str(field))]
    assert expected, f"{field.id}: say in RULES which stages read it"
    assert stale == expected[0]


def test_the_fields_are_those_of_the_files():
    names = {str(field) for field in FIELDS}
    assert len(names) > 100
    assert {"dataset.tokenizer.vocab_size", "experiment.optimizer.schedule.warmup"} <= names
    assert {"experiment.trainer.mesh", "dataset.source.paths"} <= names
