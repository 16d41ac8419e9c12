"""`torchvision:NAME`: the classification models of torchvision."""

from __future__ import annotations

from typing import Any

import torch

from laurel_rewrite.errors import ConfigError, nearest
from laurel_rewrite.sources.built import Built, made_on, unbuilt

PACKAGE = "torchvision"


def make(name: str, settings: dict[str, Any], device: str, batch: int) -> Built:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise ConfigError(f"torchvision has no classification model {name!r}. {nearest(name, known)}")
    try:
        model = made_on(device, lambda: models.get_model(name, weights=None, **settings))
    except Exception as error:  # a library of models may raise anything for a value that it does not expect
        raise unbuilt(f"torchvision:{name}", settings, error) from error
    crop = models.get_model_weights(name).DEFAULT.transforms.keywords.get("crop_size", 224)
    size = crop[0] if isinstance(crop, list | tuple) else crop
    return Built(model.train(), (torch.randn(batch, 3, size, size, device=device),), {}, f"torchvision:{name}", settings)
