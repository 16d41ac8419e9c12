"""MODEL on the command line: a file, an importable factory, or the name of an architecture in transformers, timm or torchvision."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from laurel_rewrite.errors import FOREIGN, CaptureError, ConfigError, MissingPackageError, nearest
from laurel_rewrite.sources.inputs import call_inputs

FACTORIES = ("build_model", "get_model", "model")
_ZOO = {"hf": "transformers", "timm": "timm", "torchvision": "torchvision"}
_stubs: list[Any] = []


@dataclass
class Built:
    """A model with inputs of its forward.

    Attributes:
        spec: the MODEL it was built from.
        settings: what was set with `--set`.
        files: source files beside the model's own that its classes need, by path relative to the model's folder.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    spec: str
    settings: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Number of parameters of the model."""
        return sum(p.numel() for p in self.model.parameters())


def build(spec: str, settings: Mapping[str, Any] | None = None, *, device: str = "cpu", batch: int = 2, offered: bool = False) -> Built:
    """Build the model that a MODEL names, with random weights, in train mode.

    Args:
        spec: `model.py`, `model.py:factory`, `package.module:factory`, `hf:NAME`, `timm:NAME` or `torchvision:NAME`.
        settings: keyword arguments of the factory, or fields of the architecture's configuration.
        device: "meta" builds without memory; a file's own code decides for itself.
        batch: batch size of the inputs of named architectures.
        offered: the spec was read from a file, so `package.module:factory` is imported and called only where that module is written for
            us: it has `example_inputs`, and the factory is its own.

    Raises:
        ConfigError: there is no such file, factory or name.
        CaptureError: the factory or its example inputs raise.
        MissingPackageError: the package of the prefix is not installed.
    """
    given = dict(settings or {})
    prefix, _, name = spec.partition(":")
    if prefix in _ZOO and name:
        maker = {"hf": _hugging_face, "timm": _timm, "torchvision": _torchvision}[prefix]
        require(_ZOO[prefix])
        return maker(name, given, device, batch)
    path, _, factory = spec.rpartition(":") if ":" in spec[2:] else (spec, "", "")
    with _undisturbed():
        return _from_code(path, factory, given, spec, offered=offered)


def _from_code(path: str, factory: str, given: dict[str, Any], spec: str, *, offered: bool) -> Built:
    if path.endswith(".py"):
        module, files = _load_file(Path(path))
    elif factory:
        if offered:
            check_offered(spec)
        module, files = _load_package(path), {}
    elif Path(spec).suffix:
        raise ConfigError(f"{spec}: a model is a .py file, package.module:factory, or hf:, timm: or torchvision: and a name.")
    else:
        raise ConfigError(
            f"{spec!r} is no model: there is no such file. Give model.py, package.module:factory, hf:NAME, timm:NAME or torchvision:NAME."
        )
    return _from_module(module, factory, given, spec, files)


def require_file(path: Path) -> None:
    """Raise ConfigError unless there is this file; the message lists the nearest of its kind."""
    try:
        if path.is_file():
            return
        if path.is_dir():
            raise ConfigError(f"{path} is a directory, not a file.")
        folder = path.parent if path.parent.is_dir() else Path()
        near = nearest(path.name, (p.name for p in folder.glob("*") if p.suffix == path.suffix and p.is_file()))
    except OSError as error:
        raise ConfigError(f"The file {str(path)[:80]}... cannot be read: {error.strerror}.") from error
    raise ConfigError(f"There is no file {path}. {near}")


def parse_settings(pairs: Iterable[str]) -> dict[str, Any]:
    """`["n_layer=2", "name=x"]` as `{"n_layer": 2, "name": "x"}`: Python literals, else text."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, sign, text = pair.partition("=")
        if not sign or not key.isidentifier():
            raise ConfigError(f"--set takes NAME=VALUE, not {pair!r}.")
        try:
            settings[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):  # as ast raises for what is no literal, or nested too deep
            settings[key] = text
        try:
            json.dumps(settings[key], allow_nan=False)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"--set {key}: {error}, so that the configuration could not be saved.") from error
    return settings


# Files and packages


@contextmanager
def _undisturbed() -> Iterator[None]:
    """The working directory and the default device as they are, whatever a model's code sets; its default dtype is its own affair.

    A default device moves every tensor that anybody makes afterwards, ours included, and an output folder is meant from where the user is.
    """
    folder, device = os.getcwd(), torch.get_default_device()
    try:
        yield
    finally:
        os.chdir(folder)
        if torch.get_default_device() != device:
            torch.set_default_device(None if device.type == "cpu" else device)


def is_installed(name: str, file: str | None) -> bool:
    """Whether a module is Python's or an installed package's, not a file of the user's."""
    return name in sys.stdlib_module_names or file is None or "site-packages" in file or "dist-packages" in file


