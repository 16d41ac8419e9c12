"""The blocks of code in the README and in the pages of `docs`.

A block that no plain Python process can run is marked for another test, by a comment before it: `<!-- test: NAME -->`. Where NAME is that of a
file, the page has the reader write it, and the test of the page does so.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"(?:<!-- test: ([^>]*?) -->\n+)?```(\w+)\n(.*?)```", re.S)


_SCRIPT = """
from laurel_rewrite.sources.built import declare_torchvision_ops
declare_torchvision_ops()  # Lightning imports torchvision, which may be built for another PyTorch
import runpy
runpy.run_path("page.py", run_name="__main__")
"""


FRESH = "a fresh process"
"""Mark of the blocks that run behind all others, in a process of their own."""


class Block(NamedTuple):
    """The test that it is marked for, or nothing; its language and its text."""

    test: str
    language: str
    text: str


def every_block(page: Path) -> list[Block]:
    """All blocks, in order."""
    return [Block(*match) for match in _BLOCK.findall(page.read_text())]


def blocks(page: Path, language: str, test: str = "") -> list[str]:
    """The blocks of one language that are for one test, in order."""
    return [block.text for block in every_block(page) if (block.language, block.test) == (language, test)]


def run(page: Path, folder: Path, test: str = "") -> subprocess.CompletedProcess[str]:
    """The page's Python blocks as one script in a file, as a reader would have them, in a folder that is empty at first."""
    (folder / "page.py").write_text("\n".join(blocks(page, "python", test)))
    return subprocess.run([sys.executable, "-c", _SCRIPT], cwd=folder, capture_output=True, text=True, check=False)
