"""What the catalog shows of an asset before anything of it was made."""

from collections.abc import Mapping
from typing import Any

import dagster as dg

from modeling import canonical
from resources.materializations import CONFIG
from resources.provenance import scrub


def config_metadata(params: Any) -> Mapping[str, dg.JsonMetadataValue]:
    """Returns definition metadata: the slice of the YAML that a stage reads, defaults filled in.

    It is shown and kept, so credentials in URLs are taken out.
    """
    return {CONFIG: dg.MetadataValue.json(_without_secrets(canonical.plain(params)))}


def _without_secrets(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_secrets(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_secrets(item) for item in value]
    return scrub(value) if isinstance(value, str) else value
