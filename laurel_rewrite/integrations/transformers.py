"""transformers: models that its Auto classes load with LAuReL, and what its Trainer does with their weights.

    import laurel_rewrite.integrations.transformers

    model = AutoModelForCausalLM.from_pretrained(folder)  # that save_pretrained of a rewritten model wrote
    trainer = Trainer(model, args, train_dataset=data, callbacks=[LaurelCallback()])

Trainer keeps weight decay off the weights that mix skip and branch, as `laurel_rewrite.param_groups` does: with this import, or where it was
imported itself before the model was rewritten.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from laurel_rewrite.backends.module.pretrained import classes_beside, teach_trainer
from laurel_rewrite.integrations import log_names
from laurel_rewrite.operators.annealing import advance_annealing
from laurel_rewrite.operators.connections import check_optimizer, learned
from laurel_rewrite.sources.built import require

require("transformers")
import transformers  # noqa: E402  # only now is its import of torchvision ready

__all__ = ["LaurelCallback", "classes_beside"]


class LaurelCallback(transformers.TrainerCallback):
    """Logs what the connections learned when the trainer logs a loss, for its reporters and its history, not for the console:
    `laurel/SITE/a`, `b`, `g.0`, `uv` (the norm of U V), ...

    It warns where training begins with an optimiser that decays mixing weights, or does not have them.

    Args:
        every: steps that lie at least between two logs.
    """

    def __init__(self, every: int = 1) -> None:
        self.every = every
        self._last = -every

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any) -> None:
        _callbacks[model] = self
        if optimizer is not None:
            check_optimizer(model, optimizer)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Behind the reporters, and before the console."""
        mine = {name: logs.pop(name) for name in list(logs or ()) if name.startswith(_PREFIX)}
        if mine:
            state.log_history[-1] |= mine

    def values(self, state: Any, model: Any) -> dict[str, float]:
        """What is due to be logged at this step."""
        if state.global_step < self._last + self.every:
            return {}
        self._last = state.global_step
        return log_names(learned(model))


_PREFIX = "laurel/"
_callbacks: WeakKeyDictionary[Any, LaurelCallback] = WeakKeyDictionary()


class _BeforeReporters(transformers.TrainerCallback):
    """Trainer asks its reporters before any callback of the user's, and this before its reporters."""

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **kwargs: Any) -> None:
        if model in _callbacks and logs is not None and "loss" in logs:
            logs |= _callbacks[model].values(state, model)


class _CountsSteps(transformers.TrainerCallback):
    """Annealed operators are on their way in every Trainer, with a `LaurelCallback` or none."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        advance_annealing(model)


teach_trainer()
_first: Any = transformers.trainer.DEFAULT_CALLBACKS
_first += [callback for callback in (_BeforeReporters, _CountsSteps) if callback not in _first]
