"""What a verification says, and that gradients arrive."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laurel_rewrite.errors import VerificationError
from laurel_rewrite.graph.capture import without_caches
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.private import pytree
from laurel_rewrite.sources.inputs import copied_inputs

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Check:
    """One verification: what was compared, whether it held, the largest difference, and the tolerance it was held to.

    `passed` is None where there is no verdict: nothing was compared ("not run"; the difference is NaN then), or what was compared could
    hardly have shown a fault ("says little"). The detail says why.
    """

    name: str
    passed: bool | None
    difference: float
    tolerance: str
    detail: str = ""

    @property
    def failed(self) -> bool:
        return self.passed is False

    @property
    def outcome(self) -> str:
        """In a word or two, as the terminal and the report show it."""
        if self.passed is None:
            return "not run" if self.difference != self.difference else "says little"
        return "passed" if self.passed else "FAILED"

    @staticmethod
    def not_run(name: str, why: str) -> Check:
        """A verification that could not be done, which is no pass."""
        return Check(name, None, float("nan"), "", why)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "outcome": self.outcome}


def require(checks: Sequence[Check]) -> None:
    """Raise VerificationError where a check failed; what was not run is logged."""
    for check in checks:
        if check.failed:
            raise VerificationError(failure(check))
        if check.passed is None:
            _log.warning("%s: %s: %s", check.name, check.outcome, check.detail)


def failure(check: Check) -> str:
    """A failed check in sentences."""
    return (
        f"Verification failed: {check.name}: largest difference {check.difference:.3g}, allowed {check.tolerance}. {check.detail}. "
        "Nothing was written."
    )


def check_gradients(rewritten: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, seed: int = 0) -> Check:
    """Every LAuReL parameter has a finite gradient that is not zero within two training steps of a copy of the model.

    U starts at 0, so that V has its first gradient in the second step.
    """
    name = "gradients within two steps"
    model = copy.deepcopy(rewritten).train()
    parameters = {f"{site}.{name}": p for site, module in sites_of(model).items() for name, p in module.named_parameters()}
    arrived: set[str] = set()
    broken: set[str] = set()
    with without_caches(model), torch.random.fork_rng(), torch.inference_mode(False), torch.enable_grad():
        for step in range(2):
            torch.manual_seed(seed + step)
            model.zero_grad()
            given_args, given_kwargs = copied_inputs(args, kwargs)
            leaves = [leaf for leaf in _floats(model(*given_args, **given_kwargs)) if leaf.requires_grad]
            if not leaves:
                return Check.not_run(name, "no output carries a gradient: all are whole numbers, or made under no_grad or detach")
            loss = sum(((leaf.float() * torch.randn_like(leaf, dtype=torch.float32)).mean() for leaf in leaves), torch.zeros(()))
            torch.autograd.backward(loss)
            with torch.no_grad():
                for key, parameter in parameters.items():
                    if parameter.grad is None:
                        continue
                    if not torch.isfinite(parameter.grad).all():
                        broken.add(key)
                    elif parameter.grad.abs().max() > 0:
                        arrived.add(key)
                    parameter.sub_(1e-2 * parameter.grad.sign())
    missing = sorted(set(parameters) - arrived | broken)
    detail = f"{len(parameters)} parameter tensors" if not missing else f"none or not finite: {', '.join(missing[:4])}"
    return Check(name, not missing, float(len(missing)), "finite, not zero", detail)


@contextlib.contextmanager
def randomized(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """LAuReL parameters away from their start for a while: what is 0 or 1 at the start could be lost or swapped unseen."""
    before: list[tuple[Tensor, Tensor]] = []
    generator = torch.Generator().manual_seed(seed)
    for module in sites_of(model).values():
        for parameter in module.parameters():
            before.append((parameter, parameter.detach().clone()))
            size = float(parameter.detach().abs().max()) if parameter.numel() else 0.0
            spread = 0.25 if parameter.ndim == 1 else size or 0.5
            noise = torch.randn(parameter.shape, generator=generator) * spread
            parameter.data.add_(noise.to(parameter.device, parameter.dtype))
    try:
        yield
    finally:
        for changed, value in before:
            changed.data.copy_(value)


# Tensors


def tensors_of(outputs: Any) -> list[Tensor]:
    """Every tensor in nested outputs."""
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _floats(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tensors_of(outputs) if leaf.is_floating_point()]
