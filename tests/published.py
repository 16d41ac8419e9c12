"""The published definitions of the operators, as loops over a small model: they know its weights, and nothing of how the package computes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from published_models import Branch, D, Net, blocks_of, rms
from torch import Tensor
from torch.nn import functional as F

# Local: x' = step(x, f), of the parameters there


def local(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The whole model whose sums are this step. n is what the branch reads."""

    def run(net: Net, x: Tensor, **options: Any) -> Tensor:
        for number, branch in enumerate(net, start=1):
            n = branch.norm(x)
            x = step(branch.p, x, branch.inner(n), n=n, share=number / len(net), attends=branch.attends, **options)
        return x

    return run


@local
def rw_vector(p, x, f, *, normalize="softmax", **_):
    if normalize == "sigmoid":
        a = 2 / (1 + torch.exp(-p["mix"][0]))
        return a * f + (2 - a) * x
    w = p["mix"]
    if normalize == "none":
        return (1 + w[0]) * f + (1 + w[1]) * x
    total = (w[0].exp() + w[1].exp()) / (2 if normalize == "softmax" else 1)
    return w[0].exp() / total * f + w[1].exp() / total * x


@local
def rezero(p, x, f, **_):
    return x + p["a"] * f


@local
def layerscale(p, x, f, **_):
    return x + f @ torch.diag(p["g"])


@local
def contractive(p, x, f, *, dt=0.5, **_):
    dt = p.get("learned_dt", dt)
    return x + dt * (f - x)


@local
def stochastic_depth(p, x, f, *, rate, draw, share, **_):
    """p_l = 1 - l/L (1 - p_L), with l/L the share; kept as a float32."""
    keep = float(torch.tensor(1 - share * rate, dtype=torch.float32))
    kept = draw(x.shape[0]) < keep
    return torch.stack([x[i] + f[i] / keep if kept[i] else x[i] for i in range(x.shape[0])])


@local
def highway(p, x, f, **_):
    t = torch.sigmoid(x @ p["weight.weight"].T + p["bias"])
    return x + t * (f - x)


@local
def gated(p, x, f, **_):
    return x + 2 * torch.sigmoid(x @ p["weight.weight"].T + p["bias"]) * f


@local
def gru(p, x, f, **_):
    w_r, w_z, w_g = p["of_branch.weight"].split(D)
    u_r, u_z = p["of_skip.weight"].split(D)
    r = torch.sigmoid(f @ w_r.T + x @ u_r.T)
    z = torch.sigmoid(f @ w_z.T + x @ u_z.T - p["bias"])
    h = torch.tanh(f @ w_g.T + (r * x) @ p["of_reset.weight"].T)
    return (1 - z) * x + z * h


@local
def orthogonal(p, x, f, **_):
    return x + f - (f * x).sum(-1, keepdim=True) / ((x * x).sum(-1, keepdim=True) + 1e-6) * x


@local
def delta(p, x, f, *, n, **_):
    """(I - b k k^T) x + b k v^T with one value."""
    k = (f / (f.square().sum(-1, keepdim=True) + 1e-6).sqrt()).unsqueeze(-1)
    v = 4 * torch.sigmoid(x @ p["value.weight"].T + p["value_bias"]).unsqueeze(-1)
    b = 2 * torch.sigmoid(n @ p["gate.weight"].T + p["gate_bias"]).unsqueeze(-1)
    erased = torch.eye(D, dtype=x.dtype) - b * (k @ k.transpose(-1, -2))
    return (erased @ x.unsqueeze(-1) + b * k @ v).squeeze(-1)


@local
def lr_normed(p, x, f, **_):
    return x + f + rms(x) @ (p["up.weight"] @ p["down.weight"]).T


@local
def gemma3n(p, x, f, *, n, attends, **_):
    if not attends:
        return x + f
    laurel = n + rms(n @ p["down.weight"].T @ p["up.weight"].T) * p["norm"]
    return (x + f + laurel) / 2**0.5


