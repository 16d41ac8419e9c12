"""`laurel_out/`: source a person can read, weights, plan and configuration; and back, without tracing."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import io
import json
import platform
import sys
import zlib
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import fx, nn

from laurel_rewrite import __version__
from laurel_rewrite.backends.module.functions import BASE, Written, adopt, unheard
from laurel_rewrite.backends.module.modeling import module_text
from laurel_rewrite.backends.module.saved_folder import (
    CONFIG,
    MODELING,
    PLAN,
    WEIGHTS,
    check_size,
    check_whole,
    importable,
    load_weights,
    read_config,
)
from laurel_rewrite.backends.module.surgery import Rewriting, attribute, install, keep_record, rewriting_of
from laurel_rewrite.errors import FOREIGN, CaptureError, ConfigError, nearest
from laurel_rewrite.files.checked import inner_name, read_bytes, read_json, read_text, shown
from laurel_rewrite.files.drafts import reading, replacing
from laurel_rewrite.files.manifest import MANIFEST
from laurel_rewrite.files.pickling import MODULE
from laurel_rewrite.operators import registry
from laurel_rewrite.plan import Plan
from laurel_rewrite.sources.built import Built, require
from laurel_rewrite.sources.code import check_offered
from laurel_rewrite.sources.models import build

SKELETON = "skeleton.pt"
GRAPH = "model.pt"
BASE_CONFIG, GENERATION = "base_config.json", "generation_config.json"
OPERATORS = "operators"
"""Folder of the files that operators were loaded from."""
_ORIGIN = "_laurel_origin"

_HEADER = '''"""{name} with LAuReL, written by laurel-rewrite {version}.

