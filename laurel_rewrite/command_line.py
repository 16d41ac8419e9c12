"""What was typed, as a result that goes elsewhere may show it."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import click

WORDS = "laurel_rewrite.words"
"""In the metadata of click's context: what was typed behind `laurel-rewrite`."""
_PATH = re.compile(r"(^|[=:,])((?:~|\.{0,2})/[^=:,]*)")
"""One that says where it begins, in a word: behind `hf:`, `--plan=`, `data=`."""


def command_line() -> str:
    """What was typed, without the folders of this machine; "" where nobody typed anything."""
    context = click.get_current_context(silent=True)
    words = context.meta.get(WORDS) if context is not None else None
    return shlex.join(["laurel-rewrite", *map(without_folders, words)]) if words is not None else ""


def without_folders(word: str) -> str:
    """A word of the command line with a path in it shortened to its last name: `hf:/data/model` is `hf:model`."""
    if os.sep in word and Path(word).exists():
        return Path(word).name
    return _PATH.sub(lambda found: found[1] + Path(found[2]).name, word)
