"""x_0, x_1, x_2, ...: how the states of a stream reach the connections that read them, past the model's own code.

A site leaves the skip it read in its slot, and the sites after it read that slot. So that no answer is wrong in silence, a state counts
only where it is known to be the right one:

* slots belong to one thread: passes in several threads do not mix,
* a pass begins with empty slots and leaves them empty: what runs outside of it (a block on its own, a pipeline stage without the blocks
  before it) finds none, and that is an error,
* a state is fresh until the next connection has read it, once: what runs twice, or out of order, is an error,
* a pass whose blocks run again in backward (activation checkpointing) hangs its states on the graph of its outputs. Backward enters
  there, and puts them back for as long as it runs; so several passes may wait for one backward.

All of it is attributes of plain objects, which torch.compile guards on, and hooks on the module whose call is the pass.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from laurel_rewrite.errors import LaurelError

OUTSIDE = -1  # torch's number of the running backward pass, where none runs


class Slot(threading.local):
    """Where a site leaves the skip it read, for the sites after it in the stream; every thread has its own.

    Attributes:
        value: the state, None where this pass has none yet.
        fresh: the next connection has not read it yet.
        graded: it was written where gradients are recorded.
        again: what wrote it may be run again by activation checkpointing.
    """

    __slots__ = ()  # without a __dict__ beside the thread's own, which torch.compile would write to
    value: Tensor | None = None
    fresh: bool = False
    graded: bool = False
    again: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Slot:
        return Slot()

    def __reduce__(self) -> tuple[type[Slot], tuple[()]]:
        return Slot, ()  # a copy or a pickle of a model carries no activations


class _Pass(threading.local):
    """The pass that a stream's slots hold states of, in this thread: the backward pass that it runs in, or `OUTSIDE`, and there the
    thread that it first ran in."""

    __slots__ = ()
    backward: int = OUTSIDE
    thread: int = 0

    def __reduce__(self) -> tuple[type[_Pass], tuple[()]]:
        return _Pass, ()


class Stream:
    """The slots of one stream; as a hook of the module whose call is a pass, it begins the pass before the call and ends it after.

    Args:
        slots: one a site; of a stream that comes back to a shared module, the last states, nearest first.
        shared: the latter.
        holder: path of the module whose call is a pass, for messages.
    """

    def __init__(self, slots: Sequence[Slot], *, shared: bool = False, holder: str = "") -> None:
        self.slots = tuple(slots)
        self.shared = shared
        self.holder = holder
        self.local = _Pass()
        self.module: weakref.ref[nn.Module] | None = None

    def before(self, module: nn.Module, args: Any) -> None:
        """The hook before the call."""
        if self.module is None and not torch.compiler.is_compiling():
            self.module = weakref.ref(module)  # of a model that was pickled
        self.begin()

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """The hook after the call, which comes after an exception too."""
        if torch.compiler.is_compiling():
            self.begin()
        elif running_backward() != OUTSIDE:
            _at_end_of_backward(self.end)
        else:
            if torch.is_grad_enabled() and any(slot.again for slot in self.slots):
                kept = _Kept(self)
                for node in dict.fromkeys(tensor.grad_fn for tensor in _tensors(output)):
                    if node is not None:
                        node.register_prehook(kept.restore)
            self.end()

    def begin(self) -> None:
        """Empty slots, of the pass that runs now."""
        for slot in self.slots:  # no method of a slot: torch.compile would look for it in a __dict__
            slot.value = None
            slot.fresh = slot.again = False
        if not torch.compiler.is_compiling():
            self.local.backward = running_backward()

    def end(self) -> None:
        """Empty slots, of no pass."""
        self.begin()
        self.local.backward = OUTSIDE

    def copied_with(self, memo: dict[int, Any]) -> bool:
        """Whether a deep copy takes the module with it whose call is a pass, or knows of none."""
        module = None if self.module is None else self.module()
        return module is None or id(module) in memo

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "module": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Stream:
        if not self.copied_with(memo):
            return self
        # One copy, whichever of its links is copied first.
        copied = Stream([memo.setdefault(id(slot), Slot()) for slot in self.slots], shared=self.shared, holder=self.holder)
        if self.module is not None and (module := self.module()) is not None:
            copied.module = weakref.ref(memo[id(module)])
        memo[id(self)] = copied
        return copied


class _Kept:
    """The states of one pass, for the blocks that backward runs again. They are freed as autograd frees what it saved."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.thread = threading.get_ident()
        self.states: list[tuple[Tensor | None, bool]] = [(slot.value, slot.graded) for slot in stream.slots]

    def restore(self, gradients: Any) -> None:
        """Put the states back; called when backward reaches an output of the pass, and so before it runs a block again.

        Backward does the last pass of a thread first, and whole; passes of several threads it mixes.
        """
        local = self.stream.local
        if local.backward == running_backward() and local.thread != self.thread:
            raise LaurelError(
                f"One backward goes through passes of {self.stream.holder or 'the model'} from several threads, whose checkpointed blocks "
                "would read each other's states for PA. Call backward for each thread's pass on its own."
            )
        for slot, (value, graded) in zip(self.stream.slots, self.states, strict=False):
            # What a shared module read in an earlier call is overwritten: it has values that are not fresh, and so are refused.
            slot.value, slot.graded, slot.fresh = value, graded, value is not None and not self.stream.shared
        local.backward, local.thread = running_backward(), self.thread
        keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph()
        _at_end_of_backward(lambda: self._finish(keeps_graph))

    def _finish(self, keeps_graph: bool) -> None:
        self.stream.end()
        if not keeps_graph:
            self.states = []


