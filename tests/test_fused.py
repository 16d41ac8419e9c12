"""The sum in few passes against the formula that it stands for, term by term and layer by layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from laurel_rewrite.operators import fused
from laurel_rewrite.operators.config import SiteConfig
from laurel_rewrite.operators.families.laurel import Laurel
from laurel_rewrite.operators.registry import operator
from laurel_rewrite.testing import moved

VARIANTS = ["rw", "lr", "pa", "rw+lr", "rw+pa", "lr+pa", "rw+lr+pa"]
D, R, K = 32, 2, 3


def connection(variant: str, axis: int = -1, **options) -> Laurel:
    config = SiteConfig(variant=variant, dim=D, rank=R, lags=K, history=K, axis=axis, ndim=4 if axis == 1 else 3, **options)
    module = nn.ModuleList([Laurel(operator(variant).prepare(config), dtype=torch.float64)])
    made = moved(module)[0]
    assert isinstance(made, Laurel)
    return made


def operands(axis: int = -1) -> list[Tensor]:
    shape = (2, 5, D) if axis == -1 else (2, D, 3, 5)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(K + 1)]


def results(module: Laurel, given: list[Tensor], *, plain: bool) -> list[Tensor]:
    """The value and all gradients; `plain`: by the formula."""
    x, f, *past = (value.detach().requires_grad_() for value in given)
    with pytest.MonkeyPatch.context() as patch:
        if plain:
            patch.setattr(fused, "fits", lambda *_: False)
        out = module(x, f, past=past)
    used = [value for value in (x, f, *past, *module.parameters()) if value.requires_grad]
    return [out, *torch.autograd.grad(out, used, torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out), allow_unused=True)]


def same(found: list[Tensor], right: list[Tensor], tolerance: float) -> None:
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", [{}, {"normalize": "sigmoid"}, {"history_map": "identity"}])
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_and_gradients_are_the_formula_s(variant, axis, options):
    module, given = connection(variant, axis, **options), operands(axis)
    same(results(module, given, plain=False), results(module, given, plain=True), 1e-12)  # float64; another order of sums


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_shorter_window_is_the_formula_s(variant):
    module, given = connection(variant), operands()[:3]
    same(results(module, given, plain=False), results(module, given, plain=True), 1e-12)  # float64; another order of sums


@pytest.mark.parametrize("variant", VARIANTS)
def test_second_derivatives_and_forward_mode(variant):
    module = connection(variant)
    x, f, *past = (value[:1, :2].detach().requires_grad_() for value in operands())
    inputs = (x, f, *past)
    assert torch.autograd.gradgradcheck(lambda x, f, *past: module(x, f, past=past), inputs)
    tangents = tuple(torch.randn_like(value) for value in inputs)
    _, tangent = torch.func.jvp(lambda x, f, *past: module(x, f, past=past), inputs, tangents)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "fits", lambda *_: False)
        _, right = torch.func.jvp(lambda x, f, *past: module(x, f, past=past), inputs, tangents)
    torch.testing.assert_close(tangent, right, rtol=1e-12, atol=1e-12)  # float64; another order of sums


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_keeps_the_skip_s_type(variant):
    module = connection(variant).float()
    x, f, *past = (value.detach().float() for value in operands())
    right = module(x, f, past=past)
    with torch.autocast("cpu", torch.bfloat16):
        for branch in (f, f.bfloat16()):
            out = module(x, branch, past=past)
            assert out.dtype == torch.float32
            torch.testing.assert_close(out, right, rtol=0.03, atol=0.03)  # bfloat16 has 8 bits, and products of 32 numbers of them


@pytest.mark.parametrize("variant", VARIANTS)
def test_backward_keeps_no_more_of_d_features_than_it_is_given(variant):
    module, given = connection(variant), operands()
    own = {value.untyped_storage().data_ptr() for value in (*given, *module.parameters())}
    kept: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        if value.untyped_storage().data_ptr() not in own:
            kept[value.untyped_storage().data_ptr()] = value.numel()
        return value

    x, f, *past = (torch.cat([value.detach()] * 50).requires_grad_() for value in given)  # so that weights are small beside it
    own |= {value.untyped_storage().data_ptr() for value in (x, f, *past)}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        module(x, f, past=past)
    assert all(count <= x.numel() // D * R * K for count in kept.values())


@pytest.mark.parametrize("variant", ["lr", "pa", "rw+lr+pa"])
def test_layers_that_are_more_than_their_weights_are_called(variant):
    module, given = connection(variant), operands()
    right = results(module, given, plain=True)
    calls: list[nn.Module] = []
    for down, up in module.pairs():
        down.register_forward_hook(lambda layer, *_: calls.append(layer))
        up.forward = lambda value, layer=up: calls.append(layer) or nn.Linear.forward(layer, value)  # as offloading puts a function there
    same(results(module, given, plain=False), right, 0)
    assert {id(layer) for layer in calls} == {id(layer) for pair in module.pairs() for layer in pair}


def test_a_subclass_keeps_its_own_skip():
    class Doubled(Laurel):
        def skip(self, x, *past):
            return 2 * x, *(x, *past)[: self.config.leaves]

    x, f = operands()[:2]
    config = operator("lr").prepare(SiteConfig(variant="lr", dim=D, rank=R, lags=1, history=1, axis=-1, ndim=3))
    torch.testing.assert_close(Doubled(config, dtype=torch.float64)(x, f), 2 * x + f, rtol=0, atol=0)


def test_compiled_values_and_gradients_are_the_formula_s():
    module, given = connection("rw+lr+pa"), operands()
    right = results(module, given, plain=True)
    other = copy.deepcopy(module)
    other.forward = torch.compile(other.forward, backend="aot_eager", fullgraph=True)
    same(results(other, given, plain=False), right, 1e-12)  # float64; another order of sums
    torch.compiler.reset()