def deepnorm(net: Net, x: Tensor) -> Tensor:
    """LN(a x + f) with a = (2N)^(1/4)."""
    layers = len(net) // 2
    for branch in net:
        x = branch.norm((2 * layers) ** 0.25 * x + branch.inner(x))
    return x


# One earlier value


def x0(net: Net, x: Tensor, *, post: bool = False) -> Tensor:
    start, parts = x, [*blocks_of(net)]
    for number, block in enumerate(parts):
        x = through(block, x, post)
        if number < len(parts) - 1:
            a, c = block[1].p["lambdas"]
            x = a * x + c * start
    return x


def through(block: tuple[Branch, ...], x: Tensor, post: bool) -> Tensor:
    """A block with its plain sums."""
    for branch in block:
        x = branch.norm(x + branch.inner(x)) if post else x + branch(x)
    return x


def backout(net: Net, x: Tensor, *, depth: float = 2 / 3) -> Tensor:
    held = [x]
    for branch in net:
        held.append(held[-1] + branch(held[-1]))
    return held[-1] - net[-1].p["amount"] * held[round(depth * len(net))]


# History


def denseformer(net: Net, x: Tensor, *, dilation: int = 1, period: int = 1, post: bool = False) -> Tensor:
    outputs = [x]
    for number, block in enumerate(blocks_of(net), start=1):
        outputs.append(through(block, x, post))
        x = outputs[number]
        if number % period == 0:
            read = [j for j in range(number + 1) if (number - j) % dilation == 0]
            x = sum(a * outputs[j] for a, j in zip(block[1].p["a"], read, strict=True))
    return x


def elc_bert(net: Net, x: Tensor) -> Tensor:
    outputs, parts = [x], [*blocks_of(net)]
    for number, (attend, feed) in enumerate(parts):
        if number:
            w = parts[number - 1][1].p["w"].exp()
            x = sum(share * out for share, out in zip(w / w.sum(), outputs, strict=True))
        inside = attend(x)
        outputs.append(inside + feed(inside))
    return outputs[-1]


def kept(values: list[Tensor], newest: int) -> list[Tensor]:
    """The first, the sum of those in the middle, the newest."""
    if not newest or len(values) <= newest + 1:
        return values
    middle = values[1:-newest]
    return [values[0], sum(middle[1:], middle[0]), *values[-newest:]]


def grn(net: Net, x: Tensor, *, newest: int = 0) -> Tensor:
    added, u = [x], x
    for branch in net:
        added.append(branch(u))
        u = retrieved(kept(added, newest), branch.p["b"], branch.p.get("w"))
    return u


def retrieved(values: list[Tensor], b: Tensor, w: Tensor | None) -> Tensor:
    """(G * (b + 1 relu(w.G))) 1: G is [.., D, n]."""
    g = torch.stack(values, -1)
    weights = b.T if b.ndim > 1 else b.expand(D, -1)
    if w is not None:
        weights = weights + torch.relu(w @ g).unsqueeze(-2)
    return (g * weights).sum(-1)


def dca(net: Net, x: Tensor, *, newest: int = 0) -> Tensor:
    added, reads = [x], [x]
    for branch in net:
        added.append(branch.inner(*(branch.norm(u) for u in reads)))
        values = kept(added, newest)
        reads = [retrieved(values, b, w) for b, w in zip(branch.p["b"], branch.p["w"], strict=True)]
    assert len(reads) == 1
    return reads[0]


def muddformer(net: Net, x: Tensor) -> Tensor:
    outputs, reads, stream = [x], [x], x
    for attend, feed in blocks_of(net):
        h = stream + attend.inner(*(attend.norm(u) for u in reads))
        outputs.append(h + feed(h))
        p = feed.p
        dynamic = F.gelu(rms(outputs[-1]) @ p["down.weight"].T) @ p["up.weight"].T
        weights = dynamic.unflatten(-1, p["a"].shape) + p["a"]
        mixed = torch.einsum("...cl,l...d->c...d", weights, torch.stack(outputs))
        reads, stream = [*mixed[:3]], mixed[-1]
    assert weights.shape[-2] == 1
    return stream


