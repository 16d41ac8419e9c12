"""From a live module to a graph that can be analysed: `torch.export`, with the exact source position of every add.

The exported program is only looked at. What it cannot do (switch train and eval, keep classes, pickle) nobody asks of it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import CodeType, FrameType
from typing import Any

import torch
import torch.fx.traceback
from torch import nn
from torch.overrides import TorchFunctionMode

from laurel_rewrite.errors import CaptureError

_TORCH = torch.__path__[0]
_MACHINERY = tuple(f"{_TORCH}/{part}" for part in ("_", "fx/", "overrides", "utils/", "export/", "functional", "autograd/", "compiler/"))
_CALL = f"{_TORCH}/nn/modules/module.py"
_COPY = "<copy>"
_ADDS = frozenset({"add", "add_", "__add__", "__iadd__", "__radd__", "iadd"})


@dataclass(frozen=True)
class Span:
    """A piece of source: code object, and its lines (from 1) and columns (UTF-8 bytes, from 0).

    The file is named too, because code objects of two files are equal where their text is.
    """

    code: CodeType
    filename: str
    line: int
    end_line: int
    column: int
    end_column: int


@dataclass(frozen=True)
class Call:
    """One executed add: whose forward ran it, in which of its calls, and by which steps, outermost first.

    `steps[0]` lies in a method of the owner; the last span is the add itself, those before it are calls of helpers.
    """

    owner: str
    owner_call: int
    steps: tuple[Span, ...]

    @property
    def where(self) -> str:
        last = self.steps[-1]
        return f"{last.filename}:{last.line}"


@dataclass
class Capture:
    """An exported program of a model and the calls recorded while it ran; nodes refer to them by `meta["custom"]["laurel_call"]`."""

    program: torch.export.ExportedProgram
    calls: list[Call] = field(default_factory=list)


def capture(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> Capture:
    """Export the model in train mode and record where each add stands. The model is left as it was.

    A model that cannot be exported in train mode (Gemma 3n clamps weights in place there) is exported in eval mode, where its dropouts
    are missing and its sums are the same.

    Args:
        model: on any device, meta included; in train or eval mode.
        args, kwargs: inputs of its forward, on its device.
        dynamic_shapes: as `torch.export.export` takes them. None exports with the sizes of the inputs, which is all that detection
            needs.

    Raises:
        CaptureError: the model cannot be called with these inputs, or cannot be exported.
    """
    try:
        return _export(model, args, kwargs, dynamic_shapes, train=True)
    except Exception as error:
        try:
            return _export(model, args, kwargs, dynamic_shapes, train=False)
        except Exception:
            raise CaptureError(_explain(model, args, kwargs, error)) from error


def _export(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None, dynamic_shapes: Any, *, train: bool) -> Capture:
    recorder = _Recorder(model)
    with training(model, train), without_caches(model), quiet(), torch.fx.traceback.preserve_node_meta(), recorder:
        program = torch.export.export(model, tuple(args), dict(kwargs or {}), dynamic_shapes=dynamic_shapes, strict=False)
    return Capture(program, _with_owners(program, recorder.calls))


def _with_owners(program: torch.export.ExportedProgram, calls: list[Call]) -> list[Call]:
    """Name the owners that ran as copies of the model's modules, which some exports make, by the path in the graph's metadata."""
    named = list(calls)
    for node in program.graph.nodes:
        index = (node.meta.get("custom") or {}).get("laurel_call")
        stack = node.meta.get("nn_module_stack")
        if index is not None and stack and named[index].owner == _COPY:  # the first node is the add
            key, (path, _) = next(reversed(stack.items()))
            turn = str(key).rpartition("@")[2]
            named[index] = replace(calls[index], owner=path, owner_call=int(turn) if turn.isdigit() else 0)
    return named


def _explain(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None, error: Exception) -> str:
    inputs = [describe(a) for a in args] + [f"{k}={describe(v)}" for k, v in (kwargs or {}).items()]
    reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else ""
    return (
        f"{type(model).__name__} could not be captured with the inputs ({', '.join(inputs)}): {type(error).__name__}: {reason[:400]}. "
        "Check that the model can be called with these inputs in train mode, and that its forward has no branch on the values of tensors."
    )


def describe(value: Any) -> str:
    """A short word for an input: dtype and shape of a tensor, else its type."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return repr(value) if isinstance(value, int | float | bool | str | None) else type(value).__name__


