"""The profile: what it measures is what it says. No test measures time."""

from __future__ import annotations

import itertools
import json
import random
import types
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from conftest import real, trained
from onnx import TensorProto, helper, numpy_helper
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from toys import CASES, D

from laurel_rewrite import ConfigError, detect, export_onnx, profile, rewrite, rewrite_onnx, write_onnx
from laurel_rewrite.backends.onnx.surgery import away_from_start
from laurel_rewrite.graph.feeds import draw_feeds
from laurel_rewrite.lowering import lower
from laurel_rewrite.profiling import ITSELF, _doubts, latency
from laurel_rewrite.profiling.latency import BLOCKS, VERDICTS, Effort, measure, ratio, summarised, verdict_of
from laurel_rewrite.profiling.sessions import settings


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphs")
    x = torch.randn(2, 5, D)
    model = CASES["plain"].make()
    export_onnx(model, (x,), None, folder / "baseline.onnx")
    export_onnx(rewrite(model, (x,), rank=4), (x,), None, folder / "laurel.onnx", target="portable")
    return folder / "baseline.onnx", folder / "laurel.onnx"


def test_rows_and_conditions(graphs):
    seen = []
    result = profile(graphs, seconds=0.05, min_rounds=15, threads=1, progress=seen.append)
    baseline, laurel = (row.latency for row in result.rows)
    assert (baseline.ratio, baseline.low, baseline.high, baseline.verdict) == (1, 1, 1, "baseline")
    assert laurel.low <= laurel.ratio <= laurel.high
    assert laurel.verdict in VERDICTS
    assert all(r.p10_ms <= r.median_ms <= r.p90_ms for r in (baseline, laurel))
    assert all(r.load_ms > 0 for r in result.rows)
    assert all(r.resident_bytes > 1 << 20 and r.file_bytes > 1000 and r.memory.activation_bytes > 0 for r in result.rows)
    assert result.conditions["rounds"] >= 15
    assert result.conditions["inputs"] == {"x": f"float32[1, 128, {D}]"}
    assert seen[-1] == 1.0


def test_activation_memory_grows_with_the_input(graphs):
    small, large = (
        profile(graphs[:1], seconds=0, min_rounds=1, inputs={"x": np.zeros((batch, 64, D), np.float32)}).rows[0].memory.activation_bytes
        for batch in (2, 64)
    )
    tensor = 64 * D * 4
    assert large - small >= 62 * tensor


def test_what_is_told_last_is_that_all_is_done(monkeypatch):
    """However the clock goes on between one look and the next."""
    looks = itertools.count()
    monkeypatch.setattr(latency, "time", types.SimpleNamespace(perf_counter=lambda: float(next(looks))))
    told = []
    latency.interleaved([lambda: None], 4.0, 1, random.Random(0), told.append, clock=lambda: 0.0)
    assert told[-1] == 1.0
    assert told == sorted(told)


def test_the_ratio_is_the_median_of_the_rounds():
    center, low, high = ratio([np.array([1.1, 1.2, 1.3, 1.2, 1.2])] * 4, seed=0)
    assert center == pytest.approx(1.2, rel=1e-12)
    assert 1.1 <= low <= 1.2 <= high <= 1.3


def test_sessions_that_differ_widen_the_interval():
    """Six makings around 1.00 by one per cent each way say nothing; rounds taken as independent would."""
    noise = np.random.default_rng(0).normal(0, 0.001, (6, 50))
    blocks = list(np.array([0.99, 1.01, 0.99, 1.01, 0.99, 1.01])[:, None] + noise)
    _, low, high = ratio(blocks, seed=0)
    assert low < 1 < high


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((1.0, 0.99, 1.02), "within noise"),
        ((1.02, 0.999, 1.06), "within noise"),
        ((1.014, 0.904, 1.139), "unresolved"),
        ((1.04, 0.705, 1.585), "unresolved"),
        ((0.97, 0.9, 1.0), "unresolved"),
        ((1.3, 1.05, 1.6), "slower"),
        ((0.5, 0.3, 0.7), "faster"),
    ],
)
def test_an_interval_that_is_wide_says_nothing(interval, verdict):
    assert verdict_of(*interval) == verdict


def test_more_makings_of_the_sessions_narrow_the_interval():
    noise = np.random.default_rng(0).normal(1, 0.03, (40, 2, 10))
    few, many = (summarised(list(noise[:number]), seed=0)[1] for number in (BLOCKS, 40))
    assert many.precision < few.precision
    assert many.precision == max(many.high - many.ratio, many.ratio - many.low) / many.ratio


