"""Is the verification of ONNX graphs blind? Each float initializer of a lowered graph is set to zero in turn, and it must fail.

    python tools/mutate_verification.py [MODEL ...]     # writes a dated table under tools/results/

A zero may change nothing: a key's bias moves all scores of a query alike. So what verification passes is run by another evaluator, onnx's
reference in float64, on other inputs than the verification drew: where that moves a value at a site, or an output, by more than 100
tolerances, the verification was blind, and the script ends with an error. The others are listed as inert.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path

import click
import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from laurel_rewrite.backends.onnx.surgery import GraphRewrite
from laurel_rewrite.graph.feeds import draw_feeds
from laurel_rewrite.lowering import lower
from laurel_rewrite.plan import LaurelConfig, Plan
from laurel_rewrite.verification.onnx import ENOUGH, proved, reference
from laurel_rewrite.verification.onnx_runs import run_shaken

HERE = Path(__file__).parent
RTOL, ATOL = 1e-4, 1e-5  # what verification allows in float32, of each number and of the largest of its tensor
GPT2 = {"n_layer": 3, "n_embd": 32, "n_head": 4, "vocab_size": 99}
MODELS = {
    "torchvision:resnet18": ({}, 64),
    "timm:vit_tiny_patch16_224": ({"img_size": 64, "depth": 4}, None),
    "hf:gpt2": (GPT2, None),
    "small outputs": ({}, None),
}
"""MODEL: settings, and the side of its pictures."""


@dataclass
class Mutated:
    """What became of one lowered graph: the number of initializers that were tried, those that verification caught, the inert ones with
    the tolerances that they move anything by, and those that it was blind to."""

    tried: int = 0
    caught: int = 0
    inert: dict[str, float] = field(default_factory=dict)
    missed: dict[str, float] = field(default_factory=dict)


def mutate(given: Path | ir.Model, *, variant: str = "rw+lr", every: int = 1, seed: int = 0) -> Mutated:
    """Rewrite and lower a graph with random LAuReL parameters, and zero every n-th float initializer of the result.

    Args:
        given: a graph without LAuReL.
        every: 1 for all.
        seed: of the parameters.
    """
    rewrite = GraphRewrite(ir.load(given) if isinstance(given, Path) else given)
    rewrite.apply(Plan.from_sites(rewrite.sites, LaurelConfig(variant=variant, rank=4)))
    trained(rewrite.model, seed)
    after = rewrite.model.clone()
    done = lower(after, verify=False)
    expected = reference(rewrite.model, values=rewrite.values)
    shaken = functools.cache(functools.partial(run_shaken, rewrite.model, expected.draws, tuple(rewrite.values)))
    checks, _ = proved("as it is", expected, after, values=rewrite.values, scales=done.scales, shaken=shaken)
    assert all(check.passed for check in checks), checks
    names = [name for name, value in after.graph.initializers.items() if value.const_value.dtype.is_floating_point()]
    intact = after.clone()
    result = Mutated()
    other = Other(after, list(rewrite.values))
    for name in names[::every]:
        result.tried += 1
        value = after.graph.initializers[name]
        kept = value.const_value
        value.const_value = ir.tensor(np.zeros(tuple(kept.shape), kept.dtype.numpy()), name=name)
        checks, _ = proved(name, expected, after, values=rewrite.values, scales=done.scales, shaken=shaken)
        if any(check.failed for check in checks):
            result.caught += 1
        else:
            moved = other.moved(intact, after)
            (result.missed if moved > ENOUGH else result.inert)[name] = moved
        value.const_value = kept
    return result


def trained(model: ir.Model, seed: int) -> None:
    """LAuReL parameters of trained size: a in [0.5, 1.5], b = 2 - a."""
    generator = np.random.default_rng(seed)
    for name, value in model.graph.initializers.items():
        if "laurel_" not in name:
            continue
        array = value.const_value.numpy()
        if name.endswith(".mix"):
            a = generator.uniform(0.5, 1.5)
            array = np.array([np.log(a / (2 - a)), 0.0])
        else:
            array = array + generator.standard_normal(array.shape) * 0.5 / np.sqrt(max(array.shape[:2]))
        value.const_value = ir.tensor(array.astype(value.const_value.dtype.numpy()), name=name)


class Other:
    """The independent judge: another evaluator, in float64, on other inputs."""

    def __init__(self, model: ir.Model, values: Sequence[str]) -> None:
        self.values = values
        self.feeds = draw_feeds(model, seed=1234, batch=2, length=9)
        self.before: list[np.ndarray] = []

    def run(self, model: ir.Model) -> list[np.ndarray]:
        proto = in_float64(ir.to_proto(model))
        made = {name for node in proto.graph.node for name in node.output} - {info.name for info in proto.graph.output}
        proto.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.DOUBLE, None) for name in self.values if name in made)
        wide = {name: array.astype(np.float64) if array.dtype == np.float32 else array for name, array in self.feeds.items()}
        return [np.asarray(array) for array in ReferenceEvaluator(proto).run(None, wide)]

    def moved(self, before: ir.Model, model: ir.Model) -> float:
        """How many tolerances the value that moves most moves by."""
        self.before = self.before or self.run(before)
        return max(_tolerances(a, b) for a, b in zip(self.before, self.run(model), strict=True))


def _tolerances(before: np.ndarray, after: np.ndarray) -> float:
    difference = np.abs(after - before)
    allowed = RTOL * np.abs(before) + ATOL * np.abs(before).max(initial=0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.where(difference > 0, difference / allowed, 0.0).max(initial=0.0))


def in_float64(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph in float64, in place."""
    for tensor in model.graph.initializer:
        _widen(tensor)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.DOUBLE
            if attribute.HasField("t"):
                _widen(attribute.t)
    for info in (*model.graph.input, *model.graph.output):
        if info.type.tensor_type.elem_type == TensorProto.FLOAT:
            info.type.tensor_type.elem_type = TensorProto.DOUBLE
    del model.graph.value_info[:]
    return model