Each class below is its base class with the sums of its residual connections replaced by calls of LAuReL modules; everything else is
the original's own text. `laurel_rewrite.load(folder)` builds the model from it. Edit it as you like: this file is what is loaded.
"""

'''


def save(model: nn.Module, folder: Path | str, *, built: Built | None = None, factory: str | None = None, force: bool = False) -> Path:
    """Write a rewritten model so that `load` can build it anywhere.

    Args:
        model: what `rewrite` or `load` returned.
        folder: is created. An earlier result that nobody changed is replaced as a whole.
        built: how the base model was built, where it is known: then `load` builds it so, from its configuration. Without it, a
            transformers model is built from its own configuration, and any other from a pickle of its modules without weights
            (`skeleton.pt`), for which its classes must be importable where it is loaded.
        factory: instead, "package.module:function": a function without arguments that gives the base model, in a module that also has
            `example_inputs`, as the command takes it.
        force: replace files that are no earlier result, or that were changed since, too.

    Returns:
        The folder, with `modeling_laurel.py`, `model.safetensors`, `plan.toml`, `laurel_config.json` and `laurel_manifest.json`.

    Raises:
        ConfigError: the model was not rewritten, its weights are on the meta device, there is no such factory, the folder cannot be
            written, or it holds files that would be replaced and are no earlier result.
        RewriteError: a class of the model cannot be imported again.
    """
    if isinstance(model, fx.GraphModule):
        raise ConfigError("A rewritten graph has no classes to save. Save the graph with torch.export, or rewrite the module it came from.")
    record = rewriting_of(model)
    if any(p.is_meta for p in model.parameters()):
        raise ConfigError("The model is on the meta device and has no weights to save.")
    text, names = source_of(record, type(model).__name__)
    folder = Path(folder)
    origin = attribute(model, _ORIGIN) if built is None else _origin(built)
    if factory is not None:
        check_offered(factory)
        origin = Origin({"kind": "spec", "spec": factory, "settings": {}})
    if origin is None:
        origin = _own_origin(model)
    own = {row.variant: row.operator.file for row in record.plan.sites if row.operator.file is not None}
    operators = {name: f"{OPERATORS}/{file.name}" for name, file in own.items()}
    origin = Origin(origin.recipe, {**origin.files, **{operators[name]: file.read_bytes() for name, file in own.items()}})
    _check_names(origin.files)
    config = {
        **_versions(),
        "seed": record.plan.seed,
        "class": _name(type(model)),
        "model": {**origin.recipe, "files": sorted(origin.files)},
        "classes": names,
        **({"operators": operators} if operators else {}),
    }
    for package in ("transformers", "timm", "torchvision"):
        if package in sys.modules:
            config[package] = getattr(sys.modules[package], "__version__", "unknown")
    with replacing(folder, "save", force=force) as draft:
        _write(draft / MODELING, text)
        _write(draft / PLAN, record.plan.to_toml())
        _write_weights(model, draft / WEIGHTS)
        for name, content in origin.files.items():
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            (draft / name).write_bytes(content)
        _write(draft / CONFIG, json.dumps(config, indent=2) + "\n")
    return folder


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _write_weights(model: nn.Module, path: Path) -> None:
    from safetensors.torch import save_model

    try:
        save_model(model, str(path))
    except Exception as error:  # safetensors' own, for a full disk too
        raise ConfigError(f"The weights could not be written: {type(error).__name__}: {str(error)[:300]}") from error


def _check_names(files: Iterable[str]) -> None:
    """The files of a model must not take the places of ours, nor others outside the folder."""
    for name in files:
        if name in (MODELING, WEIGHTS, PLAN, CONFIG, MANIFEST) or not inner_name(name):
            raise ConfigError(f"The model's file {shown(name)} cannot be saved beside ours under this name; rename it.")


def save_graph(module: fx.GraphModule, folder: Path, plan: Plan) -> None:
    """Write a rewritten graph module, pickled, so that `load` finds it; the packages of its modules must be installed there."""
    torch.save(module, folder / GRAPH)
    _write(folder / PLAN, plan.to_toml())
    config = {**_versions(), "seed": plan.seed, "class": _name(type(module)), "model": {"kind": "graph", "files": [GRAPH]}, "classes": {}}
    _write(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def _versions() -> dict[str, str]:
    return {"laurel_rewrite": __version__, "torch": torch.__version__, "python": platform.python_version()}


def source_of(record: Rewriting, name: str) -> tuple[str, dict[str, str]]:
    """The text of the rewritten classes, and the class of each owner in it."""
    if record.text is not None:
        return record.text, record.names
    if not record.classes:
        raise ConfigError("The source of the rewritten classes was lost, as it is in a pickled model.")
    header = _HEADER.format(name=name, version=__version__)
    text, by_class = module_text(dict.fromkeys(record.classes.values()), header)
    return text, {owner: by_class[rewritten] for owner, rewritten in record.classes.items()}


def load(folder: Path | str, device: torch.device | str | None = None) -> nn.Module:
    """Build a saved model: no capture, no tracing.

    The folder's `modeling_laurel.py` is imported, or its `model.pt` unpickled, and so runs; load only what you trust.

    Args:
        folder: what `save` or the command wrote.
        device: of the result; "meta" builds the modules without reading weights. None is the CPU.

    Returns:
        The model in train mode, with the saved weights, ready to train.

    Raises:
        ConfigError: the folder is none of ours, a file is missing or damaged, the files were not written together, or weights and plan do
            not fit. An edited source or plan is loaded as it is, and said in the log.
        CaptureError: the folder's code raises.
    """
    with reading(Path(folder)):
        return _load(Path(folder), device)


def _load(folder: Path, device: torch.device | str | None) -> nn.Module:
    meta = device is not None and torch.device(device).type == "meta"
    graph = (folder / CONFIG).is_file() and (folder / GRAPH).is_file() and not (folder / MODELING).is_file()
    needed = (PLAN, CONFIG, GRAPH) if graph else (MODELING, PLAN, CONFIG, WEIGHTS)
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise ConfigError(f"{folder} is not a folder written by laurel-rewrite: {missing[0]} is missing.")
    config = read_config(folder)
    recipe, names = config["model"], config["classes"]
    check_whole(folder, [CONFIG, *recipe["files"], *([] if meta or graph else [WEIGHTS])])
    if graph:
        return _load_graph(folder, device)
    for name, file in config["operators"].items():
        if name not in registry.operators():
            registry.load_operators(folder / file)
    plan = Plan.read(folder / PLAN)
    origin = Origin({k: v for k, v in recipe.items() if k != "files"}, {name: _own_file(folder, name) for name in recipe["files"]})
    if not meta:
        check_size(plan, folder / WEIGHTS)
    with importable(folder, origin.files):
        model = _base(folder, recipe, meta=meta)
        _check_owners(model, names, folder)
        with unheard({type(model.get_submodule(owner)) for owner in names}):
            module = _import_modeling(folder)
    text = read_text(folder / MODELING, "The source")
    classes = _classes(model, module, names, text, folder)
    _check_places(model, plan, folder / PLAN)
    install(model, plan, classes)
    keep_record(model, Rewriting(plan, {}, text, names))
    object.__setattr__(model, _ORIGIN, origin)
    model.train()
    if meta:
        return model.to("meta")
    load_weights(model, folder / WEIGHTS)
    return model if device is None else model.to(device)


def _check_owners(model: nn.Module, owners: Iterable[str], folder: Path) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    for owner in owners:
        if owner not in modules:
            raise ConfigError(
                f"{folder / CONFIG} names the module {shown(owner)}, which the model does not have. {nearest(owner, modules)}"
            )


def _classes(model: nn.Module, module: ModuleType, names: Mapping[str, str], text: str, folder: Path) -> dict[str, type]:
    """The class of each owner in the folder's module, made to look like the class that it replaces."""
    classes: dict[str, type] = {}
    for owner, name in names.items():
        base = type(model.get_submodule(owner))
        cls = getattr(module, name, None)
        if not isinstance(cls, type) or not issubclass(cls, base):
            raise ConfigError(f"{folder / MODELING} has no class {name} made from {base.__name__}, which {owner or 'the model'} needs.")
        classes[owner] = adopt(cls, Written(base, text, name))
    return classes


