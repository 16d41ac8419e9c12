"""Pipeline parallelism: the state of a stream that is cut goes from stage to stage beside the stream itself.

    stage = connect_stage(stage, rewriting_of(model).plan)     # takes (x, *state), gives (out, *state)
    PipelineStage(stage, index, count, device)

A stage is any module that holds some of the model's blocks, one after the other: what is left of a copy of the model, or a module of one's own
around them. Gradients go back through the state as through the stream.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from laurel_rewrite.backends.module.surgery import rewriting_of
from laurel_rewrite.errors import ConfigError, LaurelError
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.operators.counting import state_behind
from laurel_rewrite.operators.protocol import Connection
from laurel_rewrite.operators.state import AtEnd, Slot, Stream
from laurel_rewrite.plan import Plan, PlanSite
from laurel_rewrite.private import forget_hooks, hooks_of_calls


def connect_stage(module: nn.Module, plan: Plan | None = None, *, inputs: int = 1) -> nn.Module:
    """Let a stage of a pipeline take the state of the stream that is cut before it, and give that of the one that is cut behind it.

    Called as `module(x, *state)` it returns `(out, *state)`, each without what it has not: the first stage takes no state, the last gives
    none, and where no operator has a history nothing changes. Any number of passes may wait for their backward passes, as in 1F1B, and blocks may be
    checkpointed and compiled. It is done before the stage is compiled, sharded or wrapped; keys of the state dict stay as they are.

    Args:
        module: the stage, with connections of a rewritten model.
        plan: of that model, `laurel_rewrite.training.pipeline.plan_of(model)`; not needed where `module` is a copy of it.
        inputs: how many of the positional arguments are the module's own; those behind them are the state.

    Returns:
        The module itself.

    Raises:
        ConfigError: there is no plan, or a stream cannot be cut so; nothing was changed.
    """
    plan = rewriting_of(module).plan if plan is None else plan
    inside = {connection.site: connection for connection in sites_of(module).values()}
    entered: list[_Entry] = []
    left: list[_Exit] = []
    for rows in plan.streams():
        mine = [row for row in rows if row.id in inside]
        if not mine or len(mine) == len(rows) or not plan.has_history(rows[0].stream):
            continue
        first, last = rows.index(mine[0]), rows.index(mine[-1])
        _check_cut(module, [inside[row.id] for row in mine], rows, first, last)
        if first and plan.leaves(rows[first - 1]) != 0:
            entered.append(_Entry(inside[mine[0].id], _states_behind(plan, rows[:first]), inputs))
        if plan.leaves(rows[last]) != 0:
            left.append(_Exit(inside[mine[-1].id]))
    for word, sites in (("before", [cut.site for cut in entered]), ("behind", [cut.site for cut in left])):
        if len(sites) > 1:
            raise ConfigError(
                f"{len(sites)} streams with a history are cut {word} this stage, those of {sites[0]} and {sites[1]}. Cut the model where one "
                "stream is, or use an operator without history."
            )
    cuts: list[_Entry | _Exit] = [*entered, *left]
    for stream in {id(cut.stream): cut.stream for cut in cuts}.values():
        _take_over(module, stream, [cut for cut in entered if cut.stream is stream], [cut for cut in left if cut.stream is stream])
    return module


class _Entry:
    """The hook by which a stage puts the state that it is given where its first connection reads it."""

    def __init__(self, connection: Connection, count: int, inputs: int) -> None:
        link = connection.link
        assert link is not None and link.before is not None
        self.site, self.stream, self.slot, self.behind = connection.site, link.stream, link.before, link.behind
        self.count, self.inputs = count, inputs

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The hook before the call.

        Raises:
            LaurelError: the state is not all there.
        """
        state = args[self.inputs :]
        if len(state) != self.count:
            raise LaurelError(
                f"{self.site}: the stage got {len(state)} tensors of state behind {self.inputs} of its own, and the connections before it leave "
                f"{self.count}. Call connect_stage on the stage before it, too, and hand on all that it returns."
            )
        slot: Slot = self.slot
        slot.value, slot.fresh, slot.at_end = state, True, self.behind
        slot.graded = torch.is_grad_enabled()
        slot.again = True  # the stage's blocks may be checkpointed; its arguments are kept for backward anyhow
        return args[: self.inputs]


class _Exit:
    """The hook by which a stage gives the state that its last connection left behind its own outputs."""

    def __init__(self, connection: Connection) -> None:
        link = connection.link
        assert link is not None and link.slot is not None
        self.site, self.stream, self.slot = connection.site, link.stream, link.slot

    def after(self, module: nn.Module, args: Any, output: Any) -> tuple[Any, ...]:
        """The hook after the call.

        Raises:
            LaurelError: the connection has not run.
        """
        if self.slot.value is None:
            raise LaurelError(
                f"{self.site}: the stage ended, and its last connection has left no state. Call the stage's blocks in their order."
            )
        # Processes send whole memory; and what is handed on as it came would be one leaf under two names.
        state = tuple(value.contiguous().view_as(value) for value in self.slot.value)
        return (*(output if isinstance(output, tuple) else (output,)), *state)


def _take_over(module: nn.Module, stream: Stream, entered: list[_Entry], left: list[_Exit]) -> None:
    """Make the call of the stage the pass of a stream."""
    for inner in module.modules():
        forget_hooks(inner, lambda hook: getattr(hook, "__self__", None) is stream)
    stream.module = weakref.ref(module)
    module.register_forward_pre_hook(stream.before)
    for entry in entered:
        module.register_forward_pre_hook(entry.before)
    for leaving in left:
        module.register_forward_hook(leaving.after)
    module.register_forward_hook(stream.after, always_call=True)


def _check_cut(module: nn.Module, mine: list[Connection], rows: list[PlanSite], first: int, last: int) -> None:
    """Refuse a stage whose part of a stream cannot be told apart from the rest of it."""
    site = mine[0].site
    if any(row.repeats > 1 for row in rows):
        raise ConfigError(f"{site}: its stream comes back to a shared module, and cannot be cut. Keep it in one stage.")
    if last - first + 1 != len(mine):
        gap = next(row.id for row in rows[first:last] if row.id not in {connection.site for connection in mine})
        raise ConfigError(f"{site}: {gap} lies between the connections of this stage and is not in it. A stage is a run of blocks.")
    if any(connection.link is None for connection in mine):
        raise ConfigError(f"{site}: the states of a graph are its edges. Split it with torch.distributed.pipelining.pipeline.")
    owners = [getattr(hook, "__self__", None) for inner in module.modules() for hook in hooks_of_calls(inner)]
    ends = [owner.connection for owner in owners if isinstance(owner, AtEnd)]
    foreign = [
        connection.site for connection in ends if all(connection is not other for other in mine) and connection.site in {r.id for r in rows}
    ]
    if foreign:
        raise ConfigError(f"{foreign[0]}: the norm or activation behind it is in the next stage. Cut the model behind that.")
    if mine[-1].config.linked and all(connection is not mine[-1] for connection in ends):
        raise ConfigError(f"{mine[-1].site}: the norm or activation behind it is not in its stage. Cut the model behind that.")


def _states_behind(plan: Plan, rows: list[PlanSite]) -> int:
    """How many tensors the last of these connections of a stream leaves."""
    state: tuple[Tensor, ...] = ()
    for row in rows:
        state = state_behind(plan.build(row, torch.empty(0, device="meta")).eval(), state)
    return len(state)


def plan_of(model: nn.Module) -> Plan:
    """The plan of a rewritten model; ConfigError where it is none."""
    return rewriting_of(model).plan
