"""Strictness for every test: no silent rank promotion, no implicit dtype promotion, eight devices.

JAX reads `XLA_FLAGS` once, when its first backend starts, so the flags are set before any import.
"""

import dataclasses
import os
from pathlib import Path

import pytest

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", "8")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("DAGSTER_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@dataclasses.dataclass(frozen=True)
class Trained:
    """What evaluation and export start from: directories as the stages before leave them."""

    experiment: object
    tokenizer_dir: Path
    cache_dir: Path
    tokenized_dir: Path
    checkpoint_dir: Path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A small corpus through the data stages, and a checkpoint of a model with random weights."""
    import jax
    import numpy as np

    import haliax as hax
    from modeling.artifacts import Workspace, write_durably
    from modeling.data import cache, corpus, tokenized, tokenizer
    from modeling.data.config import (
        BpeTokenizerConfig,
        FilesSource,
        TokenizationConfig,
        ValidationConfig,
    )
    from modeling.evaluation.config import EvaluationConfig
    from modeling.experiment import ExperimentConfig
    from modeling.models.config import Gpt2Config
    from modeling.models.lm import build_model
    from modeling.training import checkpoint
    from modeling.training.config import TrainerConfig

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
        24,
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
    leaves = checkpoint.snapshot({"model": model})
    step = {"step": 1, "cursor": {"rows": 2}, "config": {}, "files": {}}
    checkpoint.write(root / "checkpoint", leaves, **step)
    sizes = {"vocab_size": Vocab.size, "sequence_length": Pos.size}
    write_durably(root / "checkpoint" / "model.json", sizes)
    return Trained(
        experiment, root / "tokenizer", root / "cache", root / "tokenized", root / "checkpoint"
    )
