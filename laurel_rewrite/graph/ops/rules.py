"""What the dialects share: the rows of their op tables, rows specialised to one use, and the dimensions behind a view."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from laurel_rewrite.graph.dataflow import OpKind, Role, Value

SOURCE = OpKind(Role.SOURCE)
TRANSPARENT = OpKind(Role.TRANSPARENT)
POINTWISE = OpKind(Role.POINTWISE)
MIXING = OpKind(Role.MIXING)
SUM = OpKind(Role.SUM)
SLICE = OpKind(Role.SLICE)
STRUCTURE = OpKind(Role.POINTWISE, linear=True)
SUBGRAPH = OpKind(Role.MIXING, enclosed=True)
GATE = OpKind(Role.POINTWISE, gated=True)
PRODUCT = OpKind(Role.POINTWISE, product=True)
DIFFERENCE = OpKind(Role.POINTWISE, linear=True, subtracts=True)
DETACH = OpKind(Role.TRANSPARENT, cut=True)
ROUND = OpKind(Role.POINTWISE, cut=True)
CHOICE = OpKind(Role.MIXING, cut=True)
NOISE = OpKind(Role.POINTWISE, cut=True, noise=True)
# Writes elements at given places: a low-rank delta that is scattered is still linear. As a shortcut it is like a convolution.
SCATTER = OpKind(Role.MIXING, linear=True, wide=True)
SOFTMAX = OpKind(Role.MIXING, softmax=True)
ATTENTION = OpKind(Role.MIXING, attends=True)
ROUTING = OpKind(Role.MIXING, routes=True)
# The votes for the feature axis: a normalisation says what its features are, a linear layer may mix tokens instead.
LINEAR = OpKind(Role.MIXING, linear=True, axis=-1, vote=1)
POOL = OpKind(Role.MIXING, linear=True, pools=True, axis=1, vote=1)
MAX_POOL = OpKind(Role.MIXING, pools=True, axis=1, vote=1)
UPSAMPLE = OpKind(Role.MIXING, upsample=True, axis=1, vote=1)
CONV = OpKind(Role.MIXING, linear=True, axis=1, vote=2)
BATCH_NORM = OpKind(Role.MIXING, linear=True, norm=True, axis=1, vote=3)
CHANNEL_NORM = replace(BATCH_NORM, scaleless=True)
LAYER_NORM = OpKind(Role.MIXING, linear=True, norm=True, scaleless=True, axis=-1, vote=4)
_GENERATED = 'File "<eval_with_key>'
_TRACE_LINE = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')


@cache
def cut(kind: OpKind) -> OpKind:
    """The row of an op whose result is an index, a mask or a count: no gradient passes."""
    return replace(kind, cut=True)


def scaled(operands: Sequence[Value], *, learned: bool) -> OpKind | None:
    """The row of a product of one data operand and one other: a constant scalar only scales, a vector or a learned scalar is linear.

    None where both depend on data.
    """
    fixed = [operand for operand in operands if not operand.data]
    if len(operands) != 2 or len(fixed) != 1:
        return None
    if fixed[0].shape in ((), (1,)) and not learned:
        return TRANSPARENT
    data = operands[1] if operands[0] is fixed[0] else operands[0]
    return replace(PRODUCT, linear=True, axis=_vector_axis(fixed[0], data), vote=2)


def _vector_axis(constant: Value, other: Value) -> int | None:
    """The feature axis a multiplication by a parameter vector implies: [D] says -1; [D, 1, 1] and [1, D, 1, 1] say 1."""
    if constant.shape is None or other.shape is None:
        return None
    long = [position - len(constant.shape) for position, size in enumerate(constant.shape) if size != 1]
    if len(long) != 1:
        return None
    return -1 if long[0] == -1 else 1 if long[0] == 1 - len(other.shape) else None


def reshaped_axes(before: Sequence[int | str], after: Sequence[int | str]) -> tuple[int | None, ...]:
    """Which dimension before a reshape each dimension after it is: those that agree from the left and from the right."""
    if tuple(before) == tuple(after):
        return tuple(range(len(before)))
    axes: list[int | None] = [None] * len(after)
    for i in range(min(len(before), len(after))):
        if before[i] != after[i]:
            break
        axes[i] = i
    for i in range(1, min(len(before), len(after)) + 1):
        if before[-i] != after[-i]:
            break
        axes[-i] = len(before) - i
    return tuple(axes)


def placed(trace: str, *, inside: bool) -> tuple[str, str]:
    """ "file:line" of the innermost frame of a stack trace, and what tells its line from others.

    Args:
        inside: the op is in a subgraph of control flow. Of code that PyTorch generated to trace that once more only the call of control flow has a
            line that somebody wrote, and nothing tells its ops apart.
    """
    people, generated, _ = trace.partition(_GENERATED) if inside else (trace, "", "")
    return innermost_frame(people), "" if generated else trace


def innermost_frame(trace: str) -> str:
    """ "file:line" of the last frame of a stack trace, or ""."""
    frame = _TRACE_LINE.match(trace, max(trace.rfind('File "'), 0)) if trace else None
    return f"{frame['file']}:{frame['line']}" if frame else ""
