"""The Dagster instance: where it lives and how it is set up.

`DAGSTER_HOME` is kept when it is set, else it becomes `.dagster_home` in the checkout. The
directory is made on first use and gets the `dagster.yaml` that ships with the repository. The copy
follows the shipped file until somebody edits the copy: from then on it is theirs.
"""

import fcntl
import hashlib
import os
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
SHIPPED = CHECKOUT / "dagster.yaml"
_STAMP = ".dagster.yaml.sha256"
_MADE = ".storage-made"


def ensure_home() -> Path:
    """Sets up `DAGSTER_HOME`, also in the environment of this process and its children.

    Raises:
        FileNotFoundError: `dagster.yaml` is missing, as in an install without a checkout.
    """
    home = Path(os.environ.get("DAGSTER_HOME") or CHECKOUT / ".dagster_home").absolute()
    home.mkdir(parents=True, exist_ok=True)
    _ship(home)
    os.environ["DAGSTER_HOME"] = str(home)
    # The file stops telemetry; this stops the upload thread of processes that have not read it yet.
    os.environ.setdefault("DAGSTER_DISABLE_TELEMETRY", "1")
    _make_storage(home)
    return home


def _make_storage(home: Path) -> None:
    """Makes the instance's databases: two processes that make them at once leave them broken."""
    if (home / _MADE).exists():
        return
    with (home / f"{_MADE}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / _MADE).exists():
            import dagster as dg

            with dg.DagsterInstance.get():
                (home / _MADE).touch()


def _ship(home: Path) -> None:
    target, stamp = home / "dagster.yaml", home / _STAMP
    shipped = SHIPPED.read_bytes()
    if target.exists():
        current = hashlib.sha256(target.read_bytes()).hexdigest()
        untouched = stamp.exists() and stamp.read_text() == current
        if not untouched:
            return
    if not target.exists() or target.read_bytes() != shipped:
        attempt = home / f".dagster.yaml.{os.getpid()}"
        attempt.write_bytes(shipped)
        attempt.replace(target)
    stamp.write_text(hashlib.sha256(shipped).hexdigest())
