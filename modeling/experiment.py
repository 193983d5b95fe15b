"""Dataset and experiment files: typed, validated, with `extends:` and dotted overrides.

    datasets/<name>.yaml      a `DatasetConfig`
    experiments/<name>.yaml   an `ExperimentConfig`; `extends: other` starts from another file,
                              `model: gpt2-nano` starts from a named size

A name is the file's name. Files are read as YAML 1.2 core (so `1e-3` is a number) by a safe loader
that refuses duplicate keys. Every mistake is reported at once, by file and field.
"""

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from modeling.canonical import NOT_IDENTITY
from modeling.data.config import DatasetConfig, Owner, Packing, TokenCacheConfig
from modeling.evaluation.config import EvaluationConfig
from modeling.fields import STRICT
from modeling.hf.config import ExportConfig
from modeling.models.config import MODEL_PRESETS, Gpt2Config, ModelConfig
from modeling.optim.config import AdamWConfig, OptimizerConfig
from modeling.training.config import TrainerConfig
from modeling.training.feasibility import mistakes

NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


class ConfigError(ValueError):
    """A dataset or experiment file is wrong; the message names the file and each field."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """One experiment file: a model and how it is trained, evaluated and exported, on a dataset."""

    dataset: str = dataclasses.field(metadata=NOT_IDENTITY)
    sequence_length: Annotated[int, Field(ge=8, le=2**20)]
    packing: Packing = dataclasses.field(default="concat", metadata=NOT_IDENTITY)
    """Which of the dataset's token caches of this length; its content id tells rows apart."""
    trainer: TrainerConfig
    model: ModelConfig = dataclasses.field(default_factory=Gpt2Config)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=AdamWConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    export: ExportConfig = dataclasses.field(default_factory=ExportConfig)
    description: str = dataclasses.field(default="", metadata=NOT_IDENTITY)
    owners: tuple[Owner, ...] = dataclasses.field(default=("team:lm",), metadata=NOT_IDENTITY)
    """Who answers for its assets."""

    identity_tag: ClassVar[str] = "experiment/1"
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        for section in ("evaluation", "export"):
            weights = getattr(self, section).weights
            if weights != "last" and getattr(self.trainer, weights) is None:
                raise ValueError(
                    f"{section}.weights: {weights} needs trainer.{weights}, which keeps that "
                    f"average; set it, or take the weights `last`."
                )
        if found := mistakes(
            self.trainer, self.optimizer, self.sequence_length, self.model.axis_names
        ):
            raise ValueError("\n".join(found))

    @property
    def cache_name(self) -> str:
        """The last part of the key of the token cache that it reads."""
        return TokenCacheConfig(length=self.sequence_length, packing=self.packing).name


@dataclasses.dataclass(frozen=True)
class Catalog:
    """All datasets and experiments of a directory, by name; every reference between them holds."""

    datasets: Mapping[str, DatasetConfig]
    experiments: Mapping[str, ExperimentConfig]


def load_catalog(
    directories: Path | Sequence[Path], overrides: Mapping[str, Sequence[str]] | None = None
) -> Catalog:
    """Reads `datasets/*.yaml` and `experiments/*.yaml` below each directory.

    Args:
        directories: one, or several that together name each dataset and experiment once.
        overrides: for each experiment, assignments such as `trainer.num_train_steps=50`; those that
            begin with `dataset.` change its dataset.

    Raises:
        ConfigError: naming file and field of every mistake.
    """
    folders = [directories] if isinstance(directories, Path) else list(directories)
    dataset_files = _yaml_files([folder / "datasets" for folder in folders])
    experiment_files = _yaml_files([folder / "experiments" for folder in folders])
    for name in sorted(set(dataset_files) & set(experiment_files)):
        raise ConfigError(
            f"{experiment_files[name]}: {dataset_files[name]} has this name too, and both name "
            f"assets; rename one."
        )
    changes = _Changes(overrides or {})
    experiments = {
        name: load_experiment(path, changes.of_experiment(name))
        for name, path in experiment_files.items()
    }
    if unknown := sorted(set(overrides or {}) - set(experiments)):
        raise ConfigError(
            f"no experiment is named {unknown[0]!r}; there are {sorted(experiments)}."
        )
    datasets = {
        name: load_dataset(path, changes.of_dataset(name, experiments))
        for name, path in dataset_files.items()
    }
    for name, experiment in experiments.items():
        _check_reference(experiment_files[name], experiment, datasets)
    return Catalog(datasets, experiments)


