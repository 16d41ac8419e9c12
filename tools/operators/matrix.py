"""The operators of this package in real architectures, each cell tried: `python -m tools.operators`.

Each architecture is built small, from its configuration, and each operator put in where it fits (`laurel_rewrite.plan.fits.plan_of`). A cell
works where the rewritten model passes its verification, runs in training mode at another batch size than it was captured with, and gives a
finite gradient to every parameter that the operator brought, with these off their start; and where its ONNX export, in onnxruntime, computes
what it does at two other sizes of all that is dynamic in it (`laurel_rewrite.export_onnx`, within 1e-4). Else it quotes why the operator is refused. Writes
`tools/results/operators.md` and `.json`, an architecture at a time; with names of operators, or `--architecture`, these cells alone are tried anew.

Exit status: 1 where a cell neither works nor is refused.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import re
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import onnx
import torch
from torch.utils import _pytree as pytree

from laurel_rewrite import detect, export_onnx, rewrite
from laurel_rewrite.errors import ConfigError, RewriteError
from laurel_rewrite.operators import registry
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.plan.fits import plan_of
from laurel_rewrite.sources.models import build
from laurel_rewrite.testing import moved

RESULTS = Path(__file__).parent.parent / "results"
_TEXT = {"vocab_size": 64}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("hf:gpt2", {**_TEXT, "n_layer": 3, "n_embd": 32, "n_head": 4, "n_positions": 64}),
    "Llama": ("hf:llama", {**_TEXT, "num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}),
    "BERT": ("hf:bert", {**_TEXT, "num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}),
    "T5": ("hf:t5", {**_TEXT, "num_layers": 3, "num_decoder_layers": 3, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4}),
    "ViT": ("timm:vit_tiny_patch16_224", {"depth": 3, "embed_dim": 32, "num_heads": 4, "img_size": 32, "patch_size": 8}),
    "Swin": ("timm:swin_tiny_patch4_window7_224", {"embed_dim": 16, "depths": (2, 2, 2), "num_heads": (2, 2, 2), "img_size": 56, "window_size": 7}),
    "ConvNeXt": ("timm:convnext_atto", {"depths": (2, 2, 3, 2), "dims": (16, 16, 32, 32)}),
    "ResNet": ("timm:resnet26", {}),
}  # fmt: skip
"""By name: the MODEL and its settings."""


@dataclass(frozen=True)
class Cell:
    """One operator in one architecture.

    Attributes:
        outcome: "works", "refused" or "failed".
        connections: how many it has.
        all_sites: these are all that the architecture has.
        start: "exact" and so on.
        dynamic: what sizes of the inputs the ONNX graph leaves open: "batch", "batch, sequence", or "".
        reason: why it is refused, or not everywhere, or what failed.
    """

    operator: str
    architecture: str
    outcome: str
    connections: int = 0
    all_sites: bool = False
    start: str = ""
    dynamic: str = ""
    reason: str = ""


def cells(architecture: str, names: list[str]) -> list[Cell]:
    """Those of one architecture, printed as they are tried."""
    torch.set_num_threads(1)
    found = []
    for cell in _tried(architecture, names):
        found.append(cell)
        print(
            f"{architecture:10} {cell.operator:17} {cell.outcome:8} {cell.connections or '':>3} {cell.dynamic} {cell.reason[:110]}",
            flush=True,
        )
    return found


def _tried(architecture: str, names: list[str]) -> Iterator[Cell]:
    spec, settings = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    built = build(spec, settings)
    model = built.model.eval()
    sites = detect(model, built.args, built.kwargs)
    for name in names:
        plan, reason = plan_of(sites, name, **({"rank": 4} if "rank" in registry.operator(name).options else {}))
        if plan is None:
            yield Cell(name, architecture, "refused", reason=reason)
            continue
        start = plan.sites[0].operator.start_of(plan.config(plan.sites[0]))
        count = len(plan.sites)
        try:
            dynamic = _try(copy.deepcopy(model), plan, built.args, built.kwargs)
        except (ConfigError, RewriteError) as error:
            yield Cell(name, architecture, "refused", reason=str(error.args[0]))
        except Exception as error:  # whatever a model or an operator raises, and a verification that fails
            yield Cell(name, architecture, "failed", count, reason=f"{type(error).__name__}: {str(error)[:300]}")
        else:
            yield Cell(name, architecture, "works", count, count == len({site.module for site in sites}), start, dynamic, reason)


def _try(model: Any, plan: Any, args: Any, kwargs: Any) -> str:
    """What is dynamic in the graph of one that works."""
    better = moved(rewrite(model, args, kwargs, plan=plan), 0.1).train()
    dynamic = _exported(better, args, kwargs)
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda x: torch.cat([x, x.flip(0)[:1]]) if x.ndim else x, (args, kwargs))
    out = better(*args, **kwargs)
    value = next(leaf for leaf in pytree.tree_leaves(dict(out) if hasattr(out, "keys") else out) if isinstance(leaf, torch.Tensor))
    assert value.isfinite().all(), "an output is not finite"
    (value.float().square().mean()).backward()
    for site, module in sites_of(better).items():
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, f"{site}.{name} has no gradient"
            assert parameter.grad.isfinite().all(), f"{site}.{name} has a gradient that is not finite"
    return dynamic


def _exported(model: Any, args: Any, kwargs: Any) -> str:
    """What is dynamic in the graph of a model, which computes what the model does."""
    with TemporaryDirectory() as folder:
        graph = onnx.load(export_onnx(model, args, kwargs, Path(folder) / "model.onnx"), load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    sizes = [info.type.tensor_type.shape.dim for info in graph.input if info.name not in weights]
    places = ("batch", "sequence")
    return ", ".join(word for place, word in enumerate(places) if any(dim[place].dim_param for dim in sizes if len(dim) > place))


def table(found: list[Cell]) -> str:
    """In Markdown, with the reasons below."""
    by_place = {(cell.operator, cell.architecture): cell for cell in found}
    names = list(dict.fromkeys(cell.operator for cell in found))
    outcomes = Counter(cell.outcome for cell in found)
    dynamic = {name: {cell.dynamic for cell in found if cell.architecture == name and cell.outcome == "works"} for name in ARCHITECTURES}
    reasons: dict[str, int] = {}
    lines = [
        "# Operators in architectures",
        "",
        f"{outcomes['works']} of {len(found)} cells work, {outcomes['refused']} are refused for a reason below, {outcomes['failed']} failed. Each was "
        "tried: see `tools/operators/matrix.py` for what is tried and how the architectures are built. A cell has the number of "
        "connections, and * where a stream of the architecture keeps its sums, for the reason of the number behind it.",
        "",
        "Dynamic in the ONNX graphs that work: "
        + "; ".join(f"{name}: {' or '.join(sorted(sizes)) or 'nothing'}" for name, sizes in dynamic.items())
        + ".",
        "",
        f"{date.today()}, torch {torch.__version__}, Python {platform.python_version()}. Made by `python -m tools.operators`.",
        "",
        "| operator | start | " + " | ".join(ARCHITECTURES) + " |",
        "|---|---|" + "---|" * len(ARCHITECTURES),
    ]
    for name in names:
        row = []
        for architecture in ARCHITECTURES:
            cell = by_place[name, architecture]
            number = f"({reasons.setdefault(_shape(cell), len(reasons) + 1)})" if cell.reason else ""
            row.append(
                {"works": f"{cell.connections}{' *' + number if number else ''}", "refused": number}.get(cell.outcome, f"FAILED {number}")
            )
        lines.append(f"| {name} | {registry.operator(name).start} | " + " | ".join(row) + " |")
    lines += ["", "Reasons, each as it was first said:", "", *(f"{number}. {text}" for text, number in reasons.items())]
    return "\n".join(lines) + "\n"


def _shape(cell: Cell) -> str:
    """A reason without the place and the operator's name, so that one is said once."""
    text = re.sub(r"^\S+( \([^)]*\))?: ", "", cell.reason)
    return text.replace(cell.operator, "the operator", 1) if text.startswith(cell.operator) else text


