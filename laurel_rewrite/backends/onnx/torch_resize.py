"""ONNX's Resize in PyTorch, one axis after the other: torch's own interpolation has fewer modes, and other positions in some."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def resize(
    x: Tensor,
    roi: Tensor | None = None,
    scales: Tensor | Sequence[float] | None = None,
    sizes: Tensor | Sequence[int] | None = None,
    *,
    mode: str = "nearest",
    coordinate_transformation_mode: str = "half_pixel",
    nearest_mode: str = "round_prefer_floor",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    antialias: int = 0,
    axes: Sequence[int] | None = None,
    keep_aspect_ratio_policy: str = "stretch",
) -> Tensor:
    """See the standard. Boxes to crop, and sizes that keep the aspect ratio, are refused with a NotImplementedError."""
    # Neither is written by an exporter of PyTorch models; computed as if they were not there, the result would be wrong in silence.
    if coordinate_transformation_mode == "tf_crop_and_resize" or keep_aspect_ratio_policy != "stretch":
        raise NotImplementedError(f"Resize with {coordinate_transformation_mode} and {keep_aspect_ratio_policy}")
    dims = range(x.ndim) if axes is None else axes
    wanted: list[int] = sizes.tolist() if isinstance(sizes, Tensor) else list(sizes or ())
    factors: list[float] = scales.tolist() if isinstance(scales, Tensor) else list(scales or ())
    for place, axis in enumerate(dims):
        had = x.shape[axis]
        size = wanted[place] if wanted else _times(had, factors[place])
        factor = size / had if wanted else factors[place]
        if isinstance(factor, float) and factor == 1:
            continue
        at = _positions(had, size, factor, coordinate_transformation_mode, x.device)
        if mode == "nearest":
            x = x.index_select(axis, _ROUNDED[nearest_mode](at).long().clamp(0, had - 1))
        else:
            shrunk = min(factor, 1.0) if antialias else 1.0
            weights = _weights(at, had, mode, shrunk, cubic_coeff_a, inside=bool(exclude_outside))
            x = (x.movedim(axis, -1) @ weights.to(x.dtype)).movedim(-1, axis)
    return x


def _times(size: int, factor: float) -> int:
    return size * int(factor) if factor == int(factor) else math.floor(size * factor)


def _positions(had: int, size: int, factor: float, mode: str, device: torch.device) -> Tensor:
    """Where each of the `size` results lies among the `had` numbers."""
    i = torch.arange(size, device=device, dtype=torch.float32)
    match mode:
        case "asymmetric":
            return i / factor
        case "align_corners":
            return i * ((had - 1) / (size - 1)) if size > 1 else i
        case "tf_half_pixel_for_nn":
            return (i + 0.5) / factor
        case "pytorch_half_pixel" if size == 1:
            return i
        case "half_pixel_symmetric":
            return had / 2 * (1 - size / (factor * had)) + (i + 0.5) / factor - 0.5
    return (i + 0.5) / factor - 0.5


_ROUNDED: dict[str, Callable[[Tensor], Tensor]] = {
    "round_prefer_floor": lambda at: (at - 0.5).ceil(),
    "round_prefer_ceil": lambda at: (at + 0.5).floor(),
    "floor": torch.floor,
    "ceil": torch.ceil,
}


def _weights(at: Tensor, had: int, mode: str, shrunk: float, a: float, *, inside: bool) -> Tensor:
    """What each result takes of each number, [had, size]: a filter as wide as the results lie apart where `shrunk` is less than 1."""
    reach = (1 if mode == "linear" else 2) / shrunk
    taps = (at - reach).floor()[:, None] + torch.arange(1, 2 * math.ceil(reach) + 1, device=at.device)
    distance = ((taps - at[:, None]) * shrunk).abs()
    weights = (1 - distance).clamp_min(0) if mode == "linear" else _cubic(distance, a)
    weights = weights * ((taps >= 0) & (taps < had)) if inside else weights
    weights = weights / weights.sum(-1, keepdim=True)
    return at.new_zeros(len(at), had).scatter_add(1, taps.long().clamp(0, had - 1), weights).T


def _cubic(d: Tensor, a: float) -> Tensor:
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return torch.where(d <= 1, near, torch.where(d < 2, far, 0.0))
