"""The profile: what it measures is what it says. No test measures time."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from toys import CASES, D

from laurel_rewrite import ConfigError, export_onnx, profile, rewrite
from laurel_rewrite.onnx_surgery import away_from_start
from laurel_rewrite.profiling.latency import ratio


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
    assert laurel.verdict in ("faster", "slower", "within noise")
    assert all(r.p10_ms <= r.median_ms <= r.p90_ms and r.load_ms > 0 for r in (baseline, laurel))
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


def test_bad_requests(graphs, tmp_path):
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
