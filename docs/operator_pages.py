"""One page an operator and an index by family, made of the registry alone; `conf.py` writes them before the build."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

from laurel_rewrite.app.operator_tables import STARTS, described
from laurel_rewrite.operators import registry
from laurel_rewrite.operators.families import FAMILIES
from laurel_rewrite.operators.registry import Operator

NEEDS = {
    "features": "a feature axis of known size",
    "maps": "a feature axis that linear maps fit: the last one, or channels of 1 to 3 dimensional convolutions",
    "plain links": "no norm and no activation between two connections, unless the operator is asked again behind them",
    "norms between": "a norm between any two connections (post-norm models)",
    "whole stream": "every connection of a stream; a stream has one such operator",
    "features last": "features on the last axis",
    "branch input": "a branch whose input is one value, behind its norm where it has one",
    "attention": "an attention among the branches of the stream",
    "projections": "queries, keys and values that are separate linear maps",
}
"""What each need asks of a model."""
WHEN = {
    "exact": "The rewritten model starts as the model that it was made from: for training from scratch, and to go on from a trained model.",
    "evaluation": "In evaluation mode the rewritten model is the model that it was made from; training differs from its first step.",
    "scale-free": "Where every reader of the stream is a normalisation (pre-norm models), the rewritten model starts as the model that it was made "
    "from, up to the epsilon of these norms. Elsewhere the rewrite says that the start differs.",
    "inexact": "The rewritten model is another function at its start: train it from scratch, or let the operator take over step by step with "
    "`--anneal linear --anneal-steps STEPS` ([annealing](../operators.md#annealing)).",
}
"""What follows from a start."""
COSTS = "Costs are those of 24 connections in 12 blocks with D = 768 features."


def pages() -> dict[str, str]:
    """The text of each page by its file name."""
    families: dict[str, list[str]] = {family: [] for family in FAMILIES}
    for name, operator in registry.operators().items():
        family = operator.connection.__module__.rpartition(".")[2]
        if family in families:  # no plugin of the machine that builds the site
            families[family].append(name)
    found = {file_name(name): _page(registry.operator(name), family) for family, names in families.items() for name in names}
    return {"index.md": _index(families), **found}


def write(folder: Path) -> None:
    """Write the pages that changed, and take away those of operators that are gone."""
    folder.mkdir(exist_ok=True)
    texts = pages()
    for path in folder.glob("*.md"):
        if path.name not in texts:
            path.unlink()
    for name, text in texts.items():
        path = folder / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def file_name(operator: str) -> str:
    return f"{operator.replace('+', '-')}.md"


def _index(families: dict[str, list[str]]) -> str:
    lines = ["# All operators", "", "By family. [What operators are, and how to choose](../operators.md).", COSTS]
    for family, names in families.items():
        lines += ["", f"## {family.replace('_', ' ').capitalize()}", "", _about(family), ""]
        lines += ["| operator | formula | start | parameters |", "|---|---|---|---|"]
        for name in names:
            known = described(name)
            lines.append(
                f"| [`{name}`]({file_name(name)}) | {_code(known['formula'])} | {STARTS[known['start']]} | {known['parameters']:,} |"
            )
    lines += ["", "```{toctree}", ":hidden:", "", *(f"{name} <{file_name(name)}>" for names in families.values() for name in names), "```"]
    return "\n".join(lines) + "\n"


def _about(family: str) -> str:
    """The first paragraph of a family's module."""
    module = importlib.import_module(f"laurel_rewrite.operators.families.{family}")
    return " ".join((inspect.getdoc(module) or "").partition("\n\n")[0].split())


def _page(operator: Operator, family: str) -> str:
    known, name = described(operator.name), operator.name
    dim, reads = 768, f" It reads earlier states of its stream, and leaves up to {known['state'] / 768:.0f} D a position for the next."
    facts = [
        ("start", STARTS[known["start"]]),
        ("parameters", f"{known['parameters']:,}"),
        ("FLOPs a position", f"{known['flops']:,.0f} a connection"),
        ("moved a position", f"{known['moved'] / dim:.1f} D elements a connection; the plain sum moves 3 D"),
        ("paper", known["paper"] or "none"),
        ("family", f"[{family.replace('_', ' ')}](index.md)"),
    ]
    lines = [f"# {name}", "", "```text", known["formula"], "```", "", (inspect.getdoc(operator.connection) or "").strip(), ""]
    lines += ["| | |", "|---|---|", *(f"| {term} | {text} |" for term, text in facts), "", COSTS, "", "## When to use it", ""]
    lines += [WHEN[known["start"]] + (reads if operator.uses_history and known["state"] else ""), "", *_needs(known["needs"]), ""]
    lines += [f"```sh\nlaurel-rewrite operators {name} --model model.py\nlaurel-rewrite model.py --variant {name}\n```", ""]
    lines += ["The first line says whether it fits the model, and why not. The second one carries it out.", "", "## Options", ""]
    lines += ["| option | what | default | values |", "|---|---|---|---|", *(_option(key, one) for key, one in known["options"].items())]
    return "\n".join(lines) + "\n"


def _needs(needs: list[str]) -> list[str]:
    if not needs:
        return ["It fits every residual connection."]
    return ["It needs", "", *(f"* {NEEDS[need]}" for need in needs)]


def _option(key: str, one: dict[str, Any]) -> str:
    values = ", ".join(f"`{choice}`" for choice in one["choices"])
    return f"| `--{key.replace('_', '-')}` | {one['help'].replace('|', chr(92) + '|')} | `{one['default']}` | {values} |"


def _code(text: str) -> str:
    """Code in a cell of a table."""
    return f"`{text.replace('|', chr(92) + '|')}`"
