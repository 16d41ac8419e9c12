"""Verification of ONNX graphs is not blind: what is wrong fails whatever its scale, what cannot be compared is no pass, and no false alarms."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import trained
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
from torch import nn

import laurel_rewrite.verification.onnx_runs
from laurel_rewrite import VerificationError, rewrite_onnx
from laurel_rewrite.backends.onnx.surgery import GraphRewrite
from laurel_rewrite.lowering import lower
from laurel_rewrite.operators import onnx_function
from laurel_rewrite.passes.evaluate_laurel import Affine
from laurel_rewrite.plan import LaurelConfig, Plan
from laurel_rewrite.verification.onnx import _compared, check_moves, proved, reference
from laurel_rewrite.verification.onnx_runs import Ran, in_float32, run_shaken

N = 16
NUMPY = {
    TensorProto.FLOAT: np.float32,
    TensorProto.FLOAT16: np.float16,
    TensorProto.BFLOAT16: ml_dtypes.bfloat16,
    TensorProto.DOUBLE: np.float64,
}


def net(kind: int = TensorProto.FLOAT, *, last: float = 1.0, mul: bool = False) -> onnx.ModelProto:
    """Two pre-norm blocks and a head whose weights are of the size `last`; the sizes of batch and length are open."""
    generator = np.random.default_rng(0)
    nodes, weights = [], {}

    def weight(name: str, *shape: int, size: float = 0.3) -> str:
        weights[name] = (generator.standard_normal(shape) * size).astype(NUMPY[kind])
        return name

    x = "x"
    for block in ("one", "two"):
        norm = [x, weight(f"{block}.gamma", N, size=1.0), weight(f"{block}.beta", N)]
        nodes += [
            helper.make_node("LayerNormalization", norm, [f"{block}.n"], f"{block}/norm"),
            helper.make_node("MatMul", [f"{block}.n", weight(f"{block}.up", N, 2 * N)], [f"{block}.h"], f"{block}/up"),
            helper.make_node("Relu", [f"{block}.h"], [f"{block}.r"], f"{block}/relu"),
            helper.make_node("MatMul", [f"{block}.r", weight(f"{block}.down", 2 * N, N)], [f"{block}.f"], f"{block}/down"),
        ]
        if mul:  # a number before the skip, as attention scales and masks leave it
            nodes.append(helper.make_node("Mul", [x, weight(f"{block}.one", size=0.0)], [f"{block}.x"], f"{block}/mul"))
            weights[f"{block}.one"] += 1
        nodes.append(helper.make_node("Add", [f"{block}.x" if mul else x, f"{block}.f"], [f"{block}.y"], f"{block}/sum"))
        x = f"{block}.y"
    nodes.append(helper.make_node("MatMul", [x, weight("head", N, N, size=last)], ["y"], "head"))
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", kind, ["batch", "length", N])],
        [helper.make_tensor_value_info("y", kind, ["batch", "length", N])], [numpy_helper.from_array(w, n) for n, w in weights.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def checks_of(folder: Path) -> dict[str, dict]:
    return {check["name"]: check for check in json.loads((folder / "laurel_out" / "report.json").read_text())["verification"]}


def lowered(model: onnx.ModelProto, variant: str = "rw+lr") -> tuple[ir.Model, ir.Model, dict[str, str], dict[str, float]]:
    """A rewritten model with other parameters than at the start, the same lowered, the names of the values at its sites, and their scales."""
    rewrite = GraphRewrite(ir.from_proto(model))
    rewrite.apply(Plan.from_sites(rewrite.sites, LaurelConfig(variant=variant, rank=4)))
    before = trained(rewrite.model)
    after = before.clone()
    done = lower(after, verify=False)
    return before, after, rewrite.values, done.scales


def zeroed(model: ir.Model, name: str) -> ir.Model:
    copy = model.clone()
    value = copy.graph.initializers[name]
    value.const_value = ir.tensor(np.zeros_like(value.const_value.numpy()), name=name)
    return copy


# What is compared


def test_values_at_the_sites_and_outputs_are_compared_at_two_sizes():
    before, after, values, scales = lowered(net())
    checks, _ = proved("lowered", reference(before, values=values), after, values=values, scales=scales)
    assert values == {"one.y": "laurel_0", "two.y": "laurel_1"}
    assert [check.outcome for check in checks] == ["passed", "passed"]
    assert checks[0].detail == f"2 of 2 sites and the outputs; x[2, 16, {N}]; x[3, 12, {N}]"
    assert 0 < checks[0].difference < 1e-5
    assert all(scale != 1 for scale in scales.values())


@pytest.mark.parametrize("last", [1e3, 1.0, 1e-9])
def test_the_tolerance_goes_with_the_outputs(last):
    """What fails at 1 fails at 1e-9 too."""
    before, after, values, scales = lowered(net(last=last))
    expected = reference(before, values=values)
    assert all(check.passed for check in proved("lowered", expected, after, values=values, scales=scales)[0])
    for name in after.graph.initializers:
        checks, _ = proved("lowered", expected, zeroed(after, name), values=values, scales=scales)
        assert any(check.failed for check in checks), name


def winding(gain: float, blocks: int = 24) -> onnx.ModelProto:
    """Blocks that make differences larger, the more so the larger the gain."""
    generator = np.random.default_rng(0)
    nodes, weights, x = [], {}, "x"
    for k in range(blocks):
        weights[f"{k}.up"] = (generator.standard_normal((N, N)) * gain).astype(np.float32)
        weights[f"{k}.down"] = (generator.standard_normal((N, N)) / 4).astype(np.float32)
        nodes += [
            helper.make_node("MatMul", [x, f"{k}.up"], [f"{k}.h"]), helper.make_node("Sin", [f"{k}.h"], [f"{k}.s"]),
            helper.make_node("MatMul", [f"{k}.s", f"{k}.down"], [f"{k}.f"]), helper.make_node("Add", [x, f"{k}.f"], [f"{k}.y"]),
        ]  # fmt: skip
        x = f"{k}.y"
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "length", N]) for name in ("x", x)]
    graph = helper.make_graph(nodes, "net", info[:1], info[1:], [numpy_helper.from_array(w, n) for n, w in weights.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


@pytest.mark.parametrize(("gain", "outcome"), [(0.1, "passed"), (0.3, "passed"), (1.0, "says little")])
def test_a_deep_graph_may_be_off_by_what_rounding_alone_makes_of_it(gain, outcome):
    before, after, values, scales = lowered(winding(gain))
    ran = reference(before, values=values)
    shaken = partial(run_shaken, before, ran.draws, values)
    told = [check.outcome for check in proved("lowered", ran, after, values=values, scales=scales)[0]]
    assert told == (["passed"] * 2 if gain == 0.1 else ["FAILED"] * 2)
    checks, _ = proved("lowered", ran, after, values=values, scales=scales, shaken=shaken)
    assert [check.outcome for check in checks] == [outcome] * 2
    assert ("what its weights' last places make" in checks[0].tolerance) == (gain != 0.1)
    (inner, _), _ = proved("lowered", ran, zeroed(after, "0.up"), values=values, scales=scales, shaken=shaken)
    assert inner.failed  # a fault at a site where little has been rounded yet, however far roundings go after it
    assert "laurel_0 is the first that differs" in inner.detail


def test_a_fault_that_no_output_shows_is_seen_at_its_site():
    before, after, values, scales = lowered(net(last=0.0))  # a head that hides all
    expected = reference(before, values=values)
    (inner, outer), _ = proved("lowered", expected, zeroed(after, "one.gamma"), values=values, scales=scales)
    assert inner.failed
    assert "laurel_0 is the first that differs" in inner.detail
    assert outer.passed


def test_parameters_that_hardly_move_the_sites_say_little():
    values = {"y": "site"}
    y = np.linspace(-1, 1, 9).astype(np.float32)
    ran = [Ran([{}], [{"y": y * factor}], [], 1e-4, 1e-5) for factor in (1.0, 1.0 + 1e-4, 1.5)]
    moves = lambda found: [check.outcome for check in check_moves(ran[0], found, values, {"site": nn.Linear(2, 2)})]  # noqa: E731
    assert moves(ran[1]) == ["says little"]
    assert moves(ran[2]) == ["passed"]


def test_connections_without_parameters_need_not_move():
    """DenseFormer has none in the midst of a block."""
    y = np.linspace(-1, 1, 9).astype(np.float32)
    one, two = (Ran([{}], [{"y": y, "z": y * factor}], [], 1e-4, 1e-5) for factor in (1.0, 1.5))
    values = {"y": "first@1", "z": "second"}
    (check,) = check_moves(one, two, values, {"first": nn.Identity(), "second": nn.Linear(2, 2)})
    assert check.outcome == "passed"
    assert check_moves(one, two, values, {"first": nn.Identity(), "second": nn.Identity()}) == []


# Every door


@pytest.fixture
def broken(monkeypatch):
    """A lowering that loses the weights of the branches."""
    monkeypatch.setattr("laurel_rewrite.passes.expand_laurel._Writer.weighted", lambda self, value, weight: value)


def test_lower_and_rewrite_compare(broken, tmp_path, monkeypatch):
    before, *_ = lowered(net())
    nodes = [node.name for node in before.graph]
    with pytest.raises(VerificationError, match="laurel_0 is the first that differs"):
        lower(before, skip=["fold-branch", "rescale-stream"])
    assert [node.name for node in before.graph] == nodes
    lower(before, skip=["fold-branch", "rescale-stream"], verify=False)
    monkeypatch.setenv("LAUREL_REWRITE_CACHE", "0")
    # What a test before this one had made is not taken, and what is made here is not left to those behind it.
    monkeypatch.setattr(onnx_function, "_step_function", onnx_function._step_function.__wrapped__)
    monkeypatch.setattr(onnx_function.Call, "run", lambda call, connection, operands: (-connection(*operands),))
    with pytest.raises(VerificationError, match="laurel_0 is the first that differs"):
        rewrite_onnx(saved(net(), tmp_path), variant="rw")
    rewrite_onnx(tmp_path / "model.onnx", variant="rw", verify=False)


def test_what_cannot_be_run_is_no_pass(tmp_path, here, monkeypatch, caplog):
    monkeypatch.setattr(laurel_rewrite.verification.onnx_runs, "_free_memory", lambda: 1000)
    saved(net(), tmp_path)
    with caplog.at_level(logging.WARNING):
        rewrite_onnx(tmp_path / "model.onnx", variant="rw")
    assert "not run: " in caplog.text
    result = here("model.onnx", "--variant", "rw", "--profile-seconds", "0.1")
    assert result.returncode == 0, result.stderr
    assert "not run" in result.stdout
    (check,) = checks_of(tmp_path).values()
    assert (check["outcome"], check["passed"]) == ("not run", None)
    assert "of memory are free; the files passed onnx's structural checks" in check["detail"]


def test_no_verify_is_no_pass(tmp_path, here):
    saved(net(), tmp_path)
    assert here("model.onnx", "--variant", "rw", "--no-verify", "--profile-seconds", "0").returncode == 0
    assert [check["outcome"] for check in checks_of(tmp_path).values()] == ["not run"]


# Mutations: what `tools/mutate_verification.py` does to every initializer, here to a small graph; its table under `tools/results` has ResNet-18, a ViT and GPT-2


@pytest.fixture(scope="module")
def tool():
    path = Path(__file__).parent.parent / "tools" / "mutate_verification.py"
    spec = importlib.util.spec_from_file_location("mutate_verification", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_no_mutation_is_missed_where_outputs_are_small(tool):
    result = tool.mutate(tool.small_outputs())
    assert (result.tried, result.caught) == (40, 40)


# Half precision and quantised


@pytest.mark.parametrize("mul", [False, True])
def test_float16_goes_through(mul, tmp_path, here):
    """onnxruntime's CPU computes some ops in float32 and drops casts, which depends on the graph around: the start is exact all the same."""
    saved(net(TensorProto.FLOAT16, mul=mul), tmp_path)
    result = here("model.onnx", "--rank", "4", "--profile-seconds", "0.1")
    assert result.returncode == 0, result.stderr
    checks = checks_of(tmp_path)
    assert checks["start, not optimised"]["difference"] == 0
    assert {check["outcome"] for check in checks.values()} == {"passed"}


