"""A lineage for others to read: one self-contained HTML page, and W3C PROV.

PROV-JSON (https://www.w3.org/submissions/prov-json) in its own words: an artifact is an *entity*,
the run of a recipe an *activity*, the commit of the code that ran an *agent*:

    wasGeneratedBy(artifact, recipe)   used(recipe, input)   wasDerivedFrom(artifact, input)
    wasAssociatedWith(recipe, commit)

A file that an artifact was read from is an entity too: its bytes, used under its path as role.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from modeling import pages
from pipelines.lineage import Node, Record, files_of, summary

_BOX_WIDTH, _BOX_HEIGHT, _GAP_X, _GAP_Y, _MARGIN = 170, 54, 60, 26, 44
_NAMESPACE = "urn:levanter:"


def to_html(node: Node) -> str:
    """Returns the page: the graph, and below it every artifact with parameters and provenance."""
    records, edges = _graph(node)
    places = _layout(records, edges)
    boxes = [{"x": x, "y": y, "width": _BOX_WIDTH, "height": _BOX_HEIGHT} | _named(records[key])
             for key, (x, y) in places.items()]  # fmt: skip
    inputs: dict[str, list[tuple[str, dict[str, str]]]] = {key: [] for key in records}
    for source, target, role in edges:
        inputs[target].append((role, _named(records[source])))
    return (
        pages.templates("pipelines")
        .get_template("lineage.html")
        .render(
            top=node.record,
            boxes=boxes,
            width=max(x for x, _ in places.values()) + _BOX_WIDTH + _MARGIN,
            height=max(y for _, y in places.values()) + _BOX_HEIGHT + _MARGIN,
            edges=[
                {"curve": _curve(places[source], places[target]), "role": role}
                for source, target, role in edges
            ],
            artifacts=[
                _described(record) | {"inputs": inputs[key]} for key, record in records.items()
            ],
        )
    )


def to_prov(node: Node) -> str:
    """Returns the lineage as PROV-JSON."""
    records, edges = _graph(node)
    entities, activities, generated, agents, associated = {}, {}, {}, {}, {}
    for key, record in records.items():
        recipe, times = _activity(record), record["provenance"].get("times", {})
        entities[key] = {
            "prov:type": record["kind"],
            "levanter:content_id": record["content_id"],
            "levanter:numerics": record["numerics"]["id"],
        }
        activities[recipe] = {
            "prov:type": f"make {record['kind']}",
            "levanter:recipe_id": record["recipe_id"],
            "levanter:parameters": json.dumps(record["recipe"]["params"], sort_keys=True),
            "levanter:commit": str(record["provenance"].get("git", {}).get("commit")),
        } | {
            f"prov:{name}Time": times[which]
            for name, which in (("start", "started"), ("end", "ended"))
            if which in times
        }
        generated[f"_:g{len(generated)}"] = {"prov:entity": key, "prov:activity": recipe}
        if commit := record["provenance"].get("git", {}).get("commit"):
            agents[f"levanter:commit-{commit}"] = {
                "prov:type": "prov:SoftwareAgent", "levanter:commit": commit,
            }  # fmt: skip
            associated[f"_:a{len(associated)}"] = {
                "prov:activity": recipe, "prov:agent": f"levanter:commit-{commit}",
            }  # fmt: skip
    used, derived = {}, {}
    for number, (source, target, role) in enumerate(edges):
        recipe = _activity(records[target])
        used[f"_:u{number}"] = {"prov:activity": recipe, "prov:entity": source, "prov:role": role}
        derived[f"_:d{number}"] = {
            "prov:generatedEntity": target,
            "prov:usedEntity": source,
            "prov:activity": recipe,
        }
    for key, record in records.items():
        recipe = _activity(record)
        for path, sha256 in files_of(record).items():
            file = f"levanter:file-{sha256}"
            entities[file] = {"prov:type": "file", "levanter:sha256": sha256}
            used[f"_:u{len(used)}"] = {
                "prov:activity": recipe, "prov:entity": file, "prov:role": path,
            }  # fmt: skip
            derived[f"_:d{len(derived)}"] = {
                "prov:generatedEntity": key, "prov:usedEntity": file, "prov:activity": recipe,
            }  # fmt: skip
    document = {
        "prefix": {"levanter": _NAMESPACE},
        "entity": entities,
        "activity": activities,
        "agent": agents,
        "wasGeneratedBy": generated,
        "used": used,
        "wasDerivedFrom": derived,
        "wasAssociatedWith": associated,
    }
    return json.dumps(document, indent=2, ensure_ascii=False)


def _graph(node: Node) -> tuple[dict[str, Record], list[tuple[str, str, str]]]:
    """Returns each artifact once, by a name, and the edges as (input, artifact, role)."""
    records: dict[str, Record] = {}
    edges: dict[tuple[str, str, str], None] = {}

    def visit(node: Node) -> str:
        name = f"levanter:{node.record['kind']}-{node.record['content_id']}"
        records.setdefault(name, node.record)
        for child in node.inputs:
            edges[visit(child), name, child.role] = None
        return name

    visit(node)
    return records, list(edges)


def _layout(
    records: Mapping[str, Record], edges: list[tuple[str, str, str]]
) -> dict[str, tuple[int, int]]:
    """Places each artifact in a column right of all that it was made of."""
    column = dict.fromkeys(records, 0)
    for _ in records:  # the longest path has at most as many steps as there are artifacts
        for source, target, _role in edges:
            column[target] = max(column[target], column[source] + 1)
    filled: dict[int, int] = {}
    places = {}
    for key in records:
        row = filled.get(column[key], 0)
        filled[column[key]] = row + 1
        places[key] = (
            _MARGIN + column[key] * (_BOX_WIDTH + _GAP_X),
            _MARGIN + row * (_BOX_HEIGHT + _GAP_Y) + (column[key] % 2) * (_BOX_HEIGHT + _GAP_Y),
        )
    return places


def _curve(source: tuple[int, int], target: tuple[int, int]) -> str:
    """Returns an arrow; one that passes other columns bows out around their boxes."""
    x0, y0 = source[0] + _BOX_WIDTH, source[1] + _BOX_HEIGHT // 2
    x1, y1 = target[0], target[1] + _BOX_HEIGHT // 2
    bend = max(_GAP_X, (x1 - x0) // 3)
    is_long = x1 - x0 > _GAP_X
    bow = (_BOX_HEIGHT + _GAP_Y) * (1 if source[1] > _MARGIN else -1) if is_long else 0
    return f"M{x0} {y0}C{x0 + bend} {y0 + bow} {x1 - bend} {y1 + bow} {x1} {y1}"


def _named(record: Record) -> dict[str, str]:
    short_id = record["content_id"][:12]
    return {
        "id": f"{record['kind']}-{short_id}",
        "kind": record["kind"],
        "short_id": short_id,
        "summary": summary(record),
    }


def _described(record: Record) -> dict[str, Any]:
    provenance = record["provenance"]
    shown = {"commit": provenance.get("git", {}).get("commit"), **provenance.get("times", {})}
    return _named(record) | {
        "content_id": record["content_id"],
        "recipe_id": record["recipe_id"],
        "numerics": record["numerics"]["id"],
        "params": list(_flat(record["recipe"]["params"])),
        "provenance": [(name, value) for name, value in shown.items() if value is not None],
        "leaves": sorted(record["leaves"].items()),
    }


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yields the fields of nested parameters as dotted paths."""
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _flat(item, f"{path}.{name}" if path else str(name))
    else:
        yield path, json.dumps(value, ensure_ascii=False)


def _activity(record: Record) -> str:
    return f"levanter:run-{record['recipe_id']}-{record['numerics']['id'][:12]}"
