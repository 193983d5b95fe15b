"""Two clones at two places: apart they make the same bytes, and over one store they share them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from modeling.artifacts import ArtifactStore
from modeling.inventory import verify_files
from modeling.upkeep import check

ROOT = Path(__file__).parents[2]
KINDS = {
    "raw_corpus",
    "tokenizer",
    "tokenized_corpus",
    "token_cache",
    "checkpoint",
    "eval_report",
    "hf_model",
}


def clone(directory: Path, texts: Path) -> Path:
    """Copies what git tracks, as a clone of the working tree would have it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, directory / name)
    shutil.copytree(texts, directory / "corpus" / "texts")
    return directory


def make_everything(directory: Path, **surroundings: str) -> dict[str, str]:
    """Runs `levanter run tiny` in a clone, and returns the content id of each artifact."""
    paths = json.dumps([str(directory / "corpus" / "texts" / "*.txt")])
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(directory),
        "DAGSTER_HOME": str(directory / "home"),
        "LEVANTER_CATALOG": str(directory / "tests" / "catalogs" / "tiny"),
        "LEVANTER_OVERRIDES": json.dumps({"tiny": [f"dataset.source.paths={paths}"]}),
        **surroundings,
    }
    command = [sys.executable, "-m", "pipelines.cli", "run", "tiny"]
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    where = "import modeling; print(modeling.__file__)"
    used = subprocess.check_output(
        [sys.executable, "-c", where], cwd=directory, env=environment, text=True
    )
    assert used.startswith(str(directory))
    store = ArtifactStore(str(directory / "home" / "store"))
    ids = {}
    for record in store.records():
        ids[record["kind"]] = record["content_id"]
        verify_files(store.local(record["kind"], record["content_id"]))
    return ids


DATA_STAGES = """\
import json
import sys
import dagster as dg
from pipelines.build import build_defs, catalog_from_environment
from pipelines.instance import ensure_home

ensure_home()
stages = [["tales", *stage.split("/")] for stage in sys.argv[1:]]
job = build_defs(catalog_from_environment()).resolve_job_def("tiny")
sys.stdin.readline()
with dg.DagsterInstance.get() as instance:
    done = job.execute_in_process(
        instance=instance, asset_selection=[dg.AssetKey(stage) for stage in stages]
    )
made = {}
for event in done.get_asset_materialization_events():
    metadata = event.materialization.metadata
    made[event.asset_key.to_user_string()] = [metadata[x].value for x in ("was", "content_id")]
print(json.dumps(made))
"""


def start(directory: Path, store: str) -> subprocess.Popen:
    """Starts the data stages in a clone; they begin when they are sent a line."""
    paths = json.dumps([str(directory / "corpus" / "texts" / "*.txt")])
    environment = os.environ | {
        "PYTHONPATH": str(directory),
        "DAGSTER_HOME": str(directory / "home"),
        "LEVANTER_STORE": store,
        "LEVANTER_CATALOG": str(directory / "tests" / "catalogs" / "tiny"),
        "LEVANTER_OVERRIDES": json.dumps({"tiny": [f"dataset.source.paths={paths}"]}),
    }
    stages = ["raw_corpus", "tokenizer", "tokenized_corpus", "token_cache/L32"]
    with (directory / "log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-c", DATA_STAGES, *stages],
            cwd=directory,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )


@pytest.mark.parametrize("place", ["bucket", pytest.param("directory", marks=pytest.mark.slow)])
def test_two_that_share_a_store_make_everything_once(request, chain, tmp_path, place):
    """Started at once they race for each stage, and what one has made the other takes."""
    store = str(tmp_path / "store") if place == "directory" else request.getfixturevalue("gcs")
    directories = [clone(tmp_path / name, chain.texts) for name in ("ann", "some where else/bert")]
    runs = [start(directory, store) for directory in directories]
    try:
        for run in runs:
            run.stdin.write("\n")
            run.stdin.flush()
        told = [run.communicate()[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
            run.wait()
    logs = "\n".join((directory / "log").read_text() for directory in directories)
    assert [run.returncode for run in runs] == [0, 0], logs
    ann, bert = (json.loads(text.splitlines()[-1]) for text in told)
    assert len(ann) == 4
    assert {key: made[1] for key, made in ann.items()} == {k: made[1] for k, made in bert.items()}
    for key in ann:
        assert sorted((ann[key][0], bert[key][0])) == ["built", "reused"], key
    shared = ArtifactStore(store, scratch=tmp_path / "scratch")
    assert len(list(shared.records())) == 4
    assert check(shared) == []


def test_every_artifact_is_the_same_in_both(chain, tmp_path):
    here = clone(tmp_path / "here", chain.texts)
    # Only one of them takes programs that were compiled for other tests.
    programs = os.environ["LEVANTER_COMPILE_CACHE"]
    one = make_everything(
        here, PYTHONHASHSEED="1", TZ="UTC", LANG="C.UTF-8", LEVANTER_COMPILE_CACHE=programs
    )
    other = make_everything(
        clone(tmp_path / "some" / "where else", chain.texts),
        PYTHONHASHSEED="2",
        TZ="Asia/Kathmandu",
        LANG="C",
        RAYON_NUM_THREADS="1",
        HOME=str(tmp_path),
    )
    assert set(one) == KINDS
    assert one == other
