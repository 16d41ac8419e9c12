"""Every exported file computes what the PyTorch module does, its values at the sites included, or it is not written."""

from __future__ import annotations

import json

import onnx
import pytest
import torch
from conftest import away_from_start, close
from onnx import TensorProto
from torch import nn
from toys import CASES, D

from laurel_rewrite import VerificationError, export_onnx, rewrite
from laurel_rewrite.exporting import Exporter
from laurel_rewrite.verification.export import check_export
from laurel_rewrite.verification.onnx import run_onnx

X = (torch.randn(2, 5, D),)

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))

def build_model():
    return Net().to(torch.{kind})

def example_inputs():
    return (torch.randn(2, 6, 16).to(torch.{kind}),)
"""


class Pair(nn.Module):
    """Two inputs, which somebody may give one tensor for."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.tanh(a + self.linear(b))


def test_one_tensor_for_two_inputs(tmp_path):
    """By position and by name; the file has both inputs, and computes with others what the module does."""
    model, x = Pair().eval(), torch.randn(2, 5, D)
    a, b = torch.randn(3, 5, D), torch.randn(3, 5, D)
    for args, kwargs in (((x, x), None), ((), {"a": x, "b": x})):
        path = export_onnx(model, args, kwargs, tmp_path / "pair.onnx")
        (found,) = run_onnx(path, {"a": a.numpy(), "b": b.numpy()}, optimised=False)
        close([found], [model(a, b).detach().numpy()])


def test_a_fault_in_the_lowering_is_no_file(tmp_path, monkeypatch):
    better = away_from_start(rewrite(CASES["plain"].make(), X, variant="rw+lr", rank=4)).eval()
    exported = Exporter(better, X, None).write(tmp_path / "model.onnx")
    checks, _ = check_export(better, exported, X, {}, name="model.onnx")
    assert [check.outcome for check in checks] == ["passed", "passed"]
    assert checks[0].detail == f"2 of 2 sites and the outputs; x[3, 3, {D}]; x[5, 3, {D}]"
    assert list(exported.values.values()) == ["laurel_0", "laurel_1"]
    (tmp_path / "model.onnx").unlink()
    monkeypatch.setattr("laurel_rewrite.passes.expand_laurel._Writer.weighted", lambda self, value, weight: value)
    options = {"skip": ["rescale-stream"]}
    with pytest.raises(VerificationError, match="laurel_0 is the first that differs"):
        export_onnx(better, X, None, tmp_path / "model.onnx", **options)
    assert not any(tmp_path.iterdir())
    export_onnx(better, X, None, tmp_path / "model.onnx", verify=False, **options)


class Draws(nn.Module):
    """Draws in eval mode, and returns numbers beside tensors."""

    def __init__(self, *, drawing: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)
        self.drawing = drawing

    def forward(self, x):
        y = x + self.linear(x)
        return {"y": y + torch.rand_like(y) if self.drawing else y, "layers": 3, "cache": None, "z": torch.tanh(y)}


def test_what_a_model_returns_beside_tensors_has_no_output(tmp_path):
    path = export_onnx(Draws(drawing=False), X, None, tmp_path / "model.onnx")
    assert len(onnx.load(path).graph.output) == 2


def test_a_model_that_differs_from_itself_is_not_verified(tmp_path):
    model = Draws(drawing=True)
    exported = Exporter(model, X, None).write(tmp_path / "model.onnx")
    (check,), _ = check_export(model, exported, X, {}, name="model.onnx")
    assert check.outcome == "not run"
    assert "differs from itself" in check.detail


@pytest.mark.parametrize(("kind", "type_"), [("float16", TensorProto.FLOAT16), ("bfloat16", TensorProto.BFLOAT16)])
def test_models_in_half_precision_go_through_the_job(kind, type_, tmp_path, here):
    (tmp_path / "model.py").write_text(MODEL.format(kind=kind))
    result = here("model.py", "--rank", "4", "--profile-seconds", "0.1")
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "laurel_out" / "report.json").read_text())
    assert {check["outcome"] for check in report["verification"]} <= {"passed", "says little"}
    assert [row["name"] for row in report["profile"]["rows"][:2]] == ["baseline.onnx", "laurel.onnx"]
    assert ("as a copy in float32" in result.stdout) == (kind == "bfloat16")
    model = onnx.load(tmp_path / "laurel_out" / "laurel.onnx")
    assert {info.type.tensor_type.elem_type for info in model.graph.input} == {type_}


class Winding(nn.Module):
    """Each block multiplies differences, those of rounding too, by about 1.5."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(D, D, bias=False) for _ in range(24))
        self.down = nn.ModuleList(nn.Linear(D, D, bias=False) for _ in range(24))
        with torch.no_grad():
            for up, down in zip(self.up, self.down, strict=True):
                up.weight.normal_(std=0.3)
                down.weight.normal_(std=0.25)

    def forward(self, x):
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.sin(up(x)))
        return x


def test_a_deep_model_may_be_off_by_what_rounding_alone_makes_of_it(tmp_path):
    better = away_from_start(rewrite(Winding(), X, variant="rw+lr", rank=4)).eval()
    checks, _ = check_export(better, Exporter(better, X, None).write(tmp_path / "model.onnx"), X, {}, name="model.onnx")
    assert [check.outcome for check in checks] == ["passed", "passed"], checks
    assert "what its weights' last places make" in checks[0].tolerance, checks


class InPlace(nn.Module):
    """Adds into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(D), nn.Linear(D, D)

    def forward(self, x):
        x += self.linear(self.norm(x))
        return x


def test_a_model_that_writes_into_its_input_is_compared_on_copies(tmp_path):
    model = away_from_start(rewrite(InPlace(), (X[0].clone(),), variant="rw+lr", rank=4)).eval()
    given = X[0].clone()
    path = export_onnx(model, (given,), None, tmp_path / "model.onnx")
    assert torch.equal(given, X[0])
    with torch.no_grad():
        close(run_onnx(path, {"x": X[0].numpy()}, optimised=True), [model(given).numpy()])
