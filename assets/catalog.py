"""What the catalog shows of an asset before anything of it was made."""

from collections.abc import Mapping
from typing import Any

import dagster as dg

from modeling import canonical
from resources.materializations import CONFIG


def config_metadata(params: Any) -> Mapping[str, dg.JsonMetadataValue]:
    """Returns definition metadata: the slice of the YAML that a stage reads, defaults filled in."""
    return {CONFIG: dg.MetadataValue.json(canonical.plain(params))}
