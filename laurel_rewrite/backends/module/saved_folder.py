"""What a folder that `save` wrote says, checked before anything of it is built: its configuration, its digests, its weights, its modules."""

from __future__ import annotations

import importlib.machinery
import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from laurel_rewrite.backends.module.replay import check_edits
from laurel_rewrite.errors import ConfigError
from laurel_rewrite.files.checked import INNER_NAME, anything, checked, list_of, mapping, one_of, optional, read_json, shown, text, whole
from laurel_rewrite.files.manifest import MANIFEST, Manifest
from laurel_rewrite.plan import MOST_SEED, Plan
from laurel_rewrite.sources.code import is_installed

MODELING, WEIGHTS, PLAN, CONFIG = "modeling_laurel.py", "model.safetensors", "plan.toml", "laurel_config.json"
OPERATORS = "operators"
"""Folder of the files that operators were loaded from."""
OPERATOR_WEIGHTS = "laurel.safetensors"
KEPT = {"all": WEIGHTS, "operators": OPERATOR_WEIGHTS, "none": ""}
"""Which weights a folder may have, and the file that holds them."""
FORMAT = 2
"""Of the configuration; 1 had no such number, no edits, and all weights."""
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
    "format": optional(one_of(1, FORMAT), 1),
    "weights": optional(one_of(*KEPT), "all"),
    "edits": optional(anything(object), None),
    "factors": optional(mapping(text(), mapping(text(), anything(float))), {}),
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
    if config["edits"] is not None:
        check_edits(config["edits"], f"{label}, edits")
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


def is_edited(folder: Path, name: str) -> bool:
    """Whether a file is another than was written with the rest; also where nothing says so."""
    manifest = Manifest.read(folder)
    return manifest is None or not manifest.holds(folder, name)


def check_size(plan: Plan, weights: Path) -> None:
    """Raise ConfigError where the plan has more parameters than the weights have bytes, before memory is taken for them."""
    if weights.is_file() and plan.parameters() > weights.stat().st_size:
        raise ConfigError(f"{weights} does not fit the plan, which has {plan.parameters()} parameters in its connections alone.")


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