@dataclasses.dataclass(frozen=True)
class _Changes:
    """Overrides by experiment, told apart into its own and those of its dataset."""

    by_experiment: Mapping[str, Sequence[str]]

    def of_experiment(self, name: str) -> list[str]:
        texts = self.by_experiment.get(name, ())
        return [text for text in texts if not text.startswith("dataset.")]

    def of_dataset(self, name: str, experiments: Mapping[str, ExperimentConfig]) -> list[str]:
        return [
            text.removeprefix("dataset.")
            for experiment, texts in self.by_experiment.items()
            for text in texts
            if experiments[experiment].dataset == name and text.startswith("dataset.")
        ]


def load_dataset(path: Path, overrides: Sequence[str] = ()) -> DatasetConfig:
    """Reads one dataset file, and the templates that it names, and applies dotted overrides."""
    raw = with_overrides(read_yaml(path), overrides)
    raw = _with_template(raw, "format", "format", path)
    if isinstance(raw.get("source"), Mapping):
        source = _with_template(raw["source"], "record", "source.record", path)
        raw = raw | {"source": source}
    if isinstance(raw.get("sources"), Mapping):
        sources = {
            name: _with_template(source, "record", f"sources.{name}.record", path)
            if isinstance(source, Mapping)
            else source
            for name, source in raw["sources"].items()
        }
        raw = raw | {"sources": sources}
    return validate(DatasetConfig, raw, str(path))


def _with_template(raw: Mapping[str, Any], field: str, shown: str, path: Path) -> dict[str, Any]:
    """Replaces `template_file` of a field by what the file holds, since its name means nothing."""
    section = raw.get(field)
    if not isinstance(section, Mapping) or "template_file" not in section:
        return dict(raw)
    if "template" in section:
        raise ConfigError(f"{path}: {shown}: set either `template` or `template_file`.")
    rest = {key: value for key, value in section.items() if key != "template_file"}
    template = path.parent / str(section["template_file"])
    try:
        rest["template"] = template.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {shown}.template_file: {template}: {error}.") from None
    return dict(raw) | {field: rest}


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Reads one experiment file, following `extends:`, and applies dotted overrides."""
    raw = with_overrides(_with_bases(path, ()), overrides)
    return validate(ExperimentConfig, _with_preset(raw, str(path)), str(path))


def validate(config_type: type[Any], raw: Mapping[str, Any], source: str) -> Any:
    """Returns `raw` as a `config_type`, or reports all that is wrong with it.

    Raises:
        ConfigError: one line a mistake: file, field, what was found, what is expected.
    """
    try:
        # Through JSON, where strictness about numbers and texts still takes objects and arrays.
        return TypeAdapter(config_type).validate_json(json.dumps(dict(raw)))
    except ValidationError as error:
        lines = [
            line
            for problem in error.errors()
            for line in _explain(problem, config_type).split("\n")
        ]
        raise ConfigError("\n".join(f"{source}: {line}" for line in lines)) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Returns the mapping in a YAML file; aliases, tags and duplicate keys are refused."""
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=_CoreLoader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}{_problem(error)}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a mapping of fields, found {type(value).__name__}.")
    return value


def _problem(error: yaml.YAMLError) -> str:
    """Returns what is wrong and where; not the text around it, in which secrets may stand."""
    mark = getattr(error, "problem_mark", None)
    where = f":{mark.line + 1}:{mark.column + 1}" if mark is not None else ""
    said = (getattr(error, name, None) for name in ("context", "problem"))
    return f"{where}: not valid YAML: {', '.join(filter(None, said)) or error}"