def test_bfloat16_is_verified_and_profiled_as_a_copy_in_float32(tmp_path, here):
    saved(net(TensorProto.BFLOAT16), tmp_path)
    result = here("model.onnx", "--rank", "4", "--profile-seconds", "0.1")
    assert result.returncode == 0, result.stderr
    assert "as a copy in float32" in result.stdout
    report = json.loads((tmp_path / "laurel_out" / "report.json").read_text())
    assert any("as a copy in float32" in note for note in report["notes"])
    assert checks_of(tmp_path)["start, not optimised"]["outcome"] == "passed"
    assert [Path(row["path"]).name for row in report["profile"]["rows"][:2]] == ["model.onnx", "laurel.onnx"]
    kinds = {tensor.data_type for tensor in onnx.load(tmp_path / "laurel_out" / "laurel.onnx").graph.initializer}
    assert TensorProto.FLOAT not in kinds


def test_a_copy_in_float32_is_one_throughout():
    model = net(TensorProto.FLOAT16)
    nodes = [helper.make_node("Cast", ["y"], ["z"], to=TensorProto.FLOAT16), helper.make_node("Constant", [], ["c"], value=helper.make_tensor("c", TensorProto.FLOAT16, [], [1.0]))]  # fmt: skip
    model.graph.node.extend(nodes)
    wide = in_float32(model, Path())
    onnx.checker.check_model(wide, full_check=True)
    assert {tensor.data_type for tensor in wide.graph.initializer} == {TensorProto.FLOAT}
    assert wide.graph.node[-2].attribute[0].i == TensorProto.FLOAT


