"""The connections in a model: where they are, and how they are trained."""

from __future__ import annotations

from typing import Any

from torch import nn

from laurel_rewrite.errors import ConfigError
from laurel_rewrite.operators.protocol import Connection


def sites_of(model: nn.Module) -> dict[str, Connection]:
    """The connections in `model` by module path; one that is shared appears once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Connection)}


def refuse_second_time(model: nn.Module) -> None:
    """Raise ConfigError where the model has connections of ours."""
    present = sites_of(model)
    if present:
        raise ConfigError(
            f"The model was rewritten already: it has {len(present)} LAuReL modules, the first at {next(iter(present))!r}. "
            "Call laurel_rewrite.remove(model) first."
        )


def param_groups(model: nn.Module, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Optimiser groups in which the scalars of LAuReL (a, b, g) and all other vectors get no weight decay.

    Args:
        model: any module; every parameter that requires a gradient is in exactly one group.
        lr: learning rate of all groups, times the `rate` that an operator declares for its own. The paper gives none for LAuReL.
        weight_decay: of the matrices; vectors (norms, biases, mix, g) get 0, as usual in pre-training.

    Returns:
        Dictionaries for `torch.optim` constructors: decayed parameters, those without decay, and one more for each other rate.
    """
    rates = {id(p): module.rate for module in sites_of(model).values() for p in module.parameters() if module.rate != 1.0}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    others: dict[float, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in rates:
            others.setdefault(rates[id(parameter)], []).append(parameter)
        else:
            (decayed if parameter.ndim >= 2 else plain).append(parameter)
    return [
        {"params": decayed, "lr": lr, "weight_decay": weight_decay},
        {"params": plain, "lr": lr, "weight_decay": 0.0},
        *({"params": group, "lr": lr * rate, "weight_decay": 0.0} for rate, group in others.items()),
    ]
