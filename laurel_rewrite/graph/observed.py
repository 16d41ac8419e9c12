"""The sizes that inference leaves unknown, as two runs in onnxruntime show them.

The runs differ in every size that the inputs leave open, by one factor, so that sizes which agree by accident part and sums of sizes stay
sums. A size that is the same in both is a constant; two that are the same in each run are one size.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from laurel_rewrite.graph.feeds import fitting_feeds, scaled_feeds
from laurel_rewrite.graph.shapes import Sizes, is_unknown, set_sizes, sizes_of

_FACTOR = 2
_WEIGHTS = 4 << 30  # bytes; above, a run is not worth its memory
_SECONDS = 60.0  # for one run; a graph may hold a loop
_log = logging.getLogger(__name__)


def observe_sizes(model: ir.Model, feeds: Mapping[str, np.ndarray] | None = None) -> bool:
    """Settle the unknown sizes of a completed model, for `sizes_of`; its shapes stay as they are.

    Args:
        model: a graph that `completed` returned.
        feeds: inputs that it runs with, by name. None draws them.

    Returns:
        Whether sizes were seen. Else the graph does not run with these inputs, or not with larger ones.
    """
    values = [value for node in model.graph for value in node.outputs if value.name and _is_open(value)]
    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    if not values or weights > _WEIGHTS:
        return False
    try:
        run = _Probe(model, [str(value.name) for value in values])
        feeds = feeds if feeds is not None else fitting_feeds(model, run)
        first, second, settled = _two_runs(model, run, feeds)
    except Exception as error:  # onnxruntime's exceptions share no base class
        _log.info("the sizes of the graph could not be observed: %s", error)
        return False
    set_sizes(_named(values, first, second, settled=settled))
    return True


def _is_open(value: ir.Value) -> bool:
    sizes = sizes_of(value)
    tensor = value.type is None or isinstance(value.type, ir.TensorType)
    return tensor and (sizes is None or any(isinstance(size, str) for size in sizes))


def _two_runs(model: ir.Model, run: _Probe, feeds: Mapping[str, np.ndarray]) -> tuple[Sequence[np.ndarray], Sequence[np.ndarray], bool]:
    """The shapes of the values in two runs, and whether these differ in every open size."""
    first = run(feeds)
    for batch, rest in ((True, True), (False, True), (True, False)):  # a batch, or a length, may be baked into the graph
        larger = scaled_feeds(model, feeds, _FACTOR, batch=batch, rest=rest)
        if all(larger[name].shape == feeds[name].shape for name in larger) and not (batch and rest):
            continue
        try:
            second = run(larger)
        except Exception as error:  # onnxruntime's
            _log.info("the graph does not run with larger inputs: %s", error)
            continue
        grown = all(
            isinstance(dim, int) or larger[str(value.name)].shape[axis] != feeds[str(value.name)].shape[axis]
            for value in model.graph.inputs
            if value.name in larger
            for axis, dim in enumerate(value.shape or ())
        )
        return first, second, grown
    raise ValueError("the graph runs with inputs of one size only")


def _named(
    values: Sequence[ir.Value], first: Sequence[np.ndarray], second: Sequence[np.ndarray], *, settled: bool
) -> dict[ir.Value, Sizes | None]:
    """Sizes from what two runs showed: a constant, or the first name of those that are alike in both."""
    names: dict[tuple[int, int], str] = {}
    table: dict[ir.Value, Sizes | None] = {}
    for value, one, other in zip(values, first, second, strict=True):
        if len(one) != len(other):
            continue
        known = sizes_of(value)
        sizes: list[int | str] = []
        for axis, pair in enumerate(zip(one.tolist(), other.tolist(), strict=True)):
            said = known[axis] if known is not None and len(known) == len(one) else "?"
            if isinstance(said, int) or said.isidentifier():  # a fact: a number, or an open size of an input
                names.setdefault(pair, str(said))
                sizes.append(said)
            elif settled and pair[0] == pair[1]:
                sizes.append(pair[0])
            else:
                sizes.append(names.setdefault(pair, said if not is_unknown(said) else f"?seen{len(names)}"))
        table[value] = tuple(sizes)
    return table


class _Probe:
    """Runs a copy of a graph whose outputs are the shapes of the named values."""

    def __init__(self, model: ir.Model, names: Sequence[str]) -> None:
        import onnxruntime

        copy = model.clone()
        values = {str(value.name): value for node in copy.graph for value in node.outputs}
        outputs: list[ir.Value] = []
        for number, name in enumerate(names):
            node = ir.Node("", "Shape", [values[name]], num_outputs=1, name=f"laurel_shape_{number}")
            node.outputs[0].name = f"laurel_shape_{number}"
            node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.INT64), ir.Shape([None])
            copy.graph.append(node)
            outputs.append(node.outputs[0])
        copy.graph.outputs[:] = outputs
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        folders = {str(t.base_dir) for v in copy.graph.initializers.values() if isinstance(t := v.const_value, ir.ExternalTensor)}
        if folders:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", min(folders))
        self._session = onnxruntime.InferenceSession(ir.to_proto(copy).SerializeToString(), options, providers=["CPUExecutionProvider"])

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        import onnxruntime

        options: Any = onnxruntime.RunOptions()
        timer = threading.Timer(_SECONDS, lambda: setattr(options, "terminate", True))
        timer.start()
        try:
            return list(self._session.run(None, dict(feeds), options))
        finally:
            timer.cancel()