def attnres(net: Net, x: Tensor, *, block_size: int = 1, total: str = "mean") -> Tensor:
    start, added, u = x, [], x
    for branch in net:
        added.append(branch(u))
        blocks = [sum(added[i + 1 : i + block_size], added[i]) for i in range(0, len(added), block_size)]
        v = torch.stack([start, *blocks], -2)
        keys = rms(v) * branch.p["scale"]
        s = (keys @ branch.p["query"]).softmax(-1)
        u = torch.einsum("...n,...nd->...d", s, v) * (v.shape[-2] if total == "sum" else 1)
    return u


def vertical(net: Net, x: Tensor) -> Tensor:
    held = []
    for number, branch in enumerate(net):
        held.append(x)
        y, v, p = x + branch(x), torch.stack(held, -2), branch.p
        read = v[..., 0, :]
        if number:
            q, k = rms(y) @ p["q.weight"].T, rms(v) @ p["k.weight"].T
            s = (torch.einsum("...r,...nr->...n", q, k) / math.sqrt(q.shape[-1])).softmax(-1)
            read = torch.einsum("...n,...nd->...d", s, v)
        x = y + p["g"] * read
    return x


# Wide streams: H is [.., n, D]


def copies(x: Tensor, n: int) -> Tensor:
    return torch.stack([x] * n, -2)


def hc(net: Net, x: Tensor, *, streams: int = 4) -> Tensor:
    return hyper(net, copies(x, streams), x, split=False)[0].sum(-2)


def hyper(net: Net, wide: Tensor, u: Tensor, *, split: bool) -> tuple[Tensor, Tensor]:
    """H' = A_r H + B f, u = A_m H'. All of f is written to each lane, or split: a part to each, and u is in parts, too."""
    for branch in net:
        p, f = branch.p, branch(u)
        b, a_r = p["into"], p["across"]
        if "dynamic.norm" in p:
            added = torch.tanh(rms(wide) * p["dynamic.norm"] @ p["dynamic.of_write.weight"].T)  # [.., lane j, 1 + n]
            b = b + p["dynamic.into_scale"] * added[..., 0]
            a_r = a_r + p["dynamic.across_scale"] * added[..., 1:].transpose(-1, -2)
        parts = f.unflatten(-1, (wide.shape[-2], -1)) if split else f.unsqueeze(-2)
        wide = a_r @ wide + b.unsqueeze(-1) * parts
        if "out" in p:
            a_m = p["out"] if split else p["out"].unsqueeze(0)
            if "dynamic.norm" in p:
                added = torch.tanh(rms(wide) * p["dynamic.norm"] @ p["dynamic.of_read.weight"].T)
                a_m = a_m + p["dynamic.out_scale"] * added.transpose(-1, -2)
            u = (a_m @ wide).flatten(-2)
    return wide, u


def frac(net: Net, x: Tensor, *, parts: int = 4) -> Tensor:
    return hyper(net, x.unflatten(-1, (parts, -1)), x, split=True)[0].flatten(-2)


def sinkhorn(logits: Tensor, rounds: int) -> Tensor:
    """Columns and rows in turn, as differences of logarithms."""
    for _ in range(rounds):
        logits = logits - logits.logsumexp(-2, keepdim=True)
        logits = logits - logits.logsumexp(-1, keepdim=True)
    return logits.exp()


def permuted(logits: Tensor, n: int) -> Tensor:
    """sum_k softmax_k P_k; P_k takes lane k(i) to place i."""
    matrices = [torch.eye(n, dtype=logits.dtype)[list(order)] for order in itertools.permutations(range(n))]
    return torch.einsum("...k,kij->...ij", logits.softmax(-1), torch.stack(matrices))


def mhc(net: Net, x: Tensor, *, streams: int = 4, rounds: int = 20) -> Tensor:
    return constrained(net, copies(x, streams), x, lambda q: sinkhorn(q.unflatten(-1, (streams, streams)), rounds))


