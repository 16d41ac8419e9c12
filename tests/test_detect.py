"""Detection on hard cases, each small, and on real architectures; plus laws on random graphs."""

from __future__ import annotations

from collections import Counter
from heapq import heappush

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from conftest import real
from hypothesis import given, settings
from torch import fx, nn
from toys import CASES, D

from laurel_rewrite import CaptureError, detect, rewrite
from laurel_rewrite.dataflow import Dataflow, OpKind, Role
from laurel_rewrite.models import build
from laurel_rewrite.residuals import _Finder, find_residuals

X = torch.randn(2, 5, D)


def kinds(sites) -> dict[str, int]:
    return dict(Counter(site.kind for site in sites))


def reasons(sites) -> set[str]:
    return {rejected.reason for rejected in sites.rejected}


class Net(nn.Module):
    """`body(self, x)` as a forward, with some layers at hand."""

    def __init__(self, body) -> None:
        super().__init__()
        self.body = body
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)
        self.norm = nn.LayerNorm(D)
        self.narrow = nn.Linear(D // 2, D // 2)
        self.table = nn.Parameter(torch.randn(5, D))
        self.gate = nn.Parameter(torch.randn(D))

    def forward(self, x):
        return self.body(self, x)


IDENTITY = {
    "norm inside": lambda s, x: x + s.a(s.norm(x)),
    "cast": lambda s, x: x.double().float() + s.a(x),
    "views": lambda s, x: x.reshape(-1, D).view(2, 5, D) + s.a(x),
    "permuted": lambda s, x: x.transpose(1, 2) + s.a(x).transpose(1, 2),
    "constant scale": lambda s, x: 0.5 * x + s.a(x),
    "skip through dropout": lambda s, x: F.dropout(x, 0.1) + s.a(x),
    "pooling branch": lambda s, x: x + F.avg_pool1d(x, 3, 1, 1),
    "fft branch": lambda s, x: x + torch.fft.fft(x).real,
    "softmax branch": lambda s, x: x + torch.softmax(x, -1),
    "roll branch": lambda s, x: x + x.roll(1, 1),
    "branch read elsewhere": lambda s, x: (f := s.a(x), x + f, s.b(f))[1:],
    "builtin sum": lambda s, x: sum([x, s.a(x)]),
    "alpha": lambda s, x: torch.add(x, s.a(x), alpha=0.5),
}


@pytest.mark.parametrize("name", IDENTITY)
def test_identity_sites(name):
    assert kinds(detect(Net(IDENTITY[name]), (X,))) == {"identity": 1}


NONE = {
    "position table": (lambda s, x: x + s.table, "not data-dependent"),
    "bias": (lambda s, x: s.a(x) + s.gate, "not data-dependent"),
    "broadcast": (lambda s, x: x + s.a(x).mean(1, keepdim=True), "broadcast"),
    "gelu by tanh": (lambda s, x: s.a(0.5 * x * (1 + torch.tanh(0.8 * (x + 0.044715 * x**3)))), "pointwise"),
    "gated skip": (lambda s, x: torch.sigmoid(s.a(x)) * x + (1 - torch.sigmoid(s.a(x))) * s.b(x), "no linear path"),
    "lerp": (lambda s, x: torch.lerp(x, s.a(x), torch.sigmoid(s.b(x))), "gated"),
    "same value twice": (lambda s, x: s.a(x + x), "pointwise"),
    "low-rank delta": (lambda s, x: s.a(x) + s.b(s.norm(s.b(x))), "both linear"),
    "experts": (lambda s, x: s.a(F.relu(s.a(x))) + s.b(F.relu(s.b(x))), "no linear path"),
    "integers": (lambda s, x: x[:, : (x.argmax(-1) + x.argmin(-1)).shape[1]], "integer"),
    "scalar": (lambda s, x: s.a(x + 1), "scalar"),
    "different slices": (lambda s, x: torch.cat([x[..., : D // 2], s.narrow(x[..., : D // 2]) + x[..., D // 2 :]], -1), None),
}


@pytest.mark.parametrize("name", NONE)
def test_what_is_no_site_and_why(name):
    body, reason = NONE[name]
    sites = detect(Net(body), (X,))
    assert not sites.sites
    assert reason is None or reason in reasons(sites)


def test_a_subtraction_is_no_site():
    sites = detect(Net(lambda s, x: x - s.a(x)), (X,))
    assert not sites.sites


def test_a_projection_shortcut():
    sites = detect(Net(lambda s, x: s.a(x) + s.b(F.relu(s.b(x)))), (X,))
    assert kinds(sites) == {"projection": 1}


def test_a_partial_skip_is_listed_and_not_rewritten_by_default():
    def body(s, x):
        return x[..., : D // 2] + s.a(x)[..., : D // 2]

    sites = detect(Net(body), (X,))
    assert kinds(sites) == {"partial": 1}
    with pytest.raises(ValueError, match="no site to rewrite"):
        rewrite(Net(body), (X,), rank=4)


def test_a_table_shared_by_layers_is_no_site():
    class Shared(Net):
        def forward(self, x):
            bias = self.table @ self.table.T
            for layer in (self.a, self.b):
                q = layer(x)
                scores = q @ q.transpose(1, 2) + bias
                x = x + scores.softmax(-1) @ q
            return x

    sites = detect(Shared(None), (X,))
    assert kinds(sites) == {"identity": 2}


def test_residual_in_residual():
    class Inner(Net):
        def forward(self, x):
            return x + 0.2 * self.b(F.relu(self.a(x + self.a(x))))

    sites = detect(Inner(None), (X,))
    assert kinds(sites) == {"identity": 2}


def test_in_place_adds_on_views_and_their_bases():
    def body(s, x):
        y = s.a(x)
        flat = y.view(-1, D)
        flat += x.view(-1, D)  # y has the sum too
        return y + s.b(y)

    assert kinds(detect(Net(body), (X,))) == {"identity": 2}


def test_a_laurel_of_the_models_own_is_recognised():
    class LaurelBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(D, 4), nn.Linear(4, D)

        def forward(self, x):
            return x + self.right(self.left(x))

    class Holder(Net):
        def __init__(self):
            super().__init__(None)
            self.augmented = LaurelBlock()

        def forward(self, x):
            return self.a(self.augmented(x))

    sites = detect(Holder(), (X,))
    assert not sites.sites
    assert "existing LAuReL" in reasons(sites)


@pytest.mark.parametrize("name", CASES)
def test_toys(name):
    case = CASES[name]
    sites = detect(case.make(), (torch.randn(case.shape),))
    assert len(sites) == case.sites
    assert len({site.id for site in sites}) == len(sites)


def test_the_fields_of_a_site():
    sites = detect(CASES["images"].make(), (torch.randn(2, 3, 8, 8),)).sites
    assert [(s.id, s.kind, s.owner, s.shape, s.axis, s.dim, s.stream, s.index) for s in sites] == [
        ("laurel_0", "projection", "", (2, D, 4, 4), 1, D, 0, 0),
        ("laurel_1", "identity", "", (2, D, 4, 4), 1, D, 0, 1),
    ]
    file, line = sites[0].where.rsplit(":", 1)
    with open(file) as source:
        assert "out += self.down(x)" in source.read().splitlines()[int(line) - 1]
    tied = detect(CASES["tied"].make(), (X,)).sites
    assert [s.id for s in tied] == [f"block.laurel_{k}{call}" for call in ("", "@1", "@2") for k in (0, 1)]
    assert [s.index for s in tied] == list(range(6))
    loop = detect(CASES["loop"].make(), (X,)).sites
    assert [s.id for s in loop] == ["laurel_0.0", "laurel_0.1", "laurel_0.2"]


REAL = {
    "torchvision:resnet18": {"identity": 5, "projection": 3},
    "torchvision:resnet50": {"identity": 12, "projection": 4},
    "torchvision:vgg11": {},
    "torchvision:densenet121": {},
    "timm:vit_small_patch16_224": {"identity": 24},
    "timm:convnext_tiny": {"identity": 18},
    "timm:swin_tiny_patch4_window7_224": {"identity": 24},
    "timm:mixer_s32_224": {"identity": 16},
    "timm:repvgg_a0": {},
    "timm:caformer_s18": {"identity": 12},
    "hf:gpt2": {"identity": 24},
    "hf:bert": {"identity": 24},
    "hf:t5": {"identity": 30},
    "hf:llama": {"identity": 64},
    "hf:falcon": {"identity": 32},
    "hf:gptj": {"identity": 28},
    "hf:mamba": {"identity": 32},
    "hf:albert": {"identity": 24},
}


@pytest.mark.parametrize("spec", REAL)
def test_real_architectures_on_the_meta_device(spec):
    settings = {"num_hidden_layers": 32} if spec == "hf:mamba" else {}
    built = build(spec, settings, device="meta")
    if spec == "hf:mamba":  # its scan is one graph node an element of the sequence
        built.kwargs = {"input_ids": built.kwargs["input_ids"][:, :4]}
    sites = detect(built.model, built.args, built.kwargs)
    assert kinds(sites) == REAL[spec]
    axes = {(site.axis, site.dim is not None) for site in sites}
    first = spec.startswith("torchvision") or spec.endswith(("convnext_tiny", "caformer_s18"))
    assert axes <= {(1 if first else -1, True)}


def test_streams_of_real_architectures():
    def lengths(spec):
        built = build(spec, {}, device="meta")
        return list(Counter(site.stream for site in detect(built.model, built.args, built.kwargs)).values())

    assert lengths("torchvision:resnet50") == [3, 4, 6, 3]
    assert lengths("timm:swin_tiny_patch4_window7_224") == [4, 4, 12, 4]
    assert lengths("hf:t5") == [12, 18]
    assert lengths("hf:bert") == [24]


@pytest.mark.parametrize("name", ["gpt2", "vit_small", "resnet50", "cohere"])
def test_the_same_sites_with_dynamic_shapes_and_from_a_program(name):
    example = real(name)
    plain = detect(example.model, example.args, example.kwargs)
    batch = {0: torch.export.Dim.AUTO}
    shapes = [batch] if example.args else dict.fromkeys(example.kwargs, batch)
    dynamic = detect(example.model, example.args, example.kwargs, dynamic_shapes=shapes)
    assert [(s.id, s.kind, s.axis, s.dim, s.stream) for s in plain] == [(s.id, s.kind, s.axis, s.dim, s.stream) for s in dynamic]
    assert all(isinstance(s.shape[0], str) for s in dynamic)
    with torch.no_grad():
        if hasattr(example.model, "config"):
            example.model.config.use_cache = False
        program = torch.export.export(example.model, example.args, example.kwargs, strict=False)
    assert [(s.kind, s.axis, s.dim) for s in detect(program)] == [(s.kind, s.axis, s.dim) for s in plain]


def test_detection_changes_nothing():
    model = real("resnet50").model.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    detect(model, (torch.randn(2, 3, 64, 64),))
    assert not model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_wrong_inputs_are_explained():
    with pytest.raises(CaptureError, match=r"Plain could not be captured with the inputs \(float32\[2, 5, 7\]\)"):
        detect(CASES["plain"].make(), (torch.randn(2, 5, 7),))
    with pytest.raises(CaptureError, match="pass example inputs"):
        detect(fx.symbolic_trace(CASES["plain"].make()))


# Laws on random graphs


def random_flow(choices: list[tuple[int, int, int]], order: list[int] | None = None) -> tuple[Dataflow, list[int]]:
    """A dataflow of values of one shape: unary mixing and pointwise ops, and sums with operands in either order."""
    flow = Dataflow()
    shape = {"shape": (2, 4), "floating": True, "data": True}
    flow.add("x", "placeholder", OpKind(Role.SOURCE), (), **shape)
    sums = []
    for number, (kind, left, right) in enumerate(choices):
        a, b = left % len(flow.values), right % len(flow.values)
        if kind % 3 == 0:
            flow.add(f"m{number}", "linear", OpKind(Role.MIXING, linear=True, axis=-1, vote=1), (a,), **shape)
        elif kind % 3 == 1:
            flow.add(f"p{number}", "relu", OpKind(Role.POINTWISE), (a,), **shape)
        else:
            swapped = order is not None and order[number % len(order)] % 2
            operands = (b, a) if swapped else (a, b)
            sums.append(flow.add(f"s{number}", "add", OpKind(Role.SUM), operands, **shape).index)
    flow.outputs.add(len(flow.values) - 1)
    return flow, sums


choices = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=40)


@settings(max_examples=200, deadline=None)
@given(choices, st.lists(st.integers(0, 1), min_size=1, max_size=8))
def test_the_order_of_operands_does_not_matter(graph, order):
    plain, _ = random_flow(graph)
    swapped, _ = random_flow(graph, order)
    first, second = (find_residuals(flow) for flow in (plain, swapped))
    assert [(r.output, r.kind) for r in first[0]] == [(r.output, r.kind) for r in second[0]]
    assert [(r.output, r.reason) for r in first[1]] == [(r.output, r.reason) for r in second[1]]


@settings(max_examples=200, deadline=None)
@given(choices)
def test_an_identity_site_is_what_the_definition_says(graph):
    """Against a second opinion: all paths, by brute force over networkx."""
    import networkx as nx

    flow, _ = random_flow(graph)
    flow.check()
    digraph = flow.to_networkx()
    found, refused = find_residuals(flow)
    folded = {node for r in found for node, _ in r.adds}
    for residual in found:
        if residual.kind == "identity":
            branches = [b for b in residual.branches if _mixes_from(flow, digraph, nx, residual.skip, b)]
            assert branches
    for refusal in refused:
        operands = flow.values[refusal.output].inputs
        if len(set(operands)) == 2 and not any(flow.values[o].role is Role.SUM for o in operands):
            a, b = operands
            assert not _mixes_from(flow, digraph, nx, a, b)
            assert not _mixes_from(flow, digraph, nx, b, a)
    assert len(folded) >= len(found)


def _mixes_from(flow, digraph, nx, source, target) -> bool:
    """Whether a path from source to target holds a mixing op other than the source itself."""
    if source == target or source not in nx.ancestors(digraph, target):
        return False
    between = (nx.descendants(digraph, source) | {source}) & (nx.ancestors(digraph, target) | {target})
    return any(flow.values[node].role is Role.MIXING for node in between - {source})


@settings(max_examples=200, deadline=None)
@given(choices, st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=12))
def test_a_walk_that_jumps_finds_what_all_paths_say(graph, questions):
    """Each question leaves jumps behind that the next ones take; the answers are those of a search without any."""
    flow, _ = random_flow(graph)
    finder = _Finder(flow)
    for left, right, target in questions:
        left, right, target = (number % len(flow.values) for number in (left, right, target))
        ways = finder._descent([left, right], [target, left])
        for goal in (target, left):
            assert ways[goal] == _ways(flow, left, goal) | _ways(flow, right, goal) << 2


def _ways(flow, start, goal) -> int:
    """Bit 0: goal is reached from start without a mixing op; bit 1: with one."""
    seen, queue = {(start, False)}, [(start, False)]
    for index, mixed in queue:
        mixed = mixed or flow.values[index].role is Role.MIXING
        for operand in flow.values[index].inputs:
            if (operand, mixed) not in seen:
                seen.add((operand, mixed))
                queue.append((operand, mixed))
    return ((goal, False) in seen) | ((goal, True) in seen) << 1


def grown(shape: str, blocks: int) -> Dataflow:
    """A graph whose number of values is a multiple of `blocks`."""
    flow = Dataflow()
    like = {"shape": (2, 4), "floating": True, "data": True}

    def put(kind: OpKind, *inputs: int) -> int:
        return flow.add(f"v{len(flow.values)}", kind.role.value, kind, inputs, **like).index

    def f(x: int) -> int:
        return put(OpKind(Role.MIXING, linear=True), put(OpKind(Role.POINTWISE), put(OpKind(Role.MIXING), x)))

    def add(x: int, y: int) -> int:
        return put(OpKind(Role.SUM), x, y)

    x, memory = put(OpKind(Role.SOURCE)), put(OpKind(Role.SOURCE))
    if shape == "stack":
        for _ in range(blocks):
            x = add(x, f(x))
    elif shape == "memory":  # one input is added in every layer
        for _ in range(blocks):
            x = add(f(x), memory)
    elif shape == "ladder":  # a U-Net
        skips = []
        for _ in range(blocks):
            x = f(x)
            skips.append(x)
        while skips:
            x = add(f(x), skips.pop())
    elif shape == "towers":  # two stacks, one after the other, and then the sums of their layers
        towers = []
        for y in (x, memory):
            tower = []
            for _ in range(blocks):
                y = add(y, f(y))
                tower.append(y)
            towers.append(tower)
        for left, right in zip(*towers, strict=True):
            f(add(left, right))
    elif shape == "fork":  # two paths from one value that never meet before the sums
        left = right = f(x)
        for _ in range(blocks):
            left, right = f(left), f(right)
            f(add(left, right))
    elif shape == "recurrence":  # an unrolled linear one, which reads a slice of the input in each step
        h, linear = memory, OpKind(Role.MIXING, linear=True)
        for _ in range(blocks):
            h = add(put(linear, h), put(linear, put(OpKind(Role.SLICE), x)))
    elif shape == "fan":  # one sum of many operands
        total = x
        for _ in range(blocks):
            total = add(total, f(x))
    flow.outputs.add(len(flow.values) - 1)
    return flow


@pytest.mark.parametrize("shape", ["stack", "memory", "ladder", "towers", "fork", "recurrence", "fan"])
def test_the_work_grows_with_the_graph(shape, monkeypatch):
    """Steps of the search are counted, not timed: ten times the graph is about ten times the work."""
    steps = 0

    def counting(heap, item):
        nonlocal steps
        steps += 1
        heappush(heap, item)

    monkeypatch.setattr("laurel_rewrite.residuals.heapq.heappush", counting)
    counts = []
    for blocks in (50, 500):
        steps = 0
        find_residuals(grown(shape, blocks))
        counts.append(steps)
    assert counts[1] <= 12 * counts[0]
