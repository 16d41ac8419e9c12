"""A model as it was: what running it changes is put back bit for bit, also where it raises.

The walk follows what a model holds: modules, containers, plain objects, closures, the classes of its modules, and the global variables that
their code names, through functions of the same package: a cache of masks may lie in any of them. It does not follow files, threads or other
machinery, whose state is nobody's to set back.
"""

from __future__ import annotations

import contextlib
import functools
import random
import sys
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType, NoneType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from laurel_rewrite.private import memory_id, sparse_parts

Undo = Callable[[], object]

_FIXED = (NoneType, bool, int, float, complex, str, bytes, torch.dtype, torch.device, ModuleType, BuiltinFunctionType)
_CONTAINERS: tuple[Any, ...] = (OrderedDict, dict, list, set, deque, bytearray)
_CACHED = functools._lru_cache_wrapper
_MISSING: Any = object()
_MADE_IN_PYTHON = 1 << 9  # Py_TPFLAGS_HEAPTYPE
_GENERATORS: dict[type, tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]] = {
    torch.Generator: (lambda g: g.get_state(), lambda g, state: g.set_state(state)),
    random.Random: (lambda g: g.getstate(), lambda g, state: g.setstate(state)),
    np.random.RandomState: (lambda g: g.get_state(), lambda g, state: g.set_state(state)),
    np.random.Generator: (lambda g: g.bit_generator.state, lambda g, state: setattr(g.bit_generator, "state", state)),
}
"""Random generators that a model may hold: how their state is read and set."""


@contextlib.contextmanager
def preserved(*things: object, values: bool = True) -> Iterator[None]:
    """Put back, at the end, whatever changes meanwhile in these things and in the random states.

    Restored are parameters, buffers and all other tensors and arrays (values, shape, storage, requires_grad, grad), every attribute of
    every module and of what it holds (new ones go, old ones come back; lists, dictionaries and sets have their elements again), the global
    variables that its code names (a `functools.cache` that has new entries is emptied), training flags, hooks, the random states of torch (CPU, and an accelerator in use), Python, numpy and of generators that the model holds, the
    default dtype and whether gradients are on.

    Args:
        things: models, and the inputs that they are called with.
        values: keep a copy of the contents of all tensors, which takes `state_bytes(*things)` of memory. False where other tensors stand
            in for parameters and buffers meanwhile, as in an export: then only what is held beside them is copied.

    Raises:
        RuntimeError: something could not be put back (the rest was), or there is no memory for the copy.
    """
    undo = list(_process_state())
    reached = [*_reachable(things)]
    for thing in reached:
        undo += _undo(thing)
    undo += [_undo_bytes(memory) for memory in _memories(reached, registered=values)]
    try:
        yield
    finally:
        failed: list[Exception] = []
        for put_back in undo:
            try:
                put_back()
            except Exception as error:  # the rest must still be put back
                failed.append(error)
        if failed:
            raise RuntimeError(f"{len(failed)} part(s) of the model could not be put back: {failed[0]}") from failed[0]


def state_bytes(*things: object) -> int:
    """Size of all tensors that these things hold, in bytes; a tensor on the meta device has none."""
    return sum(memory.numel() for memory in _memories([*_reachable(things)]))


def fits_twice(*things: object) -> bool:
    """Whether there is memory for a second copy of all tensors that these things hold, with room to spare for a run."""
    needed: Counter[str] = Counter()
    for memory in _memories([*_reachable(things)]):
        needed[memory.device.type] += memory.numel()
    return all(1.25 * size <= _free_bytes(device) for device, size in needed.items())


def _free_bytes(device: str) -> float:
    if device != "cpu":
        module: Any = torch.get_device_module(device)
        return float(module.mem_get_info()[0]) if hasattr(module, "mem_get_info") else float("inf")
    free = [float("inf")]
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free.append(1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))))
    with contextlib.suppress(OSError, ValueError, KeyError):  # a container's own limit; "max" is none
        group = Path("/sys/fs/cgroup")
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["inactive_file"]
        free.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()) + int(cached))
    return min(free)


