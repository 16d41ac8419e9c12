"""Text as tokens: documents in three splits, read once, kept as memory-mapped arrays."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from laurel_rewrite.errors import ConfigError, missing
from laurel_rewrite.files.drafts import replacing
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
"""Files that differ between builds of one version: of torch, it is the only one of 2,371 in which those for CPUs and for CUDA do."""
_LARGEST = 200_000
"""Bytes of a source file; above it is a table that a program wrote."""


@dataclass(frozen=True)
class Documents:
    """Texts by split.

    Attributes:
        splits: the documents of each, in order.
        versions: of the packages that they are from.
        left_out: how many files, or rows, were no text.
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
        ConfigError: one of them is not installed, or not whole.
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
            if found.files is None:
                raise ConfigError(
                    f"builtin:python is made of {package}, too, which was installed without a list of its files. Let pip install it."
                )
            versions[package] = found.version.partition("+")[0]
            for file in sorted(found.files, key=str):
                if file.suffix != ".py" or file.as_posix() in _BY_BUILD:
                    continue
                text = _read(Path(str(file.locate())))
                key = hashlib.sha256(text).digest()
                if text.strip() and len(text) <= _LARGEST and key not in seen:
                    seen.add(key)
                    splits[split].append(text)
    return Documents(splits, versions)


def files(path: Path, without: Path) -> Documents:
    """A file, split by position; or the files of a folder, each in the split that its content decides.

    Args:
        path: of the file or folder.
        without: a folder of results, which may lie in that of the texts.

    Raises:
        ConfigError: there is none, or no text in it, or it cannot be read.
    """
    if path.is_file():
        text = _text(path)
        if text is None:
            raise ConfigError(f"{path} is no text in UTF-8.")
        return Documents(_by_position(text))
    if not path.is_dir():
        raise ConfigError(f"There is no data at {path}: no such file or folder.")
    inner = sorted(
        file
        for file in path.rglob("*")
        if file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and not file.absolute().is_relative_to(without.absolute())
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
    rows = list(dataset["text"])
    texts = [row for row in rows if row is not None]
    strange = next((row for row in texts if not isinstance(row, str)), None)
    if strange is not None:
        raise ConfigError(f"{label}: its column 'text' holds no texts, but {type(strange).__name__}: {strange!r:.80}.")
    found = list(dict.fromkeys(text.encode() for text in texts if text.strip()))
    return Documents(_split(found), left_out=len(rows) - len(texts))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}, which belongs to the data, cannot be read: {error.strerror}.") from error


def _text(path: Path) -> bytes | None:
    found = _read(path)
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
    parts = {"train": text[:first], "choose": text[first:second], "judge": text[second:]}
    return {name: [document for document in part.split(_BETWEEN) if document] for name, part in parts.items()}


def _line_end(text: bytes, place: int) -> int:
    """Behind a line that ends near there, else behind a character."""
    found = text.find(b"\n", place, place + 4096)
    while found < 0 and place < len(text) and text[place] & 0xC0 == 0x80:
        place += 1
    return found + 1 if found >= 0 else place


# Tokens


def tokens(label: str, documents: Documents, folder: Path, tokenizer: Path | None) -> Corpus:
    """The documents as tokens, from files that an earlier call may have made.

    Args:
        label: of the data.
        folder: gets "data" with a folder of these tokens, under their digest, so that a file is never that of other data.
        tokenizer: file of `tokenizers`; None for bytes.

    Raises:
        ConfigError: the tokenizer's file is none, or the tokens cannot be written.
        MissingPackageError: tokenizers is needed and not installed.
    """
    encode, classes, between, words = _encoder(tokenizer)
    digest = hashlib.sha256((documents.digest() + words).encode()).hexdigest()
    place = folder / "data" / digest[:16]
    if not all((place / name).is_file() for name in (*(f"{name}.npy" for name in SPLITS), "tokens.json")):
        dtype = np.uint8 if classes <= 1 << 8 else np.uint16 if classes <= 1 << 16 else np.uint32
        about = {"digest": digest, "data": label, "classes": classes, "versions": documents.versions, "left_out": documents.left_out}
        with replacing(place) as draft:
            for name in SPLITS:
                parts = [np.asarray(ids, dtype) for text in documents.splits[name] for ids in (encode(text), between)]
                np.save(draft / f"{name}.npy", np.concatenate(parts or [np.zeros(0, dtype)]))
            (draft / "tokens.json").write_text(json.dumps(about, indent=1))
    return Corpus(label, "tokens", digest, classes, lambda name, shape: _Windows(place / f"{name}.npy", shape[0]), documents.versions)


def _encoder(tokenizer: Path | None) -> tuple[Callable[[bytes], Iterable[int]], int, Iterable[int], str]:
    """Of a text its ids, how many ids there are, those between documents, and a digest."""
    if tokenizer is None:
        return partial(np.frombuffer, dtype=np.uint8), _BYTES, list(_BETWEEN), "bytes"
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise missing("tokenizers", None) from error
    try:
        found = tokenizers.Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # which is what that library raises
        raise ConfigError(f"{tokenizer} is no tokenizer's file: {' '.join(str(error).split())[:200]}") from error
    found.no_truncation()  # which would drop the rest of a document
    found.no_padding()
    end = next((found.token_to_id(word) for word in ("<|endoftext|>", "</s>", "[SEP]") if found.token_to_id(word) is not None), None)
    between = found.encode("\n\n", add_special_tokens=False).ids if end is None else [end]
    return (
        lambda text: found.encode(text.decode(), add_special_tokens=False).ids,
        max(found.get_vocab(with_added_tokens=True).values(), default=-1) + 1,  # ids may leave gaps
        between,
        hashlib.sha256(tokenizer.read_bytes()).hexdigest(),
    )


class _Windows(Dataset[Example]):
    def __init__(self, path: Path, length: int) -> None:
        self.tokens, self.length = np.load(path, mmap_mode="r"), length

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, number: int) -> Example:
        window = self.tokens[number * self.length : (number + 1) * self.length]
        return {"input_ids": torch.from_numpy(window.astype(np.int64))}
