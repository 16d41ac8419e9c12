"""Connections in the bodies of If, Loop and Scan, held against numpy in onnxruntime."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import save_file

from laurel_rewrite import ConfigError, detect, rewrite_onnx, write_onnx
from laurel_rewrite.backends.onnx.surgery import GraphRewrite, inline_laurel
from laurel_rewrite.lowering import lower
from laurel_rewrite.plan import LaurelConfig, Plan
from laurel_rewrite.testing import moved

D = 8
RANDOM = np.random.default_rng(3)
W = {name: (RANDOM.standard_normal((D, D)) / 3).astype(np.float32) for name in ("w1", "w2", "w3", "w4")}
X = RANDOM.standard_normal((3, D)).astype(np.float32)
MORE = RANDOM.standard_normal((5, 3, D)).astype(np.float32)

BLOCK = "m = MatMul ({x}, {w}) r = Relu (m) {z} = Add ({x}, r)"
IF = f"""
    {BLOCK.format(x="x", w="w1", z="h").replace("m ", "m1 ").replace("(m)", "(m1)").replace("r =", "r1 =").replace(", r)", ", r1)")}
    y = If (flag) <
        then_branch = yes () => (float[N, {D}] z) {{ {BLOCK.format(x="h", w="w2", z="z")} }},
        else_branch = no () => (float[N, {D}] z) {{ p = MatMul (h, w3) {BLOCK.format(x="p", w="w2", z="z")} }}
    >
"""
LOOP = f"""
    true = Constant <value = bool {{1}}> ()
    y, all = Loop (turns, true, x) <
        body = turn (int64 i, bool go, float[N, {D}] c) => (bool on, float[N, {D}] z, float[N, {D}] kept)
        {{ on = Identity (go) {BLOCK.format(x="c", w="w2", z="z")} kept = MatMul (z, w3) }}
    >
"""
SCAN = f"""
    y, all = Scan (x, more) <num_scan_inputs = 1,
        body = turn (float[N, {D}] c, float[N, {D}] s) => (float[N, {D}] n, float[N, {D}] kept)
        {{ {BLOCK.format(x="c", w="w2", z="z")} t = MatMul (z, w3) n = Add (t, s) kept = Tanh (n) }}
    >
"""
STREAM = f"""
    y = If (flag) <
        then_branch = yes () => (float[N, {D}] z)
        {{ p = MatMul (x, w1) m = MatMul (p, w2) a = Relu (m) q = Add (p, a) n = MatMul (q, w3) b = Relu (n) q2 = Add (q, b) z = MatMul (q2, w4) }},
        else_branch = no () => (float[N, {D}] e) {{ e = MatMul (x, w4) }}
    >
"""
NESTED = f"""
    true = Constant <value = bool {{1}}> () h = MatMul (x, w1)
    y, all = Loop (turns, true, x) <
        body = turn (int64 i, bool go, float[N, {D}] c) => (bool on, float[N, {D}] z, float[N, {D}] kept)
        {{
            on = Identity (go) two = Constant <value = int64 {{2}}> () odd = Mod (i, two) is = Cast <to = 9> (odd)
            z = If (is) <
                then_branch = yes () => (float[N, {D}] u) {{ {BLOCK.format(x="c", w="w2", z="u")} }},
                else_branch = no () => (float[N, {D}] v) {{ q = Add (c, h) {BLOCK.format(x="q", w="w2", z="v")} }}
            >
            kept = MatMul (z, w3)
        }}
    >
