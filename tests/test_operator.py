"""The operator against formulas written out here in numpy, and against the mistakes other versions make."""

from __future__ import annotations

import itertools
import random
import warnings

import numpy as np
import pytest
import torch

from laurel_rewrite import ConfigError, LaurelConfig, LaurelError
from laurel_rewrite.operators.config import SiteConfig
from laurel_rewrite.operators.families.laurel import Laurel
from laurel_rewrite.operators.registry import canonical, operator, operators
from laurel_rewrite.operators.state import Link, Slot, Stream

VARIANTS = ["rw", "lr", "pa", "rw+lr", "rw+pa", "lr+pa", "rw+lr+pa"]
D, R, K = 12, 4, 3


def site(variant: str, axis: int = -1, **options) -> SiteConfig:
    config = SiteConfig(variant=variant, dim=D, rank=R, lags=K, history=K, axis=axis, ndim=4 if axis == 1 else 3, **options)
    return operator(variant).prepare(config)


def reference(module: Laurel, window: list[np.ndarray], f: np.ndarray) -> np.ndarray:
    """The paper's formula on arrays whose last axis is the feature axis."""
    values = {name: p.detach().double().numpy() for name, p in module.named_parameters()}
    values = {n: v.reshape(v.shape[:2]) if v.ndim == 4 else v for n, v in values.items()}
    variant, x = module.config.variant, window[0]
    a = b = 1.0
    if "rw" in variant:
        w = values["mix"]
        if module.config.normalize == "sigmoid":
            a = 2 / (1 + np.exp(-w[0]))
            b = 2 - a
        elif module.config.normalize == "none":
            a, b = 1 + w
        else:
            a, b = np.exp(w) / np.exp(w).sum() * (2 if module.config.normalize == "softmax" else 1)

    def low_rank(y: np.ndarray, suffix: str = "") -> np.ndarray:
        return y @ values[f"down{suffix}.weight"].T @ values[f"up{suffix}.weight"].T

    if variant in ("lr", "rw+lr"):
        return a * f + b * (low_rank(x) + x)
    if variant in ("lr+pa", "rw+lr+pa"):
        return a * f + b * (x + sum(values["g"][j] * low_rank(y, f".{j}") for j, y in enumerate(window)))
    if "pa" in variant:
        h = (lambda y: y) if module.config.history_map == "identity" else low_rank
        return a * f + b * (x + sum(values["g"][j] * h(y) for j, y in enumerate(window)))
    return a * f + b * x


def shuffled(module: Laurel) -> Laurel:
    for p in module.parameters():
        p.data.add_(torch.randn_like(p) * 0.3)
    return module


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_formula(variant, axis):
    module = shuffled(Laurel(site(variant, axis), dtype=torch.float64))
    shape = (2, 5, D) if axis == -1 else (2, D, 3, 5)
    window = [torch.randn(shape, dtype=torch.float64) for _ in range(K)]
    f = torch.randn(shape, dtype=torch.float64)
    slot = Slot()
    slot.value, slot.fresh = tuple(window[1:]), True
    module.link = Link("site", Stream([slot]), None, slot, needs=True, reader="PA")
    last = [np.moveaxis(t.numpy(), axis, -1) for t in (*window, f)]
    # Both in float64: what is left is the order of sums.
    found = np.moveaxis(module(window[0], f).detach().numpy(), axis, -1)
    np.testing.assert_allclose(found, reference(module, last[:K], last[K]), rtol=1e-12, atol=1e-12)
    given = module(window[0], f, past=window[1:])
    np.testing.assert_allclose(np.moveaxis(given.detach().numpy(), axis, -1), found, rtol=0, atol=0)


