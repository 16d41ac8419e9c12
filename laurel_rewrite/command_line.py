"""What was typed, as a result that goes elsewhere may show it."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import click

WORDS = "laurel_rewrite.words"
"""In the metadata of click's context: what was typed behind `laurel-rewrite`."""
_KINDS = ("hf", "timm", "torchvision", "datasets")


def command_line() -> str:
    """What was typed, without the folders of this machine; "" where nobody typed anything."""
    context = click.get_current_context(silent=True)
    words = context.meta.get(WORDS) if context is not None else None
    return shlex.join(["laurel-rewrite", *map(without_folders, words)]) if words is not None else ""


def without_folders(word: str) -> str:
    """A word of the command line with a path in it shortened to its last name: `hf:/data/model` is `hf:model`."""
    kind, colon, rest = word.rpartition(":") if word.partition(":")[0] in _KINDS else ("", "", word)
    option, equals, value = rest.partition("=") if rest.startswith("--") else ("", "", rest)
    path = Path(value)
    local = value and (path.is_absolute() or (os.sep in value and path.exists()) or value.startswith(("./", "../")))
    return f"{kind}{colon}{option}{equals}{path.name if local else value}"