def mhc_lite(net: Net, x: Tensor, *, streams: int = 4) -> Tensor:
    return constrained(net, copies(x, streams), x, lambda q: permuted(q, streams))


def constrained(net: Net, wide: Tensor, u: Tensor, mixing: Callable[[Tensor], Tensor]) -> Tensor:
    n = wide.shape[-2]
    for branch in net:
        p, f = branch.p, branch(u)
        write = rms(wide.flatten(-2)) @ joined(p, "of_write", n).T
        bias = p["write_bias"]
        post = 2 * torch.sigmoid(p["into_gate"] * write[..., :n] + bias[:n])
        wide = mixing(p["across_gate"] * write[..., n:] + bias[n:]) @ wide + post.unsqueeze(-1) * f.unsqueeze(-2)
        if "read_bias" in p:
            pre = torch.sigmoid(p["read_gate"] * (rms(wide.flatten(-2)) @ joined(p, "of_read", n).T) + p["read_bias"])
            u = (pre.unsqueeze(-2) @ wide).squeeze(-2)
    return wide.sum(-2)


def joined(p: dict[str, Tensor], name: str, n: int) -> Tensor:
    """The map of all n D features, of its pieces."""
    return torch.cat([p[f"{name}.{lane}.weight"] for lane in range(n)], -1)


def lanes(net: Net, x: Tensor, *, streams: int = 2) -> Tensor:
    wide = copies(x, streams)
    for number, branch in enumerate(net):
        f = branch(wide[..., number % streams, :])
        wide = branch.p["keep"].unsqueeze(-1) * wide + branch.p["into"].unsqueeze(-1) * f.unsqueeze(-2)
    return wide.mean(-2)


def altup(net: Net, x: Tensor, *, streams: int = 2, active: str = "first") -> Tensor:
    wide, across = copies(x, streams), None
    for number, branch in enumerate(net):
        a = number % streams if active == "alternating" else 0
        predicted = wide if across is None else wide + across @ wide
        u = predicted[..., a, :]
        innovation = u + branch(u) - predicted[..., a, :]
        wide = predicted + (1 + branch.p["correct"]).unsqueeze(-1) * innovation.unsqueeze(-2)
        across = branch.p.get("across")
    return wide.mean(-2)


# Other wires


def ladder(net: Net, x: Tensor) -> Tensor:
    held, outputs = [x, x], []  # what branch i reads is held[i]
    for number, branch in enumerate(net):
        outputs.append(branch(held[number]))
        held.append(x + sum(outputs))
    return held[-1]


def parallel(net: Net, x: Tensor) -> Tensor:
    for attend, feed in blocks_of(net):
        x = x + attend(x) + feed(x)
    return x


DEFINITIONS: dict[str, Callable[..., Tensor]] = {
    "rw-vector": rw_vector,
    "rezero": rezero,
    "skipinit": rezero,
    "layerscale": layerscale,
    "deepnorm": deepnorm,
    "fixup": rezero,
    "contractive": contractive,
    "stochastic-depth": stochastic_depth,
    "highway": highway,
    "gated": gated,
    "gru": gru,
    "orthogonal": orthogonal,
    "delta": delta,
    "lr-normed": lr_normed,
    "gemma3n": gemma3n,
    "x0": x0,
    "backout": backout,
    "denseformer": denseformer,
    "elc-bert": elc_bert,
    "grn-v1": grn,
    "grn-v2": grn,
    "grn-v3": grn,
    "dca": dca,
    "muddformer": muddformer,
    "attnres": attnres,
    "vertical": vertical,
    "hc": hc,
    "mhc": mhc,
    "mhc-lite": mhc_lite,
    "frac": frac,
    "lanes": lanes,
    "altup": altup,
    "ladder": ladder,
    "parallel": parallel,
}
"""Of every operator outside the LAuReL family, the whole model by hand."""
