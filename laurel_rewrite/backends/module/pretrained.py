"""Models of transformers: the configuration carries the plan, so that `save_pretrained` and `from_pretrained` keep LAuReL.

A rewritten model, and the PreTrainedModels inside it that hold all of its sites, get a class whose `__init__` puts the configuration's
operators in, and their configuration a class that writes the plan. In `config.json` the type of the model is "laurel": transformers
alone refuses it, and does not return the model without LAuReL. The Auto classes know it where this module was imported; elsewhere
`auto_map` leads to the folder's `modeling_laurel.py`, with `trust_remote_code=True`.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import sys
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from laurel_rewrite import __version__
from laurel_rewrite.backends.module.functions import BASE, RECIPE, made_quietly, name_of
from laurel_rewrite.backends.module.modeling import source_of
from laurel_rewrite.backends.module.replay import check_edits
from laurel_rewrite.backends.module.saved_folder import MODELING, OPERATORS
from laurel_rewrite.backends.module.surgery import Rewriting, hosts, install, keep_record, original_class, rewriting_of
from laurel_rewrite.backends.module.written import check_owners, classes_of
from laurel_rewrite.errors import FOREIGN, CaptureError, ConfigError, RewriteError
from laurel_rewrite.files.checked import INNER_NAME, anything, checked, mapping, one_of, optional, read_json, read_text, text
from laurel_rewrite.operators import registry
from laurel_rewrite.operators.connections import MIXING, param_groups, sites_of
from laurel_rewrite.operators.starting import not_started, put_start
from laurel_rewrite.plan import Plan
from laurel_rewrite.private import attention_of, built_from, models_of_configurations, name_or_path
from laurel_rewrite.sources.built import require

require("transformers")
import transformers  # noqa: E402  # only now is its import of torchvision ready
from transformers.models.auto import modeling_auto  # noqa: E402

TYPE = "laurel"
"""The model type in `config.json`, and the attribute of a configuration that says what was done."""
CONFIGURATION, PRETRAINED = transformers.PreTrainedConfig, transformers.PreTrainedModel
BASE_CONFIG, GENERATION = "base_config.json", "generation_config.json"
_PREFIX = "Laurel"
_GUARD = "without_laurel"
"""Key of a table in `config.json` that a configuration class of the base's type takes for its own, and fails at: it has a value for a
property that cannot be set. Nothing else looks at it."""
_REFUSAL = (
    "The residual connections of this model were rewritten by laurel-rewrite. Import laurel_rewrite.integrations.transformers and load it "
    "with an Auto class, or give trust_remote_code=True."
)
_VERSION = 1
_DATA = {
    "version": one_of(_VERSION),
    "laurel_rewrite": optional(text(), ""),
    "base_type": text(r"[\w.-]+", "a model type"),
    "plan": anything(dict),
    "edits": anything(object),
    "classes": optional(mapping(text(), text(r"\w+", "the name of a class")), {}),
    "source": optional(text(r"[0-9a-f]*", "a digest"), ""),
    "operators": optional(mapping(text(), INNER_NAME), {}),
}
_TAIL = """

# Where transformers looks for the classes that config.json names.
from laurel_rewrite.integrations.transformers import classes_beside as _classes_beside  # noqa: E402

__getattr__ = _classes_beside(globals())
"""


# Configurations


class _Rewritten:
    """Of a configuration: its attribute `laurel` is what was done to the model. In memory it is as its base is, type included."""

    _auto_class = None

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing: which code it needs is in the file already."""

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> Any:
        data, rest = super().get_config_dict(*args, **kwargs)  # type: ignore[misc]  # of PreTrainedConfig
        return _as_base(data), rest

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        return super().from_dict(_as_base(config_dict), **kwargs)  # type: ignore[misc]

    def to_json_string(self, use_diff: bool = True) -> str:
        data = {**json.loads(super().to_json_string(use_diff)), "model_type": TYPE}  # type: ignore[misc]
        data[_GUARD] = {"model_type": data[TYPE]["base_type"], "use_return_dict": _REFUSAL}
        data.pop("auto_map", None)
        if data[TYPE]["source"]:
            data["auto_map"] = _auto_map(_base_of(type(self)))
        return json.dumps(data, indent=2, sort_keys=True) + "\n"