class _Recorder(TorchFunctionMode):
    """Marks the graph node of every add with the index of a `Call` that says where it stands in the source."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._paths = {id(module): name for name, module in reversed(list(model.named_modules()))}
        self._running: dict[str, tuple[FrameType, int]] = {}
        self._positions: dict[tuple[CodeType, str, int], Span | None] = {}

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _ADDS:
            call = self._locate(sys._getframe(1))
            if call is not None:
                self.calls.append(call)
                with torch.fx.traceback.annotate({"laurel_call": len(self.calls) - 1}):
                    return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _locate(self, frame: FrameType | None) -> Call | None:
        while frame is not None and frame.f_code.co_filename.startswith(_MACHINERY):
            frame = frame.f_back
        steps: list[Span] = []
        while frame is not None and frame.f_code.co_filename != _CALL:
            span = self._span(frame)
            if span is None:
                return None
            steps.append(span)
            owner = self._owner(frame)
            outer = frame.f_back
            while outer is not None and outer.f_code.co_filename.startswith(_MACHINERY):
                outer = outer.f_back
            # A method that the owner calls on itself is a step inside the owner's call; what wraps its forward is not.
            if owner is not None and (frame.f_code.co_name == "forward" or outer is None or self._owner(outer) != owner):
                return Call(owner, self._count(owner, frame), tuple(reversed(steps)))
            frame = outer
        return None

    def _owner(self, frame: FrameType) -> str | None:
        code = frame.f_code
        if not code.co_argcount or frame.f_code.co_filename == _CALL:
            return None
        this = frame.f_locals.get(code.co_varnames[0])
        return self._paths.get(id(this), _COPY if isinstance(this, nn.Module) else None)

    def _count(self, owner: str, frame: FrameType) -> int:
        """The how-manieth call of the owner this frame belongs to."""
        running, count = self._running.get(owner, (None, -1))
        if running is not frame:
            count += 1
            self._running[owner] = (frame, count)
        return count

    def _span(self, frame: FrameType) -> Span | None:
        key = (frame.f_code, frame.f_code.co_filename, frame.f_lasti)
        if key not in self._positions:
            position = list(frame.f_code.co_positions())[frame.f_lasti // 2]
            line, end_line, column, end_column = position
            known = line is not None and end_line is not None and column is not None and end_column is not None
            self._positions[key] = Span(frame.f_code, frame.f_code.co_filename, line, end_line, column, end_column) if known else None  # type: ignore[arg-type]  # known
        return self._positions[key]


@contextlib.contextmanager
def training(model: nn.Module, mode: bool) -> Iterator[None]:
    """Every module in train or eval mode for a while, each put back as it was."""
    before = [(module, module.training) for module in model.modules()]
    try:
        with contextlib.suppress(NotImplementedError):  # an exported graph has one mode
            model.train(mode)
        yield
    finally:
        for module, was in before:
            module.training = was


@contextlib.contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """`use_cache` off in every configuration that the model's modules hold: an export refuses the cache objects."""
    changed: list[Any] = []
    seen: set[int] = set()
    stack: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    while stack:
        config = stack.pop()
        if config is None or id(config) in seen or not hasattr(config, "__dict__") or isinstance(config, nn.Module):
            continue
        seen.add(id(config))
        if getattr(config, "use_cache", None) is True:
            config.use_cache = False
            changed.append(config)
        stack.extend(v for k, v in vars(config).items() if k.endswith("config"))
    try:
        yield
    finally:
        for config in changed:
            config.use_cache = True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what exporting other people's models prints, logs and warns of: where it fails, the exception says why."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)