def test_a_fault_that_half_precision_would_hide_is_seen_in_float32(tmp_path, here, monkeypatch):
    saved(net(TensorProto.FLOAT16), tmp_path)
    multiply = Affine.multiply
    monkeypatch.setattr(Affine, "multiply", lambda self, factor: multiply(self, factor * 1.002))  # within what float16 may differ by
    result = here("model.onnx", "--rank", "4", "--profile-seconds", "0")
    assert result.returncode == 1
    assert "as a copy in float32, not optimised" in result.stderr


def test_quantised_graphs_are_held_to_what_the_optimiser_does_to_the_original(tmp_path, here):
    """onnxruntime's optimiser rounds elsewhere in a graph of QuantizeLinear and DequantizeLinear; that is no fault of LAuReL."""
    saved(net(), tmp_path)
    (tmp_path / "model.onnx").rename(tmp_path / "float.onnx")
    quantize_static(tmp_path / "float.onnx", tmp_path / "model.onnx", Calibration(), quant_format=QuantFormat.QDQ)
    result = here("model.onnx", "--rank", "4", "--profile-seconds", "0")
    assert result.returncode == 0, result.stderr
    checks = checks_of(tmp_path)
    assert "FAILED" not in {check["outcome"] for check in checks.values()}
    assert checks["start, not optimised"]["difference"] == 0


def test_the_noise_of_the_unchanged_model_is_allowed_and_named():
    before = Ran([{}], [{"y": np.float32([1.0])}], [{"y": np.float32([1.1])}], 0.0, 0.05, noise={"y": 0.1})
    after = Ran([{}], [{"y": np.float32([1.0])}], [{"y": np.float32([1.24])}], 0.0, 0.05)
    allowed = _compared("", before.optimised, after.optimised, before, (0.0, 0.05), before.noise, {}, {})
    assert allowed.passed
    assert "which the unchanged model shows against itself" in allowed.tolerance
    assert _compared("", before.optimised, after.optimised, before, (0.0, 0.05), {}, {}, {}).failed


class Calibration(CalibrationDataReader):
    def __init__(self) -> None:
        self.feeds = iter([{"x": np.random.default_rng(n).standard_normal((2, 8, N)).astype(np.float32)} for n in range(3)])

    def get_next(self):
        return next(self.feeds, None)
