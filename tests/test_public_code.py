"""The operators beside public code of the same: its modules get the weights, and a loop over the blocks calls them."""

from __future__ import annotations

import functools
import importlib
import itertools
import math
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from published_models import Branch, ConvNet, D, Gpt, by_hand, net_of
from torch import Tensor, nn
from torch.nn import functional as F

from laurel_rewrite import rewrite
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.testing import equal, gradients_of, moved, near

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-5


def public(name: str) -> Any:
    """A module of another package, where that is installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(name.partition(".")[0])
        return importlib.import_module(name)


def same(model: nn.Module, x: Tensor, definition: Callable[..., Tensor]) -> None:
    """Outputs, and the gradients of the base model's weights: the operators' own are in other modules there."""
    found, right = model(x), by_hand(model, x, definition)
    near(found, right, TOLERANCE)
    one, other = ({k: v for k, v in gradients_of(model, y).items() if ".laurel_" not in k} for y in (found, right))
    equal(one, other, 10 * TOLERANCE)


def rewritten(name: str, kind: type[nn.Module] = Gpt, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    shape = (2, D, 5, 4) if kind is ConvNet else (2, 5, D)
    return moved(rewrite(kind(), (torch.randn(shape),), variant=name, verify=False, **options)).eval()


@torch.no_grad()
def put(parameter: Tensor, *values: Tensor) -> None:
    """Values into another's parameter, side by side."""
    parameter.copy_(torch.cat([value.flatten() for value in values]).view_as(parameter))


# torch.nn


def test_a_norm_in_front_of_the_low_rank_term_is_torchs():
    model = rewritten("lr-normed", rank=4)

    def run(net: list[Branch], x: Tensor) -> Tensor:
        for branch in net:
            low = F.linear(nn.RMSNorm(D, eps=1e-6, elementwise_affine=False)(x), branch.p["down.weight"])
            x = x + branch(x) + F.linear(low, branch.p["up.weight"])
        return x

    same(model, torch.randn(3, 7, D), run)


