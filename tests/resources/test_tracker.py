"""The tracker keeps the numbers, offline, and learns no secret."""

import subprocess
import sys
from pathlib import Path

import pytest

from resources.tracker import open_tracker

CANARY = "c4n4ryc4n4ry"
SCRIPT = """
from pathlib import Path

from resources.tracker import open_tracker
Path("page.html").write_text("<p>naïve</p>", encoding="utf-8")
with open_tracker("nano", {"experiment": {"trainer": {"seed": 3}}}) as tracker:
    tracker.log(1, {"train/loss": 5.5})
    tracker.log(2, {"train/loss": 4.5})
    tracker.show(2, "pictures/foreseen", Path("page.html"))
    tracker.summarize({"loss_last": 4.5})
"""


def test_an_offline_run_is_written_quietly_and_without_secrets(tmp_path, monkeypatch):
    """In a process of its own, as in training; its arguments and variables hold canaries."""
    variables = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_API_KEY": CANARY * 4}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, f"--password={CANARY}"],
        capture_output=True,
        check=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert done.stdout + done.stderr == b""
    (log,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    kept = log.read_bytes()
    for words in (b"train/loss", b"loss_last", b"seed", b"nano"):
        assert words in kept
    (page,) = (tmp_path / "wandb").rglob("pictures/foreseen_2_*.html")
    assert page.read_text("utf-8") == "<p>naïve</p>"
    for path in tmp_path.rglob("*"):
        if path.is_file() and not path.is_symlink():
            assert CANARY.encode() not in path.read_bytes(), path


def test_disabled_imports_nothing(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with open_tracker("nano", {}) as tracker:
        tracker.log(1, {"train/loss": 5.5})
        tracker.show(1, "pictures/foreseen", Path("no-such-page.html"))
        tracker.summarize({})


def test_an_unknown_mode_is_told(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "of")
    with pytest.raises(ValueError, match="WANDB_MODE: 'of'"), open_tracker("nano", {}):
        pass
