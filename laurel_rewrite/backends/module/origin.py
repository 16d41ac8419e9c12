"""How the base model of a rewritten one is built again: by name, from its configuration, or from a pickle of its modules without weights."""

from __future__ import annotations

import copy
import importlib
import io
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from laurel_rewrite.backends.module.saved_folder import CONFIG, MODELING, PLAN, WEIGHTS
from laurel_rewrite.backends.module.surgery import attribute, take_out
from laurel_rewrite.errors import FOREIGN, CaptureError, ConfigError
from laurel_rewrite.files.checked import inner_name, read_bytes, shown
from laurel_rewrite.files.manifest import MANIFEST
from laurel_rewrite.files.pickling import MODULE
from laurel_rewrite.sources.built import Built, require
from laurel_rewrite.sources.code import check_offered
from laurel_rewrite.sources.models import build

SKELETON = "skeleton.pt"
_ORIGIN = "_laurel_origin"


@dataclass(frozen=True)
class Origin:
    """How the base model is built: the recipe, and the files it needs, by name."""

    recipe: dict[str, Any]
    files: dict[str, bytes] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> Origin:
        return self


def origin_of(model: nn.Module, built: Built | None = None, factory: str | None = None) -> Origin:
    """How a model is built; see `laurel_rewrite.save`."""
    if factory is not None:
        check_offered(factory)
        return Origin({"kind": "spec", "spec": factory, "settings": {}})
    if built is not None and built.folder is None:  # a checkpoint may lie elsewhere, or nowhere, when this is loaded
        return _of_built(built)
    known = attribute(model, _ORIGIN)
    return known if isinstance(known, Origin) else _own_origin(model)


def keep_origin(model: nn.Module, origin: Origin) -> None:
    """Say in a model how its base was built."""
    object.__setattr__(model, _ORIGIN, origin)


def read_origin(folder: Path, recipe: Mapping[str, Any]) -> Origin:
    """What a folder's configuration says, with the files that it names."""
    files = {name: read_bytes(folder / name, "The file", most=1 << 32) for name in recipe["files"]}
    return Origin({key: value for key, value in recipe.items() if key != "files"}, files)


def check_names(files: Iterable[str]) -> None:
    """The files of a model must not take the places of ours, nor others outside the folder."""
    for name in files:
        if name in (MODELING, WEIGHTS, PLAN, CONFIG, MANIFEST) or not inner_name(name):
            raise ConfigError(f"The model's file {shown(name)} cannot be saved beside ours under this name; rename it.")


def _of_built(built: Built) -> Origin:
    spec = built.spec
    if built.files:
        path, _, factory = spec.rpartition(":") if ".py:" in spec else (spec, "", "")
        spec = Path(path).name + (f":{factory}" if factory else "")
    return Origin({"kind": "spec", "spec": spec, "settings": built.settings}, {n: f.read_bytes() for n, f in built.files.items()})


def _own_origin(model: nn.Module) -> Origin:
    if "transformers" in sys.modules and isinstance(model, sys.modules["transformers"].PreTrainedModel):
        from laurel_rewrite.backends.module import pretrained

        if attribute(model, "config") is not None:
            return Origin(*pretrained.recipe_of(model))
    buffer = io.BytesIO()
    try:
        torch.save(_skeleton(model), buffer, pickle_module=MODULE)
    except Exception as error:  # pickle raises whatever an attribute of the model raises
        raise ConfigError(
            f"{type(model).__name__} cannot be saved without knowing how it is built: pickling its modules failed ({error}). "
            'Say how with factory="package.module:function", or build it in a file with build_model() and use the command, which saves that file.'
        ) from error
    return Origin({"kind": "skeleton"}, {SKELETON: buffer.getvalue()})


def _skeleton(model: nn.Module) -> nn.Module:
    """A copy of the base model whose parameters hold one element each."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = (
            torch.zeros(1, dtype=parameter.dtype).expand(parameter.numel()).view(parameter.shape)
            if parameter.numel()
            else parameter.detach()
        )
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    skeleton = copy.deepcopy(model, memo)
    take_out(skeleton)
    return skeleton


def base_model(folder: Path, recipe: Mapping[str, Any], *, meta: bool) -> nn.Module:
    """The model as it was before LAuReL. Of what a configuration can name nothing is called but makers of models: see each."""
    kind = recipe["kind"]
    if kind == "spec":
        return _built(folder, recipe, meta=meta).model
    if kind == "transformers":
        require("transformers")
        from laurel_rewrite.backends.module import pretrained

        config, cls = (named(recipe[key], kind) for key, kind in (("config", pretrained.CONFIGURATION), ("class", pretrained.PRETRAINED)))
        return pretrained.from_recipe(folder, cls, config, recipe["attention"], recipe["files"], meta=meta)
    if kind == "skeleton" and SKELETON in recipe["files"]:
        return unpickled(folder / SKELETON)
    raise ConfigError(f"{folder / CONFIG} does not say how to build the model.")


def example_inputs(folder: Path, recipe: Mapping[str, Any], model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs that a folder's model runs with; ConfigError where nothing says which."""
    if recipe["kind"] == "spec":
        built = _built(folder, recipe, meta=False)
        return built.args, built.kwargs
    if recipe["kind"] == "transformers":
        from laurel_rewrite.sources.libraries.hf import example_inputs as drawn

        return (), drawn(model, 2, "cpu")
    raise ConfigError(
        f"Nothing in {folder} says what inputs its model takes: give some, --inputs FILE.npz, by the names of its forward's arguments."
    )


def _built(folder: Path, recipe: Mapping[str, Any], *, meta: bool) -> Built:
    """The base model of a recipe that names one as the command does."""
    spec = recipe["spec"]
    file = spec.rpartition(":")[0] if ".py:" in spec else spec
    if file.endswith(".py"):
        if file not in recipe["files"]:
            raise ConfigError(f"{folder / CONFIG} names the model {shown(spec)}, which is none of its files.")
        spec = str(folder / spec)
    return build(spec, recipe["settings"], device="meta" if meta else "cpu", offered=True)


def named(name: str, kind: type) -> Any:
    """A class by its name; ConfigError unless it is one of this kind."""
    module, _, attribute = name.partition(":")
    try:
        thing: Any = importlib.import_module(module)
        for part in attribute.split("."):
            thing = getattr(thing, part)
    except FOREIGN as error:  # whatever the import of a module raises
        raise ConfigError(f"The class {name} cannot be imported: {type(error).__name__}: {error}") from error
    if not isinstance(thing, type) or not issubclass(thing, kind):
        raise ConfigError(f"{name} is no {kind.__name__}.")
    return thing


def unpickled(path: Path, device: torch.device | str | None = None) -> nn.Module:
    """The module in a pickle, which runs what it names."""
    try:
        model = torch.load(path, map_location=device, weights_only=False)
    except FOREIGN as error:  # unpickling raises whatever the modules raise
        raise CaptureError(f"{path} could not be loaded: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{path} holds no module, but {type(model).__name__}.")
    return model
