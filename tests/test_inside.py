"""What is measured inside a rewritten model: each figure against one that was computed without the stand-ins that measure it."""

from __future__ import annotations

import copy
import functools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import Example, away_from_start, real
from torch import Tensor, nn
from toys import CASES, D

from laurel_rewrite import ConfigError, learned, rewrite
from laurel_rewrite.backends.module.surgery import rewriting_of
from laurel_rewrite.lab.inside import Difference, Inside, gaining, inside
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.sources.models import build

CLOSE = {"rel": 2e-5, "abs": 2e-6}  # float32 against float64, of means over some thousand products
EQUAL = {"abs": 0.0, "rel": 0.0}  # the same kernels on the same numbers
VOCABULARY = 99
SMALL_ALBERT = {
    "num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "embedding_size": 16, "vocab_size": VOCABULARY,
}  # fmt: skip


def example(name: str) -> Example:
    if name != "albert":
        return real(name)
    torch.manual_seed(0)
    built = build("hf:albert", SMALL_ALBERT)
    return Example(built.model, built.args, built.kwargs, ((), {}), 6)


@functools.cache
def trained(name: str, variant: str = "rw+lr+pa") -> tuple[nn.Module, nn.Module]:
    """A base, and it rewritten, away from its start; in training mode but for one module."""
    case = example(name)
    model = away_from_start(rewrite(case.model, case.args, case.kwargs, variant=variant, rank=4, verify=False)).train()
    next(module for module in model.modules() if not list(module.children())).eval()
    return case.model.eval(), model


def batches_of(name: str, count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    if name == "resnet18":
        return [torch.randn(2, 3, 32, 32, generator=generator) for _ in range(count)]
    return [torch.randint(0, 90, (2, 7 + place), generator=generator) for place in range(count)]


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Cross-entropy of the output with labels that the batch gives."""
    result = model(batch)
    logits = result if isinstance(result, Tensor) else result[0] if not hasattr(result, "logits") else result.logits
    labels = torch.arange(logits[..., 0].numel()) % logits.shape[-1]
    return nn.functional.cross_entropy(logits.flatten(0, -2).float(), labels)


def stack_loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


@torch.no_grad()
def losses(model: nn.Module, batches: list[Tensor], loss: Callable = loss) -> list[float]:
    """In eval mode, of a copy."""
    model = copy.deepcopy(model).eval()
    return [float(loss(model, batch)) for batch in batches]


def difference(changed: list[float], whole: list[float]) -> tuple[float, float]:
    """Mean and standard error, by the textbook."""
    values = [a - b for a, b in zip(changed, whole, strict=True)]
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def told(found: Difference) -> tuple[float, float]:
    return found.loss, found.error


def operands(x: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    """As a connection is called with them, by place or by name."""
    return x, f


@torch.no_grad()
def sums_of(model: nn.Module, batch: Tensor, loss: Callable = loss) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    """The operands and the result of every call of every connection, in float64, by hooks of torch's."""
    model = copy.deepcopy(model).eval()
    seen = []
    for name, module in sites_of(model).items():

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor, name: str = name) -> None:
            seen.append((name, *(value.double() for value in (*operands(*args, **kwargs), output))))

        module.register_forward_hook(hook, with_kwargs=True)
    loss(model, batch)
    return seen


def vectors(value: Tensor, axis: int) -> Tensor:
    return value.movedim(axis, -1).flatten(0, -2)


def rms(value: Tensor, axis: int) -> float:
    return torch.linalg.vector_norm(vectors(value, axis), dim=-1).div(math.sqrt(value.shape[axis])).mean().item()


def cosine(one: Tensor, other: Tensor, axis: int) -> float:
    one, other = vectors(one, axis), vectors(other, axis)
    return ((one * other).sum(1) / one.norm(dim=1) / other.norm(dim=1)).mean().item()


def share(part: Tensor, whole: Tensor, axis: int) -> float:
    part, whole = vectors(part, axis), vectors(whole, axis)
    return ((part * whole).sum(1) / (whole * whole).sum(1)).mean().item()


