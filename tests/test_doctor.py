"""What is said of an installation: whole, with a package less, with one of another version, and where something does not work."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata

import pytest

from laurel_rewrite.app import doctor, trials
from laurel_rewrite.app.doctor import Package
from laurel_rewrite.errors import reason


@pytest.fixture
def waits(monkeypatch):
    """torch.compile is not waited for."""
    monkeypatch.setattr(doctor, "_begin_compiling", lambda: subprocess.Popen(["sleep", "60"], stdout=subprocess.PIPE, text=True))


def test_a_whole_installation(here, waits):
    done = here("doctor", "--json", "--wait", "0")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["healthy"] is True
    assert found["python"]["installed"] == "{}.{}.{}".format(*sys.version_info[:3])
    named = {(one["name"], one["extra"]) for one in found["packages"]}
    assert {("torch", ""), ("onnxruntime", ""), ("timm", "zoo"), ("onnx2torch", "emit-torch")} <= named
    assert not {extra for _, extra in named} & {"dev"}
    torch = next(one for one in found["packages"] if one["name"] == "torch")
    assert torch["installed"] == metadata.version("torch")
    assert torch["wanted"].startswith(">=")
    assert {"processor", "PyTorch", "GPU", "onnxruntime", "C++ compiler", "cache"} <= set(found["machine"])
    assert "CPUExecutionProvider" in found["machine"]["onnxruntime"]
    assert [trial["works"] for trial in found["works"]] == [True, True, None]
    assert "--wait" in found["works"][2]["detail"]


def test_what_does_not_work_is_said_with_its_reason(here, waits, monkeypatch):
    def broken() -> str:
        raise RuntimeError("no such symbol\nand more")

    monkeypatch.setattr(trials, "exported", broken)
    done = here("doctor", "--quiet", "--wait", "0")
    assert done.returncode == 1
    assert done.stderr == ""
    assert "works   capture, rewrite, verify" in done.stdout
    assert "fails   export, run in onnxruntime" in done.stdout
    assert "RuntimeError: no such symbol" in done.stdout
    assert "and more" not in done.stdout


def test_versions_are_held_against_the_metadata(monkeypatch):
    versions = {"torch": "2.12.1", "onnx": "1.23.9", "timm": ""}
    known = doctor.metadata_of
    monkeypatch.setattr(doctor, "metadata_of", lambda name: versions.get(name, known(name)))
    _, packages, _ = doctor._packages()
    states = {one.name: one.state for one in packages}
    assert states["torch"] == "outside what was tested"
    assert states["onnx"] == "ok"
    assert states["timm"] == 'missing: pip install "laurel-rewrite[zoo]"'
    assert Package("torch", ">=2.13,<2.14", "2.13.0+cpu").state == "ok"
    assert Package("torch", ">=2.13,<2.14", "").state == "missing"


def test_a_folder_that_is_not_installed(monkeypatch):
    def gone(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", gone)
    python, packages, notes = doctor._packages()
    assert python.state == "ok"
    assert packages == ()
    assert "is not installed" in notes[0]


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LAUREL_REWRITE_CACHE", str(tmp_path / "file"))
    assert "cannot be written" in doctor._cache()
    monkeypatch.setenv("LAUREL_REWRITE_CACHE", "0")
    assert doctor._cache() == "none is kept"


def test_the_compiled_model_computes_the_same(monkeypatch):
    import torch

    monkeypatch.setattr(torch, "compile", lambda model, **settings: model)
    assert "computes" in trials.compiled()
    monkeypatch.setattr(torch, "compile", lambda model, **settings: lambda x: model(x) + 1)
    with pytest.raises(AssertionError) as caught:
        trials.compiled()
    assert reason(caught.value).startswith("AssertionError: Tensor-likes are not close")


def test_what_only_developers_need_is_not_missed():
    (_, packages, _), extras = doctor._packages(), set(metadata.metadata("laurel-rewrite").get_all("Provides-Extra"))
    assert {"dev", "test", "docs"} <= extras
    assert {package.extra for package in packages} == {"", *extras} - {"dev", "test", "docs"}