def _widen(tensor: onnx.TensorProto) -> None:
    if tensor.data_type == TensorProto.FLOAT:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))


def small_outputs() -> ir.Model:
    """Inverted residuals with squeeze and excitation as MobileNetV3 has them, whose outputs are of the size 1e-9."""
    generator = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []

    def op(kind: str, *inputs: str, **attributes: object) -> str:
        nodes.append(helper.make_node(kind, inputs, [f"v{len(nodes)}"], f"n{len(nodes)}", **attributes))
        return f"v{len(nodes) - 1}"

    def weight(*shape: int, size: float) -> str:
        weights.append(numpy_helper.from_array((generator.standard_normal(shape) * size).astype(np.float32), f"w{len(weights)}"))
        return f"w{len(weights) - 1}"

    def conv(x: str, inputs: int, outputs: int, kernel: int = 1, **attributes: object) -> str:
        per_group = inputs // int(str(attributes.get("group", 1)))
        size = 1 / np.sqrt(per_group * kernel**2)
        return op(
            "Conv",
            x,
            weight(outputs, per_group, kernel, kernel, size=size),
            weight(outputs, size=0.1),
            pads=[kernel // 2] * 4,
            **attributes,
        )

    x = conv("x", 3, 16, 3)
    for _ in range(3):
        wide = op("HardSwish", conv(x, 16, 32))
        deep = op("HardSwish", conv(wide, 32, 32, 3, group=32))
        gate = op("HardSigmoid", conv(op("Relu", conv(op("GlobalAveragePool", deep), 32, 8)), 8, 32))
        x = op("Add", conv(op("Mul", deep, gate), 32, 16), x)
    pooled = op("Flatten", op("GlobalAveragePool", x))
    nodes.append(helper.make_node("Gemm", [pooled, weight(16, 10, size=1e-9), weight(10, size=1e-10)], ["y"], "head"))
    graph = helper.make_graph(
        nodes, "small", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 10])], weights,
    )  # fmt: skip
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10))


def given(name: str, folder: Path) -> Path | ir.Model:
    """The graph of a MODEL, without LAuReL."""
    if name == "small outputs":
        return small_outputs()
    import torch

    from laurel_rewrite import export_onnx
    from laurel_rewrite.sources.models import build

    settings, side = MODELS[name]
    torch.manual_seed(0)
    built = build(name, settings)
    args = (torch.randn(2, 3, side, side),) if side else built.args
    for module in built.model.modules():  # statistics as training leaves them
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2.0)
    for parameter in built.model.parameters():  # and no bias that is zero, which would be inert
        if not parameter.detach().any():
            parameter.data.normal_(std=0.1)
    return export_onnx(built.model, args, built.kwargs, folder / "model.onnx", verify=False)


def table(results: dict[str, Mutated]) -> Iterator[str]:
    yield "# Mutations that verification must catch\n"
    yield (
        f"{date.today()}, onnx {version('onnx')}, onnxruntime {version('onnxruntime')}, torch {version('torch')}; rw+lr of rank 4 with random "
        "parameters, lowered for ort-cpu; each float initializer set to zero in turn, and verification asked. What it passed was run by onnx's "
        f"reference evaluator in float64 on other inputs: inert is what moves no site and no output by more than {ENOUGH} tolerances "
        f"({RTOL:.0e} of each number and {ATOL:.0e} of the largest of its tensor).\n"
    )
    yield "| model | initializers | caught | inert | missed |\n|---|---:|---:|---:|---:|"
    for name, one in results.items():
        yield f"| {name} | {one.tried} | {one.caught} | {len(one.inert)} | {len(one.missed)} |"
    for name, one in results.items():
        for kind, held in (("Inert", one.inert), ("Missed", one.missed)):
            if held:
                yield f"\n{kind} in {name} (tolerances that anything moves by): " + ", ".join(
                    f"`{key}` {moved:.2g}" for key, moved in held.items()
                )


@click.command()
@click.argument("models", nargs=-1)
def main(models: tuple[str, ...]) -> None:
    results: dict[str, Mutated] = {}
    for name in models or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = mutate(given(name, Path(folder)))
        click.echo(f"{name}: {results[name]}", err=True)
    (HERE / "results" / f"mutations-{date.today()}.md").write_text("\n".join(table(results)) + "\n")
    if any(one.missed for one in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
