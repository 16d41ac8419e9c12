"""`timm:NAME`: the models of timm."""

from __future__ import annotations

from typing import Any

import torch

from laurel_rewrite.errors import ConfigError, nearest
from laurel_rewrite.sources.built import Built, made_on, unbuilt

PACKAGE = "timm"


def make(name: str, settings: dict[str, Any], device: str, batch: int) -> Built:
    import timm

    if not timm.is_model(name):
        raise ConfigError(f"timm has no model {name!r}. {nearest(name, timm.list_models())}")
    try:
        model = made_on(device, lambda: timm.create_model(name, **settings))
    except Exception as error:  # a library of models may raise anything for a value that it does not expect
        raise unbuilt(f"timm:{name}", settings, error) from error
    size = settings.get("img_size") or model.default_cfg.get("input_size", (3, 224, 224))[1:]
    height, width = (size, size) if isinstance(size, int) else size
    channels = settings.get("in_chans", 3)
    image = torch.randn(batch, channels, height, width, device=device)
    return Built(model.train(), (image,), {}, f"timm:{name}", settings)
