"""What training left in a folder: the model with its connections, inputs for it, and its graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from laurel_rewrite.backends.module.origin import example_inputs
from laurel_rewrite.backends.module.saved_folder import CONFIG, importable, read_config
from laurel_rewrite.backends.module.saving import load
from laurel_rewrite.backends.module.surgery import remove
from laurel_rewrite.errors import FOREIGN, ConfigError, LaurelError, RewriteError
from laurel_rewrite.exporting import Exporter
from laurel_rewrite.files.checked import read_json
from laurel_rewrite.graph.feeds import read_feeds
from laurel_rewrite.sources.built import require
from laurel_rewrite.sources.libraries import hf
from laurel_rewrite.sources.past import Past
from laurel_rewrite.stages import Listener, silent
from laurel_rewrite.verification.checks import randomized

_PRETRAINED = "config.json"


@dataclass
class Trained:
    """A rewritten model with inputs of its forward."""

    folder: Path
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def trained(folder: Path, inputs: Path | None = None) -> Trained:
    """The model of a folder that `laurel_rewrite.save`, the command, or `save_pretrained` of a rewritten model wrote.

    Args:
        folder: see above.
        inputs: an .npz file of inputs by the names of the forward's arguments; else those that the folder knows how to make.

    Raises:
        ConfigError: it is another folder, it is damaged, or nothing says what inputs its model takes.
        CaptureError: the folder's code raises.
    """
    given = None if inputs is None else {name: torch.from_numpy(value) for name, value in read_feeds(inputs).items()}
    if (folder / CONFIG).is_file():
        model = load(folder)
        if given is not None:
            return Trained(folder, model, (), given)
        recipe = read_config(folder)["model"]
        with importable(folder, recipe["files"]):
            args, kwargs = example_inputs(folder, recipe, model)
        return Trained(folder, model, args, kwargs)
    if (folder / _PRETRAINED).is_file():
        model = _pretrained(folder)
        return Trained(folder, model, (), hf.example_inputs(model, 2, "cpu") if given is None else given)
    if not folder.is_dir():
        raise ConfigError(f"There is no folder {folder}.")
    raise ConfigError(
        f"{folder} has neither {CONFIG}, which laurel_rewrite.save and the command write, nor {_PRETRAINED}, which save_pretrained of a rewritten model "
        "writes."
    )


def _pretrained(folder: Path) -> Any:
    """The model that `save_pretrained` of a rewritten model wrote, by the class that it had; none of the folder's code runs.

    Raises:
        ConfigError: it holds another model, or its weights are not the model's.
    """
    require("transformers")
    import transformers

    from laurel_rewrite.backends.module.pretrained import PRETRAINED, TYPE, model_class

    kind = read_json(folder / _PRETRAINED, "The configuration").get("model_type")
    if kind != TYPE:
        raise ConfigError(f"{folder} holds a model of type {kind!r} without LAuReL: as MODEL, it is hf:{folder}.")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        base = getattr(transformers, (config.architectures or [""])[0], None)
        if not (isinstance(base, type) and issubclass(base, PRETRAINED)):
            raise ConfigError(f"{folder}: transformers has no class {config.architectures}, which its configuration names.")
        return hf.with_weights(model_class(base), folder, str(folder), config=config).train()
    except LaurelError:
        raise
    except FOREIGN as error:  # a library of models may raise anything
        raise ConfigError(f"{folder} could not be loaded: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error


@contextlib.contextmanager
def as_graphs(
    paths: Sequence[Path], draft: Path, *, inputs: Path | None = None, past: bool = False, seed: int = 0, listener: Listener = silent
) -> Iterator[tuple[list[Path], list[str] | None, Mapping[Path, Path]]]:
    """ONNX files of paths that may be folders, for a profile: a folder at the first place is two graphs, without and with its connections.

    The connections are written with random parameters: a graph at its start would lose them to the runtime's optimiser, and another graph
    would be measured.

    Args:
        paths: ONNX files and folders.
        draft: folder for what is written.
        inputs, past, seed: see `trained`, `laurel_rewrite.export_onnx` and `randomized`.
        listener: is told of the stages.

    Yields:
        The files; names for them, None where there is no folder; and the folder that each file was made from.
    """
    files: list[Path] = []
    names: list[str] = []
    made: dict[Path, Path] = {}
    for number, path in enumerate(paths):
        if not path.is_dir():
            files.append(path)
            names.append(path.name)
            continue
        label = path.resolve().name
        with listener(f"export {label}") as stage:
            one = trained(path, inputs)
            models = [(f"{label} without LAuReL", _plain(one))] if number == 0 else []
            models += [(label, one.model)]
            for place, (name, model) in enumerate(models):
                if model is None:
                    continue
                file = draft / f"graph-{number}-{place}.onnx"
                behind = Past.of(model, one.args, one.kwargs) if past else None
                with randomized(model, seed):
                    Exporter(model, one.args, one.kwargs, past=behind).write(file)
                files.append(file)
                names.append(name)
                made[file] = path
            stage.done(", ".join(name for name, model in models if model is not None))
    try:
        yield files, names if made else None, made
    finally:
        for file in draft.glob("graph-*.onnx*"):
            file.unlink()


def _plain(one: Trained) -> nn.Module | None:
    """The model without its connections; None where it cannot be had."""
    try:
        return remove(one.model)
    except (ConfigError, RewriteError):
        return None
