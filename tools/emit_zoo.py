"""Survey: architectures to ONNX, back to PyTorch as `--emit-torch` does it, trained there, and to ONNX once more.

    python tools/emit_zoo.py                           # all; writes tools/results/emit-torch.md line by line
    python tools/emit_zoo.py hf:gpt2 ...               # some of them; writes nothing
    python tools/emit_zoo.py hf:gpt2 ... --out FILE    # their lines in the file anew

Each model is small, has random weights, and goes the way twice: as it is, and rewritten with `rw+lr` of rank 4, whose graph keeps LAuReL's
functions. All parameters are moved from their start first, as training moves them: an exporter leaves out biases of zero and has equal
tensors once, so that a fresh model's graph says less than the model. The module that comes back is compared with the PyTorch model at
another batch, and another sequence where the graph has it dynamic; each of its parameters must get a finite gradient; three steps of AdamW must
make the loss smaller; and its own ONNX graph is run with the first batch and sequence again.

Exit status: 1 where a line has a remark.
"""

from __future__ import annotations

import gc
import logging
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 99}
GROUPED = {**SMALL, "num_key_value_heads": 2}
VISION = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
MODELS: dict[str, dict[str, Any]] = {
    "hf:gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 99},
    "hf:gpt_neo": {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "vocab_size": 99, "attention_types": [[["global", "local"], 1]]},
    "hf:gptj": {"n_layer": 2, "n_embd": 32, "n_head": 4, "rotary_dim": 4, "vocab_size": 99},
    "hf:gpt_neox": SMALL,
    "hf:opt": {"num_hidden_layers": 2, "hidden_size": 32, "ffn_dim": 64, "num_attention_heads": 4, "vocab_size": 99, "word_embed_proj_dim": 32},
    "hf:bloom": {"n_layer": 2, "hidden_size": 32, "n_head": 4, "vocab_size": 99},
    "hf:falcon": {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 99},
    "hf:llama": GROUPED,
    "hf:mistral": GROUPED,
    "hf:qwen2": GROUPED,
    "hf:qwen3": {**GROUPED, "head_dim": 8},
    "hf:gemma": {**GROUPED, "head_dim": 8},
    "hf:gemma2": {**GROUPED, "head_dim": 8},
    "hf:phi": SMALL,
    "hf:cohere": GROUPED,
    "hf:bert": SMALL,
    "hf:roberta": SMALL,
    "hf:distilbert": {"n_layers": 2, "dim": 32, "hidden_dim": 64, "n_heads": 4, "vocab_size": 99},
    "hf:albert": {**SMALL, "embedding_size": 16},
    "hf:deberta-v2": SMALL,
    "hf:t5": {"num_layers": 2, "d_model": 32, "d_ff": 64, "num_heads": 4, "d_kv": 8, "vocab_size": 99},
    "hf:bart": {
        "encoder_layers": 2, "decoder_layers": 2, "d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "vocab_size": 99,
    },
    "hf:vit": VISION,
    "hf:deit": VISION,
    "hf:swin": {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "image_size": 32, "patch_size": 2, "window_size": 4},
    "timm:vit_tiny_patch16_224": {"img_size": 32, "depth": 2},
    "timm:deit_tiny_patch16_224": {"img_size": 32, "depth": 2},
    "timm:swin_tiny_patch4_window7_224": {"img_size": 56, "depths": [2, 2], "num_heads": [2, 4], "embed_dim": 16},
    "timm:mixer_s32_224": {},
    "timm:test_convnext": {},
    "timm:efficientnet_b0": {},
    "timm:regnetx_002": {},
    "timm:mobilenetv3_small_050": {},
    "timm:test_resnet": {},
    "torchvision:resnet18": {},
    "torchvision:densenet121": {},
    "torchvision:mobilenet_v2": {"width_mult": 0.25},
}  # fmt: skip
"""MODEL -> settings that make it small."""
CONVOLUTIONS = ("convnext", "efficientnet", "regnet", "mobilenet", "resnet", "densenet")
BATCH, SHORTER, PIXELS, STEPS, RANK = 3, 3, 64, 3, 4
TOLERANCE, AGAIN = 1e-5, 1e-4
"""Relative, and absolute in units of the largest number: against PyTorch, and in onnxruntime after training."""


