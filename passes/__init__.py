"""Graph passes, one a file: `InsertLaurel(plan)(graph_module)`.

The folder stands at the top of the repository and is installed as `laurel_rewrite.passes`, so that no other package's name is taken.
"""

from laurel_rewrite.passes.base import Pass, PassResult
from laurel_rewrite.passes.insert_laurel import InsertLaurel

__all__ = ["InsertLaurel", "Pass", "PassResult"]