def _check_places(model: nn.Module, plan: Plan, path: Path) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    for row in plan.sites:
        for name in (row.owner, row.holder):
            if name not in modules:
                raise ConfigError(f"{path}, site {row.id}: the model has no module {shown(name)}. {nearest(name, modules)}")


def _load_graph(folder: Path, device: torch.device | str | None) -> nn.Module:
    from laurel_rewrite.backends.onnx.emit_torch import onnx2torch

    onnx2torch()  # whose modules were pickled
    model = _unpickled(folder / GRAPH, device)
    return model.train()


def _unpickled(path: Path, device: torch.device | str | None = None) -> nn.Module:
    try:
        model = torch.load(path, map_location=device, weights_only=False)
    except FOREIGN as error:  # unpickling raises whatever the modules raise
        raise CaptureError(f"{path} could not be loaded: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{path} holds no module, but {type(model).__name__}.")
    return model


# How the base model is built again


@dataclass(frozen=True)
class Origin:
    """How the base model is built: the recipe, and the files it needs, by name."""

    recipe: dict[str, Any]
    files: dict[str, bytes] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> Origin:
        return self


def _origin(built: Built) -> Origin:
    spec = built.spec
    if built.files:
        path, _, factory = spec.rpartition(":") if ".py:" in spec else (spec, "", "")
        spec = Path(path).name + (f":{factory}" if factory else "")
    return Origin({"kind": "spec", "spec": spec, "settings": built.settings}, {n: f.read_bytes() for n, f in built.files.items()})


def _own_origin(model: nn.Module) -> Origin:
    config = attribute(model, "config")
    if "transformers" in sys.modules and isinstance(model, sys.modules["transformers"].PreTrainedModel) and config is not None:
        base = vars(type(model)).get(BASE, type(model))
        recipe = {"kind": "transformers", "class": _name(base), "config": _name(type(config))}
        attention = config._attn_implementation  # which the configuration's own text leaves out
        if isinstance(attention, str) and attention.isidentifier():  # a kernel from elsewhere is for the user to ask for
            recipe["attention"] = attention
        files = {BASE_CONFIG: config.to_json_string(use_diff=False)}
        if model.can_generate():
            files[GENERATION] = model.generation_config.to_json_string(use_diff=False)
        return Origin(recipe, {name: text.encode() for name, text in files.items()})
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
    from laurel_rewrite.backends.module.surgery import take_out

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


def _base(folder: Path, recipe: Mapping[str, Any], *, meta: bool) -> nn.Module:
    """The model as it was before LAuReL. Of what a configuration can name nothing is called but makers of models: see each."""
    kind = recipe["kind"]
    if kind == "spec":
        spec = recipe["spec"]
        file = spec.rpartition(":")[0] if ".py:" in spec else spec
        if file.endswith(".py"):
            if file not in recipe["files"]:
                raise ConfigError(f"{folder / CONFIG} names the model {shown(spec)}, which is none of its files.")
            spec = str(folder / spec)
        return build(spec, recipe["settings"], device="meta" if meta else "cpu", offered=True).model
    if kind == "transformers":
        return _from_transformers(folder, recipe, meta=meta)
    if kind == "skeleton" and SKELETON in recipe["files"]:
        return _unpickled(folder / SKELETON)
    raise ConfigError(f"{folder / CONFIG} does not say how to build the model.")


def _from_transformers(folder: Path, recipe: Mapping[str, Any], *, meta: bool) -> nn.Module:
    require("transformers")
    import transformers

    config_class, cls = _named(recipe["config"], transformers.PreTrainedConfig), _named(recipe["class"], transformers.PreTrainedModel)
    data = read_json(folder / BASE_CONFIG, "The configuration")
    try:
        config = config_class.from_dict(data)
        options = {"attn_implementation": recipe["attention"]} if recipe["attention"] else {}
        with torch.device("meta") if meta else nullcontext():
            model: nn.Module = cls._from_config(config, **options)
        if GENERATION in recipe["files"]:
            generation = read_json(folder / GENERATION, "The configuration of generate()")
            setattr(model, "generation_config", transformers.GenerationConfig.from_dict(generation))  # noqa: B010  # no module or tensor
    except FOREIGN as error:  # of values that the library does not expect
        raise CaptureError(f"{folder / BASE_CONFIG} gives no {cls.__name__}: {type(error).__name__}: {str(error)[:300]}") from error
    return model


def _name(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _named(name: str, kind: type) -> Any:
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


def _own_file(folder: Path, name: str) -> bytes:
    return read_bytes(folder / name, "The file", most=1 << 32)


def _import_modeling(folder: Path) -> ModuleType:
    path = folder / MODELING
    name = f"modeling_laurel_{zlib.crc32(str(path.resolve()).encode()):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except FOREIGN as error:  # whatever an edited file raises
        del sys.modules[name]
        raise CaptureError(f"{path} could not be imported: {type(error).__name__}: {error}") from error
    return module
