"""laurel-rewrite: a graph-rewriting compiler that replaces residual connections, x + f(x), by LAuReL.

    import laurel_rewrite

    sites = laurel_rewrite.detect(model, (x,))
    better = laurel_rewrite.rewrite(model, (x,), variant="rw+lr", rank=16)
    laurel_rewrite.save(better, "laurel_out")
    laurel_rewrite.export_onnx(better, (x,), None, "laurel.onnx")

Names are imported when they are first used, so that this import is quick and pulls in neither onnxruntime nor rich.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from laurel_rewrite.backends.compiled import compile_backend, prepare
    from laurel_rewrite.backends.module.saving import load, save
    from laurel_rewrite.backends.module.surgery import remove
    from laurel_rewrite.backends.onnx.surgery import rewrite_onnx
    from laurel_rewrite.backends.rewriting import rewrite
    from laurel_rewrite.detection.detecting import detect
    from laurel_rewrite.detection.drawing import draw
    from laurel_rewrite.detection.explaining import explain
    from laurel_rewrite.errors import (
        CaptureError,
        ConfigError,
        ExportError,
        LaurelError,
        MissingPackageError,
        NoSiteError,
        RewriteError,
        VerificationError,
    )
    from laurel_rewrite.exporting import export_onnx
    from laurel_rewrite.files.onnx import write_onnx
    from laurel_rewrite.lab.comparing import compare
    from laurel_rewrite.operators.annealing import advance_annealing
    from laurel_rewrite.operators.config import Option
    from laurel_rewrite.operators.connections import check_optimizer, learned, param_groups
    from laurel_rewrite.operators.protocol import Connection
    from laurel_rewrite.operators.reads import Reads
    from laurel_rewrite.operators.registry import load_operators, register_operator
    from laurel_rewrite.operators.trainable import freeze_base, summary
    from laurel_rewrite.plan import LaurelConfig
    from laurel_rewrite.profiling import profile

_HOMES = {
    "detect": "detection.detecting",
    "explain": "detection.explaining",
    "draw": "detection.drawing",
    "rewrite": "backends.rewriting",
    **dict.fromkeys(("prepare", "compile_backend"), "backends.compiled"),
    "remove": "backends.module.surgery",
    "rewrite_onnx": "backends.onnx.surgery",
    "write_onnx": "files.onnx",
    "save": "backends.module.saving",
    "load": "backends.module.saving",
    "export_onnx": "exporting",
    "profile": "profiling",
    "compare": "lab.comparing",
    **dict.fromkeys(("param_groups", "check_optimizer", "learned"), "operators.connections"),
    **dict.fromkeys(("summary", "freeze_base"), "operators.trainable"),
    "advance_annealing": "operators.annealing",
    "Connection": "operators.protocol",
    "Reads": "operators.reads",
    "Option": "operators.config",
    "register_operator": "operators.registry",
    "load_operators": "operators.registry",
    "LaurelConfig": "plan",
    **dict.fromkeys(
        (
            "CaptureError",
            "ConfigError",
            "ExportError",
            "LaurelError",
            "MissingPackageError",
            "NoSiteError",
            "RewriteError",
            "VerificationError",
        ),
        "errors",
    ),
}

__all__ = [
    "CaptureError",
    "ConfigError",
    "Connection",
    "ExportError",
    "LaurelConfig",
    "LaurelError",
    "MissingPackageError",
    "NoSiteError",
    "Option",
    "Reads",
    "RewriteError",
    "VerificationError",
    "advance_annealing",
    "check_optimizer",
    "compare",
    "compile_backend",
    "detect",
    "draw",
    "explain",
    "export_onnx",
    "freeze_base",
    "learned",
    "load",
    "load_operators",
    "param_groups",
    "prepare",
    "profile",
    "register_operator",
    "remove",
    "rewrite",
    "rewrite_onnx",
    "save",
    "summary",
    "write_onnx",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
