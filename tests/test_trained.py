"""Folders that training left: exported and profiled by the command."""

from __future__ import annotations

import json
import re

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import away_from_start
from test_cli import NET
from torch import nn
from toys import D

import laurel_rewrite


class Net(nn.Module):
    """Of a test's module, which is no file that offers inputs."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(D, D)

    def forward(self, x, scale):
        return (x + self.a(x)) * scale


def computed(path, *inputs: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {one.name: value.numpy() for one, value in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(session.run(None, feeds)[0])


@pytest.fixture
def saved(here, tmp_path):
    """A folder of the main job's model after some training."""
    (tmp_path / "net.py").write_text(NET)
    built = here("net.py", "--rank", "4", "--profile-seconds", "0", "--out", "job")
    assert built.returncode == 0, built.stderr
    model = away_from_start(laurel_rewrite.load(tmp_path / "job"))
    laurel_rewrite.save(model, tmp_path / "trained")
    return model.eval()


def test_what_was_trained_is_exported(saved, here, tmp_path):
    done = here("export", "trained", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"folder": "trained", "files": ["laurel.onnx"], "target": "ort-cpu", "verified": True}
    x = torch.randn(5, D)
    torch.testing.assert_close(computed(tmp_path / "laurel.onnx", x), saved(x), rtol=1e-4, atol=1e-5)
    again = here("export", "trained")
    assert again.returncode == 2
    assert "laurel.onnx is there already" in again.stderr
    functions = here("export", "trained", "--target", "portable", "--force")
    assert functions.returncode == 0, functions.stderr
    assert functions.stdout == "Written to laurel.onnx\n"
    assert onnx.load(tmp_path / "laurel.onnx").functions
    assert here("export", "trained", "--onnx-functions", "inline", "--out", "b.onnx").returncode == 2
    assert here("export", "job", "--out", "job.onnx").returncode == 0


def test_a_folder_is_profiled_beside_the_model_without_its_connections(saved, here, tmp_path):
    words = ("--profile-seconds", "0.05", "--no-one-more-layer", "--out", "report")
    done = here("profile", "trained", *words, "--shape", "batch=1,3", "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    rows = data["profile"]["rows"]
    assert [row["name"] for row in rows] == ["trained without LAuReL", "trained"]
    assert [row["path"] for row in rows] == ["trained", "trained"]
    assert data["title"] == "trained against trained without LAuReL"
    assert not list((tmp_path / "report").glob("graph-*"))
    assert here("export", "trained").returncode == 0
    beside = here("profile", "laurel.onnx", "trained", *words, "--json")
    assert beside.returncode == 0, beside.stderr
    assert [row["name"] for row in json.loads(beside.stdout)["profile"]["rows"]] == ["laurel.onnx", "trained"]


def test_a_folder_that_knows_no_inputs_takes_some(here, tmp_path):
    inputs = {"x": torch.randn(2, D), "scale": torch.rand(2, 1)}
    model = away_from_start(laurel_rewrite.rewrite(Net(), (), inputs, variant="lr", rank=2))
    laurel_rewrite.save(model, tmp_path / "pickled")
    refused = here("export", "pickled")
    assert refused.returncode == 2
    assert "--inputs FILE.npz" in refused.stderr
    np.savez(tmp_path / "inputs.npz", **{name: value.numpy() for name, value in inputs.items()})
    done = here("export", "pickled", "--inputs", "inputs.npz")
    assert done.returncode == 0, done.stderr
    found = computed(tmp_path / "laurel.onnx", *inputs.values())
    torch.testing.assert_close(found, model.eval()(**inputs), rtol=1e-4, atol=1e-5)
    measured = here("profile", "pickled", "--inputs", "inputs.npz", "--profile-seconds", "0.05", "--no-one-more-layer")
    assert measured.returncode == 0, measured.stderr
    assert "pickled without LAuReL" in measured.stdout


def test_a_checkpoint_of_transformers(here, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=64, bos_token_id=0, eos_token_id=0)
    plain = GPT2LMHeadModel(config)
    plain.save_pretrained(tmp_path / "plain")
    model = laurel_rewrite.rewrite(plain, (), {"input_ids": torch.randint(64, (2, 9))}, variant="rw+lr", rank=4)
    away_from_start(model).save_pretrained(tmp_path / "checkpoint")
    done = here("export", "checkpoint", "--with-past")
    assert done.returncode == 0, done.stderr
    names = {one.name for one in onnx.load(tmp_path / "laurel.onnx").graph.input}
    assert {"input_ids", "past_key_values.0.key"} <= names
    measured = here("profile", "checkpoint", "--prompt", "8", "--past", "4", "--profile-seconds", "0.05", "--no-one-more-layer", "--json")
    assert measured.returncode == 0, measured.stderr
    profile = json.loads(measured.stdout)["profile"]
    assert [row["name"] for row in profile["rows"]] == ["checkpoint without LAuReL", "checkpoint"]
    assert len(profile["phases"]) == 2
    other = here("export", "plain", "--out", "b.onnx")
    assert other.returncode == 2
    assert "as MODEL, it is hf:plain" in other.stderr
    assert re.search(r"^load: GPT2LMHeadModel", done.stderr, re.M)


def test_other_folders_are_refused(here, tmp_path):
    (tmp_path / "empty").mkdir()
    for words in (("export", "empty"), ("profile", "empty")):
        done = here(*words)
        assert done.returncode == 2
        assert "neither laurel_config.json" in done.stderr
    assert "There is no folder nowhere" in here("export", "nowhere").stderr
