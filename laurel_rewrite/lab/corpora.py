"""Where data to train on comes from: built in, files, `datasets`, or the model's own file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from laurel_rewrite.errors import FOREIGN, ConfigError, missing, nearest
from laurel_rewrite.lab import images, text
from laurel_rewrite.lab.splits import SPLITS, Corpus
from laurel_rewrite.lab.tasks import Task
from laurel_rewrite.sources.built import Built


def corpus(data: str, kind: str, *, folder: Path, tokenizer: Path | None = None) -> Corpus:
    """Find data.

    Args:
        data: "builtin" or "builtin:python" (sources of installed packages), "builtin:digits" (scikit-learn's, the default for images),
            "builtin:shapes" (drawn), a file of text, a folder of files, or "datasets:NAME" (a folder that `datasets` wrote, or a name).
        kind: what the model takes: "tokens" or "images".
        folder: where tokens are kept, in `folder / "data"`; it is no data itself, where it lies among them.
        tokenizer: file of `tokenizers`; bytes by default.

    Raises:
        ConfigError: there is no such data, it is of another kind, or the tokenizer's file is none.
        MissingPackageError: scikit-learn, tokenizers or datasets is needed and not installed.
    """
    prefix, _, name = data.partition(":")
    if tokenizer is not None and kind != "tokens":
        raise ConfigError("--tokenizer is for text, and the model takes images.")
    if prefix == "builtin":
        builtin = {"python": "tokens", "digits": "images", "shapes": "images"}
        name = name or next(one for one, its in builtin.items() if its == kind)
        if name not in builtin:
            raise ConfigError(f"There is no built-in data {name!r}. {nearest(name, builtin)}")
        if builtin[name] != kind:
            fitting = [f"builtin:{one}" for one, its in builtin.items() if its == kind]
            raise ConfigError(f"builtin:{name} is {builtin[name]}, and the model takes {kind}: {' or '.join(fitting)} would do.")
        return images.BUILTIN[name]() if kind == "images" else text.tokens(f"builtin:{name}", text.python_sources(), folder, tokenizer)
    if prefix == "datasets" and name:
        found = _from_datasets(name)
        return images.of_dataset(data, found) if kind == "images" else text.tokens(data, text.of_dataset(data, found), folder, tokenizer)
    if kind == "images":
        raise ConfigError(f"{data}: images are builtin:digits, builtin:shapes or datasets:NAME; or dataset(split) in the model's file.")
    return text.tokens(data, text.files(Path(data), folder), folder, tokenizer)


def _from_datasets(name: str) -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise missing("datasets", None) from error
    try:
        found = datasets.load_from_disk(name) if Path(name).is_dir() else datasets.load_dataset(name)
    except FOREIGN as error:  # of its file system and of what it downloads from
        raise ConfigError(f"datasets:{name} could not be loaded: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(found, dict):
        return found
    if "train" not in found:
        raise ConfigError(f"datasets:{name} has no split 'train': its splits are {', '.join(map(str, found))}.")
    return found["train"]


def own(dataset: Callable[[str], Any], label: str) -> Corpus:
    """The data that a model's file offers; its digest is over a few examples of each split.

    Args:
        dataset: called with the name of a split.
        label: of the model.

    Raises:
        ConfigError: it gives nothing with a length and items.
    """
    import hashlib

    import torch

    from laurel_rewrite.private import pytree

    found, known = hashlib.sha256(), {}
    for name in SPLITS:
        try:
            known[name] = split = dataset(name)
            size = len(split)
            for number in sorted({0, size // 2, size - 1}):
                for leaf in pytree.tree_leaves(split[number]):
                    value = torch.as_tensor(leaf)
                    found.update(f"{name} {size} {number} {value.dtype} {tuple(value.shape)}".encode())
                    found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        except FOREIGN as error:  # whatever the file's code raises
            raise ConfigError(f"{label}: dataset({name!r}) is no map-style dataset of tensors: {type(error).__name__}: {error}") from error
    return Corpus(f"dataset of {label}", "own", found.hexdigest(), 0, lambda name, shape: known[name])


def data_of(task: Task, built: Built, data: str, folder: Path, tokenizer: Path | None) -> Corpus:
    """What a model is trained on: that of its file, where it offers some."""
    if task.kind == "own":
        return own(built.offers["dataset"], built.spec)
    return corpus(data, task.kind, folder=folder, tokenizer=tokenizer)
