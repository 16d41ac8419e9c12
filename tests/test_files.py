"""Folders of results: whole or as they were, by one run at a time, nothing of the user's replaced unasked, the same bytes everywhere."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from test_cli import NET
from toys import CASES, D

from laurel_rewrite import ConfigError, load, rewrite, save
from laurel_rewrite.detection.site import portable
from laurel_rewrite.files import drafts
from laurel_rewrite.files.drafts import READY, check_out, reading, replacing
from laurel_rewrite.files.manifest import MANIFEST, Manifest
from laurel_rewrite.plan import Plan
from laurel_rewrite.sources.models import build
from tools.fuzz import kills


def written(folder: Path, files: dict[str, str], kind: str = "rewrite", **options) -> None:
    with replacing(folder, kind, **options) as draft:
        for name, text in files.items():
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            (draft / name).write_text(text)


def content(folder: Path) -> dict[str, str]:
    """Everything in a folder, scratch included, but for the manifest."""
    return {str(f.relative_to(folder)): f.read_text() for f in folder.rglob("*") if f.is_file() and f.name != MANIFEST}


def whole(folder: Path) -> bool:
    manifest = Manifest.read(folder)
    return manifest is not None and all(manifest.holds(folder, name) for name in manifest.files)


@pytest.fixture(scope="module")
def model():
    return rewrite(CASES["plain"].make(), (torch.randn(2, 5, D),), rank=4)


# One result after another


def test_a_new_result_takes_the_place_of_the_old_one_as_a_whole(tmp_path):
    written(tmp_path, {"a": "1", "sub/b": "1"})
    (tmp_path / "notes.txt").write_text("the user's")
    written(tmp_path, {"a": "2", "c": "2"})
    assert content(tmp_path) == {"a": "2", "c": "2", "notes.txt": "the user's"}
    assert not (tmp_path / "sub").exists()
    assert whole(tmp_path)


@pytest.mark.parametrize(
    "touch",
    [
        lambda d: (d / "a").write_text("edited"),
        lambda d: (d / "sub" / "b").write_text("edited, and not in the new result"),
        lambda d: (d / MANIFEST).unlink(),
        lambda d: (d / MANIFEST).write_text("{"),
        lambda d: ((d / "a").unlink(), (d / "a").symlink_to("/etc/hostname")),
        lambda d: (d / "c").write_text("the user's"),
    ],
)
def test_what_is_not_an_earlier_result_unchanged_is_replaced_only_when_asked(touch, tmp_path):
    written(tmp_path, {"a": "1", "sub/b": "1"})
    touch(tmp_path)
    before = content(tmp_path)
    with pytest.raises(ConfigError, match=r"--force"):
        written(tmp_path, {"a": "2", "c": "2"})
    assert content(tmp_path) == before
    written(tmp_path, {"a": "2", "c": "2"}, force=True)
    assert content(tmp_path).items() >= {"a": "2", "c": "2"}.items()
    assert whole(tmp_path)
    assert not (tmp_path / "a").is_symlink()


def test_the_same_bytes_are_no_conflict(tmp_path):
    (tmp_path / "net.py").write_text("same")
    written(tmp_path, {"net.py": "same", "a": "1"})
    assert whole(tmp_path)


def test_a_trained_model_is_replaced_by_another_one_alone(tmp_path):
    written(tmp_path, {"a": "1"}, "rewrite")
    written(tmp_path, {"a": "2"}, "save")
    for kind in ("rewrite", "profile"):
        with pytest.raises(ConfigError, match="may have been trained"):
            written(tmp_path, {"a": "3"}, kind)
        with pytest.raises(ConfigError, match="may have been trained"):
            check_out(tmp_path, kind, ["a"])
    written(tmp_path, {"a": "4"}, "save")
    written(tmp_path, {"a": "5"}, "rewrite", force=True)
    assert content(tmp_path) == {"a": "5"}


def test_what_a_run_reads_is_neither_replaced_nor_removed(tmp_path):
    written(tmp_path, {"a": "1", "b": "1"})
    written(tmp_path, {"c": "2"}, keep=[tmp_path / "b"])
    assert content(tmp_path) == {"b": "1", "c": "2"}
    with pytest.raises(ConfigError, match=r"which is read"):
        written(tmp_path, {"b": "2"}, keep=[tmp_path / "b"], force=True)


def test_a_directory_or_a_link_in_the_way_is_named_before_anything_moves(tmp_path):
    out = tmp_path / "out"
    written(out, {"a": "1"})
    (out / "b").mkdir()
    with pytest.raises(ConfigError, match="b is a directory"):
        written(out, {"a": "2", "b": "2"}, force=True)
    (out / "b").rmdir()
    (out / "sub").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="leads out of the folder"):
        written(out, {"a": "2", "sub/x": "2"}, force=True)
    assert (out / "a").read_text() == "1"
    assert not (tmp_path / "x").exists()


def test_all_files_have_one_mode(tmp_path, model):
    save(model, tmp_path)
    (tmp_path / "reference").write_text("")
    assert {file.stat().st_mode for file in tmp_path.iterdir()} == {(tmp_path / "reference").stat().st_mode}


# Runs that end before their end


def test_an_error_leaves_the_old_result(tmp_path):
    written(tmp_path, {"a": "1"})
    with pytest.raises(IsADirectoryError):
        written(tmp_path, {"a": "2", ".": "3"})
    with pytest.raises(ConfigError, match="No space left on device"), replacing(tmp_path, "rewrite"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert content(tmp_path) == {"a": "1"}
    assert whole(tmp_path)


def test_a_draft_of_a_dead_run_is_removed_and_one_of_a_living_run_stays(tmp_path):
    (tmp_path / ".laurel-deadbeef").mkdir()
    (tmp_path / ".laurel-deadbeef" / "a").write_text("half")
    (tmp_path / ".laurel-deadbeef-unlowered.onnx").write_text("half")
    (tmp_path / ".laurel-of-the-user").write_text("")
    with replacing(tmp_path, "rewrite") as living:
        (living / "a").write_text("1")
        written(tmp_path, {"b": "2"})
        assert living.is_dir()
    assert content(tmp_path) == {"a": "1", ".laurel-of-the-user": ""}


@pytest.mark.parametrize("step", range(7))
def test_a_run_that_dies_while_it_moves_files_is_finished_by_the_next_reader_or_writer(step, tmp_path, monkeypatch):
    """Stopped before each of its changes to the folder in turn: what a reader sees then is the old result or the new one."""
    written(tmp_path, {"a": "1", "b": "1"})
    left = [step]

    def dying(function):
        def call(*arguments, **options):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(drafts.os, "replace", dying(os.replace))
        patch.setattr(Path, "rename", dying(Path.rename))
        patch.setattr(Path, "unlink", dying(Path.unlink))
        try:
            written(tmp_path, {"a": "2", "c": "2"})
            finished = True
        except KeyboardInterrupt:
            finished = False
    assert finished == (step > 4)
    with reading(tmp_path):
        assert whole(tmp_path)
        assert content(tmp_path) in ({"a": "1", "b": "1"}, {"a": "2", "c": "2"})
    assert not (tmp_path / READY).exists()
    written(tmp_path, {"a": "3"})
    assert content(tmp_path) == {"a": "3"}


def test_two_runs_at_once_are_one_after_the_other(tmp_path):
    threads = [threading.Thread(target=written, args=(tmp_path, {name: str(n) for name in "abc"})) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(content(tmp_path).values())) == 1
    assert set(content(tmp_path)) == set("abc")
    assert whole(tmp_path)


def test_no_room_for_the_results(tmp_path):
    """A limit on the size of files stands for a full disk."""
    (tmp_path / "net.py").write_text(NET)
    command = [sys.executable, "-m", "laurel_rewrite", "net.py", "--rank", "4", "--profile-seconds", "0", "--quiet"]
    (tmp_path / "laurel_out").mkdir()
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "File too large" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list((tmp_path / "laurel_out").iterdir())


# What is loaded


def test_mixed_files_are_refused_and_edited_source_is_loaded(tmp_path, model, caplog):
    save(model, tmp_path / "one")
    other = rewrite(CASES["plain"].make(), (torch.randn(2, 5, D),), rank=4)
    other.laurel_0.mix.data += 1
    save(other, tmp_path / "two")
    shutil.copy(tmp_path / "two" / "model.safetensors", tmp_path / "one")
    with pytest.raises(ConfigError, match=r"model.safetensors is not the file that was written with the others"):
        load(tmp_path / "one")
    load(tmp_path / "one", device="meta")  # which reads no weights
    source = tmp_path / "two" / "modeling_laurel.py"
    source.write_text(source.read_text() + "# edited\n")
    load(tmp_path / "two")
    assert "modeling_laurel.py was edited" in caplog.text
    (tmp_path / "one" / MANIFEST).unlink()
    load(tmp_path / "one")


def test_saving_over_what_was_loaded(tmp_path, model):
    save(model, tmp_path)
    again = load(tmp_path)
    again.laurel_0.mix.data += 1
    save(again, tmp_path)
    assert torch.equal(load(tmp_path).laurel_0.mix, again.laurel_0.mix)
    (tmp_path / "model.safetensors").write_bytes(b"the user's")
    with pytest.raises(ConfigError, match=r"model\.safetensors\. .*force=True"):
        save(again, tmp_path)
    save(again, tmp_path, force=True)
    assert whole(tmp_path)


def test_a_folder_like_an_imported_package_is_not_imported(tmp_path, model):
    save(model, tmp_path)
    for name in ("torch", "json", "numpy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the wrong one')")
    (tmp_path / "random.py").write_text("raise RuntimeError('the wrong one')")
    before = {name: sys.modules[name] for name in ("torch", "json", "numpy", "random")}
    load(tmp_path)
    assert {name: sys.modules[name] for name in before} == before


@pytest.mark.parametrize(
    ("model", "files", "message"),
    [
        ({"kind": "skeleton", "files": ["../secret.txt"]}, [], "files must be"),
        ({"kind": "skeleton", "files": ["/etc/hostname"]}, [], "files must be"),
        ({"kind": "skeleton", "files": ["link"]}, [], "outside the folder"),
        ({"kind": "spec", "spec": "subprocess:getoutput", "settings": {"cmd": "touch ../called"}}, [], "does not define both"),
        ({"kind": "spec", "spec": "shutil:rmtree", "settings": {"path": "../kept"}}, [], "does not define both"),
        ({"kind": "spec", "spec": "nowhere_at_all:f", "settings": {}}, [], "does not define both"),
        ({"kind": "spec", "spec": "../net.py", "settings": {}}, [], "none of its files"),
        ({"kind": "spec", "spec": "timm:../x", "settings": {}}, [], "timm has no model"),
        ({"kind": "transformers", "class": "subprocess:Popen", "config": "builtins:dict"}, ["base_config.json"], "is no PreTrainedConfig"),
        ({"kind": "transformers", "class": "os:system", "config": "os:system"}, ["base_config.json"], "is no PreTrainedConfig"),
        ({"kind": ["spec"]}, [], "unknown kind of model"),
        ({"kind": "graph"}, [], "does not say how to build"),
    ],
)
def test_a_configuration_calls_nothing_and_reads_nothing_outside(model, files, message, tmp_path):
    out = tmp_path / "out"
    save(rewrite(CASES["plain"].make(), (torch.randn(2, 5, D),), rank=4), out)
    for name in ("secret.txt", "kept", "net.py"):
        (tmp_path / name).write_text("secret")
    (out / "link").symlink_to(tmp_path / "secret.txt")
    (out / MANIFEST).unlink()
    config = json.loads((out / "laurel_config.json").read_text())
    for name in files:
        (out / name).write_text("{}")
    (out / "laurel_config.json").write_text(json.dumps({**config, "model": {"files": files, **model}}))
    with pytest.raises(ConfigError, match=message):
        load(out)
    assert {p.name for p in tmp_path.iterdir()} == {"out", "secret.txt", "kept", "net.py"}


def test_a_model_file_of_a_name_that_a_result_has(tmp_path):
    (tmp_path / "modeling_laurel.py").write_text(NET)
    built = build(str(tmp_path / "modeling_laurel.py"))
    better = rewrite(built.model, built.args, rank=4)
    with pytest.raises(ConfigError, match="rename it"):
        save(better, tmp_path / "out", built=built)


# The command


def test_force_and_another_kind_of_model_in_the_same_folder(tmp_path, here):
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "laurel_out").mkdir()
    (tmp_path / "laurel_out" / "laurel.onnx").write_text("the user's")
    words = ("net.py", "--rank", "4", "--profile-seconds", "0")
    refused = here(*words)
    assert refused.returncode == 2
    assert "laurel.onnx" in refused.stderr and "--force" in refused.stderr
    assert content(tmp_path / "laurel_out") == {"laurel.onnx": "the user's"}
    assert here(*words, "--force").returncode == 0
    shutil.copy(tmp_path / "laurel_out" / "baseline.onnx", tmp_path / "model.onnx")
    assert here("model.onnx", "--rank", "4", "--profile-seconds", "0").returncode == 0
    assert set(os.listdir(tmp_path / "laurel_out")) == {"laurel.onnx", "plan.toml", "report.html", "report.json", "README.md", MANIFEST}
    assert here(*words).returncode == 0
    again = here("laurel_out/baseline.onnx", "--rank", "4", "--profile-seconds", "0")  # reads what it would remove
    assert again.returncode == 0
    assert (tmp_path / "laurel_out" / "baseline.onnx").exists()


def test_the_same_run_gives_the_same_bytes_in_another_folder_and_with_another_hash_seed(tmp_path):
    folders = {"1": tmp_path / "one", "2": tmp_path / "two" / "deeper"}
    for seed, folder in folders.items():
        folder.mkdir(parents=True)
        (folder / "net.py").write_text(NET)
        words = [str(folder / "net.py") if seed == "2" else "net.py", "--rank", "4", "--profile-seconds", "0"]
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": seed}
        command = [sys.executable, "-m", "laurel_rewrite", *words]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    one, two = (folder / "laurel_out" for folder in folders.values())
    for name in set(os.listdir(one)) - {
        "report.html",
        "report.json",
        "README.md",
        MANIFEST,
    }:  # which hold differences of rounding between kernels
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
        assert str(tmp_path).encode() not in (one / name).read_bytes()


def test_places_in_a_plan_are_those_of_modules():
    assert portable(f"{torch.nn.modules.linear.__file__}:12") == "torch/nn/modules/linear.py:12"
    assert portable(f"{torch.nn.__file__}:12") == "torch/nn/__init__.py:12"
    assert portable(f"{Path(__file__).parent / 'toys.py'}:3") == "toys.py:3"
    assert portable("/somewhere/else/model.py:3") == "model.py:3"
    assert portable("timm/layers/mlp.py:40") == "timm/layers/mlp.py:40"
    assert portable("node_name") == "node_name"


def test_a_plan_with_absolute_places_is_read():
    plan = rewrite(CASES["plain"].make(), (torch.randn(2, 5, D),), rank=4)._laurel_rewriting.plan
    text = plan.to_toml().replace('where = "toys.py', 'where = "/home/somebody/toys.py')
    assert Plan.from_toml(text).sites[0].where.startswith("/home/somebody/")
    assert plan.with_model("/home/somebody/net.py:make").model == "net.py:make"
    assert plan.with_model("timm:vit").model == "timm:vit"


def test_the_output_cannot_be_printed(tmp_path):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "laurel_rewrite", "--help"], cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr == "Error: the output cannot be printed: No space left on device. (docs: troubleshooting#configerror)\n"


@pytest.mark.parametrize("words", [["--out", "x" * 300], ["--plan-out", "x" * 300], ["--plan", "x" * 300]])
def test_names_that_no_file_system_takes(words, tmp_path, here):
    (tmp_path / "net.py").write_text(NET)
    done = here("net.py", "--rank", "4", "--profile-seconds", "0", *words) if words[0] != "--plan" else here("net.py", *words)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: The ")
    assert len(done.stderr.splitlines()) == 1


def test_a_model_that_is_no_file(tmp_path, here):
    (tmp_path / "x.onnx").mkdir()
    (tmp_path / "x.py").mkdir()
    for name, message in {"x.onnx": "is a directory", "x.py": "is a directory", "y" * 300 + ".py": "File name too long"}.items():
        done = here(name)
        assert done.returncode == 2
        assert message in done.stderr


def test_a_number_of_seconds_is_one(here):
    for word in ("nan", "inf", "-1"):
        done = here("net.py", "--profile-seconds", word)
        assert done.returncode == 2
        assert "a number of seconds" in done.stderr


KILLED = [seed for seed in range(45) if seed not in (2, 15, 22, 23)]  # which run the whole command


@pytest.mark.parametrize("part", range(3))
def test_writers_that_are_killed_at_a_random_moment(part):
    """SIGKILL, in processes of their own: what is there then is the old result or the new one."""
    found = {kills.run(seed) for seed in KILLED[part::3]}
    assert len(found) > 1
