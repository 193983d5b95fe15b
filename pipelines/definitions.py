"""The code location `lm`: what `workspace.yaml` names."""

from pipelines.build import build_defs, catalog_from_environment

defs = build_defs(catalog_from_environment())
