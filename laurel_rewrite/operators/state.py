"""How the state of a stream reaches the next connection, past the model's own code.

A connection leaves its state in its slot, and the connection after it reads that slot. So that no answer is wrong in silence, a state counts
only where it is known to be the right one:

* slots belong to one thread: passes in several threads do not mix,
* a pass begins with empty slots and leaves them empty: what runs outside of it (a block on its own, a pipeline stage without the blocks
  before it) finds none, and that is an error,
* a state is fresh until the next connection has read it, once: what runs twice, or out of order, is an error. It is let go of then, where
  no checkpoint may ask for it again,
* a pass whose blocks run again in backward (activation checkpointing) hangs its states on the graph of its outputs. Backward enters
  there, and puts them back for as long as it runs; so several passes may wait for one backward.

All of it is attributes of plain objects, which torch.compile guards on, and hooks on the module whose call is the pass.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laurel_rewrite.errors import LaurelError
from laurel_rewrite.operators.sums import state_like
from laurel_rewrite.private import at_end_of_backward, backward_keeps_graph, backward_number, saved_tensors_hooks, without_modes

OUTSIDE = -1  # torch's number of the running backward pass, where none runs
States = tuple[Tensor, ...]
FED = 3
"""How many values a branch reads apart: q, k and v."""
_PROBES = 64  # elements by which a skip is known again


class Slot(threading.local):
    """Where a connection leaves its state for the one after it in the stream; every thread has its own.

    Attributes:
        value: the state, None where this pass has none yet.
        fresh: the next connection has not read it yet.
        graded: it was written where gradients are recorded.
        again: what wrote it may be run again by activation checkpointing.
        skip: some elements of the skip beside which it was written, where that is so.
        at_end: it is the state behind the link that follows, where that is read once more.
        taken: how many of the reads at its head the branch has taken.
    """

    __slots__ = ()  # without a __dict__ beside the thread's own, which torch.compile would write to
    value: States | None = None
    fresh: bool = False
    graded: bool = False
    again: bool = False
    skip: Tensor | None = None
    at_end: bool = False
    taken: int = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Slot:
        return Slot()

    def __reduce__(self) -> tuple[type[Slot], tuple[()]]:
        return Slot, ()  # a copy or a pickle of a model carries no activations


class Tap:
    """A hook on a module that leaves what it gives for a connection: the input of a branch behind its norm."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """The hook after the call."""
        self.slot.value = (output,)


class AtEnd:
    """A hook on the module that ends a link: what it gives is read once more.

    Args:
        connection: the one before the link.
    """

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The hook after the call."""
        if not isinstance(output, Tensor):
            raise LaurelError(
                f"{self.connection.site}: {type(module).__name__} returned {type(output).__name__}, and the stream is a tensor."
            )
        return self.connection.at_end(output)