def test_measuring_goes_on_until_the_precision_is_reached(graphs, monkeypatch):
    widths = iter([0.2, 0.1, 0.04])

    def narrower(blocks, seed):
        made.append(len(blocks))
        width = next(widths)
        return [replace(one, ratio=1.0, low=1 - width, high=1 + width / 2) for one in summarised(blocks, seed)]

    made: list[int] = []
    monkeypatch.setattr("laurel_rewrite.profiling.latency.summarised", narrower)
    feeds = {"x": np.zeros((1, 2, D), np.float32)}
    latencies, loads = measure(graphs, settings(1), feeds, Effort(0, 6, 0.05, 1000), seed=0)
    assert made == [BLOCKS, BLOCKS + 1, BLOCKS + 2]
    assert len(latencies) == len(loads) == 2
    widths = iter([0.2, 0.1])
    made.clear()
    measure(graphs, settings(1), feeds, Effort(0, 6, 0.05, 0), seed=0)  # the time is out
    assert made == [BLOCKS]


def test_a_precision_that_was_not_reached_is_said(graphs):
    result = profile(graphs, seconds=0, min_rounds=6, threads=1, precision=1e-6, max_seconds=0)
    assert any("a precision of 0.0001 % was not reached in 0 seconds" in warning for warning in result.warnings)


@pytest.mark.parametrize(
    "options", [{"seconds": float("nan")}, {"seconds": -1}, {"max_seconds": float("inf")}, {"precision": 0}, {"precision": 2}]
)
def test_times_and_precisions_that_are_none(graphs, options):
    with pytest.raises(ConfigError, match=r"must (be a number of 0 or more|lie between 0 and 1)"):
        profile(graphs, **options)


def test_the_start_is_not_what_is_measured(graphs):
    """U = 0 and equal weights would let the runtime delete nodes."""
    with away_from_start(graphs[1]) as copy:
        before, after = (ir.load(p).graph.initializers for p in (graphs[1], copy))
        for name in before:
            a, b = before[name].const_value.numpy(), after[name].const_value.numpy()
            changed = name.endswith(".mix") or ".up." in name
            assert (a != b).any() == changed, name
    assert not copy.exists()
    with away_from_start(graphs[0]) as same:
        assert same == graphs[0]


@pytest.mark.parametrize("name", ["resnet18", "gpt2", "bert", "llama", "vit_small", "t5"])
def test_flops_and_parameters_are_those_of_pytorch(name, exported):
    """torch's own counter, which knows nothing of ONNX; products only, as ours."""
    example = real(name)
    feeds = draw_feeds(ir.load(exported(name)), batch=2, length=9)
    (row,) = profile([exported(name)], inputs=feeds, seconds=0, min_rounds=1, threads=1).rows
    by_name = {key: torch.from_numpy(feeds[key]) for key in example.kwargs}
    args = [torch.from_numpy(array) for array in feeds.values()] if not by_name else []
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        example.model.eval()(*args, **by_name, **({"use_cache": False} if name in ("gpt2", "llama", "t5") else {}))
    rotary = (
        row.costs.flops - counter.get_total_flops()
    )  # Llama multiplies positions and frequencies with matmul, in float32: 2 S D/2 a batch
    assert 0 <= rotary <= (4 * 9 * 32 if name == "llama" else 0)
    assert row.costs.parameters >= sum(p.numel() for p in example.model.parameters()) * 0.9  # tables and shared zeros are the exporter's


