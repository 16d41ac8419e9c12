"""The graph passes, for use from Python: `InsertLaurel(plan)(graph_module)`.

A facade of the top-level package `passes`, which another installed package of that name could hide.
"""

from __future__ import annotations

from pathlib import Path

import passes as _passes

if Path(_passes.__file__ or "").resolve().parent.parent != Path(__file__).resolve().parent.parent:
    raise ImportError(
        f"laurel-rewrite needs its own package 'passes', but {_passes.__file__} was imported under that name. "
        "Put laurel-rewrite before it on sys.path, or uninstall the other."
    )

from passes.base import Pass, PassResult  # after the check of what was imported
from passes.insert_laurel import InsertLaurel

__all__ = ["InsertLaurel", "Pass", "PassResult"]
