"""Data to train on: three splits that share nothing, and a digest that says what it was."""

from __future__ import annotations

import importlib.metadata
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from processes import together

from laurel_rewrite import ConfigError
from laurel_rewrite.lab import images, text
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


def said(found, name):
    return bytes(found.split(name, (1,)).tokens).rstrip(b"\0").decode()


def kept(folder):
    return json.loads(next((folder / "data").glob("*/tokens.json")).read_text())


@pytest.fixture
def words(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    found = tokenizers.Tokenizer(tokenizers.models.WordLevel({"line": 0, "of": 1, "[UNK]": 2, "</s>": 3}, unk_token="[UNK]"))
    found.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    found.save(str(tmp_path / "words.json"))
    return tmp_path / "words.json"


def test_sources_of_packages_are_split_by_package_and_no_text_is_in_two():
    found = python_sources()
    sizes = {name: sum(map(len, texts)) for name, texts in found.splits.items()}
    assert sizes["train"] > 50_000_000
    assert min(sizes["choose"], sizes["judge"]) > 4_000_000
    texts = [text for name in SPLITS for text in found.splits[name]]
    assert len(set(texts)) == len(texts)
    assert found.versions["torch"] == torch.__version__.partition("+")[0]
    assert not any(b"__version__ = '2." in text for text in found.splits["train"] if b"git_version" in text)  # torch/version.py


def without_files(monkeypatch, change):
    real = importlib.metadata.distribution

    def distribution(name):
        found = real(name)
        return SimpleNamespace(version=found.version, files=change(found.files)) if name == "rich" else found

    monkeypatch.setattr(text, "_PYTHON", {"train": ("click",), "choose": ("tomlkit",), "judge": ("rich",)})
    monkeypatch.setattr(importlib.metadata, "distribution", distribution)


def test_packages_that_are_not_whole(monkeypatch):
    without_files(monkeypatch, lambda files: None)
    with pytest.raises(ConfigError, match="rich, too, which was installed without a list of its files"):
        python_sources()
    without_files(monkeypatch, lambda files: [importlib.metadata.PackagePath("rich/gone.py")])
    monkeypatch.setattr(importlib.metadata.PackagePath, "locate", lambda self: f"nowhere/{self}")
    with pytest.raises(ConfigError, match=r"nowhere/rich/gone\.py, which belongs to the data, cannot be read: No such file"):
        python_sources()
    monkeypatch.setattr(text, "_PYTHON", {"train": (), "choose": (), "judge": ("no-such-package",)})
    with pytest.raises(ConfigError, match="no-such-package, too, which is not installed"):
        python_sources()


def test_a_file_is_split_by_position_at_lines(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(LINES)
    found = corpus(str(path), "tokens", folder=tmp_path / "out")
    parts = {name: found.split(name, (16,)) for name in SPLITS}
    assert "".join(said(found, name) for name in SPLITS) == LINES
    assert said(found, "train").endswith("\n")
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
    assert kept(tmp_path / "after")["left_out"] == 1
    (folder / "3.txt").write_text("another text")
    assert corpus(str(folder), "tokens", folder=tmp_path / "third").digest != after.digest


def test_a_text_without_lines_is_cut_between_characters(tmp_path, words):
    for lead in range(3):  # one of them would be cut within
        path = tmp_path / f"{lead}.txt"
        path.write_text("x" * lead + "\N{EURO SIGN}" * 9000)
        found = corpus(str(path), "tokens", folder=tmp_path / "out")
        assert "".join(said(found, name) for name in SPLITS) == path.read_text()
        corpus(str(path), "tokens", folder=tmp_path / "out", tokenizer=words)


def test_a_few_files_are_split_by_position_and_stay_documents(tmp_path, words):
    inner = tmp_path / "texts"
    inner.mkdir()
    for name in "ab":
        (inner / name).write_text(f"line of {name}\n" * 50)
    found = corpus(str(inner), "tokens", folder=tmp_path / "out", tokenizer=words).split("train", (1,)).tokens
    assert found.tolist().count(3) == 2  # an end behind each, and not a word for the byte between them
    assert min(len(corpus(str(inner), "tokens", folder=tmp_path / "out").split(name, (8,))) for name in SPLITS) > 2


def test_results_among_the_texts_are_no_data(folder):
    out = folder / "comparison"
    first = corpus(str(folder), "tokens", folder=out).digest
    (out / "report.txt").write_text("a report")
    assert corpus(str(folder), "tokens", folder=out).digest == first


def test_the_digest_is_of_text_split_and_tokenizer(tmp_path, words):
    path = tmp_path / "text.txt"
    path.write_text(LINES)
    first, same = digest(path, tmp_path), digest(path, tmp_path)
    with_words = corpus(str(path), "tokens", folder=tmp_path / "out", tokenizer=words)
    assert first == same
    assert with_words.classes == 4
    assert with_words.split("train", (4,))[0]["input_ids"].tolist() == [0, 2, 1, 2]
    assert with_words.split("judge", (4,)).tokens[-1] == 3  # the end of a document
    path.write_text(LINES[:-2] + "!\n")
    assert len({first, with_words.digest, digest(path, tmp_path)}) == 3


def test_a_tokenizer_drops_nothing_and_adds_nothing(tmp_path, words):
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path / "text.txt"
    path.write_text(LINES)
    plain = corpus(str(path), "tokens", folder=tmp_path / "out", tokenizer=words).split("train", (1,)).tokens
    cutting = tokenizers.Tokenizer.from_file(str(words))
    cutting.enable_truncation(16)
    cutting.enable_padding(pad_to_multiple_of=64)
    cutting.save(str(tmp_path / "cutting.json"))
    found = corpus(str(path), "tokens", folder=tmp_path / "out", tokenizer=tmp_path / "cutting.json")
    assert np.array_equal(found.split("train", (1,)).tokens, plain)


def test_a_vocabulary_may_leave_gaps(tmp_path, words):
    found = json.loads(words.read_text())
    found["model"]["vocab"]["a"] = 300
    words.write_text(json.dumps(found))
    path = tmp_path / "text.txt"
    path.write_text(LINES)
    found = corpus(str(path), "tokens", folder=tmp_path / "out", tokenizer=words)
    assert found.classes == 301
    assert found.split("train", (4,)).tokens.max() == 300


def test_tokens_are_kept_and_made_again_only_where_the_text_changed(tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text(LINES)
    digest(path, tmp_path)
    made = []
    real = np.save
    monkeypatch.setattr(np, "save", lambda file, array: made.append(file.name) or real(file, array))
    digest(path, tmp_path)
    assert made == []
    path.write_text(LINES * 2)
    digest(path, tmp_path)
    assert made == [f"{name}.npy" for name in SPLITS]


def test_tokens_are_never_those_of_another_text_whose_making_was_stopped(tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text(LINES)
    first = digest(path, tmp_path)
    real = np.save

    def stopped(file, array):
        if file.name == "choose.npy":
            raise KeyboardInterrupt
        real(file, array)

    path.write_text(LINES.replace("text", "another"))
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", stopped)
        with pytest.raises(KeyboardInterrupt):
            digest(path, tmp_path)
    path.write_text(LINES)
    found = corpus(str(path), "tokens", folder=tmp_path / "out")
    assert found.digest == first
    assert "".join(said(found, name) for name in SPLITS) == LINES
    assert len(list((tmp_path / "out" / "data").iterdir())) == 1


def _prepared(folder, rank):
    whole = []
    for turn in range(12):
        path = folder / f"{turn}-{rank if turn % 2 else 'both'}.txt"  # the same text, or each another
        path.write_text(f"turn {path.stem} of a text\n" * 20_000)
        torch.distributed.barrier()
        found = corpus(str(path), "tokens", folder=folder / "out")
        whole.append("".join(said(found, name) for name in SPLITS) == path.read_text())
        torch.distributed.barrier()
    torch.save(whole, folder / str(rank))


def test_two_processes_that_prepare_at_once_see_whole_files(tmp_path):
    assert together(_prepared, tmp_path) == [[True] * 12] * 2
    assert not list((tmp_path / "out" / "data").glob("*/.laurel-*"))


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
    assert {labels.count(c) == 20 if name == "shapes" else labels.count(c) > 5 for c in range(10)} == {True}
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


class Rows(dict):
    """As `datasets` gives columns."""

    @property
    def column_names(self):
        return list(self)


def test_rows_of_text():
    found = text.of_dataset("rows", Rows(text=["one", "two", "one", None, " "]))
    assert sum(len(texts) for texts in found.splits.values()) >= 2
    assert b"".join(text for name in SPLITS for text in found.splits[name]).count(b"one") == 1
    assert found.left_out == 1
    with pytest.raises(ConfigError, match="rows: its column 'text' holds no texts, but int: 3"):
        text.of_dataset("rows", Rows(text=["one", 3]))
    with pytest.raises(ConfigError, match="rows has no column 'text': its columns are words"):
        text.of_dataset("rows", Rows(words=["one"]))


@pytest.mark.parametrize(("labels", "message"), [([0, -1], "row 1 is -1"), ([None], "row 0 is None"), (["cat"], "row 0 is 'cat'")])
def test_labels_that_are_none(labels, message):
    with pytest.raises(ConfigError, match=message):
        images.of_dataset("rows", Rows(image=[None] * len(labels), label=labels))


def test_images_of_datasets_count_in_the_digest_each(tmp_path):
    datasets = pytest.importorskip("datasets")
    pictures = np.random.RandomState(0).randint(0, 255, (1200, 8, 8, 3), np.uint8)

    def found(name, pictures):
        columns = {"image": pictures, "label": [n % 7 for n in range(len(pictures))]}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(7)})
        datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / name)
        return corpus(f"datasets:{tmp_path / name}", "images", folder=tmp_path)

    first = found("first", pictures)
    assert first.classes == 7
    assert [len(first.split(name, (3, 8, 8))) for name in SPLITS] == [1080, 60, 60]
    shown = first.split("judge", (3, 8, 8))[0]["pixel_values"].permute(1, 2, 0)
    assert any(np.array_equal(np.rint((shown.numpy() + 1) * 127.5), picture) for picture in pictures)
    assert found("again", pictures).digest == first.digest
    pictures[1, 0, 0, 0] ^= 1
    assert found("other", pictures).digest != first.digest
    with pytest.raises(ConfigError, match="row 0 has no image that can be read: None"):
        found("none", [None] * 20)
    datasets.Dataset.from_dict({"image": [[0.0]] * 20, "label": [0] * 20}).save_to_disk(tmp_path / "numbers")
    with pytest.raises(ConfigError, match="holds no images"):
        corpus(f"datasets:{tmp_path / 'numbers'}", "images", folder=tmp_path)
    datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": ["one"]})}).save_to_disk(tmp_path / "parts")
    with pytest.raises(ConfigError, match="no split 'train': its splits are test"):
        corpus(f"datasets:{tmp_path / 'parts'}", "tokens", folder=tmp_path)


def test_the_data_of_a_model_file():
    data = {name: [{"x": torch.full((3,), float(n))} for n in range(4)] for name in SPLITS}
    found = own(data.__getitem__, "model.py")
    assert found.split("judge", ()) is data["judge"]
    data["judge"][3]["x"][0] = 9
    assert own(data.__getitem__, "model.py").digest != found.digest
    with pytest.raises(ConfigError, match=r"model.py: dataset\('train'\) is no map-style dataset"):
        own(lambda name: None, "model.py")