def _load_file(path: Path) -> tuple[ModuleType, dict[str, Path]]:
    require_file(path)
    path, shown = path.resolve(), path
    folder, name = path.parent, path.stem
    before = set(sys.modules)
    present = sys.modules.get(name)
    if present is not None and getattr(present, "__file__", None) != str(path):
        other = getattr(present, "__file__", None)
        if is_installed(name, other):
            raise ConfigError(
                f"{shown}: {name!r} is the name of a module that is imported already ({other or 'built in'}); rename the file."
            )
        del sys.modules[name]  # another model file of this name
    sys.path.insert(0, str(folder))
    try:
        module = importlib.import_module(name)
    except FOREIGN as error:  # whatever the user's code raises
        raise CaptureError(f"{shown} could not be imported: {type(error).__name__}: {error}") from error
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))
    if Path(module.__file__ or "").resolve() != path:
        raise ConfigError(f"{shown}: Python finds another module under the name {name!r} ({module.__file__}); rename the file.")
    files = {path.name: path}
    for other in set(sys.modules) - before:
        file = getattr(sys.modules.get(other), "__file__", None)
        if file and Path(file).is_relative_to(folder) and "site-packages" not in file:
            files[str(Path(file).relative_to(folder))] = Path(file)
    return module, files


def check_offered(spec: str) -> None:
    """Raise ConfigError unless the source of "package.module:factory" defines `example_inputs`, as one that is written for us, and the
    factory itself: only such a function is called because a saved folder names it."""
    name, _, factory = spec.rpartition(":")
    if not name:
        raise ConfigError(f'{spec!r} is no factory: say "package.module:function".')
    sys.path.insert(0, "")
    try:
        found = importlib.util.find_spec(name)
        tree = (
            ast.parse(Path(found.origin).read_bytes()) if found is not None and found.origin and found.has_location else ast.Module([], [])
        )
    except FOREIGN as error:  # a package above it is imported
        raise ConfigError(f"{spec}: there is no module {name} to import: {type(error).__name__}: {error}") from error
    finally:
        if "" in sys.path:
            sys.path.remove("")
    own = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {t.id for node in tree.body if isinstance(node, ast.Assign) for t in node.targets if isinstance(t, ast.Name)}
    if not {"example_inputs", factory} <= own:
        raise ConfigError(f"{spec}: {name} does not define both {factory} and example_inputs, so that it is not called for a saved folder.")


def _load_package(name: str) -> ModuleType:
    sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"There is no module {error.name!r} to import for {name}.") from error
    except FOREIGN as error:  # whatever the user's code raises
        raise CaptureError(f"{name} could not be imported: {type(error).__name__}: {error}") from error
    finally:
        if "" in sys.path:
            sys.path.remove("")


def _from_module(module: ModuleType, factory: str, settings: dict[str, Any], spec: str, files: dict[str, Path]) -> Built:
    names = (factory,) if factory else FACTORIES
    found = next((name for name in names if hasattr(module, name)), None)
    if found is None:
        offered = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        raise ConfigError(
            f"{spec} has no {' or '.join(f'{name}()' if name != 'model' else name for name in names)}. "
            + (
                f"It defines {', '.join(offered)}; name one as {module.__name__}.py:FACTORY."
                if offered
                else "It defines no function or class."
            )
        )
    thing = getattr(module, found)
    model = thing if isinstance(thing, nn.Module) else _call(thing, settings, f"{spec}: {found}")
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{spec}: {found} gave {type(model).__name__}, not a torch.nn.Module.")
    examples = getattr(module, "example_inputs", None)
    if examples is None:
        raise ConfigError(
            f"{spec} has no example_inputs(): a function that returns a tuple, or a dict of keyword arguments, for the model's forward."
        )
    inputs = _call(examples, {}, f"{spec}: example_inputs") if callable(examples) else examples
    args, kwargs = call_inputs(inputs)
    return Built(model.train(), args, kwargs, spec, settings, files)


def _call(function: Callable[..., Any], settings: Mapping[str, Any], label: str) -> Any:
    try:
        signature = inspect.signature(function)
        signature.bind(**settings)
    except (TypeError, ValueError) as error:  # ValueError of callables that have none
        known = list(signature.parameters) if isinstance(error, TypeError) and "signature" in locals() else []
        raise ConfigError(
            f"{label}: {error}; it must be callable without arguments, or with those given by --set. {_near_argument(error, known)}".rstrip()
        ) from error
    try:
        return function(**settings)
    except FOREIGN as error:  # whatever the user's code raises
        if isinstance(error, TypeError) and any(f"unexpected keyword argument {name!r}" in str(error) for name in settings):
            raise _unbuilt(label, settings, error) from error  # which the function passed on
        raise CaptureError(f"{label}() raised {type(error).__name__}: {error}") from error


def _near_argument(error: BaseException, known: Iterable[str]) -> str:
    """The argument names nearest to the one that a call complains of; "" where it complains of something else."""
    found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    return nearest(found[1], known) if found else ""


# Libraries


def require(package: str) -> None:
    """Raise MissingPackageError unless a package is installed; torchvision's import is made ready."""
    if importlib.util.find_spec(package) is None:
        raise MissingPackageError(f'This needs {package}: pip install "laurel-rewrite[zoo]" or pip install {package}.')
    if importlib.util.find_spec("torchvision") is not None:
        declare_torchvision_ops()


