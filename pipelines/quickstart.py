"""`levanter train`: from a model's name and some text to an experiment of the catalog.

    levanter train --model gpt2-nano --dataset pystdlib
    levanter train --model gpt2-nano --dataset notes/ --trainer.num_train_steps 200
    levanter train --config_path my.yaml --optimizer.learning_rate 1e-3
    levanter train --model gpt2-nano --dataset pystdlib --tokenizer unigram:8192

A dataset is a name of the catalog, or a path (file, folder, glob or URL), for which one is written;
as is for a dataset of the catalog with another tokenizer, so that whoever else uses it keeps its
own. All land in `$DAGSTER_HOME/catalog`, so that the UI, jobs and later runs know them. Overrides
are written into the experiment: what it says is what was run.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from modeling.experiment import (
    MODEL_PRESETS,
    Catalog,
    ConfigError,
    load_catalog,
    read_yaml,
    with_overrides,
)
from modeling.urls import public_url
from pipelines.build import CATALOG

_DEFAULT_TRAINER = {"num_train_steps": 300, "train_batch_size": 16}
_DEFAULT_VOCAB_SIZE = 4096
_DEFAULT_LENGTH = 128


def write_experiment(
    home: Path,
    catalog: Catalog,
    *,
    model: str | None,
    dataset: str | None,
    config_path: Path | None,
    overrides: Sequence[str],
    tokenizer: str | None = None,
) -> str:
    """Writes the experiment, and its dataset if need be, into the catalog below `home`.

    Returns:
        The experiment's name.

    Raises:
        ConfigError: something is missing or wrong, by field.
    """
    raw = _from_file(config_path) if config_path else _from_names(model, dataset)
    if config_path and model:
        raw["model"] = model
    if config_path and dataset:
        raw["dataset"] = dataset
    raw = with_overrides(raw, [text for text in overrides if not text.startswith("dataset.")])
    if "dataset" not in raw:
        raise ConfigError("no dataset: add `--dataset NAME_OR_PATH`, or `dataset:` to the file.")
    changes = [text.removeprefix("dataset.") for text in overrides if text.startswith("dataset.")]
    with _restored_on_error(home / "catalog"):
        chosen = None if tokenizer is None else _tokenizer(tokenizer)
        raw["dataset"] = _dataset(home, catalog, str(raw["dataset"]), raw, changes, chosen)
        name = _experiment_name(config_path, model, raw["dataset"])
        _write_new(home, catalog, name, raw)
        # As every later command will load it: a file that is wrong must not stay.
        load_catalog([CATALOG, home / "catalog"])
    return name


@contextlib.contextmanager
def _restored_on_error(directory: Path) -> Iterator[None]:
    before = {path: path.read_bytes() for path in directory.glob("*/*.yaml")}
    try:
        yield
    except BaseException:
        for path in directory.glob("*/*.yaml"):
            if path not in before:
                path.unlink()
        for path, content in before.items():
            path.write_bytes(content)
        raise


def _write_new(home: Path, catalog: Catalog, name: str, raw: Mapping[str, Any]) -> None:
    if name in catalog.experiments and not (home / "catalog/experiments" / f"{name}.yaml").exists():
        raise ConfigError(
            f"an experiment named {name!r} ships with the catalog: run it with `levanter run "
            f"{name}`, or give your file another name."
        )
    _write(home / "catalog" / "experiments" / f"{name}.yaml", raw)


def _from_names(model: str | None, dataset: str | None) -> dict[str, Any]:
    if model is None or dataset is None:
        raise ConfigError(
            "give a model and a dataset, e.g. `levanter train --model gpt2-nano --dataset "
            "pystdlib`, or a file with `--config_path FILE.yaml`."
        )
    if model not in MODEL_PRESETS:
        raise ConfigError(f"--model {model}: not one of {sorted(MODEL_PRESETS)}.")
    return {
        "dataset": dataset,
        "sequence_length": _DEFAULT_LENGTH,
        "model": model,
        "trainer": dict(_DEFAULT_TRAINER),
    }


def _from_file(path: Path) -> dict[str, Any]:
    raw = read_yaml(path)
    if "extends" in raw:
        raise ConfigError(
            f"{path}: extends: works in the catalog's folders; write the fields here."
        )
    return raw


def _dataset(
    home: Path,
    catalog: Catalog,
    dataset: str,
    raw: Mapping[str, Any],
    changes: Sequence[str],
    tokenizer: Mapping[str, Any] | None,
) -> str:
    """Returns the dataset's name, having written a file for it if it is a path, or changed."""
    if dataset in catalog.datasets:
        if tokenizer is not None:
            return _with_tokenizer(home, catalog, dataset, raw, changes, tokenizer)
        if changes:
            raise ConfigError(
                f"--dataset.{changes[0]}: {dataset!r} is a dataset of the catalog, which others "
                f"use too. Change its file, or use `levanter run EXPERIMENT --set "
                f"dataset.{changes[0]}`."
            )
        return dataset
    paths = _absolute(dataset)
    if paths is None:
        raise ConfigError(
            f"dataset: {dataset!r} is neither one of {sorted(catalog.datasets)} nor an existing "
            f"file, folder, glob or URL."
        )
    written = {
        "description": f"Documents of {public_url(dataset)}.",
        "source": {"type": "files", "paths": [paths], "format": _format(public_url(paths))},
        "tokenizer": tokenizer or {"type": "bpe", "vocab_size": _DEFAULT_VOCAB_SIZE},
    }
    # A name is shown everywhere, and with another password it is the same dataset.
    place = public_url(paths)
    return _write_dataset(
        home, catalog, _slug(Path(place.rstrip("/")).stem), place, written, raw, changes, tokenizer
    )


