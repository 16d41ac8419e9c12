"""Data to train on: three splits that share nothing, and a digest that says what it was."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from laurel_rewrite import ConfigError
from laurel_rewrite.lab.corpora import corpus, own
from laurel_rewrite.lab.images import SHAPES
from laurel_rewrite.lab.splits import SPLITS
from laurel_rewrite.lab.text import python_sources

LINES = "".join(f"line {n} of a text that is long enough\n" for n in range(400))


@pytest.fixture
def folder(tmp_path):
    inner = tmp_path / "texts"
    inner.mkdir()
    for n in range(60):
        (inner / f"{n}.txt").write_text(f"document {n}\n" * (n + 20))
    return inner


def digest(path, tmp_path, **options):
    return corpus(str(path), "tokens", folder=tmp_path / "out", **options).digest


def test_sources_of_packages_are_split_by_package_and_no_text_is_in_two():
    found = python_sources()
    sizes = {name: sum(map(len, texts)) for name, texts in found.splits.items()}
    assert sizes["train"] > 50_000_000
    assert min(sizes["choose"], sizes["judge"]) > 4_000_000
    texts = [text for name in SPLITS for text in found.splits[name]]
    assert len(set(texts)) == len(texts)
    assert found.versions["torch"] == torch.__version__.partition("+")[0]
    assert not any(b"__version__ = '2." in text for text in found.splits["train"] if b"git_version" in text)  # torch/version.py


def test_a_file_is_split_by_position_at_lines(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(LINES)
    found = corpus(str(path), "tokens", folder=tmp_path / "out")
    parts = {name: found.split(name, (16,)) for name in SPLITS}
    whole = {name: bytes(parts[name].tokens).rstrip(b"\0").decode() for name in SPLITS}
    assert "".join(whole[name] for name in SPLITS) == LINES
    assert whole["train"].endswith("\n")
    assert len(parts["train"]) == len(parts["train"].tokens) // 16
    item = parts["train"][1]["input_ids"]
    assert item.dtype == torch.int64
    assert bytes(item.tolist()).decode() == LINES[16:32]
    assert isinstance(parts["train"].tokens, np.memmap)


def test_files_of_a_folder_are_split_by_what_they_say(folder, tmp_path):
    before = corpus(str(folder), "tokens", folder=tmp_path / "before").split("judge", (8,)).tokens.copy()
    (folder / "again.txt").write_text((folder / "3.txt").read_text())  # the same text counts once
    (folder / "picture.png").write_bytes(b"\x89PNG\0\0")
    (folder / ".hidden").write_text("no")
    after = corpus(str(folder), "tokens", folder=tmp_path / "after")
    assert np.array_equal(after.split("judge", (8,)).tokens, before)
    assert json.loads((tmp_path / "after" / "data" / "tokens.json").read_text())["left_out"] == 1
    (folder / "3.txt").write_text("another text")
    assert corpus(str(folder), "tokens", folder=tmp_path / "third").digest != after.digest


def test_the_digest_is_of_text_split_and_tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path / "text.txt"
    path.write_text(LINES)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"line": 0, "of": 1, "[UNK]": 2, "</s>": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "words.json"))
    first, same = digest(path, tmp_path), digest(path, tmp_path)
    with_words = corpus(str(path), "tokens", folder=tmp_path / "out", tokenizer=tmp_path / "words.json")
    assert first == same
    assert with_words.classes == 4
    assert with_words.split("train", (4,))[0]["input_ids"].tolist() == [0, 2, 1, 2]
    assert with_words.split("judge", (4,)).tokens[-1] == 3  # the end of a document
    path.write_text(LINES[:-2] + "!\n")
    assert len({first, with_words.digest, digest(path, tmp_path)}) == 3


def test_tokens_are_kept_and_made_again_only_where_the_text_changed(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(LINES)
    digest(path, tmp_path)
    kept = (tmp_path / "out" / "data" / "train.npy").stat().st_mtime_ns
    digest(path, tmp_path)
    assert (tmp_path / "out" / "data" / "train.npy").stat().st_mtime_ns == kept
    path.write_text(LINES * 2)
    digest(path, tmp_path)
    assert (tmp_path / "out" / "data" / "train.npy").stat().st_mtime_ns != kept


@pytest.mark.parametrize("name", ["digits", "shapes"])
def test_images_have_the_shape_that_the_model_takes(name, tmp_path):
    found = corpus(f"builtin:{name}", "images", folder=tmp_path)
    assert found.classes == len(SHAPES)
    for shape in ((3, 32, 32), (1, 16, 24), (3, 96, 96)):
        item = found.split("train", shape)[7]
        assert item["pixel_values"].shape == shape
        assert item["pixel_values"].dtype == torch.float32
        assert item["pixel_values"].is_contiguous()
    again = corpus(f"builtin:{name}", "images", folder=tmp_path)
    assert again.digest == found.digest
    part = found.split("judge", (3, 32, 32))
    assert torch.equal(again.split("judge", (3, 32, 32))[5]["pixel_values"], part[5]["pixel_values"])
    labels = [int(part[n]["labels"]) for n in range(200)]
    assert {labels.count(c) > 5 for c in range(10)} == {True}
    pictures = {name: found.split(name, (1, 8, 8))[n]["pixel_values"].numpy().tobytes() for name in SPLITS for n in range(3)}
    assert len(set(pictures.values())) == len(pictures)


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        ("nowhere", "tokens", "There is no data at nowhere"),
        ("builtin:pythn", "tokens", "no built-in data 'pythn'. Nearest: python"),
        ("builtin:digits", "tokens", "builtin:digits is images, and the model takes tokens: builtin:python would do"),
        ("builtin:python", "images", "builtin:digits or builtin:shapes would do"),
        ("empty", "tokens", "empty has no file of text"),
        ("binary.txt", "tokens", "binary.txt is no text"),
        ("text.txt", "images", "images are builtin:digits"),
    ],
)
def test_data_that_cannot_be_meant(data, kind, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xfa" * 9)
    (tmp_path / "text.txt").write_text(LINES)
    with pytest.raises(ConfigError, match=message):
        corpus(data, kind, folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_is_none(tmp_path):
    (tmp_path / "text.txt").write_text(LINES)
    (tmp_path / "words.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"words.json is no tokenizer's file"):
        corpus(str(tmp_path / "text.txt"), "tokens", folder=tmp_path, tokenizer=tmp_path / "words.json")
    with pytest.raises(ConfigError, match="--tokenizer is for text"):
        corpus("builtin", "images", folder=tmp_path, tokenizer=tmp_path / "words.json")


def test_the_data_of_a_model_file():
    data = {name: [{"x": torch.full((3,), float(n))} for n in range(4)] for name in SPLITS}
    found = own(data.__getitem__, "model.py")
    assert found.split("judge", ()) is data["judge"]
    data["judge"][3]["x"][0] = 9
    assert own(data.__getitem__, "model.py").digest != found.digest
    with pytest.raises(ConfigError, match=r"model.py: dataset\('train'\) is no map-style dataset"):
        own(lambda name: None, "model.py")
