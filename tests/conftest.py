"""Strictness for every test: no silent rank promotion, no implicit dtype promotion, eight devices.

JAX reads `XLA_FLAGS` once, when its first backend starts, so the flags are set before any import.
"""

import dataclasses
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import absl.logging
import pytest
from hypothesis import settings

# A busy machine fails no test: none asserts time.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# Of a test's time most is compilation, and of that half is what makes programs fast. Processes that
# a test launches are given the flags that their experiment asks for, and compile as ever.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", "8")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("DAGSTER_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What the product's processes compile is kept for all that follow, whatever their instance: most of
# a tiny run is compilation, of the same few programs. Workers of pytest have the variable already.
_PROGRAMS = None
if "LEVANTER_COMPILE_CACHE" not in os.environ:
    _PROGRAMS = tempfile.mkdtemp(prefix="levanter-programs-")
    os.environ["LEVANTER_COMPILE_CACHE"] = _PROGRAMS
# gcsfs asks Google what kind of bucket it has before each access; an emulator has one kind.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")


_LONGEST = (
    "training/test_bitwise.py", "pipelines/test_cli.py", "pipelines/test_on_demand.py",
    "pipelines/test_launch.py", "training/test_rule.py", "pipelines/test_ui.py",
    "pipelines/test_two_clones.py", "models/test_gpt2.py", "pipelines/test_checks.py",
    "training/test_trainer.py", "pipelines/test_verify.py", "training/test_layouts.py",
    "pipelines/test_secrets.py", "pipelines/test_chain.py", "training/test_step.py",
    "models/test_segments.py",
)  # fmt: skip
"""Files of a minute and more. With `--no-loadscope-reorder` they begin first, or the last one would
run alone."""


def pytest_configure() -> None:
    """Keeps absl, which Optax imports, from closing what pytest captures output with.

    It holds the standard error of the moment when it was imported, and closes that when logging is
    configured anew, as Dagster does, if another has taken its place since.
    """
    absl.logging.get_absl_handler().python_handler.setStream(sys.__stderr__)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first; within a file the order stays."""
    here = Path(__file__).parent
    rank = {here / name: number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


def pytest_unconfigure() -> None:
    """Removes what was compiled, once no process of the tests is left to use it."""
    if _PROGRAMS is not None:
        shutil.rmtree(_PROGRAMS, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class Trained:
    """What evaluation and export start from: directories as the stages before leave them."""

    experiment: object
    tokenizer_dir: Path
    cache_dir: Path
    tokenized_dir: Path
    checkpoint_dir: Path


@pytest.fixture(scope="session")
def gcs_address() -> Iterator[str]:
    """The address of a Cloud Storage emulator, a process that ends with the session."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, str(Path(__file__).parent / "gcs_emulator.py"), str(port)]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as server:
        try:
            deadline = time.monotonic() + 60
            while not _answers(address):
                assert server.poll() is None, "the emulator has ended"
                assert time.monotonic() < deadline, "the emulator does not answer"
                time.sleep(0.05)
            yield address
        finally:
            server.kill()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/storage/v1/b?project=p", timeout=5):
            return True
    except (urllib.error.URLError, ConnectionError):
        return False


@pytest.fixture
def gcs(gcs_address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL `gs://...` of a fresh bucket; this process and its children reach it by gcsfs.

    Objects over 5 MB take another way, which warns of what it does to the event loop.
    """
    import fsspec

    gcsfs = fsspec.get_filesystem_class("gs")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_address)
    gcsfs.clear_instance_cache()  # instances remember where they belong
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    fsspec.filesystem("gs").mkdir(bucket)
    yield f"gs://{bucket}"
    gcsfs.clear_instance_cache()


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A small corpus through the data stages, and a checkpoint of a model with random weights."""
    import jax
    import numpy as np

    import haliax as hax
    from modeling.artifacts import Workspace, write_durably
    from modeling.data import cache, corpus, tokenized, tokenizer
    from modeling.data.config import TokenCacheConfig, TokenizationConfig
    from modeling.data.sources_config import FilesSource, ValidationConfig
    from modeling.data.tokenizers_config import BpeTokenizerConfig
    from modeling.evaluation.config import EvaluationConfig
    from modeling.experiment import ExperimentConfig
    from modeling.models.config import Gpt2Config
    from modeling.models.lm import build_model
    from modeling.training import checkpoint
    from modeling.training.config import TrainerConfig
    from modeling.training.leaves import snapshot

    root = tmp_path_factory.mktemp("trained")

    def workspace(stage: str) -> Workspace:
        made = Workspace(root / "progress" / stage, root / stage)
        made.progress.mkdir(parents=True)
        made.output.mkdir()
        return made

    source_dir = root / "source"
    source_dir.mkdir()
    for index in range(30):
        text = f"def f{index}(argv):\n\tprint('naïve café', {index * 37})  # 日本 🎉\n" * 4
        (source_dir / f"{index:02d}.txt").write_text(text, encoding="utf-8")
    source = FilesSource(type="files", paths=(str(source_dir / "*.txt"),))
    listing = corpus.scan(source, validation=ValidationConfig(fraction=0.3))
    corpus.build(source, listing, workspace("corpus"))
    bpe = BpeTokenizerConfig(type="bpe", vocab_size=280)
    tokenizer.build(bpe, root / "corpus", workspace("tokenizer"))
    policy = TokenizationConfig()
    tokens = tokenized.build(policy, root / "corpus", root / "tokenizer", workspace("tokenized"))
    cache.build(
        TokenCacheConfig(length=24),
        root / "tokenized",
        workspace("cache"),
        tokenized_id=tokens.content_id,
        tokenizer_id="0" * 64,
    )
    experiment = ExperimentConfig(
        dataset="small",
        sequence_length=24,
        trainer=TrainerConfig(num_train_steps=1, train_batch_size=2, mp="p=f32,c=f32"),
        model=Gpt2Config(hidden_dim=32, num_layers=2, num_heads=4, attn_pdrop=0.1),
        evaluation=EvaluationConfig(batch_size=7, prompts=("def ", "", "naï"), sample_tokens=12),
    )
    Vocab, Pos = hax.Axis("vocab", 280), hax.Axis("position", 24)
    abstract = jax.eval_shape(
        lambda: build_model(experiment.model, Vocab, Pos, key=jax.random.key(0))
    )
    draw = np.random.default_rng(0)
    model = jax.tree.map(
        lambda x: jax.numpy.asarray(draw.normal(0.1, 0.3, x.shape), x.dtype), abstract
    )
    leaves = snapshot({"model": model})
    step = {"step": 1, "cursor": {"rows": 2}, "config": {}, "files": {}}
    checkpoint.write(root / "checkpoint", leaves, **step)
    sizes = {"vocab_size": Vocab.size, "sequence_length": Pos.size}
    write_durably(root / "checkpoint" / "model.json", sizes)
    return Trained(
        experiment, root / "tokenizer", root / "cache", root / "tokenized", root / "checkpoint"
    )
