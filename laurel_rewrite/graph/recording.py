"""Where every add stands: which module's code ran it, in which of its calls, and by which source positions."""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType, FrameType, FunctionType, MethodType
from typing import Any

import torch
import torch.fx.traceback
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.overrides import TorchFunctionMode

_TORCH = torch.__path__[0]
_MACHINERY = tuple(f"{_TORCH}/{part}" for part in ("_", "fx/", "overrides", "utils/", "export/", "functional", "autograd/", "compiler/"))
_CALL = f"{_TORCH}/nn/modules/module.py"
_ADDS = frozenset({"add", "add_", "__add__", "__iadd__", "__radd__", "iadd"})
_FORWARDS: weakref.WeakKeyDictionary[type, tuple[frozenset[CodeType], bool]] = weakref.WeakKeyDictionary()
_DATA = Tensor.data.__get__  # type: ignore[attr-defined]  # a property of C


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


class Recorder(TorchFunctionMode):
    """Marks the graph node of every add with the index of a `Call` in `meta["custom"]["laurel_call"]`, and in inference mode with
    "laurel_unrecorded".

    Attributes:
        calls: the adds in Python code of the model's modules, in order of execution.
        sums: how often each place added two floating-point tensors of one rank: what can be a residual connection at all.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.sums: Counter[tuple[str, tuple[Span, ...]]] = Counter()
        self._inference = torch.is_inference_mode_enabled()  # of the caller
        # By their attributes, which the stand-ins that an export makes of modules share with them. A module of two paths has the first.
        self._modules = {id(vars(module)): (path, module) for path, module in reversed(list(model.named_modules()))}
        self._running: dict[str, tuple[FrameType, int]] = {}
        self._positions: dict[tuple[CodeType, str, int], Span | None] = {}
        self._methods: dict[type, frozenset[CodeType]] = {}

    def path(self, module: nn.Module) -> str | None:
        """Path of a module or of a stand-in for it; None where it is no part of the model."""
        return self._modules.get(id(vars(module)), (None,))[0]

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _DATA:  # no tracer sees it, and the graph would be cut there
            return args[0].detach()
        if getattr(func, "__name__", "") in _ADDS:
            call = self._locate(sys._getframe(1))
            if call is not None:
                self.calls.append(call)
                self.sums[call.owner, call.steps] += _can_be_residual(args)
                marks: dict[str, Any] = {"laurel_call": len(self.calls) - 1}
                if torch.is_inference_mode_enabled() and not self._inference:  # which leaves no node in the graph
                    marks["laurel_unrecorded"] = True
                with torch.fx.traceback.annotate(marks):
                    return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _locate(self, frame: FrameType | None) -> Call | None:
        if _has_own_backward(frame):
            return None
        frame = _outside_machinery(frame)
        steps: list[Span] = []
        while frame is not None and frame.f_code.co_filename != _CALL:
            span = self._span(frame)
            if span is None:
                return None
            steps.append(span)
            outer = _outside_machinery(frame.f_back)
            owner = self._owner(frame)
            # A method that the owner calls on itself is a step inside the owner's call; what wraps its forward is not.
            if owner is not None and (self._is_forward(frame) or outer is None or self._owner(outer) != owner):
                return Call(owner, self._count(owner, frame), tuple(reversed(steps)))
            frame = outer
        return None

    def _self(self, frame: FrameType) -> tuple[str, nn.Module] | None:
        """The module that a frame's first argument is."""
        code = frame.f_code
        if not code.co_argcount or code.co_filename == _CALL:
            return None
        this = frame.f_locals.get(code.co_varnames[0])
        return self._modules.get(id(vars(this))) if isinstance(this, nn.Module) else None

    def _owner(self, frame: FrameType) -> str | None:
        """Path of the module that a frame is a method of. A function that merely takes a module first is none."""
        found = self._self(frame)
        return found[0] if found is not None and self._is_method(found[1], frame.f_code) else None

    def _is_method(self, module: nn.Module, code: CodeType) -> bool:
        """Whether code is that of a method, a property or a replaced method of a module, behind whatever decorates it."""
        cls = type(module)
        if cls not in self._methods:
            values = [value for base in cls.__mro__ if base is not object for value in vars(base).values()]
            self._methods[cls] = frozenset(code for value in values for code in _codes(value))
        if code in self._methods[cls]:
            return True
        return any(code in set(_codes(value)) for value in vars(module).values() if callable(value) and not isinstance(value, nn.Module))

    def _is_forward(self, frame: FrameType) -> bool:
        found = self._self(frame)
        if frame.f_code.co_name == "forward" or found is None:
            return True
        return getattr(inspect.unwrap(type(found[1]).forward), "__code__", None) is frame.f_code

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