@dataclass
class Row:
    """One line of the table; a differing or missing figure makes a remark."""

    model: str
    variant: str
    parameters: tuple[int, int] = (0, 0)
    dynamic: tuple[int, int] = (0, 0)
    error: float = float("nan")
    losses: list[float] = field(default_factory=list)
    again: float = float("nan")
    seconds: float = 0.0
    remarks: list[str] = field(default_factory=list)

    def line(self) -> str:
        losses = " ".join(f"{loss:.4g}" for loss in self.losses)
        cells = [
            self.model, self.variant, f"{self.parameters[0]:,} / {self.parameters[1]:,}", f"{self.dynamic[0]} / {self.dynamic[1]}",
            f"{self.error:.1e}", losses, f"{self.again:.1e}", f"{self.seconds:.0f}", "; ".join(self.remarks).replace("|", "\\|"),
        ]  # fmt: skip
        return "| " + " | ".join(cells) + " |\n"


HEADING = (
    "| model | variant | parameters: PyTorch / emitted | dynamic dimensions: first graph / second | difference | losses | "
    "difference after training | s | remark |\n|---|---|---:|---:|---:|---|---:|---:|---|\n"
)


def moved(model: nn.Module, seed: int = 0) -> nn.Module:
    """With each parameter away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def other(leaf: Tensor, generator: torch.Generator) -> Tensor:
    """An input of another batch, and of another sequence where it holds ids."""
    if leaf.is_floating_point():
        return torch.randn(BATCH, *leaf.shape[1:], generator=generator)
    return torch.randint(1, int(leaf.max()) + 1, (BATCH, leaf.shape[1] - SHORTER), generator=generator)


def tensors(result: Any) -> list[Tensor]:
    """The floating-point tensors of what a model returns."""
    from torch.utils import _pytree as pytree

    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def difference(found: Sequence[Any], expected: Sequence[Any]) -> float:
    """The largest difference over outputs, in units of 1 or of the output's largest number."""
    if [tuple(a.shape) for a in found] != [tuple(b.shape) for b in expected]:
        return float("inf")
    return max(
        float(np.abs(np.asarray(a) - np.asarray(b)).max() / max(1.0, float(np.abs(b).max()))) for a, b in zip(found, expected, strict=True)
    )


def ordered(path: Path, args: Sequence[Tensor], kwargs: dict[str, Tensor]) -> list[Tensor]:
    """Inputs in the order of a graph."""
    given = iter(args)
    return [kwargs[value.name] if value.name in kwargs else next(given) for value in ir.load(path).graph.inputs]


def dynamic_dimensions(path: Path) -> int:
    return sum(not isinstance(size, int) for value in ir.load(path).graph.inputs for size in value.shape or ())


