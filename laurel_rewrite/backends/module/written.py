"""The classes of a `modeling_laurel.py` that was written before, which runs when it is imported."""

from __future__ import annotations

import importlib.util
import sys
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType

from torch import nn

from laurel_rewrite.backends.module.functions import Written, adopt
from laurel_rewrite.errors import FOREIGN, CaptureError, ConfigError, nearest
from laurel_rewrite.files.checked import shown


def imported(path: Path) -> ModuleType:
    """The module of a file.

    Raises:
        CaptureError: it raises.
    """
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


def check_owners(model: nn.Module, owners: Iterable[str], label: str) -> None:
    """Raise ConfigError where the model has no module of one of these paths."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for owner in owners:
        if owner not in modules:
            raise ConfigError(f"{label} names the module {shown(owner)}, which the model does not have. {nearest(owner, modules)}")


def classes_of(
    module: ModuleType, model: nn.Module, owners: Iterable[str], names: Mapping[str, str], text: str, label: str
) -> dict[str, type]:
    """The class of each owner, made to look like the class that it replaces.

    Args:
        module: of the file.
        model: whose modules are the owners.
        owners: of the plan's sites.
        names: the owners' classes in the module.
        text: of the file, by which models of these classes pickle.
        label: of the file, for messages.

    Raises:
        ConfigError: an owner has no class there.
    """
    without = next((owner for owner in owners if owner not in names), None)
    if without is not None:
        raise ConfigError(f"{label}: no class is named for {without or 'the model'}, so that its connections would not be called.")
    classes: dict[str, type] = {}
    for owner, name in names.items():
        base = type(model.get_submodule(owner))
        cls = getattr(module, name, None)
        if not isinstance(cls, type) or not issubclass(cls, base):
            raise ConfigError(f"{label} has no class {name} made from {base.__name__}, which {owner or 'the model'} needs.")
        classes[owner] = adopt(cls, Written(base, text, name))
    return classes