def _outside_machinery(frame: FrameType | None) -> FrameType | None:
    while frame is not None and frame.f_code.co_filename.startswith(_MACHINERY):
        frame = frame.f_back
    return frame


def _has_own_backward(frame: FrameType | None) -> bool:
    """Whether a frame runs in the forward of a `torch.autograd.Function`: its backward is written for the sums that stand there."""
    forwards = [_forward(cls) for cls in _below(torch.autograd.Function)]
    by_context = frozenset().union(*(codes for codes, context in forwards if context))
    by_code = frozenset().union(*(codes for codes, context in forwards if not context))
    while frame is not None:
        if frame.f_code in by_code or (frame.f_code in by_context and isinstance(_first(frame), FunctionCtx)):
            return True
        frame = frame.f_back
    return False


def _below(cls: Any) -> Iterator[type]:
    for child in cls.__subclasses__():
        yield child
        yield from _below(child)


def _forward(cls: Any) -> tuple[frozenset[CodeType], bool]:
    """Code of the forward of an autograd function, and whether it takes the context, by which a plain call of the same code is told apart."""
    if cls not in _FORWARDS:
        context = cls.setup_context is torch.autograd.Function.setup_context
        codes = _codes(inspect.getattr_static(cls, "forward"))
        plain = getattr(inspect.unwrap(cls.forward), "__code__", None)
        _FORWARDS[cls] = frozenset(codes) if context else frozenset([plain] if plain else []), context
    return _FORWARDS[cls]


def _first(frame: FrameType) -> Any:
    """The first operand of the call that a frame runs."""
    code = frame.f_code
    value = frame.f_locals.get(code.co_varnames[0]) if code.co_varnames else None
    return value[0] if not code.co_argcount and isinstance(value, tuple) and value else value


def _can_be_residual(args: Any) -> bool:
    tensors = [a for a in args[:2] if isinstance(a, Tensor)]
    # Sizes are not compared: under an export with open sizes that would fix them.
    return len(tensors) == 2 and all(t.is_floating_point() for t in tensors) and tensors[0].dim() == tensors[1].dim()


def _codes(thing: Any, depth: int = 8) -> Iterator[CodeType]:
    """Code of a function and of the functions that it wraps: by `functools.wraps`, in a closure, as partial, property or static method."""
    if depth == 0:
        return
    inner: list[Any] = []
    if isinstance(thing, FunctionType):
        yield thing.__code__
        inner = [getattr(thing, "__wrapped__", None), *(cell.cell_contents for cell in thing.__closure__ or () if _is_full(cell))]
    elif isinstance(thing, staticmethod | classmethod | MethodType):
        inner = [thing.__func__]
    elif isinstance(thing, functools.partial | functools.partialmethod | functools.cached_property):
        inner = [thing.func]
    elif isinstance(thing, property):
        inner = [thing.fget]
    for part in inner:
        if isinstance(part, FunctionType | MethodType | staticmethod | classmethod | functools.partial):
            yield from _codes(part, depth - 1)


def _is_full(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