def tensors_in(*things: object) -> list[Tensor]:
    """Every plain tensor that these things hold, each once."""
    return [thing for thing in _reachable(things) if isinstance(thing, Tensor) and _holds_memory(thing)]


# What is reached


def _reachable(things: Sequence[object]) -> Iterator[Any]:
    """Everything that can change, each once."""
    seen: dict[int, object] = {}  # also keeps them alive, so that no id is used twice
    stack = list(reversed(things))
    while stack:
        thing = stack.pop()
        if isinstance(thing, _FIXED) or id(thing) in seen or _is_machinery(thing):
            continue
        seen[id(thing)] = thing
        yield thing
        stack.extend(reversed([*_parts(thing)]))


def _is_machinery(thing: object) -> bool:
    """Objects of the standard library (loggers, locks, files), but for containers and what holds the user's things."""
    if isinstance(thing, (*_CONTAINERS, tuple, frozenset, type, *_GENERATORS, SimpleNamespace)):
        return False
    if isinstance(thing, FunctionType | MethodType | functools.partial | CellType | _CACHED):
        return False
    return type(thing).__module__.partition(".")[0] in sys.stdlib_module_names


def _parts(thing: Any) -> Iterator[Any]:
    if isinstance(thing, dict):
        yield from (value for _, value in _elements(thing, dict))
    elif isinstance(thing, list | tuple | set | frozenset | deque):
        yield from thing
    elif isinstance(thing, type):
        yield from vars(thing).values() if _is_own_class(thing) else ()
        return
    elif isinstance(thing, FunctionType):
        yield from thing.__closure__ or ()
        yield from _followed_globals(thing)
    elif isinstance(thing, _CACHED):
        yield thing.__wrapped__
    elif isinstance(thing, CellType):
        with contextlib.suppress(ValueError):  # empty
            yield thing.cell_contents
    elif isinstance(thing, MethodType):
        yield thing.__self__
    elif isinstance(thing, functools.partial):
        yield from (thing.func, thing.args, thing.keywords)
    elif isinstance(thing, nn.Module):
        yield from type(thing).__mro__
        if isinstance(thing, torch.jit.ScriptModule):  # its tensors are not among its attributes
            yield from (*thing.parameters(), *thing.buffers())
    elif isinstance(thing, Tensor):
        yield thing.grad if thing.is_leaf else None
    yield from (getattr(thing, name, None) for name in _slots(type(thing)))
    yield from _attributes(thing).values()


def _is_own_class(cls: type) -> bool:
    return not _is_foreign(cls.__module__) and bool(cls.__flags__ & _MADE_IN_PYTHON)


def _is_foreign(module: object) -> bool:
    """Whether a name is that of torch or the standard library, whose global variables are their own."""
    root = _root(module)
    return root == "torch" or (root != "__main__" and root in sys.stdlib_module_names)


def _root(module: object) -> str:
    """The package of a module's name; a function may have none."""
    return str(module).partition(".")[0]