def mean(values: Iterator[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


@functools.cache
def looked(name: str, variant: str = "rw+lr+pa") -> Inside:
    return inside(trained(name, variant)[1], iter(batches_of(name)), loss)


FIGURES = ("skip", "branch", "result", "branch_cosine", "result_cosine")
REAL = [("llama", "rw+lr+pa"), ("gpt2", "rw+lr"), ("resnet18", "rw+lr+pa"), ("albert", "rw+lr+pa")]


@pytest.mark.parametrize(("name", "variant"), REAL)
def test_the_stream_is_what_hooks_see(name, variant):
    _, model = trained(name, variant)
    found, rows = looked(name, variant), {row.id: row for row in rewriting_of(model).plan.sites}
    expected, shares, starts = defaultdict(list), defaultdict(list), defaultdict(list)
    runs = [sums_of(model, batch) for batch in batches_of(name)]
    for run in runs:
        finals = {rows[site].stream: out for site, _, _, out in run}
        first, by_site = {}, defaultdict(list)
        for site, x, f, out in run:
            axis, stream = rows[site].axis, rows[site].stream
            first.setdefault(stream, share(x, finals[stream], axis))
            sizes = [rms(x, axis), rms(f, axis), rms(out, axis), cosine(f, x, axis), cosine(out, x, axis)]
            by_site[site].append([*sizes, share(out - x, finals[stream], axis)])
        for site, calls in by_site.items():
            expected[site].append([mean(column) for column in zip(*calls, strict=True)])
            shares[site].append(sum(call[-1] for call in calls))
        for stream, start in first.items():
            starts[stream].append(start)
    assert [site.site for site in found.sites] == list(dict.fromkeys(site for site, *_ in runs[0]))
    for site in found.sites:
        right = [mean(column) for column in zip(*expected[site.site], strict=True)]
        assert [getattr(site, figure) for figure in FIGURES] == pytest.approx(right[:-1], **CLOSE), site.site
        assert site.share == pytest.approx(mean(shares[site.site]), **CLOSE)
        assert (site.calls, site.stream) == (rows[site.site].calls, rows[site.site].stream)
    for stream in found.streams:
        assert stream.start == pytest.approx(mean(starts[stream.stream]), **CLOSE)
        assert stream.sites == tuple(site.site for site in found.sites if site.stream == stream.stream)
    if name in ("llama", "gpt2"):  # each result is the next skip
        total = sum(site.share for site in found.sites) + found.streams[0].start
        assert total == pytest.approx(1.0, abs=1e-5)  # of float32 sums
    assert len(found.streams) == (4 if name == "resnet18" else 1)


@pytest.mark.parametrize(("name", "variant"), REAL)
def test_what_was_learned(name, variant):
    _, model = trained(name, variant)
    found, connections = looked(name, variant), sites_of(model)
    assert {site.site: site.learned for site in found.sites} == learned(model)
    for site in found.sites:
        module = connections[site.site]
        pairs = zip(module.down, module.up, strict=True) if "pa" in variant else [(module.down, module.up)]
        names = [f"uv.{lag}" for lag in range(module.config.lags)] if "pa" in variant else ["uv"]
        for key, (down, up) in zip(names, pairs, strict=True):
            product = up.weight.detach().flatten(1).double() @ down.weight.detach().flatten(1).double()
            right = torch.linalg.svdvals(product)[:4].tolist()
            assert site.singular_values[key] == pytest.approx(right, rel=1e-5)  # told in float32
        assert list(site.singular_values) == names
        assert site.depth == pytest.approx(module.g.tolist() if "pa" in variant else [], rel=1e-6)  # float32


@pytest.mark.parametrize("name", ["llama", "resnet18"])
def test_without_a_branch_is_with_zeros_for_its_last_weights(name):
    _, model = trained(name)
    found, batches = looked(name), batches_of(name)
    whole = losses(model, batches)
    assert found.loss == pytest.approx(mean(whole), rel=1e-12)
    last = {"llama": ("self_attn.o_proj", "mlp.down_proj"), "resnet18": ("bn2",)}[name]
    for site in found.sites:
        changed = copy.deepcopy(model)
        owner, _, attribute = site.site.rpartition(".")
        for parameter in changed.get_submodule(f"{owner}.{last[int(attribute[-1])]}").parameters():
            parameter.data.zero_()
        assert told(site.without_branch) == pytest.approx(
            difference(losses(changed, batches), whole), rel=1e-9, abs=1e-12
        )  # of float64 means


@pytest.mark.parametrize(("name", "variant"), REAL)
def test_plain_sums_put_back(name, variant):
    """One at a time by a hook that replaces what the connection gives, which leaves its state; all of them against the base."""
    base, model = trained(name, variant)
    found, batches = looked(name, variant), batches_of(name)
    whole = losses(model, batches)
    assert told(found.plain) == pytest.approx(difference(losses(base, batches), whole), rel=1e-9, abs=1e-12)  # of float64 means
    for site in found.sites:
        changed = copy.deepcopy(model)
        changed.get_submodule(site.site).register_forward_hook(
            lambda module, args, kwargs, output: sum(operands(*args, **kwargs)), with_kwargs=True
        )
        right = difference(losses(changed, batches), whole)
        assert told(site.plain) == pytest.approx(right, rel=1e-9, abs=1e-12)  # likewise
    assert len(found.streams) > 1 or found.streams[0].plain == found.plain


def as_it_is(model: nn.Module) -> dict[str, object]:
    facts: dict[str, object] = {f"{name}.training": module.training for name, module in model.named_modules()}
    for name, module in model.named_modules():
        facts[f"{name}.hooks"] = [list(hooks) for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        facts[f"{name}.attributes"] = sorted(vars(module))
        facts[f"{name}.plain"] = getattr(module, "plain", None)
    return facts


def test_the_model_is_left_as_it_was():
    model = copy.deepcopy(trained("llama")[1])
    model.register_buffer("counts", torch.zeros(1))
    model.register_buffer("replaced", torch.zeros(1))
    before, values = as_it_is(model), copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    right = torch.rand(3)
    torch.manual_seed(5)
    runs = []

    def fails(at: int) -> Callable[[nn.Module, Tensor], Tensor]:
        def counted(model: nn.Module, batch: Tensor) -> Tensor:
            runs.append(model.training)
            model.counts += 1
            model.replaced = model.replaced + 1
            if len(runs) == at:
                raise ValueError("no loss")
            return loss(model, batch)

        return counted

    for at in (1, 2, 5, 12):  # in a run of the model, without a branch, with a plain sum
        runs.clear()
        with pytest.raises(ValueError, match="no loss"):
            inside(model, batches_of("llama"), fails(at))
        assert as_it_is(model) == before
    runs.clear()
    inside(model, batches_of("llama", 1), fails(-1))
    assert not any(runs)
    assert len(runs) == 2 + 2 * 6 + 1 + 1
    assert as_it_is(model) == before
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.rand(3), right)


def test_a_loss_that_draws_draws_the_same_each_time():
    def drawn(model: nn.Module, batch: Tensor) -> Tensor:
        return loss(model, batch) + torch.rand(())

    base = real("llama")
    model = rewrite(base.model, base.args, base.kwargs, variant="rw")
    found = inside(model, batches_of("llama"), drawn)
    assert told(found.plain) == (0.0, 0.0)  # at its start it is the base
    assert all(told(site.plain) == (0.0, 0.0) and site.learned == {"a": 1.0, "b": 1.0} for site in found.sites)
    assert all(site.without_branch.loss != 0.0 for site in found.sites)
    assert gaining(found) == []


def test_batches_that_are_drawn_one_by_one_are_not_one_and_the_same():
    x = torch.randn(2, 5, D)
    model = rewrite(CASES["plain"].make(), (x,), variant="rw")
    seen: list[Tensor] = []

    def kept(model: nn.Module, batch: Tensor) -> Tensor:
        seen.append(batch)
        return stack_loss(model, batch)

    inside(model, (torch.randn(2, 5, D) for _ in range(2)), kept)
    assert len({float(batch[0, 0, 0]) for batch in seen}) == 2


# How a model is held


def test_wrapped_and_compiled_models_are_looked_at_as_they_are():
    _, model = trained("llama")
    expected, batches = looked("llama"), batches_of("llama")
    assert inside(torch.compile(model), batches, loss) == expected
    inner = copy.deepcopy(model)
    inner.model.layers[1] = torch.compile(inner.model.layers[1])
    assert inside(inner, batches, loss) == expected
    assert inside(torch.compile(nn.DataParallel(model)), batches, loss) == expected


def test_a_graph_that_was_compiled_before_is_left_alone():
    x = torch.randn(2, 5, D)
    model = away_from_start(rewrite(CASES["plain"].make(), (x,), variant="rw+lr+pa", rank=4)).eval()
    expected = inside(model, [x], stack_loss).to_dict()
    compiled = torch.compile(model, backend="eager")
    right = compiled(x)
    assert inside(compiled, [x], stack_loss).to_dict() == expected  # NaN of one batch is None there
    assert torch.equal(compiled(x), right)


def test_half_precision_is_measured_in_float32():
    _, model = trained("llama")
    expected = looked("llama")
    found = inside(copy.deepcopy(model).bfloat16(), batches_of("llama"), loss)
    for site, right in zip(found.sites, expected.sites, strict=True):
        assert site.skip == pytest.approx(right.skip, rel=2e-2)  # 8 bits
        assert site.share == pytest.approx(right.share, abs=2e-2)  # likewise
        assert site.singular_values["uv.0"] == pytest.approx(right.singular_values["uv.0"], rel=2e-2)  # likewise


def test_what_is_no_number_is_none_in_json():
    _, model = trained("llama")
    found = inside(model, batches_of("llama", 1), lambda model, batch: loss(model, batch) * math.nan)
    data = found.to_dict()
    json.dumps(data, allow_nan=False)
    assert data["loss"] is data["plain"]["loss"] is data["sites"][0]["without_branch"]["error"] is None
    assert data["sites"][0]["skip"] == found.sites[0].skip


def test_what_cannot_be_looked_at_is_refused():
    base, model = trained("llama")
    batches = batches_of("llama")
    with pytest.raises(ConfigError, match=r"was not made by laurel_rewrite\.rewrite"):
        inside(base, batches, loss)
    with pytest.raises(ConfigError, match="There is no batch"):
        inside(model, iter(()), loss)
    with pytest.raises(ConfigError, match=r"The loss gave a tensor of shape \[2, 7, 99\]\. Let it return one number"):
        inside(model, batches, lambda model, batch: model(batch).logits)
    with pytest.raises(ConfigError, match="The loss gave CausalLMOutputWithPast"):
        inside(model, batches, lambda model, batch: model(batch))
    x = torch.randn(2, 5, D)
    graph = torch.export.export(CASES["plain"].make(), (x,)).module(check_guards=False)
    with pytest.raises(ConfigError, match="A rewritten graph has no record of its streams"):
        inside(rewrite(graph, (x,), variant="rw"), [x], stack_loss)
    with pytest.raises(ConfigError, match="One batch has no standard error"):
        gaining(inside(model, batches[:1], loss))