class _Any(transformers.PreTrainedConfig):  # type: ignore[no-untyped-call]  # a hook of its own
    """What the type "laurel" stands for: the configuration of whichever architecture was rewritten."""

    model_type = TYPE

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        kind = _checked(config_dict.get(TYPE), _label(config_dict))["base_type"]
        if kind not in transformers.CONFIG_MAPPING:
            raise ConfigError(
                f"{_label(config_dict)}: transformers knows no model of type {kind!r}. Register its classes first (AutoConfig.register)."
            )
        return config_class(transformers.CONFIG_MAPPING[kind]).from_dict(config_dict, **kwargs)


def _label(data: Mapping[str, Any]) -> str:
    return f"{data.get('_name_or_path') or 'config.json'}, {TYPE!r}"


def _checked(data: Any, label: str) -> dict[str, Any]:
    """What a configuration says was done; ConfigError where it cannot have been."""
    found = checked(data, _DATA, label)
    if found["edits"] is not None:
        check_edits(found["edits"], f"{label}, edits")
    return found


def _as_base(data: Mapping[str, Any]) -> dict[str, Any]:
    """What a file of ours holds, as the base's configuration would write it, and `laurel`."""
    if data.get("model_type") != TYPE:
        return dict(data)
    return {
        **{key: value for key, value in data.items() if key != _GUARD},
        "model_type": _checked(data.get(TYPE), _label(data))["base_type"],
    }


def _base_of(cls: type) -> Any:
    return vars(cls).get(BASE, cls)


_configs: dict[type, type] = {}


def config_class(base: type) -> Any:
    """The class of a rewritten model's configuration; the Auto classes know it, and the models of it."""
    if base not in _configs:
        cls = made_quietly(f"{_PREFIX}{base.__name__}", (_Rewritten, base), {BASE: base}, _Made("config", base))
        _configs[base] = cls
        for auto, models in _models_of(base):
            made = tuple(model_class(model) for model in models)
            models_of_configurations(auto).register(cls, made if len(made) > 1 else made[0], exist_ok=True)
    return _configs[base]


def _models_of(config: type) -> Iterator[tuple[Any, tuple[type, ...]]]:
    """The Auto classes that have a model for a configuration, and which."""
    for auto in vars(modeling_auto).values():
        known = models_of_configurations(auto) if isinstance(auto, type) else None
        found = known[config] if known is not None and config in known else None
        models = tuple(model for model in (found if isinstance(found, tuple | list) else (found,)) if isinstance(model, type))
        if models:
            yield auto, models


def _auto_map(config: type) -> dict[str, str]:
    names = {auto.__name__: models[0].__name__ for auto, models in _models_of(config)}
    return {name: f"{Path(MODELING).stem}.{_PREFIX}{cls}" for name, cls in {"AutoConfig": config.__name__, **names}.items()}


# Models


class _Pretrained:
    """Of a model: its class puts in what its configuration says, and saves it.

    Attributes:
        _laurel_code: name of the module of a `modeling_laurel.py` whose classes are taken; "" for those that the edits give.
    """

    _auto_class = None
    _laurel_code = ""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing: its code is written by `save_pretrained`."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]  # of the model
        if isinstance(config, _Rewritten):
            _put_in(self, config, self._laurel_code)

    def initialize_weights(self) -> None:
        """Of PreTrainedModel, which knows nothing of the connections' starts."""
        super().initialize_weights()  # type: ignore[misc]
        for connection in sites_of(self).values():  # type: ignore[arg-type]  # it is a module
            missing = not_started(connection)
            if missing:
                put_start(connection, missing)

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any) -> Any:
        """As the model's own does, with a configuration that carries the plan, and the source of the rewritten classes."""
        model: Any = self
        record = rewriting_of(model)
        try:
            source, names = source_of(record, type(model).__name__)
            source = source if _TAIL in source else source + _TAIL
        except RewriteError:  # defined where it cannot be imported from; the plan and the edits are enough for whoever has the classes
            source, names = "", {}
        model.config.laurel = {**model.config.laurel, "classes": names, "source": _digest(source) if source else ""}
        result = super().save_pretrained(save_directory, is_main_process, *args, **kwargs)  # type: ignore[misc]
        if is_main_process:
            if source:
                Path(save_directory, MODELING).write_text(source, encoding="utf-8")
            for name, file in record.operator_files().items():
                place = Path(save_directory, model.config.laurel["operators"][name])
                place.parent.mkdir(exist_ok=True)
                place.write_bytes(file.read_bytes())
        return result


