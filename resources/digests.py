"""Where the digests of unchanged source files are remembered, and how to do without.

The memo lies in `$DAGSTER_HOME/digests.sqlite`. `LEVANTER_REHASH=1` reads every file anew.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modeling.data.digests import DigestMemo

REHASH = "LEVANTER_REHASH"


def open_memo(environ: Mapping[str, str] = os.environ) -> "DigestMemo | None":
    """Returns the memo of this machine; None if every file is to be read."""
    from modeling.data.digests import DigestMemo

    home = environ.get("DAGSTER_HOME")
    if home is None or environ.get(REHASH, "") not in ("", "0"):
        return None
    return DigestMemo(Path(home) / "digests.sqlite")
