"""Two clones at two places, in two surroundings, make the same bytes: every content id is equal."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from modeling.artifacts import ArtifactStore, verify_files

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


def test_every_artifact_is_the_same_in_both(chain, tmp_path):
    here = clone(tmp_path / "here", chain.texts)
    one = make_everything(here, PYTHONHASHSEED="1", TZ="UTC", LANG="C.UTF-8")
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
