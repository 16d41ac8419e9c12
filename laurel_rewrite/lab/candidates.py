"""What is compared: the unchanged model, the model with one more layer, and the model with an operator, each from the same seeds."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from laurel_rewrite.backends.rewriting import apply_plan
from laurel_rewrite.detection.detecting import detect
from laurel_rewrite.detection.sites import Sites
from laurel_rewrite.errors import ConfigError
from laurel_rewrite.operators import registry
from laurel_rewrite.operators.connections import refuse_second_time
from laurel_rewrite.plan import LaurelConfig, Plan, read_plan
from laurel_rewrite.profiling import ONE_MORE
from laurel_rewrite.profiling.training import one_more_block
from laurel_rewrite.sources.built import Built
from laurel_rewrite.sources.inputs import call_inputs, copied_inputs
from laurel_rewrite.sources.models import build

UNCHANGED = "baseline"
TWIN = "another start"
_DONOR = 1 << 20
"""Added to the seed of the model that the weights of one more layer come from."""


class NoLayerError(ConfigError):
    """No layer of a model can be repeated."""


@dataclass(frozen=True)
class Candidate:
    """A model to be trained.

    Attributes:
        name: in tables and files.
        config: what its sites get; None for no operator.
        plan: the same, site by site, instead.
        more: with one more layer.
        start: added to the seed of its weights; its batches stay those of the seed.
        rate: factor on the learning rate.
    """

    name: str
    config: LaurelConfig | None = None
    plan: Plan | None = None
    more: bool = False
    start: int = 0
    rate: float = 1.0

    @staticmethod
    def of_plan(path: Path) -> Candidate:
        """What a plan file asks for, by the file's name."""
        asked = read_plan(path)
        return Candidate(path.stem, config=asked) if isinstance(asked, LaurelConfig) else Candidate(path.stem, plan=asked)

    @property
    def rewritten(self) -> bool:
        """Whether it has an operator."""
        return self.config is not None or self.plan is not None

    def to_dict(self) -> dict[str, Any]:
        """As results hold it: what makes it another model, and not its name."""
        config = None if self.config is None else {name: value for name, value in asdict(self.config).items() if name != "seed"}
        if config is not None and not config["rules"]:
            del config["rules"]
        plan = None if self.plan is None else replace(self.plan, seed=0).to_toml()
        return {"config": config, "plan": plan, "more": self.more, "start": self.start, "rate": self.rate}


class Source:
    """Makes the candidates' models.

    Args:
        make: gives the unchanged model with example inputs, with weights drawn from PyTorch's global generator; a new one each time.
    """

    def __init__(self, make: Callable[[], Built]) -> None:
        self._make = make
        self._sites: Sites | None = None

    def base(self, seed: int) -> Built:
        """The unchanged model from a seed."""
        torch.manual_seed(seed)
        built = self._make()
        refuse_second_time(built.model)
        return built

    def sites(self) -> Sites:
        """Its residual connections."""
        if self._sites is None:
            built = self.base(0)
            self._sites = detect(built.model, built.args, built.kwargs)
        return self._sites

    def plan(self, candidate: Candidate) -> Plan | None:
        """What the sites of a candidate get."""
        if candidate.plan is not None:
            return candidate.plan
        return None if candidate.config is None else Plan.from_sites(self.sites(), candidate.config)

    def model(self, candidate: Candidate, seed: int, *, verify: bool = False) -> nn.Module:
        """A candidate's model from a seed.

        Raises:
            NoLayerError: no layer of the model can be doubled.
            ConfigError: the operator does not fit.
            RewriteError: sites stand where they cannot be rewritten.
            VerificationError: the operator's start is not the unchanged model, where that is asked for.
        """
        built = self.base(seed + candidate.start)
        if candidate.more:
            donor = self.base(seed + candidate.start + _DONOR).model
            owners = [site.owner for site in self.sites() if site.kind == "identity"]
            taller = one_more_block(built.model, owners, built.args, built.kwargs, donor=donor)
            if taller is None:
                raise NoLayerError(f"{built.spec}: no layer of it can be put in once more, so that its example inputs run through it.")
            return taller
        plan = self.plan(candidate)
        if plan is None:
            return built.model
        sites = detect(built.model, built.args, built.kwargs)
        seeded = replace(plan, seed=seed + candidate.start)
        model: nn.Module = apply_plan(built.model, sites, seeded, built.args, built.kwargs, inplace=True, verify=verify).model
        return model

    def digest(self) -> str:
        """SHA-256 of what the unchanged model is: the code of its files, whatever its comments, and its start from seed 0."""
        built = self.base(0)
        found = hashlib.sha256()
        for name, file in sorted(built.files.items()):
            found.update(name.encode() + _code(Path(file)))
        for name, value in built.model.state_dict().items():
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()


