"""A graph from one run on concrete values: no value is symbolic, so that nothing a forward does with its values can stop the capture.

It says what this run with these inputs did, and no more; detection needs no more. The operators stay whole, as in `torch.export`.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch.fx.traceback
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from laurel_rewrite.graph.recording import Recorder
from laurel_rewrite.graph.snapshot import tensors_in
from laurel_rewrite.private import ALLOWS_VALUES, rename


def trace(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], recorder: Recorder) -> tuple[fx.GraphModule, dict[str, str]]:
    """Run the model once and write down what it computes. The caller preserves the model.

    Args:
        model: on a device with values.
        args, kwargs: inputs of its forward; tensors in objects of any class are found.
        recorder: is active meanwhile.

    Returns:
        The graph, with shapes, and the placeholders that hold parameters, buffers and other tensors of the model, with the names of parameters there.
    """
    inputs = tensors_in(args, kwargs)
    given = {id(tensor) for tensor in inputs}
    # The model's own tensors are tracked from the start: one that is changed in place is one value, however often it is read.
    state = [tensor for tensor in tensors_in(model) if id(tensor) not in given]

    def run(*_: Tensor) -> list[Tensor]:
        return tensors_in(model(*args, **kwargs))

    with recorder, torch.fx.traceback.preserve_node_meta(), _module_stacks(recorder):
        graph = make_fx(
            run, tracing_mode="real", pre_dispatch=True, record_stack_traces=True, **ALLOWS_VALUES
        )(*state, *inputs)  # fmt: skip
    names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for node, tensor in zip(placeholders, state, strict=False):
        kind = "p_" if isinstance(tensor, nn.Parameter) else "b_"
        rename(node, f"{kind}{names[id(tensor)]}".replace(".", "_") if id(tensor) in names else "c_tensor")
    own = {id(parameter): name for name, parameter in model.named_parameters()}
    return graph, {node.name: own.get(id(tensor), "") for node, tensor in zip(placeholders, state, strict=False)}


@contextlib.contextmanager
def _module_stacks(recorder: Recorder) -> Iterator[None]:
    """Nodes say which modules they were made in, as those of an export do."""
    stack: list[tuple[nn.Module, str, tuple[str, str] | None]] = []
    calls: Counter[str] = Counter()

    def show() -> None:
        meta = torch.fx.traceback.get_current_meta()
        meta["nn_module_stack"] = {key: entry for _, key, entry in stack if entry is not None}

    def enter(module: nn.Module, _: Any) -> None:
        path = recorder.path(module)
        key = "" if path is None else f"{path}@{calls[path]}"
        if path is not None:
            calls[path] += 1
        cls = type(module)
        stack.append((module, key, None if path is None else (path, f"{cls.__module__}.{cls.__qualname__}")))
        show()

    def leave(module: nn.Module, *_: Any) -> None:
        while stack and stack.pop()[0] is not module:
            pass
        show()

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        torch.fx.traceback.get_current_meta().pop("nn_module_stack", None)