@pytest.mark.parametrize("normalize", ["softmax", "sigmoid", "none", "paper"])
@pytest.mark.parametrize("history_map", ["low-rank", "identity"])
def test_formula_of_the_options(normalize, history_map):
    module = shuffled(Laurel(site("rw+pa", normalize=normalize, history_map=history_map), dtype=torch.float64))
    window = [torch.randn(2, 5, D, dtype=torch.float64) for _ in range(K)]
    f = torch.randn(2, 5, D, dtype=torch.float64)
    found = module(window[0], f, past=window[1:]).detach().numpy()
    # float64; only the order of the sums differs
    np.testing.assert_allclose(found, reference(module, [t.numpy() for t in window], f.numpy()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("init_down", ["orthogonal", "xavier"])
@pytest.mark.parametrize("history_map", ["low-rank", "identity"])
@pytest.mark.parametrize("normalize", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_start_is_exact(variant, normalize, history_map, init_down, dtype):
    module = Laurel(site(variant, normalize=normalize, history_map=history_map, init_down=init_down), dtype=dtype)
    x, f, *past = (torch.randn(2, 5, D, dtype=dtype) for _ in range(4))
    assert torch.equal(module(x, f, past=past), x + f)
    assert torch.equal(module(x, f, f, past=past), x + f + f)


def test_paper_normalisation_starts_at_one_half():
    module = Laurel(site("rw", normalize="paper"))
    x, f = torch.randn(2, 5, D), torch.randn(2, 5, D)
    torch.testing.assert_close(module(x, f), 0.5 * x + 0.5 * f, rtol=1e-6, atol=1e-7)  # float32 rounds the mix


@pytest.mark.parametrize("normalize", ["softmax", "sigmoid"])
def test_weights_are_bounded_and_sum_to_two(normalize):
    module = Laurel(site("rw", normalize=normalize))
    module.mix.data.copy_(torch.linspace(-30, 30, module.mix.numel()))
    a, b = module.weights()
    assert a.shape == b.shape == (1,)
    assert 0 <= a.item() <= 2
    torch.testing.assert_close(a + b, torch.full((1,), 2.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("options", [{}, {"normalize": "sigmoid"}, {"history_map": "identity"}])
def test_parameter_formula(variant, options):
    config = site(variant, **options)
    module = Laurel(config)
    assert operator(variant).parameters(config) == sum(p.numel() for p in module.parameters())
    assert all(p.ndim >= 1 for p in module.parameters())  # FSDP refuses 0-d parameters


@pytest.mark.parametrize("variant", ["lr", "rw+lr", "pa", "lr+pa", "rw+lr+pa"])
def test_flop_formula_counts_the_matrix_products(variant):
    from torch.utils.flop_counter import FlopCounterMode

    config = site(variant)
    module = Laurel(config)
    x, *past = (torch.randn(1, 1, D) for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        module.skip(x, *past)
    products = counter.get_total_flops()  # counts matrix products only
    assert products == 4 * R * D * len(module.pairs())
    assert products <= operator(variant).counts(config).flops <= products + 10 * D


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient_within_two_steps(variant):
    module = Laurel(site(variant))
    arrived = set()
    for _ in range(2):
        x, f, *past = (torch.randn(2, 5, D) for _ in range(4))
        module.zero_grad()
        (module(x, f, past=past) * torch.randn(2, 5, D)).sum().backward()
        arrived |= {n for n, p in module.named_parameters() if p.grad.abs().max() > 0}
        with torch.no_grad():
            for p in module.parameters():
                p -= 0.1 * p.grad
    assert arrived == {n for n, _ in module.named_parameters()}


def test_orthogonal_start_is_the_papers():
    down = Laurel(site("lr")).down.weight
    expected = torch.zeros(R, D)
    for i in range(D):
        expected[i % R, i] = 1 / (R * D) ** 0.5
    torch.testing.assert_close(down.detach(), expected, rtol=1e-6, atol=0)


def test_start_depends_on_seed_and_site_alone():
    def down(name, seed):
        torch.randn(3)  # the global generator has no say
        return Laurel(site("lr", init_down="xavier"), site=name, seed=seed).down.weight

    assert torch.equal(down("a", 0), down("a", 0))
    assert not torch.equal(down("a", 0), down("b", 0))
    assert not torch.equal(down("a", 0), down("a", 1))


def test_a_float32_skip_beside_a_bfloat16_branch():
    module = Laurel(site("rw+lr"), dtype=torch.bfloat16)
    x, f = torch.randn(2, 5, D), torch.randn(2, 5, D, dtype=torch.bfloat16)
    assert module(x, f).dtype == torch.float32
    assert torch.equal(module(x, f), x + f)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_result_has_the_dtype_of_the_sum(variant):
    """Skip, branch and states of every pair of types."""
    kinds = [torch.bfloat16, torch.float32, torch.float64]
    module = Laurel(site(variant))
    for x_kind, f_kind, state_kind in itertools.product(kinds, kinds, kinds):
        x, f = torch.randn(2, 5, D).to(x_kind), torch.randn(2, 5, D).to(f_kind)
        past = [torch.randn(2, 5, D).to(state_kind) for _ in range(K - 1)]
        found = module(x, f, past=past)
        assert found.dtype == (x + f).dtype
        assert torch.equal(found, x + f)


def operand(shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor as models have them: permuted, channels last, a slice of a larger one, or spread over an axis."""
    how = random.choice(["contiguous", "permuted", "permuted", "slice", "spread", "channels last"])
    if how == "permuted":
        order = random.sample(range(len(shape)), len(shape))
        return torch.randn([shape[i] for i in order]).permute([order.index(i) for i in range(len(shape))])
    if how == "slice":
        return torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]
    if how == "spread":
        axis = random.randrange(len(shape))
        return torch.randn([1 if i == axis else n for i, n in enumerate(shape)]).expand(shape)
    wanted = torch.channels_last if how == "channels last" and len(shape) == 4 else torch.contiguous_format
    return torch.randn(shape).contiguous(memory_format=wanted)


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_result_has_the_memory_layout_of_the_sum(variant, axis):
    random.seed(0)
    module = Laurel(site(variant, axis))
    for _ in range(60):
        shape = [random.choice([1, 2, 3]) for _ in range(4 if axis == 1 else 3)]
        shape[axis] = D
        x, f, more, *past = (operand(tuple(shape)) for _ in range(5))
        module.sides = (random.choice([0, 1]), random.choice([0, 1]))
        two = f + x if module.sides[0] else x + f
        three = more + two if module.sides[1] else two + more
        for found, expected in ((module(x, f, past=past), two), (module(x, f, more, past=past), three)):
            assert torch.equal(found, expected)
            assert found.stride() == expected.stride(), (shape, x.stride(), f.stride(), module.sides)
        out = module(x.double(), f.double().requires_grad_(), past=past)
        out.sum().backward()  # through a copy, where there is one


def test_a_branch_keeps_its_memory_layout():
    module = Laurel(site("rw", axis=1))
    for f in (torch.randn(2, D, 3, 5).to(memory_format=torch.channels_last), torch.randn(5, 3, D, 2).permute(3, 2, 1, 0)):
        assert module.branch(f).stride() == f.stride()


def test_quantised_maps():
    module = torch.nn.Sequential(shuffled(Laurel(site("rw+lr+pa"))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would have us use another package
        small = torch.ao.quantization.quantize_dynamic(module, {torch.nn.Linear})[0]
    x, f, *past = (torch.randn(2, 5, D) for _ in range(4))
    torch.testing.assert_close(small(x, f, past=past), module[0](x, f, past=past), rtol=0.05, atol=0.1)  # int8 weights


def test_torchscript_is_refused_with_the_reason():
    model = torch.nn.Sequential(torch.nn.Linear(D, D), Laurel(site("rw")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would have us use another compiler
        with pytest.raises(LaurelError, match=r"torch\.jit\.script"):
            torch.jit.script(model)


def test_canonical_names():
    assert canonical(" LR+RW ") == "rw+lr"
    assert set(VARIANTS) <= set(operators())
    with pytest.raises(ConfigError, match="Unknown variant 'rw\\+xx'"):
        canonical("rw+xx")


def test_config_reports_every_mistake_at_once():
    with pytest.raises(ConfigError) as info:
        LaurelConfig(variant="no", rank=0, normalize="maybe")
    assert all(word in str(info.value) for word in ("'no'", "rank", "'maybe'"))


def test_a_state_of_another_size_is_an_error():
    module = Laurel(SiteConfig("pa", dim=D, rank=4, lags=2))
    with pytest.raises(LaurelError, match=r"a state of shape \[2, 2, 16\] beside a skip of shape \[2, 16\]"):
        module(torch.randn(2, 16), torch.randn(2, 16), past=[torch.randn(2, 2, 16)])
