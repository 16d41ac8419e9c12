"""`hf:NAME`: the architectures of transformers, by their model types; `hf:FOLDER`: a checkpoint that `save_pretrained` wrote."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from laurel_rewrite.errors import CaptureError, ConfigError, LaurelError, nearest
from laurel_rewrite.files.checked import read_json
from laurel_rewrite.private import built_from, models_of_configurations
from laurel_rewrite.sources.built import Built, made_on

PACKAGE = "transformers"
_AUTOS = ("AutoModelForPreTraining", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModel")
"""What an architecture is pre-trained as, else its bare model."""


def make(name: str, settings: dict[str, Any], device: str, batch: int) -> Built:
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return _from_folder(folder, name, settings, device, batch)
    import transformers

    known = list(transformers.CONFIG_MAPPING.keys())
    if name not in known:
        if "/" in name or folder.is_dir():
            raise ConfigError(f"hf:{name} is no folder with a config.json, as save_pretrained writes it.")
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
    model = _from_config(config, name, device)
    return Built(model.train(), (), example_inputs(model, batch, device), f"hf:{name}", settings)


def _class_for(config: Any, name: str) -> Any:
    """The class that a configuration names as its own, else the Auto class that has one for it."""
    import transformers

    own = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    if own is not None and own.config_class is type(config):
        return own
    for auto in (getattr(transformers, n) for n in _AUTOS):
        if type(config) in models_of_configurations(auto):
            return auto
    raise ConfigError(f"hf:{name}: transformers has no model class for this configuration.")


def _from_config(config: Any, name: str, device: str) -> Any:
    maker = _class_for(config, name)
    try:
        return made_on(device, lambda: built_from(maker, config))
    except Exception as error:  # a library of models may raise anything
        raise CaptureError(f"hf:{name} could not be built from its configuration: {type(error).__name__}: {error}") from error


def _from_folder(folder: Path, name: str, settings: dict[str, Any], device: str, batch: int) -> Built:
    """The model of a checkpoint with its weights; on the meta device without."""
    from transformers import CONFIG_MAPPING, AutoConfig

    if settings:
        raise ConfigError(f"hf:{name} has its configuration with its weights; --set is for architectures with random ones.")
    kind = read_json(folder / "config.json", "The configuration").get("model_type")
    if kind not in CONFIG_MAPPING:
        hint = "; it was rewritten already" if kind == "laurel" else ""
        raise ConfigError(f"hf:{name} has the model type {kind!r}, which transformers alone does not know{hint}.")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if device == "meta":
            model = _from_config(config, name, device)
            return Built(model.train(), (), example_inputs(model, batch, device), f"hf:{name}", folder=folder)
        model = with_weights(_class_for(config, name), folder, f"hf:{name}")
    except LaurelError:
        raise
    except Exception as error:  # a library of models may raise anything
        raise ConfigError(f"hf:{name} could not be loaded: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    return Built(model.train(), (), example_inputs(model, batch, device), f"hf:{name}", folder=folder)


def with_weights(cls: Any, folder: Path, called: str, **given: Any) -> Any:
    """A model of a class with the weights of a folder; ConfigError where those are not all of its own, and nothing else's."""
    with without_bar():
        model, report = cls.from_pretrained(folder, local_files_only=True, output_loading_info=True, **given)
    wrong = [f"{what.replace('_', ' ')}: {sorted(report[what])[0]}" for what in ("missing_keys", "unexpected_keys") if report[what]]
    if wrong:
        raise ConfigError(f"{called}: its weights are not those of {type(model).__name__} ({'; '.join(wrong)}).")
    return model


@contextlib.contextmanager
def without_bar() -> Iterator[None]:
    """The library's progress bars are not shown: whoever asked has a display of his own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def example_inputs(model: Any, batch: int, device: str) -> dict[str, Any]:
    """Random inputs that a model of transformers takes, by name."""
    config = model.config
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else tuple(size)[:2]
        return {"pixel_values": torch.randn(batch, getattr(config, "num_channels", 3), height, width, device=device)}
    vocabulary = min(getattr(config, "vocab_size", 100), 1000)
    ids = torch.randint(3, max(vocabulary, 4), (batch, 17), generator=torch.Generator().manual_seed(0)).to(device)
    decoder = {"decoder_input_ids": ids.clone()} if getattr(config, "is_encoder_decoder", False) else {}
    return {"input_ids": ids, **decoder}
