"""Accelerate: the learned weights in its trackers.

Nothing else is needed. Rewrite before `prepare`, and save what `unwrap_model` gives. Its policies find blocks by the names of their classes,
which rewritten ones keep; blocks that were rewritten in different ways, or not at all, are found together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from laurel_rewrite.integrations import log_names
from laurel_rewrite.operators.connections import learned

if TYPE_CHECKING:
    from accelerate import Accelerator


def log_learned(accelerator: Accelerator, model: nn.Module, step: int, *, prefix: str = "laurel") -> dict[str, float]:
    """Log what the connections learned with the accelerator's trackers. A collective where the model is sharded: every process calls it.

    Args:
        accelerator: which has trackers (`log_with`, `init_trackers`), or none.
        model: what `accelerator.prepare` gave.
        step: of the training, for the trackers.
        prefix: of the names, `laurel/SITE/a`.

    Returns:
        What was logged.
    """
    values = log_names(learned(model), prefix)
    accelerator.log(values, step=step)
    return values
