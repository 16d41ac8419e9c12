"""The residual operators of this package: one module a family, which registers its operators when it is imported.

A family is a file here and its name in `FAMILIES`. `tools/list_operators.py` writes what the command's help says of them.
"""

FAMILIES = (
    "laurel",
    "scaled",
    "dropped",
    "gated",
    "directed",
    "normed",
    "lambdas",
    "dense",
    "ways",
    "depth_attention",
    "hyper",
    "lanes",
    "rewired",
)
"""In the order in which they are listed."""
