"""What a folder that `save` wrote says, checked before anything of it is built: its configuration, its digests, its weights, its modules."""

from __future__ import annotations

import importlib.machinery
import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from laurel_rewrite.errors import ConfigError
from laurel_rewrite.files.checked import INNER_NAME, anything, checked, list_of, mapping, optional, read_json, shown, text, whole
from laurel_rewrite.files.manifest import MANIFEST, Manifest
from laurel_rewrite.plan import MOST_SEED, Plan
from laurel_rewrite.sources.code import is_installed

MODELING, WEIGHTS, PLAN, CONFIG = "modeling_laurel.py", "model.safetensors", "plan.toml", "laurel_config.json"
_log = logging.getLogger(__name__)

_TEXTS = ("laurel_rewrite", "torch", "python", "transformers", "timm", "torchvision")
_CLASS = text(r"[\w.]+:[\w.<>]+", "module:class")
_FILES = list_of(INNER_NAME, most=10_000)
_CONFIG = {
    **{name: optional(text(), "") for name in _TEXTS},
    "seed": optional(whole(0, MOST_SEED), 0),
    "class": optional(_CLASS, ""),
    "model": anything(dict),
    "classes": mapping(text(), text(r"\w+", "the name of a class")),
    "operators": optional(mapping(text(), text()), {}),
}
_RECIPES = {
    "spec": {"spec": text(), "settings": mapping(text(r"\w+", "a name"), anything(object))},
    "transformers": {"class": _CLASS, "config": _CLASS, "attention": optional(text(r"\w*", "the name of an implementation"), "")},
    "skeleton": {},
    "graph": {},
}


def read_config(folder: Path) -> dict[str, Any]:
    """`laurel_config.json`; ConfigError where a value is of another type, or names a file outside the folder."""
    label = str(folder / CONFIG)
    config = checked(read_json(folder / CONFIG, "The configuration"), _CONFIG, label)
    kind = config["model"].get("kind")
    if not isinstance(kind, str) or kind not in _RECIPES:
        raise ConfigError(f"{label} names an unknown kind of model: {shown(kind)}.")
    recipe = {"kind": text(), "files": optional(_FILES, []), **_RECIPES[kind]}
    config["model"] = checked(config["model"], recipe, f"{label}, model")
    for name in config["model"]["files"]:
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"{label} names the file {shown(name)}, which lies outside the folder.")
        if not (folder / name).is_file():
            raise ConfigError(f"{folder} is incomplete: {name} cannot be read (no such file).")
    for file in config["operators"].values():
        if file not in config["model"]["files"]:
            raise ConfigError(f"{label} names the operator file {shown(file)}, which is none of its files.")
    return config


def check_whole(folder: Path, names: Sequence[str]) -> None:
    """Raise ConfigError where files are not those that were written together. Source and plan may be edited: that is logged."""
    manifest = Manifest.read(folder)
    if manifest is None:
        _log.info("%s has no %s, so that nothing says whether its files belong together", folder, MANIFEST)
        return
    for name in (n for n in dict.fromkeys([*names, MODELING, PLAN]) if (folder / n).exists()):
        if manifest.holds(folder, name):
            continue
        if name.endswith(".py") or name == PLAN:
            _log.warning("%s was edited after it was written; it is loaded as it is", folder / name)
        else:
            raise ConfigError(
                f"{folder / name} is not the file that was written with the others: copied from elsewhere, or damaged. "
                f"Write the folder again; if the change is meant, remove {MANIFEST}."
            )


def check_size(plan: Plan, weights: Path) -> None:
    """Raise ConfigError where the plan has more parameters than the weights have bytes, before memory is taken for them."""
    if plan.parameters() > weights.stat().st_size:
        raise ConfigError(f"{weights} does not fit the plan, which has {plan.parameters()} parameters in LAuReL modules alone.")


def load_weights(model: nn.Module, path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_model

    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    try:
        with safe_open(str(path), "pt") as file:
            for key in file.keys():  # noqa: SIM118  # not a dict
                tensor = own.get(key)
                given = file.get_slice(key)
                wanted = _DTYPES.get(given.get_dtype())
                if tensor is None or list(given.get_shape()) != list(tensor.shape):
                    continue  # load_model says all of them
                if wanted is None and tensor.dtype.is_floating_point:
                    raise ConfigError(f"{path}: {key} is of type {given.get_dtype()}, and the model's of {tensor.dtype}.")
                if wanted is not None and (tensor.dtype != wanted or not tensor.is_contiguous()):
                    tensor.data = torch.empty(tensor.shape, dtype=wanted, device=tensor.device)
        load_model(model, str(path))
    except RuntimeError as error:
        raise ConfigError(f"{path} does not fit the model: {str(error)[:600]}") from error
    except ConfigError:
        raise
    except Exception as error:  # safetensors', whose exception has no public base class, and the file system's
        raise ConfigError(f"{path} could not be read as safetensors: {type(error).__name__}: {str(error)[:300]}") from error


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class importable:
    """The named files of a folder can be imported for a while, before others of their names, and nothing else in the folder can."""

    def __init__(self, folder: Path, files: Iterable[str]) -> None:
        self.folder = str(folder.resolve())
        self.own = {Path(name).parts[0].removesuffix(".py") for name in files if name.endswith(".py")}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """As a finder of `sys.meta_path`."""
        return importlib.machinery.PathFinder.find_spec(name, [self.folder]) if path is None and name in self.own else None

    def __enter__(self) -> None:
        self.hidden = {n: m for n, m in sys.modules.items() if n.partition(".")[0] in self.own}
        for name, module in self.hidden.items():
            if is_installed(name.partition(".")[0], getattr(module, "__file__", None)):
                raise ConfigError(f"{self.folder} has a file of the name {name!r}, which is an installed module's; rename it.")
        for name in self.hidden:
            del sys.modules[name]
        sys.meta_path.insert(0, self)

    def __exit__(self, *_: Any) -> None:
        sys.meta_path.remove(self)
        sys.modules.update(self.hidden)
