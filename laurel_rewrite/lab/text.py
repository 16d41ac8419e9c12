"""Text as tokens: documents in three splits, read once, kept as memory-mapped arrays."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from laurel_rewrite.errors import ConfigError, missing
from laurel_rewrite.files.checked import read_json
from laurel_rewrite.lab.splits import SPLITS, Corpus, Example

_BYTES = 256
_BETWEEN = b"\0"
"""Between documents: a byte that text does not have, so that a model can tell where one begins."""
_PYTHON = {
    "train": ("torch", "sympy", "numpy", "onnx", "onnx-ir", "Jinja2", "mpmath"),
    "choose": ("networkx",),
    "judge": ("onnxscript", "rich", "click", "Pygments", "tomlkit", "safetensors", "MarkupSafe"),
}
"""Packages that this one stands on, by split: no package is in two, since its files resemble each other."""
_BY_BUILD = ("torch/version.py", "numpy/__config__.py", "numpy/version.py")
"""Files that differ between builds of one version."""
_LARGEST = 200_000
"""Bytes of a source file; above it is a table that a program wrote."""


@dataclass(frozen=True)
class Documents:
    """Texts by split.

    Attributes:
        splits: the documents of each, in order.
        versions: of the packages that they are from.
        left_out: how many files were no text.
    """

    splits: Mapping[str, list[bytes]]
    versions: dict[str, str] = field(default_factory=dict)
    left_out: int = 0

    def digest(self) -> str:
        """SHA-256 of the documents and their split."""
        found = hashlib.sha256()
        for name in SPLITS:
            found.update(name.encode())
            for text in self.splits[name]:
                found.update(len(text).to_bytes(8, "big") + text)
        return found.hexdigest()


def python_sources() -> Documents:
    """The sources of a fixed list of installed packages, each text once.

    Raises:
        ConfigError: one of them is not installed.
    """
    seen: set[bytes] = set()
    splits: dict[str, list[bytes]] = {}
    versions = {}
    for split in reversed(SPLITS):  # what two packages share stays out of training
        splits[split] = []
        for package in _PYTHON[split]:
            try:
                found = importlib.metadata.distribution(package)
            except importlib.metadata.PackageNotFoundError as error:
                raise ConfigError(
                    f"builtin:python is made of {package}, too, which is not installed. Install it, or give other --data."
                ) from error
            versions[package] = found.version.partition("+")[0]
            for file in sorted(found.files or (), key=str):
                name = file.as_posix()
                if file.suffix != ".py" or name in _BY_BUILD:
                    continue
                text = Path(str(found.locate_file(file))).read_bytes()
                key = hashlib.sha256(text).digest()
                if text.strip() and len(text) <= _LARGEST and key not in seen:
                    seen.add(key)
                    splits[split].append(text)
    return Documents(splits, versions)


def files(path: Path) -> Documents:
    """A file, split by position; or the files of a folder, each in the split that its content decides.

    Raises:
        ConfigError: there is none, or no text in it.
    """
    if path.is_file():
        text = _text(path)
        if text is None:
            raise ConfigError(f"{path} is no text in UTF-8.")
        return Documents(_by_position(text))
    if not path.is_dir():
        raise ConfigError(f"There is no data at {path}: no such file or folder.")
    inner = sorted(
        file for file in path.rglob("*") if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    texts = [_text(file) for file in inner]
    found = list(dict.fromkeys(text for text in texts if text is not None and text.strip()))
    if not found:
        raise ConfigError(f"{path} has no file of text in UTF-8 ({len(inner)} files).")
    return Documents(_split(found), left_out=texts.count(None))


def of_dataset(label: str, dataset: Any) -> Documents:
    """The column "text" of a dataset."""
    columns = list(getattr(dataset, "column_names", ()))
    if "text" not in columns:
        raise ConfigError(f"{label} has no column 'text': its columns are {', '.join(map(str, columns)) or 'unknown'}.")
    return Documents(_split(list(dict.fromkeys(text.encode() for text in dataset["text"] if text.strip()))))


def _text(path: Path) -> bytes | None:
    found = path.read_bytes()
    if b"\0" in found[:8192]:
        return None
    try:
        found.decode()
    except UnicodeDecodeError:
        return None
    return found


def _split(texts: list[bytes]) -> dict[str, list[bytes]]:
    """By content, so that a document more moves no other; by position where that leaves a split empty."""
    splits: dict[str, list[bytes]] = {name: [] for name in SPLITS}
    for text in texts:
        place = int.from_bytes(hashlib.sha256(text).digest()[:4], "big") % 20
        splits["choose" if place == 0 else "judge" if place == 1 else "train"].append(text)
    return splits if all(splits.values()) else _by_position(_BETWEEN.join(texts))


def _by_position(text: bytes) -> dict[str, list[bytes]]:
    """90, 5 and 5 per cent, each cut behind a line."""
    first, second = (_line_end(text, len(text) * share // 100) for share in (90, 95))
    return {"train": [text[:first]], "choose": [text[first:second]], "judge": [text[second:]]}


def _line_end(text: bytes, place: int) -> int:
    found = text.find(b"\n", place, place + 4096)
    return found + 1 if found >= 0 else place


# Tokens


def tokens(label: str, documents: Documents, folder: Path, tokenizer: Path | None) -> Corpus:
    """The documents as tokens, from files that an earlier call may have made.

    Args:
        label: of the data.
        folder: gets "data" with a file of tokens a split.
        tokenizer: file of `tokenizers`; None for bytes.
    """
    encode, classes, between, words = _encoder(tokenizer)
    digest = hashlib.sha256((documents.digest() + words).encode()).hexdigest()
    place = folder / "data"
    about = place / "tokens.json"
    if not about.is_file() or read_json(about, "The tokens").get("digest") != digest:
        place.mkdir(parents=True, exist_ok=True)
        dtype = np.uint8 if classes <= 1 << 8 else np.uint16 if classes <= 1 << 16 else np.uint32
        for name in SPLITS:
            parts = [np.asarray(ids, dtype) for text in documents.splits[name] for ids in (encode(text), between)]
            _whole(place / f"{name}.npy", partial(np.save, arr=np.concatenate(parts or [np.zeros(0, dtype)])))
        words_of = {"digest": digest, "data": label, "classes": classes, "versions": documents.versions, "left_out": documents.left_out}
        _whole(about, lambda file: file.write(json.dumps(words_of, indent=1).encode()))
    return Corpus(label, "tokens", digest, classes, lambda name, shape: _Windows(place / f"{name}.npy", shape[0]), documents.versions)


def _encoder(tokenizer: Path | None) -> tuple[Callable[[bytes], Iterable[int]], int, Iterable[int], str]:
    """Of a text its ids, how many ids there are, those between documents, and a digest."""
    if tokenizer is None:
        return partial(np.frombuffer, dtype=np.uint8), _BYTES, list(_BETWEEN), "bytes"
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise missing("tokenizers", "train") from error
    try:
        found = tokenizers.Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # which is what that library raises
        raise ConfigError(f"{tokenizer} is no tokenizer's file: {' '.join(str(error).split())[:200]}") from error
    end = next((found.token_to_id(word) for word in ("<|endoftext|>", "</s>", "[SEP]") if found.token_to_id(word) is not None), None)
    between = found.encode("\n\n", add_special_tokens=False).ids if end is None else [end]
    return (
        lambda text: found.encode(text.decode(), add_special_tokens=False).ids,
        found.get_vocab_size(with_added_tokens=True),
        between,
        hashlib.sha256(tokenizer.read_bytes()).hexdigest(),
    )


def _whole(path: Path, write: Callable[[Any], object]) -> None:
    """Write a file that others see whole or not at all."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.new")
    with aside.open("wb") as file:
        write(file)
    os.replace(aside, path)


class _Windows(Dataset[Example]):
    def __init__(self, path: Path, length: int) -> None:
        self.tokens, self.length = np.load(path, mmap_mode="r"), length

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, number: int) -> Example:
        window = self.tokens[number * self.length : (number + 1) * self.length]
        return {"input_ids": torch.from_numpy(window.astype(np.int64))}