class Fed:
    """A hook on a projection of an attention branch, which reads what the connection before the branch left for it.

    Args:
        connection: the one whose branch it is.
        place: 0 for q, 1 for k, 2 for v.
        norm: the branch's, through which what is read goes; None where it has none.
        holder, name: where the projection is a child.
    """

    def __init__(self, connection: Any, place: int, norm: nn.Module | None, holder: nn.Module, name: str) -> None:
        self.connection, self.place, self.norm, self.holder, self.name = connection, place, norm, holder, name

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """The hook before the call."""
        if self.holder._modules.get(self.name) is not module:  # a LoRA around it would read the value itself, beside this
            raise LaurelError(f"{self.connection.site}: {self.name} was wrapped or replaced after the rewrite. Rewrite the model last.")
        named = next(iter(kwargs), "") if not args else ""
        given = args[0] if args else kwargs[named]
        read = state_like(self.connection.fed(self.place), given, 0, self.connection.reader)
        read = read if self.norm is None else self.norm.forward(read)
        return ((read, *args[1:]), kwargs) if args else (args, {**kwargs, named: read})


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
        slots: one a connection; of a stream that comes back to a shared module, one for all.
        shared: the latter.
        holder: path of the module whose call is a pass, for messages.
    """

    def __init__(self, slots: Sequence[Slot], *, shared: bool = False, holder: str = "") -> None:
        self.slots = tuple(slots)
        self.shared = shared
        self.holder = holder
        self.local = _Pass()
        self.traced = False  # the pass as a whole is being compiled
        self.module: weakref.ref[nn.Module] | None = None

    def before(self, module: nn.Module, args: Any) -> None:
        """The hook before the call."""
        if self.module is None and not torch.compiler.is_compiling():
            self.module = weakref.ref(module)  # of a model that was pickled
        self.begin()
        self.traced = torch.compiler.is_compiling()

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """The hook after the call, which comes after an exception too."""
        self.traced = False
        if torch.compiler.is_compiling():
            self.begin()
        elif running_backward() != OUTSIDE:
            at_end_of_backward(self.end)
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
            slot.value = slot.skip = None
            slot.fresh = slot.again = slot.at_end = False
            slot.taken = 0
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
        return {**self.__dict__, "module": None, "traced": False}

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
        self.states = [(slot.value, slot.graded, slot.skip, slot.at_end) for slot in stream.slots]

    def restore(self, gradients: Any) -> None:
        """Put the states back; called when backward reaches an output of the pass, and so before it runs a block again.

        Backward does the last pass of a thread first, and whole; passes of several threads it mixes.
        """
        local = self.stream.local
        if local.backward == running_backward() and local.thread != self.thread:
            raise LaurelError(
                f"One backward goes through passes of {self.stream.holder or 'the model'} from several threads, whose checkpointed blocks "
                "would read each other's states. Call backward for each thread's pass on its own."
            )
        for slot, (value, graded, skip, at_end) in zip(self.stream.slots, self.states, strict=False):
            # What a shared module read in an earlier call is overwritten: it has values that are not fresh, and so are refused.
            slot.value, slot.graded, slot.skip, slot.fresh = value, graded, skip, value is not None and not self.stream.shared
            slot.at_end, slot.taken = at_end, 0
        local.backward, local.thread = running_backward(), self.thread
        keeps_graph = backward_keeps_graph()
        at_end_of_backward(lambda: self._finish(keeps_graph))

    def _finish(self, keeps_graph: bool) -> None:
        self.stream.end()
        if not keeps_graph:
            self.states = []


class Link:
    """What one connection has to do with its stream: the slot that it writes, and the one that it reads.

    Args:
        site: its id.
        stream: its stream.
        slot: where it leaves its state; None where nobody reads it.
        before: what the connection before it leaves; None at a stream's first.
        needs: whether that must be there; not where the site's module is shared and this may be its first call.
        reader: what reads it, for messages.
        behind: what the connection before it leaves was read once more behind a norm or activation.
        fed: its branch takes the head of that.
    """

    def __init__(
        self,
        site: str,
        stream: Stream,
        slot: Slot | None,
        before: Slot | None,
        *,
        needs: bool,
        reader: str,
        behind: bool = False,
        fed: bool = False,
    ) -> None:
        self.site = site
        self.stream = stream
        self.slot = slot
        self.before = before
        self.needs = needs
        self.reader = reader
        self.behind = behind
        self.fed = fed

    def read(self, x: Tensor) -> States:
        """The state before x; none at the start of a stream that comes back to this module.

        Raises:
            LaurelError: it is missing, or is not known to belong to this pass.
        """
        eager = not torch.compiler.is_compiling()
        before = self.before
        if before is None:
            if eager and (running_backward() == OUTSIDE or self.stream.local.backward != running_backward()):
                self.stream.begin()  # a stream that is run by hand
            return ()
        value = before.value
        missing = self.needs and value is None
        stale = value is not None and not before.fresh
        if eager and running_backward() != OUTSIDE:
            self._check_again(x, stale)
        elif missing or stale or (eager and self.stream.local.backward != OUTSIDE):
            raise LaurelError(
                f"{self.site}: {self.reader} reads the states of the connections before it in its stream, and this pass has none of them. Call "
                f"{self.stream.holder or 'the model'} as a whole: a pipeline stage without the blocks before it, a block on its own or "
                "copied into another model, blocks out of order, and a block whose predecessor was skipped cannot know them. Use an "
                "operator without history there."
            )
        if value is not None and self.behind and not before.at_end:
            raise self._not_run(
                "the norm or activation before it", "its result is what the connection before it gives, and was not asked for"
            )
        if value is not None and self.fed and before.taken != FED:
            raise self._not_run("the projections of its branch", f"q, k and v have inputs of their own, and {before.taken} of 3 were taken")
        before.fresh = False
        before.taken = 0
        if eager and not before.again and not _records_again() and before is not self.slot:
            before.value = None
        return () if value is None else value

    def write(self, x: Tensor, state: States) -> None:
        """Leave a state for the connection after this one."""
        slot = self.slot
        if slot is None:
            return
        slot.value = state
        slot.fresh = True
        slot.at_end = False
        slot.taken = 0
        slot.graded = torch.is_grad_enabled()
        if torch.compiler.is_compiling():
            slot.again = True
        elif _records_again():
            slot.again = True
            slot.skip = _probe(x)

    def at_end(self) -> States:
        """The state that this connection itself left, at the end of the link that follows it.

        Raises:
            LaurelError: it left none in this pass, or was asked already.
        """
        slot = self.slot
        if slot is None or slot.value is None or not slot.fresh or slot.at_end or self._of_another_pass():
            raise self._not_run("the norm or activation behind it", "it ran without this connection before it, or twice", whole=True)
        return slot.value

    def write_at_end(self, state: States) -> None:
        """Leave the state behind the link instead."""
        assert self.slot is not None
        self.slot.value = state
        self.slot.at_end = True

    def take(self, place: int) -> Tensor:
        """What one of q, k and v reads, which the connection before this one left.

        Raises:
            LaurelError: it is missing, or of another pass.
        """
        before = self.before
        there = before is not None and before.value is not None and before.fresh and (before.at_end or not self.behind)
        again = not torch.compiler.is_compiling() and running_backward() != OUTSIDE
        if before is None or before.value is None or not there or self._of_another_pass() or (again and not before.graded):
            raise self._not_run("a projection of its branch", "what it reads is gone, or was never there", whole=True)
        before.taken += 1
        if not torch.compiler.is_compiling() and _records_again():
            before.again = True  # the branch alone may be run again
        return before.value[place]

    def _of_another_pass(self) -> bool:
        """Whether the slots hold states of another pass than the one that runs now."""
        return not torch.compiler.is_compiling() and self.stream.local.backward != running_backward()

    def _not_run(self, what: str, why: str, *, whole: bool = False) -> LaurelError:
        hint = f" Call {self.stream.holder or 'the model'} as a whole, and keep a block inside one checkpoint." if whole else ""
        return LaurelError(
            f"{self.site}: {self.reader} and {what} do not fit together: {why}.{hint} A module that was replaced or wrapped after the rewrite "
            "has lost its hook: rewrite the model last."
        )

    def _check_again(self, x: Tensor, stale: bool) -> None:
        """Refuse a block that runs again in backward and would not find what it found the first time."""
        before = self.before
        assert before is not None
        if self.stream.local.backward != running_backward() or (self.needs and (before.value is None or not before.graded)):
            raise LaurelError(
                f"{self.site}: activation checkpointing runs this block again, and the states that {self.reader} reads there are gone. Use "
                f"checkpoint(..., use_reentrant=False), call {self.stream.holder or 'the model'} itself rather than its forward or its "
                "parts, let its outputs lead to the loss, and use retain_graph=True where backward runs twice."
            )
        if stale and (self.stream.shared or not self._same(x)):
            raise LaurelError(
                f"{self.site}: activation checkpointing runs this block again for an earlier forward pass, whose states {self.reader} no "
                "longer has. Do not checkpoint a layer that is shared, and let the outputs of each pass lead to the loss."
            )

    def _same(self, x: Tensor) -> bool:
        """Whether x is the skip that this connection had in this pass: a block inside two checkpoints runs more than once."""
        own = None if self.slot is None else self.slot.skip
        found = _probe(x)
        # Another pass has other values altogether; the bounds only let through what kernels that are not deterministic change.
        with without_modes(), torch.no_grad():
            return own is not None and own.shape == found.shape and torch.allclose(own, found, rtol=1e-2, atol=1e-3, equal_nan=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> Link:
        """A copy of a block takes part in the original's stream, a copy of the model has streams of its own."""
        if not self.stream.copied_with(memo):
            return self
        import copy

        stream = copy.deepcopy(self.stream, memo)
        slots = {id(old): new for old, new in zip(self.stream.slots, stream.slots, strict=True)}
        slot, before = (None if old is None else slots[id(old)] for old in (self.slot, self.before))
        same: dict[str, Any] = {"needs": self.needs, "reader": self.reader, "behind": self.behind, "fed": self.fed}
        return Link(self.site, stream, slot, before, **same)


def _records_again() -> bool:
    """Whether what runs here may be run again by activation checkpointing."""
    return saved_tensors_hooks(False) is not None


def _probe(x: Tensor) -> Tensor:
    """Some elements of a tensor, outside of the modes that record or replay what a checkpoint computes."""
    with without_modes(), torch.no_grad():
        if x.is_nested:
            return x.values()[:_PROBES].clone()
        x = x.to_local() if hasattr(x, "to_local") else x  # of a DTensor, this device's part
        return x.detach().reshape(-1)[:: max(x.numel() // _PROBES, 1)].clone()


def running_backward() -> int:
    """The number of the backward pass that this runs in, as the second run of a checkpointed block does; `OUTSIDE` elsewhere, and where
    it is compiled."""
    return OUTSIDE if torch.compiler.is_compiling() else backward_number()


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