def train(module: nn.Module, inputs: Sequence[Tensor], row: Row) -> None:
    """Three steps towards random targets, and the loss before, between and behind them."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    torch.manual_seed(0)
    targets = [torch.randn_like(result) for result in tensors(module(*inputs))]
    for step in range(STEPS + 1):
        loss = sum((result - target).square().mean() for result, target in zip(tensors(module(*inputs)), targets, strict=True))
        row.losses.append(float(loss))
        if step == STEPS:
            break
        optimizer.zero_grad()
        loss.backward()
        idle = [name for name, p in module.named_parameters() if p.grad is None or not bool(p.grad.isfinite().all())]
        if idle:
            row.remarks.append(f"{len(idle)} parameters without a finite gradient: {', '.join(idle[:3])}")
        optimizer.step()
    if not all(later < earlier for earlier, later in zip(row.losses, row.losses[1:], strict=False)):
        row.remarks.append("the loss does not fall")


def there_and_back(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], plan: Any, folder: Path, row: Row) -> None:
    """The whole way of one model, which fills its line."""
    from laurel_rewrite import export_onnx
    from laurel_rewrite.backends.onnx.emit_torch import to_torch
    from laurel_rewrite.verification.onnx import run_onnx

    path = export_onnx(model, args, kwargs, folder / "first.onnx", target="portable")
    module = to_torch(ir.load(path), plan)
    row.parameters = tuple(sum(p.numel() for p in m.parameters()) for m in (model, module))
    generator = torch.Generator().manual_seed(7)
    other_args = tuple(other(leaf, generator) for leaf in args)
    other_kwargs = {name: other(leaf, generator) for name, leaf in kwargs.items()}
    inputs = ordered(path, other_args, other_kwargs)
    with torch.no_grad():
        expected, found = tensors(model.eval()(*other_args, **other_kwargs)), tensors(module.eval()(*inputs))
    row.error = difference(found, expected[: len(found)])
    if not row.error <= TOLERANCE:
        row.remarks.append("differs from PyTorch")
    train(module.train(), inputs, row)
    again = export_onnx(module, tuple(inputs), None, folder / "second.onnx")
    row.dynamic = dynamic_dimensions(path), dynamic_dimensions(again)
    if row.dynamic[1] < row.dynamic[0]:
        row.remarks.append("the second graph is less dynamic")
    first = ordered(path, args, kwargs)
    with torch.no_grad():
        expected = tensors(module.eval()(*first))
    names = [str(value.name) for value in ir.load(again).graph.inputs]
    row.again = difference(run_onnx(again, dict(zip(names, (t.numpy() for t in first), strict=True)), optimised=True), expected)
    if not row.again <= AGAIN:
        row.remarks.append("differs in onnxruntime")


def survey(spec: str, variant: str) -> Row | None:
    """One line, whatever happens on the way; none for the rewrite of a model without residual connections (DenseNet)."""
    from laurel_rewrite import NoSiteError, rewrite
    from laurel_rewrite.backends.module.surgery import rewriting_of
    from laurel_rewrite.sources.models import build

    row, begin = Row(spec, variant or "-"), time.perf_counter()
    try:
        torch.manual_seed(0)
        built = build(spec, MODELS.get(spec, {}))
        model, args, kwargs = moved(built.model), built.args, built.kwargs
        if any(name in spec for name in CONVOLUTIONS):
            args = tuple(leaf[..., :PIXELS, :PIXELS].contiguous() for leaf in args)
        plan = None
        if variant:
            model = moved(rewrite(model, args, kwargs, variant=variant, rank=RANK))
            plan = rewriting_of(model).plan
        with tempfile.TemporaryDirectory() as folder:
            there_and_back(model, args, kwargs, plan, Path(folder), row)
    except NoSiteError:
        return None
    except Exception as error:  # whatever libraries, exporter and converter raise is this survey's finding
        row.remarks.append(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    row.seconds = time.perf_counter() - begin
    return row


def preface() -> str:
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "onnx2torch", "onnxruntime", "timm", "transformers", "torchvision")
    )
    return (
        f"# ONNX graphs back in PyTorch, {date.today()}\n\nPython {platform.python_version()}, {packages}; float32, one thread. Small models with "
        f"random weights. Outputs at a batch of {BATCH} and a sequence {SHORTER} shorter than the export's, against the PyTorch model: at most "
        f"{TOLERANCE:g} of the largest number (or of 1); {STEPS} steps of AdamW at 1e-3; the trained module's own graph in onnxruntime, at the "
        f"export's batch and sequence: at most {AGAIN:g}. Batch normalisation behind a convolution is folded by the export, and its parameters "
        "with it; a table that is read at fixed places (Swin's relative positions) comes back as what was read. Lines are written as they are measured, each in a run of its model.\n\n"
    )


def written(path: Path) -> dict[tuple[str, str], str]:
    """The lines of a table, by model and variant."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    cells = [line.split(" | ") for line in lines]
    return {(row[0].removeprefix("| "), row[1]): line for row, line in zip(cells, lines, strict=True) if ":" in row[0] and len(row) > 2}


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("models", nargs=-1)
@click.option("--out", type=click.Path(path_type=Path), help="The table's file; by default tools/results/emit-torch.md, for all models.")
def main(models: tuple[str, ...], out: Path | None) -> None:
    from laurel_rewrite.sources.built import declare_torchvision_ops

    warnings.simplefilter("ignore")  # of the libraries that are surveyed
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    declare_torchvision_ops()
    out = HERE / "results" / "emit-torch.md" if out is None and not models else out
    lines = written(out) if out is not None and models else {}
    failed = 0
    for spec in models or MODELS:
        for variant in ("", "rw+lr"):
            row = survey(spec, variant)
            if row is None:
                continue
            failed += bool(row.remarks)
            click.echo(row.line(), nl=False)
            lines[spec, row.variant] = row.line()
            if out is not None:
                out.write_text(preface() + HEADING + "".join(lines.values()))
            gc.collect()
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
