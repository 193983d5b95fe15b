"""The `README.md` of an export: what the model is, how to run it, and which bytes made it.

A card is a claim that a stranger can check: it lists the SHA-256 of every other file, which hosting
sites show beside downloads, and the content ids that lead from the weights back to the corpus. It
therefore says nothing that depends on where or when it was written.
"""

from collections.abc import Mapping
from typing import Any

LINEAGE = (
    ("raw_corpus", "Raw corpus"),
    ("tokenizer", "Tokenizer"),
    ("tokenized_corpus", "Tokenized corpus"),
    ("token_cache", "Token cache"),
    ("checkpoint", "Checkpoint"),
)
"""Artifact kinds in the order that they are made, and what the card calls them."""
_SOMETIMES = {"initial_checkpoint": "Checkpoint that training began from"}


def model_card(
    config: Mapping[str, Any],
    *,
    num_parameters: int,
    lineage: Mapping[str, str],
    digests: Mapping[str, str],
    evaluation: Mapping[str, float] | None = None,
    has_tokenizer: bool = True,
) -> str:
    """Returns the card, front matter and all.

    Args:
        config: the export's `config.json`.
        num_parameters: elements of all tensors.
        lineage: content id by artifact kind; each of `LINEAGE`, and others after them.
        digests: SHA-256 by file name.
        evaluation: figures by name.
        has_tokenizer: whether a tokenizer lies beside the weights.
    """
    missing = [kind for kind, _ in LINEAGE if kind not in lineage]
    if missing:
        raise ValueError(
            f"lineage: no content id of {missing} among {sorted(lineage)}. Give one for each stage "
            f"from the corpus to the checkpoint, so that the card can be checked."
        )
    titles = dict(LINEAGE) | {kind: title for kind, title in _SOMETIMES.items() if kind in lineage}
    kinds = [*titles, *sorted(set(lineage) - set(titles))]
    ids = [(titles.get(kind, kind), f"`{lineage[kind]}`") for kind in kinds]
    files = [(f"`{name}`", f"`{digests[name]}`") for name in sorted(digests)]
    sizes = {name: config[field] for name, field in _FIELDS[config["model_type"]].items()}
    shape = [
        ("Parameters", f"{num_parameters:,}"),
        ("Layers", f"{sizes['layers']}"),
        ("Width", f"{sizes['width']:,}"),
        ("Heads", f"{sizes['heads']}"),
        ("Context", f"{sizes['context']:,} tokens"),
        ("Vocabulary", f"{config['vocab_size']:,} ids"),
        ("Weights", config["dtype"]),
    ]
    sections = [
        _FRONT_MATTER.format(config["model_type"]),
        f"# {_TITLES[config['model_type']]} language model",
        "A decoder-only transformer trained from scratch on the corpus named below.",
        _table(("", ""), shape),
        "## Use",
        _USE if has_tokenizer else _NO_TOKENIZER,
    ]
    if evaluation:
        figures = [(name, f"{value:.6g}") for name, value in evaluation.items()]
        sections += ["## Evaluation", _table(("Measure", "Value"), figures)]
    sections += ["## Lineage", _LINEAGE_TEXT, _table(("Artifact", "Content id"), ids)]
    sections += ["## Files", _table(("File", "SHA-256"), files)]
    return "\n\n".join(sections) + "\n"


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [head, ("---", "---"), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


_FRONT_MATTER = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- {}
- jax
---"""

_TITLES = {"gpt2": "GPT-2", "llama": "Llama"}
_FIELDS: Mapping[str, Mapping[str, str]] = {
    "gpt2": {
        "layers": "n_layer", "width": "n_embd", "heads": "n_head", "context": "n_positions",
    },
    "llama": {
        "layers": "num_hidden_layers", "width": "hidden_size", "heads": "num_attention_heads",
        "context": "max_position_embeddings",
    },
}  # fmt: skip
"""What `config.json` of each architecture calls its sizes."""

_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".")
inputs = tokenizer("def main(", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
```"""

_NO_TOKENIZER = (
    "The model was trained on ids that were made elsewhere, so there is no tokenizer here: use the "
    "one that made them.\n\n```python\nfrom transformers import AutoModelForCausalLM\n\n"
    'model = AutoModelForCausalLM.from_pretrained(".")\n```'
)

_LINEAGE_TEXT = (
    "Each artifact is named by a digest of its content, and its record holds the digests of what "
    "it was made from. Following them down leads to the SHA-256 of every file of the corpus."
)
