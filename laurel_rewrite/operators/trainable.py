"""Which parameters of a rewritten model train, and how many there are."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from laurel_rewrite.errors import ConfigError
from laurel_rewrite.operators.connections import bare, by_path, sites_of


@dataclass(frozen=True)
class Summary:
    """Parameters of a rewritten model, each counted once; `print` shows a line.

    Attributes:
        connections: number of connections.
        laurel: parameters of the connections.
        base: all others.
        trainable: of both, those that require a gradient.
        trainable_laurel: of the connections', those that require one.
    """

    connections: int
    laurel: int
    base: int
    trainable: int
    trainable_laurel: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.laurel + self.base

    @property
    def percent(self) -> float:
        """How many of all parameters train, in per cent."""
        return 100 * self.trainable / max(self.total, 1)

    def __str__(self) -> str:
        return (
            f"{self.connections} connections with {self.laurel:,} parameters, base model {self.base:,}; trainable {self.trainable:,} of {self.total:,} "
            f"({self.percent:.4g} %)"
        )


def summary(model: nn.Module) -> Summary:
    """How many parameters a rewritten model has, and how many of them train.

    `print(laurel_rewrite.summary(model))` is the line that peft's `print_trainable_parameters` prints.

    Args:
        model: a rewritten model, as it is or wrapped (DDP, torch.compile).

    Raises:
        ConfigError: the model has no connection.
    """
    own = _own(model)
    every = {id(parameter): parameter for parameter in model.parameters()}
    laurel = {key: parameter for key, parameter in every.items() if key in own}
    trains = [key for key, parameter in every.items() if parameter.requires_grad]
    return Summary(
        connections=len(by_path(model)),
        laurel=sum(parameter.numel() for parameter in laurel.values()),
        base=sum(parameter.numel() for key, parameter in every.items() if key not in own),
        trainable=sum(every[key].numel() for key in trains),
        trainable_laurel=sum(every[key].numel() for key in trains if key in own),
    )


def freeze_base(model: nn.Module) -> Summary:
    """Let the connections' parameters train alone: those of the base model get `requires_grad=False`, those of the connections `True`.

    Call it before the optimiser is built and before the model is sharded. `laurel_rewrite.save(model, folder, weights="operators")` then writes what
    was trained, and nothing else. `model.requires_grad_(True)` undoes it.

    Args:
        model: a rewritten model; it is changed itself. Modes, buffers and dropout stay as they are: a norm that keeps statistics goes on
            keeping them in train mode.

    Returns:
        The summary of what trains now.

    Raises:
        ConfigError: the model has no connection, or its connections have no parameters, so that nothing would train.
    """
    own = _own(model)
    if not own:
        raise ConfigError("The connections of this model have no parameters: with a frozen base nothing would train.")
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in own)
    return summary(model)


def _own(model: nn.Module) -> set[int]:
    """The connections' parameters, by id."""
    connections = sites_of(bare(model))
    if not connections:
        raise ConfigError(f"This {type(bare(model)).__name__} has no connections: it was not rewritten.")
    return {id(parameter) for connection in connections.values() for parameter in connection.parameters()}
