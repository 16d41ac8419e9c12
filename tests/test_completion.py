"""What a shell offers, asked as click's scripts for shells ask."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from laurel_rewrite.app import cli
from laurel_rewrite.app.operator_options import OPERATORS


def ask(shell: str, *words: str) -> str:
    """The answer to the last word of a line, as the shell's script gets it."""
    asked = {"COMP_WORDS": " ".join(["laurel-rewrite", *words]), "COMP_CWORD": str(len(words))}
    if shell == "fish":
        asked["COMP_CWORD"] = words[-1]
    done = subprocess.run(
        [sys.executable, "-m", "laurel_rewrite"], capture_output=True, text=True, check=False,
        env={**os.environ, **asked, "_LAUREL_REWRITE_COMPLETE": f"{shell}_complete"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def offered(*words: str) -> set[str]:
    return {line.partition(",")[2] for line in ask("bash", *words).splitlines() if line.startswith("plain,")}


def test_the_first_word_is_a_verb_or_a_model():
    everything = offered("")
    assert set(cli.COMMANDS) | {"hf:", "timm:", "torchvision:"} == everything
    assert "file," in ask("bash", "")  # or a model's file, which the shell completes itself
    assert offered("op") == {"operators"}
    assert offered("--variant", "mudd") == {"muddformer"}
    assert {"--variant", "--profile-seconds"} <= offered("--")


@pytest.mark.parametrize("words", [("--variant",), ("model.py", "--variant"), ("compare", "model.py", "--variant"), ("operators",)])
def test_names_of_operators(words):
    assert offered(*words, "") == set(OPERATORS) if words != ("operators",) else set(OPERATORS) <= offered(*words, "")
    assert offered(*words, "rw+") == {"rw+lr", "rw+pa", "rw+lr+pa"}


def test_options_of_the_verb_that_stands_there():
    assert offered("model.py", "--target", "ort") == {"ort-cpu", "ort-cuda"}
    assert offered("export", "folder", "--target", "port") == {"portable"}
    assert "--self-check" in offered("profile", "--se")
    assert offered("sites", "--ex") == {"--explain"}
    assert not offered("sites", "--vari")
    assert offered("model.py", "--print") == {"--print-config"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_its_script_and_its_answers(shell):
    done = subprocess.run(
        [sys.executable, "-m", "laurel_rewrite"], capture_output=True, text=True, check=False,
        env={**os.environ, "_LAUREL_REWRITE_COMPLETE": f"{shell}_source"},
    )  # fmt: skip
    if shell == "bash" and shutil.which("bash") is None:
        pytest.skip("click asks bash for its version")
    assert done.returncode == 0, done.stderr
    assert f"_LAUREL_REWRITE_COMPLETE={shell}_complete" in done.stdout
    assert "doctor" in ask(shell, "doc")


def test_a_configuration_that_is_wrong_stands_in_no_ones_way(tmp_path, monkeypatch):
    (tmp_path / "laurel.toml").write_text("nonsense")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(cli.__file__).rpartition("/laurel_rewrite/")[0], os.environ.get("PYTHONPATH", "")])
    )
    monkeypatch.chdir(tmp_path)
    assert offered("profi") == {"profile"}
