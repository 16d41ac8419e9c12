"""The questions, each as a comparison: which models, on what, for how long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from laurel_rewrite.app.job import find_sites
from laurel_rewrite.lab.candidates import Candidate
from laurel_rewrite.operators import registry
from laurel_rewrite.plan import LaurelConfig
from laurel_rewrite.plan.fits import fits

GPT = "tools/examples/gpt.py"  # from the root of the repository: what is committed names no folder of a machine
LAUREL = ("rw", "lr", "pa", "rw+lr", "rw+pa", "lr+pa", "rw+lr+pa")


@dataclass(frozen=True)
class Table:
    """A comparison of one model with operators.

    Attributes:
        question: what it is made for.
        model, settings: MODEL as the command takes it.
        candidates: what is compared with it, beside one more layer.
        data: name of what is trained on.
        recipe: fields of `laurel_rewrite.lab.runs.Recipe`.
        rates: learning rates; the one that is best for the unchanged model, from another seed and a quarter of the tokens, is everybody's.
        cut: what is smaller or other than in the paper.
    """

    question: str
    model: str
    settings: dict[str, Any]
    candidates: Callable[[], list[Candidate]]
    data: str
    recipe: dict[str, Any]
    rates: Sequence[float]
    cut: str


def each(*names: str, **options: Any) -> Callable[[], list[Candidate]]:
    """A candidate for each operator."""
    return lambda: [Candidate(name, LaurelConfig(name, **_known(name, options))) for name in names]


def ranks(name: str, *tried: int) -> Callable[[], list[Candidate]]:
    """A candidate for each rank of an operator."""
    return lambda: [Candidate(f"{name} rank {rank}", LaurelConfig(name, rank=rank)) for rank in tried]


def both(*parts: Callable[[], list[Candidate]]) -> Callable[[], list[Candidate]]:
    """The candidates of several."""
    return lambda: [candidate for part in parts for candidate in part()]


def placements() -> list[Candidate]:
    """One operator in different places of a pre-norm transformer; the half rank has as many parameters everywhere as the whole one in half of them."""
    places = {
        "every sublayer": {"rank": 16}, "every sublayer, rank 8": {"rank": 8}, "attention only": {"rank": 16, "include": "attention"},
        "feed-forward only": {"rank": 16, "include": "feed-forward"}, "both of every other block": {"rank": 16, "include": ("blocks.1", "blocks.3", "blocks.5")},
    }  # fmt: skip
    return [Candidate(name, LaurelConfig("rw+lr", **options)) for name, options in places.items()]


def registered(model: str, settings: dict[str, Any]) -> Callable[[], list[Candidate]]:
    """A candidate for each operator that fits every stream of a model, with its options as they are where none are given."""
    return lambda: [
        Candidate(fit.operator, LaurelConfig(fit.operator)) for fit in fits(find_sites(model, settings)) if fit.fits and not fit.reason
    ]


def _known(name: str, options: dict[str, Any]) -> dict[str, Any]:
    return {option: value for option, value in options.items() if option in registry.operator(name).options}


_SMALL = {"width": 128, "depth": 6, "heads": 4, "vocabulary": 256, "dropout": 0.0}
_TEXT = {"tokens": 1_000_000, "length": 128, "batch": 16}
_LLAMA = {"num_hidden_layers": 6, "vocab_size": 256, "max_position_embeddings": 256}
_SMALL_LLAMA = _LLAMA | {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 3, "num_key_value_heads": 3}
_IMAGES = {"tokens": 16_000, "batch": 32}
_TEXT_CUT = "bytes of Python's sources for C4; 1 M tokens"

PAPER = Table(
    "The paper's table on another corpus: every variant of LAuReL and one more layer, on a language model",
    GPT, _SMALL, each(*LAUREL, rank=16, history=3), "builtin:python", _TEXT, (1e-3, 3e-3, 1e-2),
    f"{_TEXT_CUT}; 1.3 M parameters in 6 blocks for 157 M in 24; rank 16 for 32; an operator at each of two sublayers of a block for one a block",
)  # fmt: skip

TABLES = {
    "paper": PAPER,
    "placement": replace(
        PAPER, question="Where should the operator stand: at every sublayer, at attention, at the feed-forward layers, in every other block?",
        candidates=placements, cut=f"{_TEXT_CUT}; 1.3 M parameters",
    ),
    "resnet": Table(
        "A ResNet-18 a quarter as wide on images: rw, and rw+lr of rank 4 to 32",
        "timm:resnet18", {"num_classes": 10, "channels": [16, 32, 64, 128], "pretrained_cfg_overlay": {"input_size": [3, 48, 48]}},
        both(each("rw"), ranks("rw+lr", 4, 8, 16, 32)), "builtin:shapes", _IMAGES, (1e-3, 3e-3, 1e-2),
        "drawn shapes of 48 x 48 pixels in ten classes for ImageNet; 16,000 images (37 M pixels); AdamW",
    ),
    "llama": Table(
        "A Llama: does low rank add to the residual weights?",
        "hf:llama", _LLAMA | {"hidden_size": 160, "intermediate_size": 432, "num_attention_heads": 5, "num_key_value_heads": 5},
        each("rw", "rw+lr", rank=16), "builtin:python", _TEXT, (1e-3, 3e-3, 1e-2), f"{_TEXT_CUT}; 1.9 M parameters",
    ),
    "vit": Table(
        "A Vision Transformer on images: each mechanism alone, and rw+lr",
        "timm:vit_tiny_patch16_224", {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3, "num_classes": 10},
        each("rw", "lr", "pa", "rw+lr", rank=16, history=3), "builtin:shapes", _IMAGES, (3e-4, 1e-3, 3e-3),
        "drawn shapes of 32 x 32 pixels in ten classes; 16,000 images (1.04 M tokens); 0.7 M parameters",
    ),
    "convnext": Table(
        "A ConvNeXt on images: each mechanism alone, and rw+lr",
        "timm:convnext_atto",
        {"depths": [2, 2, 4, 2], "dims": [24, 48, 96, 192], "num_classes": 10, "patch_size": 2, "pretrained_cfg_overlay": {"input_size": [3, 32, 32]}},
        each("rw", "lr", "pa", "rw+lr", rank=16, history=3), "builtin:shapes", _IMAGES, (1e-3, 3e-3, 1e-2),
        "drawn shapes of 32 x 32 pixels in ten classes; 16,000 images (16 M pixels); 1.1 M parameters",
    ),
    "registry": Table(
        "A Llama with every residual operator, each with its options as they are where none are given",
        "hf:llama", _SMALL_LLAMA, registered("hf:llama", _SMALL_LLAMA), "builtin:python", _TEXT | {"tokens": 500_000}, (1e-3, 3e-3, 1e-2),
        "bytes of Python's sources; 0.5 M tokens; 0.7 M parameters; one learning rate for all, and no option tuned; deepnorm is for post-norm models",
    ),
}  # fmt: skip
"""For two CPU cores, two hours each or less."""

GPU_TABLES = {
    "paper": replace(
        PAPER, settings={"width": 736, "depth": 24, "heads": 8, "vocabulary": 256, "dropout": 0.0, "context": 1024},
        candidates=each(*LAUREL, rank=32, history=3),
        recipe={"tokens": 64_000_000, "length": 1024, "batch": 64, "precision": "bf16", "compile": True}, rates=(3e-4, 1e-3),
        cut="bytes of Python's sources for C4; 64 M tokens; an operator at each of two sublayers of a block for one a block",
    ),
}  # fmt: skip
"""For one GPU: a run ends within eight minutes."""
