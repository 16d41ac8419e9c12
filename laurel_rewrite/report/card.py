"""README.md of a result's folder: what it is, what it costs, how to go on. In the form of a model card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from laurel_rewrite.backends.module.saved_folder import CONFIG
from laurel_rewrite.report.answer import answer

CARD = "README.md"
_LOAD = """## Train it

```python
import torch

import laurel_rewrite

model = laurel_rewrite.load(".")  # this folder; another path from elsewhere
optimizer = torch.optim.AdamW(laurel_rewrite.param_groups(model, lr=1e-3, weight_decay=0.1))
```

`laurel_rewrite.freeze_base(model)` trains the new parameters alone, `laurel_rewrite.save(model, folder)` writes what was trained, and
`laurel_rewrite.remove(model)` is the model without them."""
_EXPORT = """`laurel-rewrite export FOLDER` writes what training left there as ONNX."""


def card(report: Mapping[str, Any]) -> str:
    """The card of a report, given the content of its `report.json`."""
    return "\n\n".join(_sections(report)) + "\n"


def _sections(report: Mapping[str, Any]) -> Iterator[str]:
    variants = list(dict.fromkeys(site["variant"] for site in report["plan"]["sites"]))
    tags = "".join(f"\n- {tag}" for tag in ("residual-connections", *variants))
    yield f"---\nlibrary_name: laurel-rewrite\ntags:{tags}\n---"
    yield f"# {report['title']} with {', '.join(variants)}"
    yield " ".join(answer(report))
    yield "`report.html` has all figures; `plan.toml` says what each residual connection got."
    loadable, files = CONFIG in report["files"], set(report["files"])
    if loadable:
        yield _LOAD
    if graphs := [name for name in ("baseline.onnx", "laurel.onnx") if name in files]:
        start = " at their start" if loadable else ""  # a graph may have been given trained ones
        words = {"baseline.onnx": "the model without them", "laurel.onnx": f"the model with the new connections{start}"}
        yield "## Deploy it\n\n" + ", ".join(f"`{name}` is {words[name]}" for name in graphs) + "." + (f" {_EXPORT}" if loadable else "")
    yield "## How it was made\n\n" + _made(report)


def _made(report: Mapping[str, Any]) -> str:
    passed = sum(check["outcome"] == "passed" for check in report["verification"])
    lines = [f"    {report['command']}\n"] if report["command"] else []
    lines.append(f"laurel-rewrite {report['version']}" + "".join(f", {name} {one}" for name, one in report["versions"].items()) + ".")
    lines.append(f"{passed} of {len(report['verification'])} checks passed." if report["verification"] else "Nothing was verified.")
    return "\n".join(lines)
