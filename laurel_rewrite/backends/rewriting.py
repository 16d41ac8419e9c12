"""From a model to a rewritten one that proved itself: detection, a plan, and the back end for the form that the model comes in."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from laurel_rewrite.backends import UNSUPPORTED, Applied
from laurel_rewrite.backends.fx import FxBackEnd
from laurel_rewrite.backends.module.back_end import ModuleBackEnd
from laurel_rewrite.detection.detecting import detect
from laurel_rewrite.detection.sites import Sites
from laurel_rewrite.errors import ConfigError
from laurel_rewrite.operators.connections import refuse_second_time
from laurel_rewrite.plan import Plan, asked_for, planned
from laurel_rewrite.sources.inputs import call_inputs
from laurel_rewrite.verification.checks import Check

_ENGINES = {"torch.DistributedDataParallel", "torch.FullyShardedDataParallel", "torch.FSDPModule", "deepspeed.DeepSpeedEngine"}
"""Packages and classes in them that send gradients around for the parameters that they found when they were made."""
_log = logging.getLogger(__name__)


def rewrite(
    model: nn.Module | torch.export.ExportedProgram,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    variant: str = "rw+lr",
    extra_turns: str = "refuse",
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    rules: Sequence[Mapping[str, Any]] = (),
    plan: Plan | str | None = None,
    inplace: bool = False,
    seed: int = 0,
    unsupported: str = "refuse",
    verify: bool = True,
    **options: Any,
) -> nn.Module:
    """Replace the residual connections of a model by LAuReL, or by another operator. At the start it computes what it computed, bit for bit,
    where the operator does not declare another start.

    That is verified before anything is returned, by two runs of the original and two of the result, in eval and in train mode with one random
    state; both models are left as they were. What cannot be verified (the model differs from itself, or does not fit into memory twice) is
    logged as a warning with the reason; on the meta device shapes, strides and types are compared.

    Args:
        model: a module on any device (meta included) whose classes have their source at hand, or an `fx.GraphModule`; an exported program
            becomes one.
        args, kwargs: inputs of its forward, for the capture and the verification; a batch of 2 or more. An exported program has its own.
        variant, extra_turns, include, exclude, rules, seed: see `LaurelConfig`.
        options: of the operator: rank, history, normalize, ...; see there, too.
        plan: instead of the above, a plan, or the path of one (see `read_plan`).
        inplace: change `model` itself; else a copy. Where the verification fails, the change is undone.
        unsupported: "refuse" the whole rewrite where a site cannot be rewritten, or "skip" such sites, which then keep their plain sum
            (with a warning for each; where an operator reads the history of its stream, the whole stream keeps its sums).
        verify: False leaves the verification out.

    Returns:
        The model with LAuReL modules as children of the sites' owners; they are on the owner's device and of its dtype. An old
        state dict loads with `strict=False`, and only LAuReL keys are missing.

    Raises:
        ConfigError: the request cannot be meant (`LaurelConfig`), the model was rewritten already, or it is wrapped for distributed
            training (DDP, FSDP, DeepSpeed), which takes note of the parameters: rewrite first.
        NoSiteError: no residual connection, or none that can be rewritten.
        CaptureError: the model cannot be captured with these inputs.
        RewriteError: sites stand where they cannot be rewritten; all of them are named. The model is as it was.
        VerificationError: the result would not compute what the original does; the first site that changes it is named.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> layer = nn.TransformerEncoderLayer(32, 4, batch_first=True)
        >>> better = rewrite(layer, (torch.randn(2, 5, 32),), variant="rw+lr", rank=4)
        >>> [name for name, _ in better.named_children() if name.startswith("laurel")]
        ['laurel_0', 'laurel_1']
    """
    if isinstance(model, torch.export.ExportedProgram):
        if not args and not kwargs:
            args, kwargs = model.example_inputs or ((), {})
        model = model.module(check_guards=False)  # of the shapes that it was exported with
    config = {
        "variant": variant,
        "extra_turns": extra_turns,
        "include": include,
        "exclude": exclude,
        "rules": rules,
        "seed": seed,
        **options,
    }
    args, kwargs, sites, chosen = found_and_planned(model, args, kwargs, plan=plan, **config)
    applied = apply_plan(model, sites, chosen, args, kwargs, inplace=inplace, unsupported=unsupported, verify=verify)
    warn(sites, applied.checks)
    for site in applied.skipped:
        _log.warning("skipped: %s (%s): %s", site.id, site.where, site.reason)
    rewritten: nn.Module = applied.model
    return rewritten


def found_and_planned(
    model: Any, args: Any, kwargs: Mapping[str, Any] | None, *, plan: Plan | str | None, **config: Any
) -> tuple[tuple[Any, ...], dict[str, Any], Sites, Plan]:
    """The inputs of a model as arguments of a call, its sites, and the plan that is asked for, given or of a configuration."""
    asked = asked_for(plan, **config)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"rewrite takes a torch.nn.Module, not {type(model).__name__}; rewrite_onnx takes ONNX files, and the command model files."
        )
    refuse_second_time(model)
    _refuse_distributed(model)
    args, kwargs = call_inputs(args, kwargs)
    sites = detect(model, args, kwargs)
    return args, kwargs, sites, planned(sites, asked)


def warn(sites: Sites, checks: Iterable[Check]) -> None:
    """Log what was not seen and not verified."""
    for note in sites.notes:
        _log.warning("%s", note)
    for check in checks:
        if check.passed is None:
            _log.warning("not verified: %s: %s", check.name, check.detail)


def _refuse_distributed(model: nn.Module) -> None:
    """Raise ConfigError where a module's parameters are known to an engine already: it would not send the gradients of new ones around."""
    for name, module in model.named_modules():
        known = (f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in type(module).__mro__)
        engine = next((name.partition(".")[2] for name in known if name in _ENGINES), None)
        if engine is not None:
            raise ConfigError(
                f"{name or 'The model'} is a {engine}, which took note of its parameters before LAuReL's were there: each process would train its "
                "own. Rewrite the model first, and wrap or shard the result."
            )


def apply_plan(
    model: nn.Module,
    sites: Sites,
    plan: Plan,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    inplace: bool = False,
    unsupported: str = "refuse",
    verify: bool = True,
) -> Applied:
    """Carry out a plan on the model that `sites` were found in; see `rewrite`. Everything is checked before anything changes."""
    if unsupported not in UNSUPPORTED:
        raise ConfigError(f"unsupported must be one of {', '.join(UNSUPPORTED)}, not {unsupported!r}.")
    if "transformers" in sys.modules:
        from laurel_rewrite.backends.module import pretrained  # noqa: F401  # whose models keep a record of their own
    if isinstance(model, fx.GraphModule):
        return FxBackEnd(model, sites, args, kwargs, inplace=inplace, verify=verify).apply(plan)
    return ModuleBackEnd(model, sites, args, kwargs, inplace=inplace, skip=unsupported == "skip", verify=verify).apply(plan)
