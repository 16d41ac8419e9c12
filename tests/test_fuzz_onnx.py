"""Random ONNX graphs, lowered by every subset of the passes; `tools/fuzz/onnx_graphs.py` makes as many as one likes."""

from __future__ import annotations

from collections import Counter

import pytest
from conftest import slow

from tools.fuzz import onnx_graphs

SEEDS = 200


@pytest.mark.parametrize("part", [0, 1, 2, 3, *(slow(part) for part in range(4, 8))])
def test_lowered_graphs_compute_what_they_computed(part):
    kinds = Counter(onnx_graphs.run(seed).split(":")[0] for seed in range(part * SEEDS // 8, (part + 1) * SEEDS // 8))
    assert kinds["nothing to do"] < SEEDS // 16  # half of the part
