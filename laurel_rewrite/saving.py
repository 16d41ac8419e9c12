"""`laurel_out/`: source a person can read, weights, plan and configuration; and back, without tracing."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import io
import json
import platform
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import fx, nn

from laurel_rewrite import __version__, models
from laurel_rewrite.drafts import replacing
from laurel_rewrite.errors import CaptureError, ConfigError
from laurel_rewrite.functions import BASE, unheard
from laurel_rewrite.modeling import module_text
from laurel_rewrite.models import Built
from laurel_rewrite.plan import Plan
from laurel_rewrite.surgery import RECORD, Rewriting, install, rewriting_of

MODELING, WEIGHTS, PLAN, CONFIG, SKELETON = "modeling_laurel.py", "model.safetensors", "plan.toml", "laurel_config.json", "skeleton.pt"
GRAPH = "model.pt"
BASE_CONFIG = "base_config.json"
_ORIGIN = "_laurel_origin"

_HEADER = '''"""{name} with LAuReL, written by laurel-rewrite {version}.

Each class below is its base class with the sums of its residual connections replaced by calls of LAuReL modules; everything else is
the original's own text. `laurel_rewrite.load(folder)` builds the model from it. Edit it as you like: this file is what is loaded.
"""

'''


def save(model: nn.Module, folder: Path | str, *, built: Built | None = None) -> Path:
    """Write a rewritten model so that `load` can build it anywhere.

    Args:
        model: what `rewrite` or `load` returned.
        folder: is created; files of these names in it are replaced.
        built: how the base model was built, where it is known: then `load` builds it so, from its configuration. Without it, a
            transformers model is built from its own configuration, and any other from a pickle of its modules without weights
            (`skeleton.pt`), for which its classes must be importable where it is loaded.

    Returns:
        The folder, with `modeling_laurel.py`, `model.safetensors`, `plan.toml` and `laurel_config.json`.

    Raises:
        ConfigError: the model was not rewritten, or its weights are on the meta device, or the folder cannot be written.
        RewriteError: a class of the model cannot be imported again.
    """
    from safetensors.torch import save_model

    if isinstance(model, fx.GraphModule):
        raise ConfigError("A rewritten graph has no classes to save. Save the graph with torch.export, or rewrite the module it came from.")
    record = rewriting_of(model)
    if any(p.is_meta for p in model.parameters()):
        raise ConfigError("The model is on the meta device and has no weights to save.")
    text, names = source_of(record, type(model).__name__)
    folder = Path(folder)
    with replacing(folder) as draft:
        (draft / MODELING).write_text(text)
        (draft / PLAN).write_text(record.plan.to_toml())
        save_model(model, str(draft / WEIGHTS))
        origin = getattr(model, _ORIGIN, None) if built is None else _origin(built)
        if origin is None:
            origin = _own_origin(model)
        for name, content in origin.files.items():
            target = draft / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        config = {
            **_versions(),
            "seed": record.plan.seed,
            "class": _name(type(model)),
            "model": {**origin.recipe, "files": sorted(origin.files)},
            "classes": names,
        }
        for package in ("transformers", "timm", "torchvision"):
            if package in sys.modules:
                config[package] = getattr(sys.modules[package], "__version__", "unknown")
        (draft / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return folder


def save_graph(module: fx.GraphModule, folder: Path, plan: Plan) -> None:
    """Write a rewritten graph module, pickled, so that `load` finds it; the packages of its modules must be installed there."""
    torch.save(module, folder / GRAPH)
    (folder / PLAN).write_text(plan.to_toml())
    config = {**_versions(), "seed": plan.seed, "class": _name(type(module)), "model": {"kind": "graph", "files": [GRAPH]}, "classes": {}}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


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
        ConfigError: the folder is none of ours, a file is missing, or weights and plan do not fit.
    """
    folder = Path(folder)
    if (folder / CONFIG).is_file() and (folder / GRAPH).is_file() and not (folder / MODELING).is_file():
        return _load_graph(folder, device)
    missing = [name for name in (MODELING, PLAN, CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise ConfigError(f"{folder} is not a folder written by laurel-rewrite: {missing[0]} is missing.")
    try:
        config = json.loads((folder / CONFIG).read_text())
        plan = Plan.read(folder / PLAN)
        recipe, names = config["model"], config["classes"]
        origin = Origin(recipe, {name: (folder / name).read_bytes() for name in recipe["files"]})
    except OSError as error:
        raise ConfigError(f"{folder} is incomplete: {error.filename} cannot be read ({error.strerror}).") from error
    except (json.JSONDecodeError, KeyError) as error:
        raise ConfigError(f"{folder / CONFIG} is damaged: {type(error).__name__}: {error}") from error
    meta = device is not None and torch.device(device).type == "meta"
    with _importable(folder):
        model = _base(folder, recipe, meta=meta)
        with unheard({type(model.get_submodule(owner)) for owner in names}):
            module = _import_modeling(folder)
    classes: dict[str, type] = {}
    for owner, name in names.items():
        base = type(model.get_submodule(owner))
        cls = getattr(module, name, None)
        if cls is None or not issubclass(cls, base):
            raise ConfigError(f"{folder / MODELING} has no class {name} made from {base.__name__}, which {owner or 'the model'} needs.")
        cls.__name__, cls.__qualname__, cls.__module__ = base.__name__, base.__qualname__, base.__module__
        setattr(cls, BASE, base)
        classes[owner] = cls
    install(model, plan, classes)
    setattr(model, RECORD, Rewriting(plan, {}, (folder / MODELING).read_text(), names))
    setattr(model, _ORIGIN, origin)
    model.train()
    if meta:
        return model.to("meta")
    _load_weights(model, folder / WEIGHTS)
    return model if device is None else model.to(device)


def _load_graph(folder: Path, device: torch.device | str | None) -> nn.Module:
    from laurel_rewrite.emit_torch import onnx2torch

    onnx2torch()  # whose modules were pickled
    try:
        model: nn.Module = torch.load(folder / GRAPH, map_location=device, weights_only=False)
    except Exception as error:  # unpickling raises whatever the modules raise
        raise CaptureError(f"{folder / GRAPH} could not be loaded: {type(error).__name__}: {error}") from error
    return model.train()


def _load_weights(model: nn.Module, path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_model

    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    with safe_open(str(path), "pt") as file:
        for key in file.keys():  # noqa: SIM118  # not a dict
            tensor = own.get(key)
            dtype = file.get_slice(key).get_dtype()
            wanted = _DTYPES.get(dtype)
            if tensor is not None and wanted is not None and (tensor.dtype != wanted or not tensor.is_contiguous()):
                tensor.data = torch.empty(tensor.shape, dtype=wanted, device=tensor.device)
    try:
        load_model(model, str(path))
    except RuntimeError as error:
        raise ConfigError(f"{path} does not fit the model: {str(error)[:600]}") from error


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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
    config = getattr(model, "config", None)
    if "transformers" in sys.modules and isinstance(model, sys.modules["transformers"].PreTrainedModel) and config is not None:
        base = vars(type(model)).get(BASE, type(model))
        recipe = {"kind": "transformers", "class": _name(base), "config": _name(type(config))}
        return Origin(recipe, {BASE_CONFIG: config.to_json_string(use_diff=False).encode()})
    buffer = io.BytesIO()
    try:
        torch.save(_skeleton(model), buffer)
    except Exception as error:  # pickle raises whatever an attribute of the model raises
        raise ConfigError(
            f"{type(model).__name__} cannot be saved without knowing how it is built: pickling its modules failed ({error}). "
            "Build it in a file with build_model() and use the command, which saves that file."
        ) from error
    return Origin({"kind": "skeleton"}, {SKELETON: buffer.getvalue()})


def _skeleton(model: nn.Module) -> nn.Module:
    """A copy of the base model whose parameters hold one element each."""
    from laurel_rewrite.surgery import remove

    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = (
            torch.zeros(1, dtype=parameter.dtype).expand(parameter.numel()).view(parameter.shape)
            if parameter.numel()
            else parameter.detach()
        )
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    return remove(copy.deepcopy(model, memo), inplace=True)


def _base(folder: Path, origin: Mapping[str, Any], *, meta: bool) -> nn.Module:
    kind = origin.get("kind")
    if kind == "spec":
        spec = origin["spec"]
        path = str(folder / spec) if ".py" in spec else spec
        return models.build(path, origin["settings"], device="meta" if meta else "cpu").model
    if kind == "transformers":
        config_class, cls = _named(origin["config"]), _named(origin["class"])
        config = config_class.from_dict(json.loads((folder / BASE_CONFIG).read_text()))
        with torch.device("meta") if meta else nullcontext():
            return cls._from_config(config)  # type: ignore[no-any-return]  # a PreTrainedModel
    if kind == "skeleton":
        model = torch.load(folder / SKELETON, weights_only=False)
        return model  # type: ignore[no-any-return]  # what was saved
    raise ConfigError(f"{folder / CONFIG} names an unknown kind of model: {kind!r}.")


def _name(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _named(name: str) -> Any:
    module, _, attribute = name.partition(":")
    thing: Any = importlib.import_module(module)
    for part in attribute.split("."):
        thing = getattr(thing, part)
    return thing


class _importable:
    """The folder's own modules first, without replacing what is imported already under their names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()

    def __enter__(self) -> None:
        sys.path.insert(0, str(self.folder))
        own = {p.stem for p in self.folder.glob("*.py")} | {p.name for p in self.folder.iterdir() if p.is_dir()}
        self.hidden = {n: m for n, m in sys.modules.items() if n.partition(".")[0] in own}
        for name in self.hidden:
            del sys.modules[name]

    def __exit__(self, *_: Any) -> None:
        sys.path.remove(str(self.folder))
        sys.modules.update(self.hidden)


def _import_modeling(folder: Path) -> ModuleType:
    path = folder / MODELING
    name = f"modeling_laurel_{abs(hash(str(path.resolve()))):x}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever an edited file raises
        del sys.modules[name]
        raise CaptureError(f"{path} could not be imported: {type(error).__name__}: {error}") from error
    return module