def _with_tokenizer(
    home: Path,
    catalog: Catalog,
    dataset: str,
    raw: Mapping[str, Any],
    changes: Sequence[str],
    tokenizer: Mapping[str, Any],
) -> str:
    """Writes a dataset of the catalog anew, under another name, with another tokenizer."""
    places = [folder / "datasets" / f"{dataset}.yaml" for folder in (CATALOG, home / "catalog")]
    path = next(place for place in places if place.exists())
    written = read_yaml(path) | {"tokenizer": dict(tokenizer)}
    template = written.get("format", {})
    if "template_file" in template:
        named = path.parent / str(template["template_file"])
        written["format"] = template | {"template_file": str(named.resolve())}
    return _write_dataset(home, catalog, dataset, dataset, written, raw, changes, tokenizer)


def _write_dataset(
    home: Path,
    catalog: Catalog,
    name: str,
    source: str,
    written: Mapping[str, Any],
    raw: Mapping[str, Any],
    changes: Sequence[str],
    tokenizer: Mapping[str, Any] | None,
) -> str:
    """Writes a dataset with the rows that the experiment needs, and returns its name."""
    told = source if tokenizer is None else json.dumps([source, tokenizer], sort_keys=True)
    name = f"{name[:48]}_{hashlib.sha256(told.encode()).hexdigest()[:6]}"
    # What earlier experiments on these texts use stays built.
    known = catalog.datasets[name].sequence_lengths if name in catalog.datasets else ()
    wanted = raw.get("sequence_length", _DEFAULT_LENGTH), raw.get("packing", "concat")
    caches = sorted({*((cache.length, cache.packing) for cache in known), wanted})
    lengths = [
        length if packing == "concat" else {"length": length, "packing": packing}
        for length, packing in caches
    ]
    path = home / "catalog" / "datasets" / f"{name}.yaml"
    _write(path, with_overrides(dict(written) | {"sequence_lengths": lengths}, changes))
    return name


def _tokenizer(text: str) -> dict[str, Any]:
    """Returns the tokenizer that `--tokenizer` names.

    Raises:
        ConfigError: it is none of a path, a repository at a commit, and a kind with a size.
    """
    path = Path(text).expanduser()
    if path.exists():
        return {"type": "pretrained", "path": str(path.resolve())}
    if kind := re.fullmatch(r"(bpe|wordpiece|unigram):(\d+)", text):
        return {"type": kind[1], "vocab_size": int(kind[2])}
    if hub := re.fullmatch(r"([\w.-]+(?:/[\w.-]+)?)@(\w+)", text):
        return {"type": "pretrained", "hub": hub[1], "revision": hub[2]}
    raise ConfigError(
        f"--tokenizer {text}: expected an existing directory or tokenizer.json; a repository of "
        f"the Hugging Face hub at a commit, OWNER/NAME@COMMIT; or a kind to train and its number "
        f"of ids, such as bpe:8192, wordpiece:8192 or unigram:8192."
    )


def _format(paths: str) -> str:
    """Returns how documents stand in the files; one text has paragraphs, a folder texts."""
    if suffix := re.search(r"\.(jsonl|json|parquet|arrow)(\.(gz|zst|bz2|xz))?$", paths):
        return suffix[1]
    return "paragraphs" if Path(paths).is_file() else "text"


def _absolute(dataset: str) -> str | None:
    if "://" in dataset:
        return dataset
    path = Path(dataset).expanduser()
    if path.exists():
        return str(path.resolve())
    is_glob = any(sign in dataset for sign in "*?[{")
    return str(Path.cwd() / path) if is_glob else None


def _experiment_name(config_path: Path | None, model: str | None, dataset: str) -> str:
    return _slug(config_path.stem) if config_path else _slug(f"{model}_{dataset}")


def _slug(text: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:48]
    return slug if slug[:1].isalpha() else f"d_{slug}"


def _write(path: Path, raw: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        yaml.safe_dump(dict(raw), sort_keys=False, allow_unicode=True), encoding="utf-8"
    )