def model_class(base: type, code: str = "") -> Any:
    """The class of a rewritten model, or of one that its configuration says how to rewrite.

    Args:
        base: the class without that.
        code: see `_Pretrained`.
    """
    known: dict[str, Any] = {BASE: _base_of(base), "_laurel_code": code}
    if getattr(base, "config_class", None) is not None:
        known["config_class"] = config_class(base.config_class)  # type: ignore[attr-defined]
    return _model_class(base, code, tuple(known.items()))


@functools.cache
def _model_class(base: type, code: str, known: tuple[tuple[str, Any], ...]) -> Any:
    return made_quietly(base.__name__, (_Pretrained, base), dict(known), _Made("model", vars(base).get(RECIPE, base), code))


@dataclass(frozen=True)
class _Made:
    """By what instances of the classes above pickle. `source` is the class that they were made from, or that one's own recipe."""

    kind: str
    source: Any
    code: str = ""

    @property
    def cls(self) -> Any:
        base = self.source if isinstance(self.source, type) else self.source.cls
        if self.kind == "config":
            return config_class(base)
        return model_class(base, self.code if self.code in sys.modules else "")


def _put_in(model: Any, config: Any, code: str) -> None:
    """Install what a configuration says in a model that was just made from it."""
    label = f"{name_or_path(config) or 'the configuration'}, {TYPE!r}"
    data = _checked(config.laurel, label)
    _check_operators(config, data, label, trusted=bool(code))
    record = _seen_from(model, Rewriting(Plan.from_data(data["plan"], label), {}, data["edits"], names=data["classes"]))
    check_owners(model, (row.owner for row in record.plan.sites), label)
    if code:
        file = Path(str(sys.modules[code].__file__))
        written = read_text(file, "The source")
        record.text, record.edits = written, record.edits if _digest(written) == data["source"] else None
        owners = [row.owner for row in record.plan.sites]
        classes = classes_of(sys.modules[code], model, owners, record.names, written, str(file))
    else:
        _check_unedited(config, data, label)
        classes = record.made_again(model, label)
    install(model, record.plan, classes)
    keep_record(model, record)


def _check_operators(config: Any, data: Mapping[str, Any], label: str, *, trusted: bool) -> None:
    """Load the operators that were saved beside a model, where its code is trusted; else they must be known."""
    for name, inner in data["operators"].items():
        if name in registry.operators():
            continue
        file = Path(name_or_path(config), inner)
        if not trusted or not file.is_file():
            raise ConfigError(
                f"{label}: the operator {name!r} is not known here. Import what registers it, or laurel_rewrite.load_operators(file), before "
                f"the model is loaded; the file is saved as {inner} beside it, and is loaded with trust_remote_code=True."
            )
        registry.load_operators(file)


def _check_unedited(config: Any, data: Mapping[str, Any], label: str) -> None:
    file = Path(name_or_path(config), MODELING) if name_or_path(config) else None
    edited = file is not None and file.is_file() and data["source"] and _digest(read_text(file, "The source")) != data["source"]
    if data["edits"] is None or edited:
        what = f"{file} was edited" if edited else f"{label}: its classes were edited, or their edits cannot be told"
        raise ConfigError(f"{what}, so that what runs is that file's own: load it with trust_remote_code=True, if you trust it.")


def _seen_from(model: Any, record: Rewriting) -> Rewriting:
    """The record with the paths that this class of model has: with a head or without, they begin otherwise."""
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
    prefix = f"{model.base_model_prefix}."
    seen = (record, record.moved(prefix, ""), record.moved("", prefix)) if len(prefix) > 1 else (record,)
    return next((other for other in seen if all(row.owner in modules for row in other.plan.sites)), record)