@pytest.mark.parametrize("name", ["attnres", "vertical"])
def test_attention_over_depth_is_torchs(name):
    """One query for each token, the values of all depths as its sequence."""
    model = rewritten(name, **({"rank": 4} if name == "vertical" else {}))

    def attended(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return F.scaled_dot_product_attention(q.unsqueeze(-2), k, v, scale=scale).squeeze(-2)

    def residuals(net: list[Branch], x: Tensor) -> Tensor:
        values, u = [x], x
        for branch in net:
            values.append(branch(u))
            v = torch.stack(values, -2)
            u = attended(branch.p["query"].expand_as(x), F.rms_norm(v, (D,), branch.p["scale"], 1e-6), v, 1.0)
        return u

    def vertical(net: list[Branch], x: Tensor) -> Tensor:
        values = []
        for branch in net:
            values.append(x)
            y, v, read = x + branch(x), torch.stack(values, -2), x
            if len(values) > 1:
                q, k = (F.linear(F.rms_norm(z, (D,), eps=1e-6), branch.p[f"{m}.weight"]) for z, m in ((y, "q"), (v, "k")))
                read = attended(q, k, v, 0.5)
            x = y + branch.p["g"] * read
        return x

    same(model, torch.randn(3, 7, D), residuals if name == "attnres" else vertical)


# timm and torchvision


def test_layerscale_is_timms():
    """A whole vision transformer, with timm's own LayerScale and with this one."""
    timm = public("timm.models.vision_transformer")
    size: dict[str, Any] = {"img_size": 8, "patch_size": 4, "embed_dim": D, "depth": 3, "num_heads": 2, "num_classes": 5}
    torch.manual_seed(0)
    theirs, base = timm.VisionTransformer(**size, init_values=0.1).eval(), timm.VisionTransformer(**size)
    base.load_state_dict({key: value for key, value in theirs.state_dict().items() if ".ls" not in key})
    mine = moved(rewrite(base, (torch.randn(2, 3, 8, 8),), variant="layerscale", verify=False)).eval()
    gains = [scale.gamma for block in theirs.blocks for scale in (block.ls1, block.ls2)]
    for gain, site in zip(gains, sites_of(mine).values(), strict=True):
        put(gain, site.g)
    x = torch.randn(3, 3, 8, 8)
    near(mine(x), theirs(x), TOLERANCE)
    one, other = gradients_of(mine, mine(x)), gradients_of(theirs, theirs(x))
    for gain, site in zip(gains, sites_of(mine).values(), strict=True):
        near(site.g.grad, gain.grad, 10 * TOLERANCE)
    equal({k: v for k, v in one.items() if ".laurel_" not in k}, {k: v for k, v in other.items() if ".ls" not in k}, 10 * TOLERANCE)


def test_layerscale_of_channels_is_timms():
    layer = public("timm.layers.layer_scale").LayerScale2d
    model = rewritten("layerscale", ConvNet)

    def run(net: list[Branch], x: Tensor) -> Tensor:
        for branch in net:
            scale = layer(D)
            put(scale.gamma, branch.p["g"])
            x = x + scale(branch(x).movedim(-1, 1)).movedim(1, -1)
        return x

    same(model, torch.randn(3, D, 4, 6), run)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_stochastic_depth_is_theirs(library, monkeypatch):
    """With the same draws."""
    if library == "timm":
        drop = public("timm.layers.drop").DropPath
    else:
        drop = functools.partial(public("torchvision.ops").StochasticDepth, mode="row")
    model = rewritten("stochastic-depth", drop_rate=0.6).train()
    monkeypatch.setattr(torch.Tensor, "bernoulli_", lambda noise, share: noise.copy_(torch.rand(noise.shape) < share))

    def run(net: list[Branch], x: Tensor) -> Tensor:
        for number, branch in enumerate(net, start=1):
            x = x + drop(0.6 * number / len(net)).train()(branch(x))
        return x

    x = torch.randn(8, 7, D)
    torch.manual_seed(1)
    found = model(x)
    torch.manual_seed(1)
    near(found, by_hand(model, x, run), TOLERANCE)


# transformers


def test_gemma3n_is_transformers():
    gemma = public("transformers.models.gemma3n.modeling_gemma3n")
    model = rewritten("gemma3n", rank=4)
    config = types.SimpleNamespace(hidden_size=D, laurel_rank=4, rms_norm_eps=1e-6)

    def run(net: list[Branch], x: Tensor) -> Tensor:
        for branch in net:
            f = branch(x)
            if branch.attends:
                laurel = gemma.Gemma3nTextLaurelBlock(config)
                put(laurel.linear_left.weight, branch.p["down.weight"])
                put(laurel.linear_right.weight, branch.p["up.weight"])
                put(laurel.post_laurel_norm.weight, branch.p["norm"])
                x = (x + f + laurel(branch.norm(x))) / math.sqrt(2)
            else:
                x = x + f
        return x

    same(model, torch.randn(3, 7, D), run)


def test_altup_is_transformers():
    """Its coefficients depend on the token; here they are the first column of its maps."""
    gemma = public("transformers.models.gemma3n.modeling_gemma3n")
    n = 3
    model = rewritten("altup", streams=n)
    config = types.SimpleNamespace(hidden_size=D, altup_num_inputs=n, altup_active_idx=0, altup_coef_clip=None, rms_norm_eps=1e-6)

    class Constant(gemma.Gemma3nTextAltUp):
        def compute_router_modalities(self, x: Tensor) -> Tensor:
            return F.one_hot(torch.zeros(x.shape[:-1], dtype=torch.long), n).to(x.dtype)

    def run(net: list[Branch], x: Tensor) -> Tensor:
        wide, across = torch.stack([x] * n), torch.zeros(n, n)
        for branch in net:
            altup = Constant(config)
            put(altup.prediction_coefs.weight, torch.cat([across.reshape(-1, 1), torch.randn(n * n, n - 1)], 1))
            put(altup.correction_coefs.weight, torch.cat([branch.p["correct"].reshape(-1, 1), torch.randn(n, n - 1)], 1))
            predicted = altup.predict(wide)
            wide = altup.correct(predicted, predicted[0] + branch(predicted[0]))
            across = branch.p.get("across")
        return wide.mean(0)

    same(model, torch.randn(3, 7, D), run)


def test_mhc_is_transformers():
    """DeepSeek-V4's, whose map gives what is read of the wide stream, what is written to it, and its mixing, transposed."""
    deepseek = public("transformers.models.deepseek_v4.modeling_deepseek_v4")
    n = 4
    model = rewritten("mhc", streams=n)
    config = types.SimpleNamespace(hidden_size=D, hc_mult=n, hc_sinkhorn_iters=20, hc_eps=0.0, rms_norm_eps=1e-6)

    def connection(read: dict[str, Tensor] | None, write: dict[str, Tensor]) -> nn.Module:
        hyper = deepseek.DeepseekV4HyperConnection(config)
        written = torch.cat([write[f"of_write.{lane}.weight"] for lane in range(n)], 1)
        mixing = written[n:].unflatten(0, (n, n)).transpose(0, 1).flatten(0, 1)
        reading, bias, gate = torch.zeros(n, n * D), torch.zeros(n), torch.zeros(1)
        if read is not None:
            reading = torch.cat([read[f"of_read.{lane}.weight"] for lane in range(n)], 1)
            bias, gate = read["read_bias"], read["read_gate"]
        put(hyper.fn, reading, written[:n], mixing)
        put(hyper.base, bias, write["write_bias"][:n], write["write_bias"][n:].view(n, n).T)
        put(hyper.scale, gate, write["into_gate"], write["across_gate"])
        return hyper

    def run(net: list[Branch], x: Tensor) -> Tensor:
        wide, before = torch.stack([x] * n, 2), None
        for branch in net:
            post, comb, read = connection(before, branch.p)(wide)
            f = branch(x if before is None else read)  # the first reads the stream itself
            wide = post.unsqueeze(-1) * f.unsqueeze(-2) + comb.transpose(-1, -2) @ wide
            before = branch.p
        return wide.sum(2)

    same(model, torch.randn(3, 7, D), run)


def test_parallel_branches_are_transformers():
    """A GPT-NeoX is configured with them, or made so."""
    transformers = public("transformers")
    size: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    torch.manual_seed(0)
    theirs, base = (
        transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**size, use_parallel_residual=kind)).eval() for kind in (True, False)
    )
    base.load_state_dict(theirs.state_dict())
    mine = rewrite(base, kwargs={"input_ids": torch.randint(1, 64, (2, 6))}, variant="parallel", verify=False).eval()
    ids = torch.randint(1, 64, (3, 9))
    found, right = mine(ids).logits, theirs(ids).logits
    near(found, right, TOLERANCE)
    equal(gradients_of(mine, found), gradients_of(theirs, right), 10 * TOLERANCE)
    assert (base(ids).logits - right).abs().max() > 1e-3


