"""torchtitan 0.2: a model converter, optimisers that leave mixing weights their own, and the learned weights beside the loss.

A module of one's own registers them for the models that one trains, and names the section `[laurel]` of the configuration:

    from laurel_rewrite.integrations.torchtitan import JobConfig, register

    register("llama3")

`--job.custom_config_module` has torchtitan import it, and `--model.converters laurel` rewrites the model, on the meta device, before it is
parallelised. The start is set when torchtitan initialises its weights.
"""

import functools
import importlib.util
import logging
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from laurel_rewrite.backends.rewriting import rewrite
from laurel_rewrite.errors import ConfigError
from laurel_rewrite.integrations import log_names, required
from laurel_rewrite.operators import registry
from laurel_rewrite.operators.annealing import advance_annealing
from laurel_rewrite.operators.connections import check_optimizer, learned, param_groups, sites_of
from laurel_rewrite.private import forget_training_spec, known_model_converters

NAME = "laurel"
"""Of the converter, in `--model.converters`."""
_CONVERTERS = "torchtitan.protocols.model_converter"
_log = logging.getLogger(__name__)


@dataclass
class Laurel:
    """Which operator the sites get; see `laurel_rewrite.rewrite`."""

    variant: str = "rw+lr"
    """Name of an operator"""
    rank: int = 16
    """Rank of the low-rank maps"""
    history: int = 3
    """How many states of the stream PA reads"""
    normalize: str = "softmax"
    """How a and b are kept bounded"""
    include: list[str] = field(default_factory=list)
    """Patterns of sites; a site must match one"""
    exclude: list[str] = field(default_factory=list)
    """Patterns of sites; a site must match none"""
    plan: str = ""
    """A plan's file, instead of all the above"""
    seed: int = 0
    """Of the start"""
    capture_length: int = 16
    """Tokens in the sequences that the residual connections are found with"""


@dataclass
class JobConfig:
    """What torchtitan's configuration gets: the section `[laurel]`."""

    laurel: Laurel = field(default_factory=Laurel)


class LaurelConverter:
    """torchtitan's protocol `ModelConverter`: rewrites the model in place.

    Args:
        job_config: with the section `laurel`; without it everything has its default.
        parallel_dims: of the job.
    """

    def __init__(self, job_config: Any, parallel_dims: Any) -> None:
        self.settings: Laurel = getattr(job_config, "laurel", None) or Laurel()
        self.model_name: str = job_config.model.name
        self.parallel_dims = parallel_dims

    def convert(self, model: nn.Module) -> None:
        """Rewrite.

        Raises:
            ConfigError: the job is parallel in a way that the operator does not fit; and what `rewrite` raises.
        """
        if self.parallel_dims.tp_enabled:
            raise ConfigError(
                "torchtitan's tensor parallelism splits the sequence between blocks, where each rank would get the gradients of LAuReL's "
                "parameters for its tokens alone. Set parallelism.tensor_parallel_degree to 1, and shard with FSDP."
            )
        s = self.settings
        tokens = torch.zeros(2, s.capture_length, dtype=torch.long, device=next(model.parameters()).device)
        asked: dict[str, Any] = (
            {"plan": s.plan} if s.plan else {"variant": s.variant, "include": s.include, "exclude": s.exclude, "seed": s.seed}
        )
        if not s.plan:
            known = registry.operator(s.variant).options
            asked |= {name: getattr(s, name) for name in ("rank", "history", "normalize") if name in known}
        rewrite(model, (tokens,), inplace=True, **asked)
        connections = sites_of(model)
        past = next((name for name, module in connections.items() if module.link is not None), None)
        if self.parallel_dims.pp_enabled and past is not None:
            raise ConfigError(
                f"{past} reads the states of earlier connections, which a pipeline stage does not have. Choose an operator without history, or "
                "set parallelism.pipeline_parallel_degree to 1."
            )
        prepared = next((name for name, module in connections.items() if module.prepared), None)
        if prepared is not None:
            raise ConfigError(
                f"{prepared} scales weights of its branch when it is put in, which torchtitan initialises only later. Choose another."
            )
        _warn_unless_registered(self.model_name)
        _log.info("LAuReL at %d sites of %s", len(connections), self.model_name)

    def post_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """Count the step for annealed operators; torchtitan calls it behind each of its optimisers'."""
        for part in model if isinstance(model, list) else [model]:
            advance_annealing(part)