def _digest(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()


def classes_beside(scope: Mapping[str, Any]) -> Callable[[str], Any]:
    """`__getattr__` of a `modeling_laurel.py`: the classes that `config.json` names.

    Args:
        scope: of that module.
    """

    def find(name: str) -> Any:
        base = getattr(transformers, name.removeprefix(_PREFIX), None) if name.startswith(_PREFIX) else None
        if isinstance(base, type) and issubclass(base, CONFIGURATION):
            return config_class(base)
        if isinstance(base, type) and issubclass(base, PRETRAINED):
            return model_class(base, scope["__name__"])
        raise AttributeError(f"module {scope['__name__']!r} has no attribute {name!r}")

    return find


class _Host:
    """What a rewritten model of transformers keeps beside the record."""

    def owns(self, module: Any) -> bool:
        return isinstance(module, PRETRAINED)

    def adopt(self, model: Any, record: Rewriting) -> None:
        if not isinstance(model, _Pretrained):
            object.__setattr__(model, "__class__", model_class(type(model)))
        if not isinstance(model.config, _Rewritten):
            model.config.__class__ = config_class(type(model.config))
        model.config.laurel = {
            "version": _VERSION,
            "laurel_rewrite": __version__,
            "base_type": model.config.model_type,
            "plan": tomllib.loads(record.plan.to_toml()),
            "edits": record.edits,
            "classes": record.names,
            "source": "" if record.text is None else _digest(record.text),
            "operators": {name: f"{OPERATORS}/{file.name}" for name, file in record.operator_files().items()},
        }
        if "transformers.trainer" in sys.modules:  # else its import would take a while
            teach_trainer()

    def release(self, module: nn.Module) -> None:
        config = getattr(module, "config", None) if isinstance(module, PRETRAINED) else None
        if isinstance(config, _Rewritten):
            object.__setattr__(config, "__class__", _base_of(type(config)))
            vars(config).pop(TYPE)


def recipe_of(model: Any) -> tuple[dict[str, Any], dict[str, bytes]]:
    """How `laurel_rewrite.load` builds the model as it was before the rewrite, and the files for it."""
    config = copy.deepcopy(model.config)
    if isinstance(config, _Rewritten):
        object.__setattr__(config, "__class__", _base_of(type(config)))
        vars(config).pop(TYPE)
    recipe = {"kind": "transformers", "class": name_of(original_class(model)), "config": name_of(type(config))}
    attention = attention_of(config)  # which the configuration's own text leaves out
    if isinstance(attention, str) and attention.isidentifier():  # a kernel from elsewhere is for the user to ask for
        recipe["attention"] = attention
    files = {BASE_CONFIG: config.to_json_string(use_diff=False)}
    if model.can_generate():
        files[GENERATION] = model.generation_config.to_json_string(use_diff=False)
    return recipe, {name: text.encode() for name, text in files.items()}


def from_recipe(folder: Path, cls: Any, config_class: Any, attention: str, files: Collection[str], *, meta: bool) -> nn.Module:
    """That model again.

    Raises:
        CaptureError: the configuration is none that the library takes.
    """
    data = read_json(folder / BASE_CONFIG, "The configuration")
    try:
        config = config_class.from_dict(data)
        options = {"attn_implementation": attention} if attention else {}
        with torch.device("meta") if meta else nullcontext():
            model: nn.Module = built_from(cls, config, **options)
        if GENERATION in files:
            generation = read_json(folder / GENERATION, "The configuration of generate()")
            setattr(model, "generation_config", transformers.GenerationConfig.from_dict(generation))  # noqa: B010  # no module or tensor
    except FOREIGN as error:  # of values that the library does not expect
        raise CaptureError(f"{folder / BASE_CONFIG} gives no {cls.__name__}: {type(error).__name__}: {str(error)[:300]}") from error
    return model


def teach_trainer() -> None:
    """Let transformers' Trainer keep weight decay off mixing weights, as `param_groups` does: by their names they look like matrices to it."""
    decayed = transformers.Trainer.get_decay_parameter_names
    if hasattr(decayed, "__wrapped__"):
        return

    @functools.wraps(decayed)
    def get_decay_parameter_names(self: Any, model: Any) -> list[str]:
        groups = param_groups(model, lr=0.0, weight_decay=0.0) if sites_of(model) else []
        kept = {id(p) for group in groups if group["name"].startswith(MIXING) for p in group["params"]}
        own = dict(model.named_parameters())
        return [name for name in decayed(self, model) if name not in own or id(own[name]) not in kept]

    setattr(transformers.Trainer, decayed.__name__, get_decay_parameter_names)


def _teach_saving() -> None:
    """Let a PreTrainedModel that has rewritten parts save what was done to them: its own `save_pretrained` knows of no connection."""
    save = PRETRAINED.save_pretrained

    @functools.wraps(save)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, _Pretrained) or not sites_of(self):
            return save(self, *args, **kwargs)
        keep_record(self, rewriting_of(self))
        return self.save_pretrained(*args, **kwargs)

    setattr(PRETRAINED, save.__name__, save_pretrained)


hosts.append(_Host())
_teach_saving()
transformers.AutoConfig.register(TYPE, _Any, exist_ok=True)