def declare_torchvision_ops() -> None:
    """Let torchvision be imported beside a PyTorch that it has no compiled ops for, by declaring the two ops that its import wants."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch types it not
        for op in ("nms", "qnms"):
            library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _stubs.append(library)
        importlib.import_module("torchvision")
    except ImportError as error:
        raise MissingPackageError(f"torchvision is installed but cannot be imported: {error}") from error


def _make(build: Callable[[], Any], device: str) -> Any:
    """What `build` makes, on a device."""
    if device == "cpu":
        return build()
    try:
        with torch.device(device):
            return build()
    except NotImplementedError:  # some compute their sizes with tensors, as RegNet does, and the meta device has no values to read
        return build().to(device)


def _unbuilt(label: str, settings: Mapping[str, Any], error: Exception) -> ConfigError | CaptureError:
    """What to raise where a library does not build an architecture: with settings, it is these that cannot be meant."""
    if not settings:
        return CaptureError(f"{label} could not be built: {type(error).__name__}: {error}")
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    refused = re.match(r"(\w+)\.__init__\(\)", str(error))
    cls = {**frame.f_globals, **frame.f_locals}.get(refused[1]) if refused else None
    cls = cls or next((v for v in frame.f_locals.values() if refused and isinstance(v, type) and v.__name__ == refused[1]), None)
    known = inspect.signature(cls).parameters if isinstance(cls, type) else ()
    return ConfigError(f"{label}: {error}. {_near_argument(error, known)}".rstrip())


def _timm(name: str, settings: dict[str, Any], device: str, batch: int) -> Built:
    import timm

    if not timm.is_model(name):
        raise ConfigError(f"timm has no model {name!r}. {nearest(name, timm.list_models())}")
    try:
        model = _make(lambda: timm.create_model(name, **settings), device)
    except Exception as error:  # a library of models may raise anything for a value that it does not expect
        raise _unbuilt(f"timm:{name}", settings, error) from error
    size = settings.get("img_size") or model.default_cfg.get("input_size", (3, 224, 224))[1:]
    height, width = (size, size) if isinstance(size, int) else size
    channels = settings.get("in_chans", 3)
    image = torch.randn(batch, channels, height, width, device=device)
    return Built(model.train(), (image,), {}, f"timm:{name}", settings)


def _torchvision(name: str, settings: dict[str, Any], device: str, batch: int) -> Built:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise ConfigError(f"torchvision has no classification model {name!r}. {nearest(name, known)}")
    try:
        model = _make(lambda: models.get_model(name, weights=None, **settings), device)
    except Exception as error:  # a library of models may raise anything for a value that it does not expect
        raise _unbuilt(f"torchvision:{name}", settings, error) from error
    crop = models.get_model_weights(name).DEFAULT.transforms.keywords.get("crop_size", 224)
    size = crop[0] if isinstance(crop, list | tuple) else crop
    return Built(model.train(), (torch.randn(batch, 3, size, size, device=device),), {}, f"torchvision:{name}", settings)


def _hugging_face(name: str, settings: dict[str, Any], device: str, batch: int) -> Built:
    import transformers

    known = list(transformers.CONFIG_MAPPING.keys())
    if name not in known:
        raise ConfigError(f"transformers has no architecture {name!r}; names are model types, as in a config.json. {nearest(name, known)}")
    config_class = transformers.CONFIG_MAPPING[name]
    plain = config_class()
    unknown = [key for key in settings if not hasattr(plain, key)]
    if unknown:
        fields = [*plain.to_dict(), *config_class.attribute_map]
        raise ConfigError(f"hf:{name}: the configuration has no field {unknown[0]!r}. {nearest(unknown[0], fields)}")
    try:
        config = config_class(**settings)
    except Exception as error:  # a library of configurations may raise anything for a value that it does not expect
        raise ConfigError(f"hf:{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    # What the architecture is pre-trained as, else its bare model.
    autos = ("AutoModelForPreTraining", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModel")
    auto = next((a for a in (getattr(transformers, n) for n in autos) if type(config) in a._model_mapping), None)
    if auto is None:
        raise ConfigError(f"hf:{name}: transformers has no model class for this configuration.")
    try:
        model = _make(lambda: auto.from_config(config), device)
    except Exception as error:  # a library of models may raise anything
        raise CaptureError(f"hf:{name} could not be built from its configuration: {type(error).__name__}: {error}") from error
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else tuple(size)[:2]
        image = torch.randn(batch, getattr(config, "num_channels", 3), height, width, device=device)
        return Built(model.train(), (), {"pixel_values": image}, f"hf:{name}", settings)
    vocabulary = min(getattr(config, "vocab_size", 100), 1000)
    ids = torch.randint(3, max(vocabulary, 4), (batch, 17), generator=torch.Generator().manual_seed(0)).to(device)
    kwargs = {"input_ids": ids}
    if getattr(config, "is_encoder_decoder", False):
        kwargs["decoder_input_ids"] = ids.clone()
    return Built(model.train(), (), kwargs, f"hf:{name}", settings)