def _code(file: Path) -> bytes:
    """A file; of Python what is run, which another format, comment or docstring leaves as it is."""
    if file.suffix != ".py":
        return file.read_bytes()
    tree = ast.parse(file.read_bytes())
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and ast.get_docstring(node, clean=False) is not None
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree).encode()


def variants(source: Source, names: Sequence[str], options: dict[str, Sequence[Any]], **selection: Any) -> list[Candidate]:
    """A candidate for each operator and each value of the options that it has; ranks that make no difference ("rw") count as one.

    Args:
        source: of the unchanged model.
        names: of operators.
        options: values of operators' options; of several values, each is a candidate.
        selection: include and exclude, see `LaurelConfig`.

    Raises:
        ConfigError: an operator or a value that there is not, or an option that none of the operators has.
    """
    found: list[Candidate] = []
    unused = set(options)
    for name in dict.fromkeys(registry.canonical(name) for name in names):
        own = [option for option in options if option in registry.operator(name).options]
        unused -= set(own)
        tried = {option: options[option] for option in own}
        if len(tried.get("rank", ())) > 1:
            trials = (source.plan(Candidate("", LaurelConfig(name, **selection, rank=rank))) for rank in tried["rank"])
            if len({plan.parameters() for plan in trials if plan is not None}) == 1:
                tried["rank"] = tried["rank"][:1]
        for values in _products(list(tried.values())):
            given = dict(zip(tried, values, strict=True))
            several = [f"{option} {given[option]}" for option in tried if len(tried[option]) > 1]
            found.append(Candidate(" ".join([name, *several]), LaurelConfig(name, **selection, **given)))
    if unused:
        raise ConfigError(f"None of {', '.join(names)} has the option {sorted(unused)[0]}.")
    return found


def _products(values: Sequence[Sequence[Any]]) -> Iterable[tuple[Any, ...]]:
    return [(value, *rest) for value in values[0] for rest in _products(values[1:])] if values else [()]


def control() -> Candidate:
    """The model with one more layer."""
    return Candidate(ONE_MORE, more=True)


def twin() -> Candidate:
    """The unchanged model from other weights: what it differs by is noise."""
    return Candidate(TWIN, start=_DONOR // 2)


def source_of(model: Any, args: Any, kwargs: Mapping[str, Any] | None, settings: Mapping[str, Any] | None) -> tuple[Source, str]:
    """What makes the unchanged model, and its name."""
    if isinstance(model, str):
        if args != () or kwargs:
            raise ConfigError("A MODEL that is named has its own inputs; args and kwargs are for modules.")
        return Source(lambda: build(model, settings)), model
    if settings:
        raise ConfigError("settings are for a MODEL that is named.")
    given, named = call_inputs(args, kwargs)
    if isinstance(model, nn.Module):
        from laurel_rewrite.backends.module.surgery import copied

        return Source(lambda: Built(copied(model).train(), *copied_inputs(given, named), type(model).__name__)), type(model).__name__
    label = getattr(model, "__name__", type(model).__name__)
    return Source(lambda: Built(model().train(), *copied_inputs(given, named), label)), label