@functools.lru_cache(maxsize=1 << 14)
def _names(code: CodeType) -> frozenset[str]:
    """The names that code refers to, and the functions in it; attributes are among them."""
    return frozenset(code.co_names).union(*(_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _globals_of(function: FunctionType) -> dict[str, Any]:
    """The global variables that a function's code names, those that are not there as `_MISSING`."""
    if _is_foreign(function.__module__):
        return {}
    given = function.__globals__
    return {name: given.get(name, _MISSING) for name in _names(function.__code__)}


def _followed_globals(function: FunctionType) -> Iterator[Any]:
    """Of these the tensors, containers and generators, and the functions, classes and objects of the function's own package."""
    package = _root(function.__module__)
    for value in _globals_of(function).values():
        if isinstance(value, (*_CONTAINERS, Tensor, *_GENERATORS)) or _root(getattr(value, "__module__", None)) == package:
            yield value


def _attributes(thing: object) -> dict[str, Any]:
    try:
        found = object.__getattribute__(thing, "__dict__")
    except AttributeError:
        return {}
    return found if isinstance(found, dict) else {}


def _slots(cls: type) -> tuple[str, ...]:
    """Names of the attributes outside `__dict__` that a class of Python declares."""
    if cls not in _known_slots:
        _known_slots[cls] = _declared_slots(cls)
    return _known_slots[cls]


_known_slots: weakref.WeakKeyDictionary[type, tuple[str, ...]] = weakref.WeakKeyDictionary()


def _declared_slots(cls: type) -> tuple[str, ...]:
    names: list[str] = []
    for base in cls.__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else tuple(slots):
            private = name.startswith("__") and not name.endswith("__")
            names.append(f"_{base.__name__.lstrip('_')}{name}" if private else name)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


# Attributes and containers


def _undo(thing: Any) -> Iterator[Undo]:
    """What puts one object back; the contents of tensors apart."""
    for cls, (get, put) in _GENERATORS.items():
        if isinstance(thing, cls):
            yield functools.partial(put, thing, get(thing))
            return
    if isinstance(thing, type):
        if _is_own_class(thing):
            yield functools.partial(_restore_class, thing, dict(vars(thing)))
        return
    base = next((cls for cls in _CONTAINERS if isinstance(thing, cls)), None)
    if base is not None:
        yield functools.partial(_restore_container, thing, base, _elements(thing, base))
    elif isinstance(thing, CellType):
        with contextlib.suppress(ValueError):
            yield functools.partial(setattr, thing, "cell_contents", thing.cell_contents)
    elif isinstance(thing, FunctionType):
        if named := _globals_of(thing):
            yield functools.partial(_restore_globals, thing.__globals__, named)
    elif isinstance(thing, _CACHED):
        yield functools.partial(_restore_cached, thing, thing.cache_info().misses)
    elif isinstance(thing, np.ndarray) and thing.dtype != object:
        yield functools.partial(_restore_array, thing, thing.copy())
    elif isinstance(thing, Tensor):
        yield from _undo_tensor(thing)
    attributes = _attributes(thing)
    if attributes or not isinstance(thing, (*_CONTAINERS, Tensor)):
        yield functools.partial(_restore_container, attributes, dict, _elements(attributes, dict))
    slots = {name: getattr(thing, name) for name in _slots(type(thing)) if hasattr(thing, name)}
    if slots:
        yield functools.partial(_restore_slots, thing, slots)


def _elements(thing: Any, base: Any) -> list[Any]:
    """What a container holds, a dictionary as pairs; whatever a subclass makes of it that is asked (transformers' ACT2FN makes new ones)."""
    if issubclass(base, dict):
        return [(key, dict.__getitem__(thing, key)) for key in base.__iter__(thing)]
    return list(base.__iter__(thing))


def _restore_container(thing: Any, base: Any, before: list[Any]) -> None:
    now = _elements(thing, base)
    if len(now) == len(before) and all(_same(a, b) for a, b in zip(now, before, strict=True)):
        return
    base.clear(thing)
    if issubclass(base, dict):
        for key, value in before:
            base.__setitem__(thing, key, value)
    else:
        (base.update if issubclass(base, set) else base.extend)(thing, before)


def _same(a: Any, b: Any) -> bool:
    return all(x is y for x, y in zip(a, b, strict=True)) if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b) else a is b


def _restore_globals(namespace: dict[str, Any], before: dict[str, Any]) -> None:
    for name, value in before.items():
        if isinstance(namespace.get(name), ModuleType | FunctionType | type):  # what was imported meanwhile stays
            continue
        if value is _MISSING:
            namespace.pop(name, None)
        elif namespace.get(name, _MISSING) is not value:
            namespace[name] = value


def _restore_cached(function: Any, misses: int) -> None:
    if function.cache_info().misses != misses:
        function.cache_clear()  # its entries cannot be told apart from outside


def _restore_class(cls: type, before: dict[str, Any]) -> None:
    for name in [name for name in vars(cls) if name not in before]:
        delattr(cls, name)
    for name, value in before.items():
        if vars(cls).get(name) is not value:
            setattr(cls, name, value)


def _restore_slots(thing: object, before: dict[str, Any]) -> None:
    for name in _slots(type(thing)):
        if name not in before and hasattr(thing, name):
            object.__delattr__(thing, name)
        elif name in before and getattr(thing, name, None) is not before[name]:
            object.__setattr__(thing, name, before[name])


def _restore_array(array: Any, before: Any) -> None:
    if array.tobytes() != before.tobytes():
        array[...] = before


# Tensors


def _undo_tensor(tensor: Tensor) -> Iterator[Undo]:
    whole = _holds_memory(tensor)
    yield functools.partial(_restore_tensor, tensor, tensor.data if whole else None, tensor.is_leaf, tensor.requires_grad)
    if tensor.is_leaf:
        yield functools.partial(_restore_grad, tensor, tensor.grad)


def _holds_memory(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and tensor.layout == torch.strided


def _restore_tensor(tensor: Tensor, data: Tensor | None, leaf: bool, requires_grad: bool) -> None:
    if data is not None and _layout(tensor) != _layout(data):
        tensor.data = data
    if leaf and not tensor.is_leaf:  # a buffer that was updated by what has a gradient
        tensor.detach_()
    if leaf and tensor.requires_grad is not requires_grad:
        tensor.requires_grad_(requires_grad)


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return memory_id(tensor.untyped_storage()), tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()


def _restore_grad(tensor: Tensor, grad: Tensor | None) -> None:
    if tensor.grad is not grad:
        tensor.grad = grad


def _memories(reached: Sequence[Any], *, registered: bool = True) -> Iterator[Tensor]:
    """The memory behind every tensor among these things, as bytes, each piece once: views and tied tensors share theirs.

    Without `registered`, that of parameters and buffers is left out.
    """
    seen: set[int] = set()
    for module in reached if not registered else ():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)) if isinstance(module, nn.Module) else ():
            seen.update(memory_id(part.untyped_storage()) for part in _plain_tensors(tensor))
    for thing in reached:
        for tensor in _plain_tensors(thing) if isinstance(thing, Tensor) else ():
            storage = tensor.untyped_storage()
            if memory_id(storage) not in seen and storage.device.type != "meta" and storage.nbytes():
                seen.add(memory_id(storage))
                yield torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The strided tensors that one consists of."""
    if hasattr(tensor, "__tensor_flatten__"):  # a subclass that wraps others: DTensor, quantised weights
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain_tensors(getattr(tensor, name))
    elif tensor.layout == torch.strided:
        yield tensor
    elif tensor.layout == torch.sparse_coo:
        yield from sparse_parts(tensor)
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())


def _undo_bytes(memory: Tensor) -> Undo:
    before = memory.clone()

    def put_back() -> None:
        if not torch.equal(memory, before):  # memory that is only read may be write-protected
            memory.copy_(before)

    return put_back


# The process


def _process_state() -> Iterator[Undo]:
    yield functools.partial(torch.set_rng_state, torch.get_rng_state())
    yield functools.partial(random.setstate, random.getstate())
    yield functools.partial(np.random.set_state, np.random.get_state())
    yield functools.partial(torch.set_default_dtype, torch.get_default_dtype())
    yield functools.partial(torch.set_grad_enabled, torch.is_grad_enabled())
    device = torch.accelerator.current_accelerator()
    module: Any = torch.get_device_module(device) if device is not None else None
    if module is not None and getattr(module, "is_initialized", lambda: True)():
        if hasattr(module, "get_rng_state_all"):
            yield functools.partial(module.set_rng_state_all, module.get_rng_state_all())
        elif hasattr(module, "get_rng_state"):
            yield functools.partial(module.set_rng_state, module.get_rng_state())
