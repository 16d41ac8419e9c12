"""The weights of a connection that is linear, found by running it.

A run shows what a sum of multiples weighs, and not that it is one: an operator may bend where no number was tried. That is for the ops of its
function to say (`laurel_rewrite.passes.evaluate_laurel`).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from laurel_rewrite.operators.affine import Affine, Weight
from laurel_rewrite.operators.onnx_function import Call
from laurel_rewrite.operators.protocol import Connection

_NEAR = 1e-12  # of float64, relative to the largest element


def linear_form(connection: Connection, call: Call) -> Affine | None:
    """What a call computes, where that is a sum of multiples; None where it is not.

    Superposition is tried on random operands, and the weights are what each operand alone becomes where it is 1 everywhere.

    Args:
        connection: in float64 and in eval mode.
        call: what of it.
    """
    config = connection.config
    if call.reads:
        return None
    with torch.no_grad():
        form = connection.affine(call.states) if call.part != "read" else None
    if form is not None:
        form.alphas = [] if call.part == "skip" else form.alphas * call.branches
        return Affine(form.alphas, axis=config.axis, ndim=config.ndim) if call.part == "branch" else form
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        one, two = (call.operands(connection, torch.float64) for _ in range(2))
        if any(value.ndim != config.ndim for value in one):  # states of several streams
            return None
        values = [_value(connection, call, operands) for operands in (one, two)]
        both = _value(connection, call, [a - 3 * b for a, b in zip(one, two, strict=True)])
        if not _near(both, values[0] - 3 * values[1]):
            return None
        weights = []
        total = torch.zeros_like(both)
        for place, operand in enumerate(one):
            alone = [torch.ones_like(value) if other == place else torch.zeros_like(value) for other, value in enumerate(one)]
            weight = _value(connection, call, alone)
            total = total + weight * operand
            weights.append(_weight(weight, config.axis))
        if not _near(total, values[0]) or any(weight is None for weight in weights):
            return None
    found = [weight for weight in weights if weight is not None]
    skips = call.part != "branch"
    alphas, betas = found[skips : skips + call.branches], found[:skips] + found[skips + call.branches :]
    return Affine(alphas, [None if isinstance(b, float) and b == 0.0 else b for b in betas], axis=config.axis, ndim=config.ndim)


def _value(connection: Connection, call: Call, operands: list[Tensor]) -> Tensor:
    return call.run(connection, operands)[0]


def _near(found: Tensor, right: Tensor) -> bool:
    scale = float(right.abs().max()) or 1.0
    return bool((found - right).abs().max() <= _NEAR * scale)


def _weight(of_ones: Tensor, axis: int) -> Weight | None:
    """The weight that gave this of ones: one number, or one a feature; None where positions differ."""
    rows = of_ones.movedim(axis, -1).reshape(-1, of_ones.shape[axis])
    vector = rows[0]
    if not _near(rows, vector.expand_as(rows)):
        return None
    if bool((vector == vector[0]).all()):
        return float(vector[0])
    return np.asarray(vector.numpy().copy())
