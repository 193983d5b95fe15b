"""Where work on this machine lies: builds and copies of a remote store, and compiled programs.

Launched processes read this too, so that no Dagster is imported here.
"""

import os
from collections.abc import Mapping
from pathlib import Path


def scratch_directory(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Returns the local directory for builds and copies of a remote store, if any is set."""
    if scratch := environ.get("LEVANTER_SCRATCH"):
        return Path(scratch)
    home = environ.get("DAGSTER_HOME")
    return Path(home) / "scratch" if home else None


def programs_directory(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Returns where compiled programs are kept; None if nobody says, or `off` is said.

    `LEVANTER_COMPILE_CACHE` names a directory or is `off`; else they lie beside other scratch work.
    """
    wanted = environ.get("LEVANTER_COMPILE_CACHE")
    if wanted:
        return None if wanted == "off" else Path(wanted).absolute()
    scratch = scratch_directory(environ)
    return scratch and scratch / "programs"