# Packages that this one does not need


@pytest.mark.parametrize("mix", ["static", "dynamic"])
def test_hyper_connections_are_those_of_the_package(mix):
    """It has one norm and one scale for what is read and for the mixing: they are made equal. Its first connection reads lane 0, a copy of x."""
    package = public("hyper_connections")
    n = 4
    model = rewritten("hc", streams=n, mix=mix)
    net = net_of(model)
    if mix == "dynamic":
        with torch.no_grad():
            for before, after in itertools.pairwise(net):
                before.p["dynamic.out_scale"].copy_(after.p["dynamic.across_scale"])
            for branch in net[1:]:
                branch.p["dynamic.norm"].copy_(net[0].p["dynamic.norm"])

    def connection(read: dict[str, Tensor] | None, write: dict[str, Tensor]) -> nn.Module:
        hyper = package.HyperConnections(n, dim=D, layer_index=0)
        if read is not None:
            put(hyper.static_alpha[:, 0], read["out"])
        put(hyper.static_alpha[:, 1:], write["across"].T)
        put(hyper.static_beta, write["into"])
        if mix == "dynamic":
            put(hyper.norm.gamma, write["dynamic.norm"] - 1)
            put(hyper.dynamic_beta_fn, write["dynamic.of_write.weight"][0])
            put(hyper.dynamic_beta_scale, write["dynamic.into_scale"])
            put(hyper.dynamic_alpha_fn[:, 1:], write["dynamic.of_write.weight"][1:].T)
            put(hyper.dynamic_alpha_scale, write["dynamic.across_scale"])
            if read is not None:
                put(hyper.dynamic_alpha_fn[:, 0], read["dynamic.of_read.weight"])
        return hyper

    def run(net: list[Branch], x: Tensor) -> Tensor:
        expand, reduce = package.HyperConnections.get_expand_reduce_stream_functions(n)
        wide, before = expand(x), None
        for branch in net:
            u, add = connection(before, branch.p)(wide)
            wide, before = add(branch(u)), branch.p
        return reduce(wide)

    same(model, torch.randn(3, 7, D), run)


def test_orthogonal_updates_are_those_of_x_transformers():
    update = public("x_transformers.x_transformers").OrthogonalResidualUpdate(D)
    model = rewritten("orthogonal")

    def run(net: list[Branch], x: Tensor) -> Tensor:
        for branch in net:
            rows = branch(x).flatten(0, 1), x.flatten(0, 1)  # it projects whole samples
            x = update(*rows).view_as(x)
        return x

    same(model, torch.randn(3, 7, D), run)


@pytest.mark.parametrize(("dilation", "period"), [(1, 1), (2, 1), (2, 2)])
def test_denseformer_is_that_of_its_authors(dilation, period):
    package = public("denseformer")
    model = rewritten("denseformer", dilation=dilation, period=period)

    def run(net: list[Branch], x: Tensor) -> Tensor:
        averages = package.DWAModules(len(net) // 2, dilation, period)
        averages.init_accumulators(x)
        for number, (attend, feed) in enumerate(zip(net[::2], net[1::2], strict=True)):
            if averages.alphas[number] is not None:
                put(averages.alphas[number].weight, feed.p["a"])
            x = x + attend(x)
            x = averages(x + feed(x), block_idx=number)
        return x

    same(model, torch.randn(3, 7, D), run)