def register(*models: str, scalar_lr: float = 1.0) -> None:
    """Register the converter "laurel" with torchtitan, and for some models optimisers and metrics that know of LAuReL.

    Args:
        models: names of torchtitan's models, "llama3". Their mixing weights get no decay, and what was learned is logged with the loss.
        scalar_lr: factor on the learning rate of mixing weights.

    Raises:
        MissingPackageError: torchtitan is not installed.
        ConfigError: this torchtitan has no model converters.
    """
    titan = required("torchtitan", "torchtitan")
    if importlib.util.find_spec(_CONVERTERS) is None:
        version = getattr(titan, "__version__", "of this version")
        raise ConfigError(f"torchtitan {version} has no model converters, which 0.2 has: pip install 'torchtitan>=0.2.2,<0.3'.")
    converters = required(_CONVERTERS, "torchtitan")
    specs = required("torchtitan.protocols.train_spec", "torchtitan")
    metrics = required("torchtitan.components.metrics", "torchtitan")
    if NAME not in known_model_converters(converters):
        converters.register_model_converter(LaurelConverter, NAME)
    for model in models:
        spec = specs.get_train_spec(model)
        if not _is_ours(spec):
            processors = spec.build_metrics_processor_fn or metrics.build_metrics_processor
            ours = replace(
                spec,
                build_optimizers_fn=functools.partial(build_optimizers, spec.build_optimizers_fn, scalar_lr),
                build_metrics_processor_fn=functools.partial(build_metrics_processor, processors),
            )
            forget_training_spec(specs, model)  # where the user registered one
            specs.register_train_spec(model, ours)


def _is_ours(spec: Any) -> bool:
    return getattr(spec.build_optimizers_fn, "func", None) is build_optimizers


def _warn_unless_registered(model: str) -> None:
    if not _is_ours(required("torchtitan.protocols.train_spec", "torchtitan").get_train_spec(model)):
        _log.warning(
            "mixing weights decay like all others, and are not logged: call laurel_rewrite.integrations.torchtitan.register(%r)", model
        )


def build_optimizers(plain: Any, scalar_lr: float, model_parts: list[nn.Module], *args: Any, **kwargs: Any) -> Any:
    """What another builder of optimisers gives, with the mixing weights in groups of their own: no decay, and their learning rate."""
    container = plain(model_parts, *args, **kwargs)
    own: dict[int, dict[str, Any]] = {}
    for part in model_parts:
        for group in param_groups(part, lr=1.0, weight_decay=1.0, scalar_lr=scalar_lr):
            if group["name"] not in ("matrices", "vectors"):
                own |= {id(parameter): group for parameter in group["params"]}
    for optimizer in container:
        for group in list(optimizer.param_groups):
            apart: dict[str, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if id(parameter) in own:
                    apart.setdefault(own[id(parameter)]["name"], []).append(parameter)
            left = [parameter for parameter in group["params"] if id(parameter) not in own]
            if not left and len(apart) == 1:  # an optimiser for one parameter
                _change(group, own[id(group["params"][0])])
                continue
            group["params"] = left
            group.setdefault("name", "others")
            for parameters in apart.values():
                optimizer.add_param_group(_change({**group, "params": parameters}, own[id(parameters[0])]))
    for part in model_parts:
        check_optimizer(part, list(container))
    return container


def _change(group: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    group.update(name=ours["name"], lr=group["lr"] * ours["lr"], weight_decay=group["weight_decay"] * ours["weight_decay"])
    return group


def build_metrics_processor(plain: Any, *args: Any, **kwargs: Any) -> Any:
    """What another builder of metrics gives, which logs what was learned with the loss, as `laurel/SITE/a`."""
    processor = plain(*args, **kwargs)
    log = processor.log

    def with_learned(*given: Any, extra_metrics: dict[str, Any] | None = None, **more: Any) -> None:
        found: dict[str, float] = {}
        for part in processor.model_parts:
            found |= log_names(learned(part))
        log(*given, extra_metrics={**(extra_metrics or {}), **found}, **more)

    processor.log = with_learned
    return processor
