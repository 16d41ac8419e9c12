"""The registry of residual operators, and what each costs.

The formulas are LAuReL's ("LAuReL: Learned Augmented Residual Layer", ICML 2025), with x = x_i, the skip of site i:

    RW          a f(x) + b x
    LR          f(x) + U V x + x
    PA          f(x) + x + sum_j g_j h(x_{i-j})                       j = 0 .. k-1
    RW+LR       a f(x) + b (U V x + x)
    RW+PA       a f(x) + b (x + sum_j g_j h(x_{i-j}))
    LR+PA       f(x) + x + sum_j g_j U_j V_j x_{i-j}
    RW+LR+PA    a f(x) + b (x + sum_j g_j U_j V_j x_{i-j})

An operator is one entry: `register` it, and the plan, the command and the back ends know it by its name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from laurel_rewrite.errors import ConfigError, nearest
from laurel_rewrite.operators.config import SiteConfig

if TYPE_CHECKING:
    import onnx_ir


@dataclass(frozen=True)
class Operator:
    """One residual operator: its name, formula, costs, PyTorch module and ONNX function."""

    name: str
    formula: str
    parameters: Callable[[SiteConfig], int]
    flops: Callable[[SiteConfig], int]
    module: Callable[..., Any]
    onnx_function: Callable[..., onnx_ir.Function]
    uses_rank: bool
    uses_history: bool

    def prepare(self, config: SiteConfig) -> SiteConfig:
        """The configuration with what this operator ignores set to nothing."""
        return config if self.uses_history else replace(config, lags=0)


def laurel_parameters(config: SiteConfig) -> int:
    """Number of new parameters: 2 r D for each low-rank pair, one g for each lag, and a and b."""
    return 2 * config.rank * config.dim * config.maps + config.lags + config.weights


def laurel_flops(config: SiteConfig) -> int:
    """FLOPs (a multiply and an add are two) for one position (token, pixel) of one site: 4 r D for each low-rank pair."""
    scale = 4 if "rw" in config.terms else 1
    return config.dim * (4 * config.rank * config.maps + 2 * config.lags + scale)


_registry: dict[str, Operator] = {}


def register(operator: Operator) -> None:
    """Make an operator known by its name.

    Raises:
        ConfigError: the name is taken.
    """
    if operator.name in _registry:
        raise ConfigError(f"The operator {operator.name!r} is registered already.")
    _registry[operator.name] = operator


def operators() -> dict[str, Operator]:
    """All operators by name, in the order of registration."""
    return dict(_registry)


def canonical(name: str) -> str:
    """The registered spelling of a variant's name: terms may come in any order and any case.

    Raises:
        ConfigError: there is no such variant; the message lists what there is.
    """
    spelled = str(name).strip().lower()
    if spelled in _registry:
        return spelled
    terms = spelled.split("+")
    for known in _registry:
        if sorted(known.split("+")) == sorted(terms):
            return known
    raise ConfigError(f"Unknown variant {name!r}. Choose one of {', '.join(_registry)}. {nearest(spelled, _registry)}")


def operator(name: str) -> Operator:
    """The operator of a variant's name, in any spelling that `canonical` takes."""
    return _registry[canonical(name)]


def _laurel_module(*args: Any, **kwargs: Any) -> Any:
    from laurel_rewrite.operators.laurel import Laurel

    return Laurel(*args, **kwargs)


def _laurel_function(*args: Any, **kwargs: Any) -> onnx_ir.Function:
    from laurel_rewrite.operators.onnx_function import laurel_function

    return laurel_function(*args, **kwargs)


for _name, _formula in {
    "rw": "a*f(x) + b*x",
    "lr": "f(x) + U*V*x + x",
    "pa": "f(x) + x + sum_j g_j*h(x_{i-j})",
    "rw+lr": "a*f(x) + b*(U*V*x + x)",
    "rw+pa": "a*f(x) + b*(x + sum_j g_j*h(x_{i-j}))",
    "lr+pa": "f(x) + x + sum_j g_j*U_j*V_j*x_{i-j}",
    "rw+lr+pa": "a*f(x) + b*(x + sum_j g_j*U_j*V_j*x_{i-j})",
}.items():
    register(
        Operator(
            name=_name,
            formula=_formula,
            parameters=laurel_parameters,
            flops=laurel_flops,
            module=_laurel_module,
            onnx_function=_laurel_function,
            uses_rank="lr" in _name or "pa" in _name,
            uses_history="pa" in _name,
        )
    )
