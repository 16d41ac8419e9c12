"""Write `laurel_rewrite/operators/builtin.json`: the operators of this package and their options, for a help that answers without torch.

python tools/list_operators.py
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from laurel_rewrite.operators import registry

FILE = Path(registry.__file__).with_name("builtin.json")


def listed() -> str:
    """The file's text."""
    ours = {
        name: operator for name, operator in registry.operators().items() if operator.connection.__module__.startswith(registry.__package__)
    }
    found = {
        name: {
            "family": operator.connection.__module__.rpartition(".")[2],
            "formula": operator.formula,
            "options": {key: asdict(option) for key, option in operator.options.items()},
        }
        for name, operator in ours.items()
    }
    return json.dumps(found, indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(listed())
    print(f"{len(json.loads(listed()))} operators are in {FILE.name}.")