@pytest.mark.parametrize(("name", "target"), [("resnet18", "ort-cpu"), ("gpt2", "portable")])
def test_time_is_attributed_to_sites_and_modules(name, target, exported, tmp_path):
    model = trained(rewrite_onnx(exported(name), variant="rw+lr", rank=16))
    sites = {n.metadata_props["laurel_rewrite.site"] for n in model.graph if "laurel_rewrite.site" in n.metadata_props}
    if target == "ort-cpu":
        lower(model)
    path = write_onnx(model, tmp_path / "laurel.onnx")
    baseline, laurel = profile([exported(name), path], seconds=0, min_rounds=3, threads=1).rows
    for row in (baseline, laurel):
        total = sum(node.ms for node in row.attribution.nodes)
        assert total == pytest.approx(row.latency.median_ms, rel=1e-9)
        for key in ("op", "module", "site"):
            assert sum(row.attribution.by(key).values()) == pytest.approx(total, rel=1e-9)
    assert {site.site for site in laurel.attribution.sites} == sites
    assert all(site.nodes >= 2 for site in laurel.attribution.sites)
    difference = laurel.latency.median_ms - baseline.latency.median_ms
    assert sum(site.ms for site in laurel.attribution.sites) + laurel.attribution.left_over_ms == pytest.approx(difference, abs=1e-9)
    assert not baseline.attribution.sites
    block = {"resnet18": "layer3.1", "gpt2": "transformer.h.1"}[name]
    assert any(module.startswith(block) for module in laurel.attribution.by("module"))
    static = laurel.costs.sites
    assert set(static) == sites
    positions = {
        site.id: (site.dim, [int(d) if str(d).isdigit() else 128 if "seq" in str(d) else 1 for d in site.shape])
        for site in detect(exported(name))
    }
    for site, costs in static.items():
        dim, shape = positions[site]
        numbers = int(np.prod(shape))
        assert costs.parameters == 2 * 16 * dim + (2 if target == "portable" else 0)
        assert costs.flops == 4 * 16 * numbers  # 4 r D a position
        assert costs.activation_bytes >= 4 * (numbers + numbers // dim * 16)  # U V x and V x, in float32
        assert costs.moved_bytes > costs.activation_bytes


def test_sites_whose_sum_was_absorbed_say_by_what(exported, tmp_path):
    model = trained(rewrite_onnx(exported("resnet18"), variant="rw"))
    lower(model)
    rows = profile([exported("resnet18"), write_onnx(model, tmp_path / "laurel.onnx")], seconds=0, min_rounds=3, threads=1).rows
    sites = rows[1].attribution.sites
    assert len(sites) == 8
    assert all(site.nodes == 0 and "(Conv)" in site.into for site in sites)
    convolutions = [node for node in rows[1].attribution.nodes if node.absorbed["Add"]]
    assert all(node.absorbed["Conv"] == node.absorbed["Relu"] == 1 for node in convolutions)


def test_ops_and_fusions(exported, tmp_path):
    naive = trained(rewrite_onnx(exported("resnet18"), variant="rw"))
    rows = profile([exported("resnet18"), write_onnx(naive, tmp_path / "naive.onnx")], seconds=0, min_rounds=1, threads=1).rows
    ops = rows[0].ops
    assert (ops.before["Conv"], ops.before["Add"], ops.before["Relu"]) == (20, 8, 17)
    assert ops.after.total() == 25
    assert ops.fused == Counter({"Conv+Relu": 9, "Conv+Add+Relu": 8})
    found = rows[1].ops.against(ops)
    assert found.lost == Counter({"Conv+Add+Relu": 8})
    assert found.kept.total() == 9
    assert str(rows[0].ops.against(ops)) == "17 kept, 0 lost, 0 gained"


def test_memory_is_the_same_each_time_and_what_the_graph_says(exported):
    memories = [profile([exported("resnet18")], seconds=0, min_rounds=1, threads=2).rows[0] for _ in range(3)]
    first = memories[0].memory
    assert all(row.memory == first for row in memories)
    assert first.activation_bytes == first.live_bytes  # every buffer is reused as soon as the graph allows it
    assert not first.note
    resident = [row.resident_bytes for row in memories]
    assert max(resident) <= 1.01 * min(resident)


def test_memory_that_the_graph_does_not_explain_is_explained(exported):
    (row,) = profile([exported("vit_small")], seconds=0, min_rounds=1, threads=1).rows
    assert row.memory.activation_bytes > 1.1 * row.memory.live_bytes
    assert "memory for later values of the same size" in row.memory.note


def test_several_shapes(exported):
    result = profile([exported("gpt2")] * 2, shapes={"batch": [1, 3], "seq": [5, 9]}, seconds=0, min_rounds=2, threads=1)
    assert [shape["input_ids"] for shape in result.shapes] == ["int64[1, 5]", "int64[1, 9]", "int64[3, 5]", "int64[3, 9]"]
    assert all(len(row.latencies) == 4 for row in result.rows)
    assert [row.name for row in result.rows] == [f"{exported('gpt2')} ({n})" for n in (1, 2)]


def test_the_self_check_is_a_model_against_itself(graphs, monkeypatch):
    result = profile(graphs, seconds=0, min_rounds=2, threads=1, self_check=True)
    assert [row.name for row in result.rows] == ["baseline.onnx", "laurel.onnx", ITSELF]
    assert result.rows[2].ops == result.rows[0].ops
    noisy = replace(result.rows[2], latencies=(replace(result.rows[2].latency, ratio=1.1, low=1.05, high=1.2, verdict="slower"),))
    assert any("too noisy" in doubt for doubt in _doubts([*result.rows[:2], noisy], settings(), Effort(), [""]))


def test_a_provider_that_falls_back_is_reported(graphs):
    if "AzureExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has one provider")
    result = profile(graphs[:1], seconds=0, min_rounds=1, provider="azure")
    assert result.conditions["provider"] == "AzureExecutionProvider"
    nodes = sum(result.rows[0].providers.values())
    assert result.warnings == (f"baseline.onnx: {nodes} of {nodes} nodes ran on CPUExecutionProvider, not on AzureExecutionProvider.",)