class _CoreLoader(yaml.SafeLoader):
    """A safe loader with YAML 1.2 numbers, no aliases and no duplicate keys."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(
                None,
                None,
                "aliases are not allowed; write the value again or use `extends:`",
                self.peek_event().start_mark,
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_YAML_1_1 = ("tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
_CoreLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _YAML_1_1]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_CoreLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?$|[-+]?[0-9]+[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def _yaml_files(directories: Sequence[Path]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in (path for directory in directories for path in sorted(directory.glob("*.yaml"))):
        if not NAME.fullmatch(path.stem):
            raise ConfigError(
                f"{path}: the name must match {NAME.pattern}, so that it can be an asset key."
            )
        if path.stem in files:
            raise ConfigError(f"{path}: {files[path.stem]} has this name already; rename one.")
        files[path.stem] = path
    return files


def _check_reference(
    path: Path, experiment: ExperimentConfig, datasets: Mapping[str, DatasetConfig]
) -> None:
    dataset = datasets.get(experiment.dataset)
    if dataset is None:
        raise ConfigError(
            f"{path}: dataset: {experiment.dataset!r} is not one of {sorted(datasets)}."
        )
    wanted = experiment.sequence_length, experiment.packing
    if wanted not in [(cache.length, cache.packing) for cache in dataset.sequence_lengths]:
        built = [cache.name for cache in dataset.sequence_lengths]
        raise ConfigError(
            f"{path}: sequence_length: {experiment.sequence_length} with packing: "
            f"{experiment.packing} is not built by dataset {experiment.dataset!r} ({built}); add "
            f"it to that file's `sequence_lengths`."
        )


def _with_bases(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    if path in chain:
        raise ConfigError(f"{path}: extends: goes round in a circle: {[p.stem for p in chain]}.")
    raw = _named_model(read_yaml(path))
    base = raw.pop("extends", None)
    if base is None:
        return raw
    if not isinstance(base, str) or not NAME.fullmatch(base):
        raise ConfigError(f"{path}: extends: {base!r} is not the name of a file beside this one.")
    return _merge(_with_bases(path.with_name(f"{base}.yaml"), (*chain, path)), raw)


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def with_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Returns `raw` with assignments such as `trainer.num_train_steps=50` merged in."""
    raw = _named_model(raw)
    for text in overrides:
        field, equals, value = text.partition("=")
        if not equals or not all(field.split(".")):
            raise ConfigError(
                f"--set {text}: expected section.field=value, e.g. trainer.num_train_steps=50."
            )
        try:
            change: Any = yaml.load(value, Loader=_CoreLoader)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {text}{_problem(error)}") from None
        for key in reversed(field.split(".")):
            change = {key: change}
        raw = _merge(raw, _named_model(change))
    return raw


def _named_model(raw: dict[str, Any]) -> dict[str, Any]:
    """Writes `model: NAME` as `model: {preset: NAME}`, to which field overrides can be added."""
    return raw | {"model": {"preset": raw["model"]}} if isinstance(raw.get("model"), str) else raw


def _with_preset(raw: dict[str, Any], source: str) -> dict[str, Any]:
    """Replaces `model: {preset: NAME, ...}` by that size's fields, changed as written."""
    model = raw.get("model")
    if not isinstance(model, Mapping) or "preset" not in model:
        return raw
    name = model["preset"]
    if name not in MODEL_PRESETS:
        raise ConfigError(f"{source}: model: {name!r} is not one of {sorted(MODEL_PRESETS)}.")
    changes = {key: value for key, value in model.items() if key != "preset"}
    return raw | {"model": dataclasses.asdict(MODEL_PRESETS[name]) | changes}


def _explain(problem: Any, config_type: type[Any]) -> str:
    """Returns one validation problem as `field: what, found, expected`."""
    path, section = _place(config_type, problem["loc"])
    field = ".".join(path)
    if problem["type"] == "unexpected_keyword_argument":
        known = sorted({f.name for kind in section for f in dataclasses.fields(kind)})
        close = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean `{close[0]}`?" if close else f"the fields here are {known}."
        return f"{field}: no such field; {hint}"
    if problem["type"] in ("missing", "missing_argument"):
        return f"{field}: this field is required."
    if not path:  # Of several fields together, which the message names.
        return problem["msg"].removeprefix("Value error, ")
    return f"{field}: {problem['msg']} (found {problem['input']!r})."


def _place(config_type: Any, location: Sequence[Any]) -> tuple[list[str], list[Any]]:
    """Returns a location as it is written in a file, and the dataclasses that its end is in.

    pydantic also names the members of unions on the way, which nobody has written.
    """
    path: list[str] = []
    section: list[Any] = []
    current = _alternatives(config_type)
    for part in location:
        tagged = [kind for kind in current if part in _tags(kind)]
        inner = [found for kind in current for found in _inside(kind, part)]
        if len(current) > 1 and (tagged or not inner):
            current = tagged or current
            continue
        path.append(str(part))
        section = [kind for kind in current if dataclasses.is_dataclass(kind)]
        current = inner
    return path, section


def _alternatives(annotation: Any) -> list[Any]:
    """Returns the members of a union, through `Annotated`."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [kind for member in get_args(annotation) for kind in _alternatives(member)]
    return [annotation]


def _tags(kind: Any) -> tuple[Any, ...]:
    if not dataclasses.is_dataclass(kind):
        return ()
    types = [f.type for f in dataclasses.fields(kind) if f.name == "type"]
    return tuple(tag for annotation in types for tag in get_args(annotation))


def _inside(kind: Any, part: Any) -> list[Any]:
    """Returns what may stand at a field, a key or an item of a section."""
    if dataclasses.is_dataclass(kind):
        return [
            inner
            for f in dataclasses.fields(kind)
            if f.name == part
            for inner in _alternatives(f.type)
        ]
    if get_origin(kind) is Mapping:
        return _alternatives(get_args(kind)[1])
    if get_origin(kind) is tuple and isinstance(part, int):
        return _alternatives(get_args(kind)[0])
    return []