"""
INPUTS = {"flag": "bool flag", "turns": "int64 turns", "more": f"float[T, N, {D}] more"}


def given(body, opset=20):
    extra = "".join(f", {text}" for name, text in INPUTS.items() if f"({name}" in body or f", {name})" in body)
    outputs = f"float[N, {D}] y" + (f", float[T, N, {D}] all" if " all " in body else "")
    weights = ", ".join(f"float[{D}, {D}] {name}" for name in W)
    text = f'<ir_version: 10, opset_import: ["" : {opset}]> graph (float[N, {D}] x{extra}) => ({outputs}) <{weights}> {{ {body} }}'
    model = onnx.parser.parse_model(text)
    del model.graph.initializer[:]
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in W.items())
    onnx.checker.check_model(model, full_check=True)
    return ir.from_proto(model)


def by_hand(connections):
    """x + f of rw+lr in numpy, by site."""

    def at(site, x, f):
        p = {name: value.numpy() for name, value in connections[site].state_dict().items()}
        a, b = 2 * np.exp(p["mix"]) / np.exp(p["mix"]).sum()
        return a * f + b * (x + x @ p["down.weight"].T @ p["up.weight"].T)

    return at


def relu(x):
    return np.maximum(x, 0)


def by_hand_if(at, x, flag):
    h = at("laurel_0", x, relu(x @ W["w1"]))
    p = h if flag else h @ W["w3"]
    return [at("If.then_branch.laurel_0", p, relu(p @ W["w2"]))]


def by_hand_loop(at, x, turns):
    kept = []
    for _ in range(int(turns)):
        x = at("Loop.body.laurel_0", x, relu(x @ W["w2"]))
        kept.append(x @ W["w3"])
    return [x, np.stack(kept) if kept else np.zeros((0, *x.shape), np.float32)]


def by_hand_nested(at, x, turns):
    """Both sides of the condition run one block, the second behind what is computed outside of the loop."""
    h, kept = x @ W["w1"], []
    for turn in range(int(turns)):
        x = x if turn % 2 else x + h
        x = at("Loop.body.If.then_branch.laurel_0", x, relu(x @ W["w2"]))
        kept.append(x @ W["w3"])
    return [x, np.stack(kept) if kept else np.zeros((0, *x.shape), np.float32)]


def by_hand_scan(at, x, more):
    kept = []
    for new in more:
        x = at("Scan.body.laurel_0", x, relu(x @ W["w2"])) @ W["w3"] + new
        kept.append(np.tanh(x))
    return [x, np.stack(kept)]


CASES = {
    "if": (IF, by_hand_if, [{"flag": np.array(True)}, {"flag": np.array(False)}]),
    "loop": (LOOP, by_hand_loop, [{"turns": np.array(turns)} for turns in (0, 1, 2, 6)]),
    "nested": (NESTED, by_hand_nested, [{"turns": np.array(turns)} for turns in (1, 2, 5)]),
    "scan": (SCAN, by_hand_scan, [{"more": MORE}, {"more": MORE[:1]}, {"more": -MORE[:3]}]),
}


def session(model, path):
    return onnxruntime.InferenceSession(str(write_onnx(model, path)), providers=["CPUExecutionProvider"])


def same(found, right):
    if right.size or found.size:  # onnxruntime knows no batch of what no turn gave
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-5)


def trained(body, tmp_path, **options):
    """A rewritten graph with weights that were trained, and its connections."""
    rewrite = GraphRewrite(given(body))
    rewrite.apply(Plan.from_sites(rewrite.sites, LaurelConfig(**options)))
    torch.manual_seed(1)
    for connection in rewrite.connections.values():
        moved(connection)
    tensors = {f"{site}.{name}": value for site, module in rewrite.connections.items() for name, value in module.state_dict().items()}
    save_file(tensors, tmp_path / "weights.safetensors")
    rewrite.load(tmp_path / "weights.safetensors")
    return rewrite.model, rewrite.connections


@pytest.mark.parametrize("form", ["functions", "inlined", "lowered"])
@pytest.mark.parametrize("name", CASES)
def test_onnxruntime_computes_what_numpy_does(name, form, tmp_path):
    body, right, feeds = CASES[name]
    model, connections = trained(body, tmp_path, variant="rw+lr", rank=2)
    names = [key for key in model.graph.initializers if "laurel" in key]
    assert sorted(names) == sorted(f"{site}.{key}" for site, module in connections.items() for key in module.state_dict())
    if form == "inlined":
        inline_laurel(model)
    if form == "lowered":
        lower(model)
    assert form == "functions" or all(node.domain == "" for node in model.graph.all_nodes())
    run = session(model, tmp_path / "laurel.onnx")
    for feed in feeds:
        for x in (X, -X[:1]):
            given_now = {"x": x, **{key: value[:, : len(x)] if key == "more" else value for key, value in feed.items()}}
            found = run.run(None, given_now)
            for one, other in zip(found, right(by_hand(connections), **given_now), strict=True):
                same(one, other)


def test_sites_say_where_they_are_and_share_what_both_sides_call():
    assert [site.id for site in detect(given(IF))] == ["laurel_0", "If.then_branch.laurel_0", "If.then_branch.laurel_0@1"]
    assert [site.where for site in detect(given(IF))] == ["h", "z in If.then_branch", "z in If.else_branch"]
    sites = detect(given(SCAN))
    assert [site.id for site in sites] == ["Scan.body.laurel_0"]
    assert [(r.where, r.reason) for r in sites.rejected] == [("n in Scan.body", "no common ancestor")]


@pytest.mark.parametrize("name", CASES)
def test_the_start_is_exact(name, tmp_path):
    body, _, feeds = CASES[name]
    before, after = (session(model, tmp_path / f"{n}.onnx") for n, model in enumerate((given(body), rewrite_onnx(given(body), rank=2))))
    for feed in feeds:
        for one, other in zip(before.run(None, {"x": X, **feed}), after.run(None, {"x": X, **feed}), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("variant", ["rw", "lr", "rezero", "layerscale", "highway", "rw+lr"])
def test_local_operators_are_everywhere(variant, tmp_path):
    for name, (body, _, feeds) in CASES.items():
        options = {"rank": 2} if "lr" in variant else {}
        model, connections = trained(body, tmp_path, variant=variant, **options)
        run = session(model, tmp_path / f"{name}.onnx")

        def at(site, x, f, known=connections):
            with torch.no_grad():
                return known[site](torch.from_numpy(x), torch.from_numpy(f)).numpy()

        for feed in feeds:
            for one, other in zip(run.run(None, {"x": X, **feed}), CASES[name][1](at, X, **feed), strict=True):
                same(one, other)


# Streams


@pytest.mark.parametrize("variant", ["rw+pa", "hc", "attnres"])
def test_a_stream_within_one_subgraph_has_a_history(variant, tmp_path):
    model, connections = trained(STREAM, tmp_path, variant=variant, **({"rank": 2} if "pa" in variant else {}))
    first, second = (connections[f"If.then_branch.laurel_{n}"] for n in (0, 1))
    for form in ("functions", "lowered"):
        if form == "lowered":
            lower(model)
        run = session(model, tmp_path / f"{form}.onnx")
        with torch.no_grad():
            p = torch.from_numpy(X @ W["w1"])
            q, state = first.connect(p, torch.relu(p @ torch.from_numpy(W["w2"])), state=())
            q, _ = second.connect(q, torch.relu(q @ torch.from_numpy(W["w3"])), state=state)
        same(run.run(None, {"x": X, "flag": np.array(True)})[0], q.numpy() @ W["w4"])
        same(run.run(None, {"x": X, "flag": np.array(False)})[0], X @ W["w4"])


@pytest.mark.parametrize(("body", "words"), [(IF, "from laurel_0 on to If"), (LOOP, "on from Loop.body.laurel_0 to the next turn")])
def test_a_stream_that_crosses_a_border_is_refused(body, words):
    with pytest.raises(ConfigError, match=words):
        rewrite_onnx(given(body), variant="pa", rank=2)
    inside = "If.*" if body is IF else "Loop.*"
    if body is IF:  # what is left lies in one graph
        rewrite_onnx(given(body), variant="pa", rank=2, exclude=inside)


# What is none


def test_sums_that_are_no_residual_connections_there_are_none():
    """Both operands come from outside, where one is computed from the other; a product with what depends on weights alone mixes nothing."""
    outside = f"""
        f = MatMul (x, w1) g = Relu (f)
        y = If (flag) <
            then_branch = yes () => (float[N, {D}] z) {{ z = Add (x, g) }}, else_branch = no () => (float[N, {D}] e) {{ e = Identity (x) }}
        >
    """
    sites = detect(given(outside))
    assert [(r.where, r.reason) for r in sites.rejected] == [("z in If.then_branch", "no common ancestor")]
    assert not sites.sites
    gate = f"""
        true = Constant <value = bool {{1}}> ()
        y = Loop (turns, true, x) <
            body = turn (int64 i, bool go, float[N, {D}] c) => (bool on, float[N, {D}] z)
            {{ on = Identity (go) k = MatMul (w1, w2) q = ReduceSum (k) p = Mul (q, c) z = Add (c, p) }}
        >
    """
    assert [r.reason for r in detect(given(gate)).rejected] == ["pointwise"]


def test_a_state_that_changes_its_shape_is_left_alone():
    grown = f"""
        true = Constant <value = bool {{1}}> ()
        last = Loop (turns, true, x) <
            body = turn (int64 i, bool go, float[M, {D}] c) => (bool on, float[K, {D}] z)
            {{ on = Identity (go) m = MatMul (c, w1) d = Add (c, m) z = Concat <axis = 0> (d, x) }}
        >
        s = ReduceSum (last) y = Mul (x, s)
    """
    sites = detect(given(grown))
    assert not sites.sites
    assert [r.reason for r in sites.rejected] == ["subgraph"]


def test_a_rewritten_graph_is_refused_the_second_time():
    model = rewrite_onnx(given(LOOP), rank=2)
    with pytest.raises(ConfigError, match="rewritten already"):
        rewrite_onnx(model, rank=2)