def test_raw_traces_are_kept(graphs, tmp_path):
    profile(graphs, seconds=0, min_rounds=1, traces=tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"trace-baseline.json", "trace-laurel.json"}
    events = json.loads((tmp_path / "trace-laurel.json").read_text())
    assert {"name", "ts", "dur", "ph", "pid", "tid"} <= set(events[-1])


def test_nodes_of_a_loop_are_not_counted_twice(tmp_path):
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("MatMul", ["s", "w"], ["t"])], "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []), helper.make_tensor_value_info("go", TensorProto.BOOL, []),
         helper.make_tensor_value_info("s", TensorProto.FLOAT, [64, 64])],
        [helper.make_tensor_value_info("on", TensorProto.BOOL, []), helper.make_tensor_value_info("t", TensorProto.FLOAT, [64, 64])],
    )  # fmt: skip
    graph = helper.make_graph(
        [helper.make_node("Loop", ["n", "", "x"], ["l"], body=body, name="loop"), helper.make_node("Relu", ["l"], ["y"])], "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [64, 64])], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [64, 64])],
        [numpy_helper.from_array(np.array(20), "n"), numpy_helper.from_array(np.eye(64, dtype=np.float32), "w")],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "loop.onnx")
    (row,) = profile([tmp_path / "loop.onnx"], seconds=0, min_rounds=3, threads=1).rows
    assert {node.op for node in row.attribution.nodes} == {"Loop", "Relu"}


def test_inputs_are_drawn_until_the_graph_runs_with_them(tmp_path):
    """A table of 16 positions, which a sequence of 128 does not fit."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "positions"], ["y"], name="add")], "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "sequence", D])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.zeros((1, 16, D), np.float32), "positions")],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "short.onnx")
    path = tmp_path / "short.onnx"
    assert profile([path], seconds=0, min_rounds=1, threads=1).shapes == ({"x": f"float32[2, 16, {D}]"},)
    assert profile([path], shapes={"batch": [3]}, seconds=0, min_rounds=1, threads=1).shapes == ({"x": f"float32[3, 16, {D}]"},)
    with pytest.raises(ConfigError, match="No inputs were found that the graph runs with"):
        profile([path], shapes={"sequence": [17]}, seconds=0)
    with pytest.raises(ConfigError, match="too large to be drawn"):
        profile([path], shapes={"batch": [99_999_999_999]}, seconds=0)


def test_bad_requests(graphs, tmp_path):
    with pytest.raises(ConfigError, match="no execution provider 'quantum'"):
        profile(graphs, provider="quantum")
    with pytest.raises(ConfigError, match="no open size 'width'"):
        profile(graphs, shapes={"width": [3]})
    with pytest.raises(ConfigError, match="must be 1 or more"):
        profile(graphs, shapes={"batch": [0]})
    with pytest.raises(ConfigError, match="inputs that are drawn"):
        profile(graphs, shapes={"batch": [1]}, inputs={"x": np.zeros((1, 2, D), np.float32)})
    with pytest.raises(ConfigError, match="There is no file"):
        profile([tmp_path / "none.onnx"])
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(ConfigError, match=r"broken\.onnx"):
        profile([tmp_path / "broken.onnx"])
    with pytest.raises(ConfigError, match=r"takes the inputs \['x'\], not \['y'\]"):
        profile(graphs, inputs={"y": np.zeros((1, 2, D), np.float32)})
    with pytest.raises(ConfigError, match="the input 'x' is of shape"):
        profile(graphs, inputs={"x": np.zeros((1, 2, D + 1), np.float32)})
    with pytest.raises(ConfigError, match="the input 'x' is of type float32, not float64"):
        profile(graphs, inputs={"x": np.zeros((1, 2, D))})
