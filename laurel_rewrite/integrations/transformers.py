"""transformers: models that its Auto classes load with LAuReL, and what its Trainer does with their weights.

    import laurel_rewrite.integrations.transformers

    model = AutoModelForCausalLM.from_pretrained(folder)  # that save_pretrained of a rewritten model wrote
    trainer = Trainer(model, args, train_dataset=data, callbacks=[LaurelCallback()])

With this import, Trainer keeps weight decay off the weights that mix skip and branch, as `laurel_rewrite.param_groups` does.
"""

from __future__ import annotations

import functools
from typing import Any

from laurel_rewrite.backends.module.pretrained import classes_beside
from laurel_rewrite.operators.connections import check_optimizer, learned, param_groups
from laurel_rewrite.sources.built import require

require("transformers")
import transformers  # noqa: E402  # only now is its import of torchvision ready

__all__ = ["LaurelCallback", "classes_beside"]


class LaurelCallback(transformers.TrainerCallback):
    """Logs what the connections learned, wherever the trainer logs: `laurel/SITE/a`, `b`, `g.0`, `uv` (the norm of U V), ...

    It warns where training begins with an optimiser that decays mixing weights, or does not have them.

    Args:
        every: steps between two logs; None for each time that the trainer logs a loss.
    """

    def __init__(self, every: int | None = None) -> None:
        self.every = every

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any) -> None:
        if optimizer is not None:
            check_optimizer(model, optimizer)

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs or (self.every is not None and state.global_step % self.every):
            return
        logs |= {f"laurel/{site}/{name}": value for site, weights in learned(model).items() for name, value in weights.items()}


def _without_mixing_weights(decayed: Any) -> Any:
    """`Trainer.get_decay_parameter_names`, less what mixes: by their names alone they look like matrices."""

    @functools.wraps(decayed)
    def get_decay_parameter_names(self: Any, model: Any) -> list[str]:
        groups = param_groups(model, lr=0.0, weight_decay=1.0)
        mixing = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
        own = dict(model.named_parameters())
        return [name for name in decayed(self, model) if name not in own or id(own[name]) not in mixing]

    return get_decay_parameter_names


_DECAYED = "get_decay_parameter_names"
if not hasattr(getattr(transformers.Trainer, _DECAYED), "__wrapped__"):  # where this module is imported anew
    setattr(transformers.Trainer, _DECAYED, _without_mixing_weights(getattr(transformers.Trainer, _DECAYED)))
