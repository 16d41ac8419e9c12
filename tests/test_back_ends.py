"""Back ends are one interface: the same plan on a module, an fx graph, an exported program and an ONNX graph."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir
import pytest
import torch
from torch import nn

from laurel_rewrite import ConfigError, LaurelConfig, RewriteError, detect, export_onnx, rewrite, write_onnx
from laurel_rewrite.backends import Applied, BackEnd
from laurel_rewrite.backends.fx import FxBackEnd
from laurel_rewrite.backends.module.back_end import ModuleBackEnd
from laurel_rewrite.backends.onnx.surgery import GraphRewrite
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.plan import Plan
from laurel_rewrite.testing import near
from laurel_rewrite.testing.stacks import D, Stack
from laurel_rewrite.verification.onnx_runs import run_onnx


def back_end(form: str, model: nn.Module, x: torch.Tensor, folder) -> BackEnd:
    if form == "module":
        return ModuleBackEnd(model, detect(model, (x,)), (x,))
    if form == "onnx":
        return GraphRewrite(ir.load(export_onnx(model, (x,), None, folder / "base.onnx")))
    graph = torch.export.export(model, (x,)).module(check_guards=False)
    return FxBackEnd(graph, detect(graph), (x,))


def output(form: str, result, x: torch.Tensor, folder) -> torch.Tensor:
    if form == "onnx":
        return torch.from_numpy(run_onnx(write_onnx(result, folder / "laurel.onnx"), {"x": x.numpy()}, optimised=False)[0])
    return result.eval()(x).detach()


@pytest.mark.parametrize("form", ["module", "fx", "onnx"])
@pytest.mark.parametrize("variant", ["rw+lr", "rw+lr+pa"])
def test_a_plan_is_checked_and_carried_out(form, variant, tmp_path):
    torch.manual_seed(0)
    model, x = Stack().eval(), torch.randn(2, 5, D)
    chosen = back_end(form, model, x, tmp_path)
    plan = Plan.from_sites(chosen.sites, LaurelConfig(variant, rank=4))
    chosen.check(plan)
    foreign = replace(plan, sites=(replace(plan.sites[0], id="blocks.9.laurel_0", owner="blocks.9"), *plan.sites[1:]))
    for carried in (chosen.check, chosen.apply):
        with pytest.raises(ConfigError, match=r"names the site 'blocks.9.laurel_0', which the model does not have"):
            carried(foreign)
    applied = chosen.apply(plan)
    assert isinstance(applied, Applied)
    assert applied.plan == plan
    assert not applied.skipped
    assert all(check.passed for check in applied.checks)
    near(output(form, applied.model, x, tmp_path), model(x).detach(), 1e-6)
    assert not sites_of(model)


class Hidden(nn.Module):
    """Its add is no binary + of the source."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._plus(x, self.f(x))

    _plus = staticmethod(eval("lambda x, f: x + f"))


def test_what_cannot_be_rewritten_is_known_before_anything_changes():
    model, x = Hidden(), torch.randn(2, 5, D)
    chosen = ModuleBackEnd(model, detect(model, (x,)), (x,), inplace=True)
    plan = Plan.from_sites(chosen.sites, LaurelConfig("rw"))
    for carried in (chosen.check, chosen.apply):
        with pytest.raises(RewriteError, match="cannot be rewritten in the source"):
            carried(plan)
    assert type(model) is Hidden
    assert not sites_of(model)


def test_an_exported_program_has_its_own_inputs():
    torch.manual_seed(0)
    model, x = Stack().eval(), torch.randn(2, 5, D)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    made = rewrite(program, variant="rw+lr+pa", rank=4)
    other = torch.randn(3, 5, D)
    assert len(sites_of(made)) == 6
    assert torch.equal(made(other), model(other))
    made(other).sum().backward()
    assert all(parameter.grad is not None for name, parameter in made.named_parameters() if ".mix" in name)