def read() -> dict[tuple[str, str], Cell]:
    """What was tried before."""
    file = RESULTS / "operators.json"
    cells = [Cell(**one) for one in json.loads(file.read_text())] if file.exists() else []
    return {(cell.operator, cell.architecture): cell for cell in cells}


def write(known: dict[tuple[str, str], Cell]) -> None:
    """Both results, of the operators and architectures that there are, in their order."""
    places = [(name, architecture) for architecture in ARCHITECTURES for name in registry.operators()]
    found = [known[place] for place in places if place in known]
    (RESULTS / "operators.json").write_text(json.dumps([asdict(cell) for cell in found], indent=1) + "\n")
    if len(found) == len(places):
        (RESULTS / "operators.md").write_text(table(found))


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("names", nargs=-1)
@click.option(
    "--architecture", "architectures", multiple=True, type=click.Choice([*ARCHITECTURES]), default=[*ARCHITECTURES], show_default=True
)
def main(names: tuple[str, ...], architectures: tuple[str, ...]) -> None:
    chosen = [registry.canonical(name) for name in names] or [*registry.operators()]
    known, found = read(), []
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("spawn")) as pool:
        for part in as_completed([pool.submit(cells, architecture, chosen) for architecture in architectures]):
            found += part.result()
            known |= {(cell.operator, cell.architecture): cell for cell in found}
            write(known)
    failed = [cell for cell in found if cell.outcome == "failed"]
    print(f"{sum(cell.outcome == 'works' for cell in found)} of {len(found)} work, {len(failed)} failed")
    sys.exit(1 if failed else 0)
