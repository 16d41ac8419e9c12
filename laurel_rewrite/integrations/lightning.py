"""Lightning: a callback that logs what was learned, and looks at the optimisers before they train.

A model is rewritten in `configure_model`, which Lightning calls before it places, wraps or shards anything, and again, with nothing to do, for
each later `fit`, `test` or `load_from_checkpoint`:

    def configure_model(self):
        if self.model is None:
            model = build()
            self.model = laurel_rewrite.rewrite(model, example_inputs, inplace=True)

There strategies may have set the meta device (FSDP, `empty_init`), on which `rewrite` and `laurel_rewrite.load(folder, device="meta")` work, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from laurel_rewrite.errors import ConfigError
from laurel_rewrite.integrations import log_names, required
from laurel_rewrite.operators.annealing import advance_annealing
from laurel_rewrite.operators.connections import check_optimizer, learned

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    Callback = required("lightning.pytorch", "lightning").Callback


class LogLearned(Callback):
    """Logs `laurel_rewrite.learned` every few steps, as `laurel/SITE/a`, runs `check_optimizer` when a fit starts, and counts the steps of annealed
    operators.

    Args:
        every: so many steps of the optimiser.
        prefix: of the names.

    Raises:
        ConfigError: `every` is no positive number.
    """

    def __init__(self, every: int = 100, *, prefix: str = "laurel") -> None:
        if every < 1:
            raise ConfigError(f"every must be at least 1, not {every}.")
        self.every, self.prefix = every, prefix
        self._last = self._counted = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of what the optimisers would do to mixing weights."""
        check_optimizer(pl_module if trainer.model is None else trainer.model, trainer.optimizers)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that goes on does not begin at step 0."""
        self._counted = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log, once for each step that several batches may share. Every process comes here, so that parts can be put together."""
        advance_annealing(pl_module, trainer.global_step - self._counted)
        self._counted = trainer.global_step
        if trainer.global_step % self.every == 0 and trainer.global_step != self._last:
            self._last = trainer.global_step
            pl_module.log_dict(log_names(learned(pl_module if trainer.model is None else trainer.model), self.prefix))
