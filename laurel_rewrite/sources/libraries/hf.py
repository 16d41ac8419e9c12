"""`hf:NAME`: the architectures of transformers, by their model types."""

from __future__ import annotations

from typing import Any

import torch

from laurel_rewrite.errors import CaptureError, ConfigError, nearest
from laurel_rewrite.sources.built import Built, made_on

PACKAGE = "transformers"


def make(name: str, settings: dict[str, Any], device: str, batch: int) -> Built:
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
        model = made_on(device, lambda: auto.from_config(config))
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