class Link:
    """What one site has to do with its stream: the slot it writes, and the slots it reads.

    Args:
        site: its id.
        stream: its stream.
        slot: where it leaves its skip; None where nobody reads it.
        past: what it reads, nearest first.
        needs: how many of these must be there; fewer than all where the site's module is shared and this may be its first call.
        first: the stream begins here.
    """

    def __init__(self, site: str, stream: Stream, slot: Slot | None, past: Sequence[Slot], *, needs: int, first: bool) -> None:
        self.site = site
        self.stream = stream
        self.slot = slot
        self.past = tuple(past)
        self.required = self.past[:needs]
        self.first = first
        # The last states of a shared module move up by one; the oldest first.
        ring = stream.slots if stream.shared else ()
        self.moves = tuple(zip(ring[::-1], ring[-2::-1], strict=False))

    def read(self, x: Tensor) -> list[Tensor | None]:
        """The states before x, nearest first; None at the start of a stream that comes back to this module.

        Raises:
            LaurelError: a state is missing, or is not known to belong to this pass.
        """
        eager = not torch.compiler.is_compiling()
        if eager and self.first and (running_backward() == OUTSIDE or self.stream.local.backward != running_backward()):
            self.stream.begin()  # a stream that is run by hand
        if not self.past:
            return []
        nearest = self.past[0]
        missing = any(slot.value is None for slot in self.required)
        stale = nearest.value is not None and not nearest.fresh
        if eager and running_backward() != OUTSIDE:
            self._check_again(x, stale)
        elif missing or stale or (eager and self.stream.local.backward != OUTSIDE):
            raise LaurelError(
                f"{self.site}: PA reads the states of the connections before it in its stream, and this pass has none of them. Call "
                f"{self.stream.holder or 'the model'} as a whole: a pipeline stage without the blocks before it, a block on its own or "
                "copied into another model, blocks out of order, and a block whose predecessor was skipped cannot know them. Use a "
                "variant without pa there."
            )
        nearest.fresh = False
        return [slot.value for slot in self.past]

    def write(self, x: Tensor) -> None:
        """Leave x for the sites after this one."""
        slot = self.slot
        if slot is None:
            return
        for older, newer in self.moves:
            older.value, older.graded = newer.value, newer.graded
        slot.value = x
        slot.fresh = True
        slot.graded = torch.is_grad_enabled()
        if torch.compiler.is_compiling() or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
            slot.again = True

    def _check_again(self, x: Tensor, stale: bool) -> None:
        """Refuse a block that runs again in backward and would not find what it found the first time."""
        if self.stream.local.backward != running_backward() or any(slot.value is None or not slot.graded for slot in self.required):
            raise LaurelError(
                f"{self.site}: activation checkpointing runs this block again, and the states that PA reads there are gone. Use "
                f"checkpoint(..., use_reentrant=False), call {self.stream.holder or 'the model'} itself rather than its forward or its "
                "parts, let its outputs lead to the loss, and use retain_graph=True where backward runs twice."
            )
        if stale and (self.stream.shared or not self._same(x)):
            raise LaurelError(
                f"{self.site}: activation checkpointing runs this block again for an earlier forward pass, whose states PA no longer has. "
                "Do not checkpoint a layer that is shared, and let the outputs of each pass lead to the loss."
            )

    def _same(self, x: Tensor) -> bool:
        """Whether x is what this site left in this pass: a block inside two checkpoints runs more than once."""
        own = None if self.slot is None else self.slot.value
        # Outside of the modes that record or replay what a checkpoint computes. Another pass has other values altogether; the bounds
        # only let through what kernels that are not deterministic change.
        with _disable_current_modes(), torch.no_grad():
            return own is not None and own.shape == x.shape and torch.allclose(own, x, rtol=1e-2, atol=1e-3, equal_nan=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> Link:
        """A copy of a block takes part in the original's stream, a copy of the model has streams of its own."""
        if not self.stream.copied_with(memo):
            return self
        import copy

        stream = copy.deepcopy(self.stream, memo)
        slots = {id(old): new for old, new in zip(self.stream.slots, stream.slots, strict=True)}
        slot = None if self.slot is None else slots[id(self.slot)]
        past = [slots[id(old)] for old in self.past]
        return Link(self.site, stream, slot, past, needs=len(self.required), first=self.first)


def running_backward() -> int:
    """The number of the backward pass that this runs in, as the second run of a checkpointed block does; `OUTSIDE` elsewhere, and where
    it is compiled."""
    return OUTSIDE if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def _at_end_of_backward(call: Callable[[], None]) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(call)


def _tensors(output: Any, depth: int = 4) -> Iterator[Tensor]:
    """The tensors in nested outputs, whatever classes hold them."""
    if isinstance(output, Tensor):
        yield output
    elif depth and isinstance(output, Mapping):
        yield from (tensor for value in output.values() for tensor in _tensors(value, depth - 1))
    elif depth and isinstance(output, list | tuple | set | frozenset):
        yield from (tensor for value in output for tensor in _tensors(value, depth - 1))
    elif depth and hasattr(output, "__dict__") and not isinstance(output, type | nn.Module):
        yield from _tensors(vars(output), depth - 1)
