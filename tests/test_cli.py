"""The command as a user runs it: in a process of its own, in an empty folder."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import EXAMPLES, run, slow
from toys import D

from laurel_rewrite.app import cli
from laurel_rewrite.command_line import without_folders
from laurel_rewrite.operators.families.laurel import Laurel

NET = f"""
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.l = torch.nn.Linear({D}, {D})

    def forward(self, x):
        return x + self.l(x)

def build_model():
    return Net()

def example_inputs():
    return (torch.randn(2, {D}),)
"""
FILES = {
    "baseline.onnx",
    "laurel.onnx",
    "laurel_config.json",
    "model.safetensors",
    "modeling_laurel.py",
    "plan.toml",
    "report.json",
    "report.html",
    "README.md",
}
MANIFEST = "laurel_manifest.json"
TRACES = {"trace-baseline.json", "trace-laurel.json"}


@pytest.fixture
def net(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(NET)
    return tmp_path


def test_help_answers_without_heavy_imports(tmp_path):
    code = "import sys; from laurel_rewrite.app.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\nprint(sorted({'torch', 'rich', 'numpy', 'onnx'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert re.search(r"Exit status:\n +0 +done\n +1 +a verification failed", done.stdout)
    assert run(tmp_path).stdout.startswith("Usage: laurel-rewrite")


def umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now


def test_the_main_job(net):
    done = run(net, "net.py", "--rank", "4", "--profile-seconds", "0.1")
    assert done.returncode == 0, done.stderr
    assert [line.partition(":")[0] for line in done.stderr.splitlines()][:2] == ["build", "detect"]
    assert "Verification" in done.stdout
    assert "Profile in onnxruntime" in done.stdout
    assert {p.name for p in (net / "laurel_out").iterdir()} == FILES | TRACES | {"net.py", MANIFEST}
    report = json.loads((net / "laurel_out" / "report.json").read_text())
    assert all(check["passed"] for check in report["verification"])
    assert report["parameters"]["added"] == 2 + 2 * 4 * D
    assert report["profile"]["rows"][0]["latencies"][0]["verdict"] == "baseline"
    assert set(report["files"]) == FILES | TRACES | {"net.py", MANIFEST}
    card = (net / "laurel_out" / "README.md").read_text()
    assert "    laurel-rewrite net.py --rank 4 --profile-seconds 0.1\n" in card
    assert report["command"] in card
    assert all(str(net).encode() not in path.read_bytes() for path in (net / "laurel_out").iterdir())
    assert {path.stat().st_mode & 0o777 for path in (net / "laurel_out").iterdir()} == {0o666 & ~umask()}
    code = "import laurel_rewrite, torch; print(type(laurel_rewrite.load('laurel_out').laurel_0).__name__)"
    assert subprocess.run([sys.executable, "-c", code], cwd=net, capture_output=True, text=True, check=True).stdout == "Laurel\n"


def test_the_main_job_measures_as_profile_does(net, here):
    words = ("--rank", "4", "--profile-seconds", "0.05", "--threads", "1")
    done = here("net.py", *words, "--shape", "batch=1,3", "--provider", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    profile = json.loads(done.stdout)["profile"]
    assert [list(shape.values()) for shape in profile["shapes"]] == [[f"float32[1, {D}]"], [f"float32[3, {D}]"]]
    assert profile["conditions"]["threads"] == 1
    graph = here("laurel_out/baseline.onnx", *words, "--shape", "batch=5", "--out", "graph", "--json")
    assert graph.returncode == 0, graph.stderr
    assert json.loads(graph.stdout)["profile"]["conditions"]["inputs"] == {"x": f"float32[5, {D}]"}
    for wrong, message in (("--provider=nowhere", "no execution provider 'nowhere'"), ("--shape=batch", "--shape takes NAME=SIZE")):
        refused = here("net.py", *words, wrong, "--out", "other")
        assert refused.returncode == 2
        assert message in refused.stderr
    both = here("laurel_out/baseline.onnx", "--shape", "batch=5", "--inputs", "x.npz")
    assert "--shape is for inputs that are drawn" in both.stderr


def test_every_verb_stands_in_the_help_and_has_one(here):
    text = here("--help").stdout.partition("Options:")[0]
    assert all(re.search(rf"^  {verb} +\S", text, re.M) for verb in cli.COMMANDS)
    for verb in cli.COMMANDS:
        for flag in ("-h", "--help"):
            assert here(verb, flag).stdout.startswith(f"Usage: laurel-rewrite {verb} ")
    assert re.fullmatch(r"laurel-rewrite, version \d+\.\d+\.\d+\n", here("--version").stdout)


SMALL = "--set depth=3 --set width=40 --set heads=2".split()
SITES = {"gpt": 6, "resnet": 8, "vit": 6, "unet": 7, "translator": 15}


@pytest.mark.parametrize(
    ("name", "settings", "variant"),
    [
        *[
            ("gpt", SMALL, "lr+pa"),
            ("resnet", [], "rw+lr+pa"),
            ("vit", SMALL, "rw+lr"),
            ("unet", [], "rw+lr"),
            ("translator", SMALL, "rw+lr"),
        ],
        *[
            slow("gpt", SMALL, "rw"),
            slow("gpt", SMALL, "rw+pa"),
            slow("gpt", SMALL, "rw+lr+pa"),
            slow("resnet", [], "lr"),
            slow("resnet", [], "pa"),
        ],
    ],
)
def test_the_examples_through_every_variant(name, settings, variant, here, tmp_path):
    done = here(str(EXAMPLES / f"{name}.py"), "--variant", variant, "--rank", "8", "--profile-seconds", "0", "--json", *settings)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert len(report["plan"]["sites"]) == SITES[name]
    assert not any(check["outcome"] == "FAILED" for check in report["verification"])
    assert {p.name for p in (tmp_path / "laurel_out").iterdir()} == FILES | {f"{name}.py", MANIFEST}


def test_sites(net, here):
    data = json.loads(here("sites", "net.py", "--json").stdout)
    assert set(data) == {"sites", "rejected", "notes"}
    place = {"id", "kind", "owner", "where", "shape", "axis", "dim", "stream", "index"}
    spot = {
        "link",
        "length",
        "block",
        "ends_block",
        "role",
        "evidence",
        "reads",
        "normed",
        "projections",
        "maps",
        "link_end",
        "last_end",
        "scale_free",
        "owner_class",
    }
    assert set(data["sites"][0]) == place | spot
    table = here("sites", "torchvision:resnet18")
    assert "torchvision:resnet18: 8 residual connections" in table.stdout
    assert "integer" in table.stdout
    rejected = json.loads(here("sites", "torchvision:resnet18", "--json").stdout)["rejected"]
    assert rejected
    assert all(set(r) == {"where", "owner", "reason", "detail"} for r in rejected)


def test_plan_out_edit_plan(net, here):
    done = here("net.py", "--rank", "4", "--plan-out", "plan.toml")
    assert done.returncode == 0, done.stderr
    assert not (net / "laurel_out").exists()
    text = (net / "plan.toml").read_text()
    (net / "plan.toml").write_text(text.replace('variant = "rw+lr"', 'variant = "lr"').replace("rank = 4", "rank = 3"))
    done = here("net.py", "--plan", "plan.toml", "--dry-run", "--json")
    site = json.loads(done.stdout)["plan"]["sites"][0]
    assert (site["variant"], site["rank"]) == ("lr", 3)
    assert not (net / "laurel_out").exists()
    edited = (net / "plan.toml").read_text()
    refused = here("net.py", "--rank", "4", "--plan-out", "plan.toml")
    assert refused.returncode == 2
    assert "plan.toml is there already, and says something else" in refused.stderr
    assert (net / "plan.toml").read_text() == edited
    for _ in range(2):
        assert here("net.py", "--rank", "4", "--plan-out", "plan.toml", "--force").returncode == 0
    assert here("net.py", "--rank", "4", "--plan-out", "plan.toml").returncode == 0
    assert (net / "plan.toml").read_text() == text


def test_a_dry_run_compares_configurations_with_one_capture(net, here, monkeypatch):
    from laurel_rewrite.app import job

    captures: list[object] = []
    detect = job.detect
    monkeypatch.setattr(job, "detect", lambda *arguments: captures.append(arguments) or detect(*arguments))
    done = here("net.py", "--rank", "4", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    added = {(one["variant"], one["rank"]): one["added"] for one in report["configurations"]}
    assert added["rw", None] == 2
    assert added["lr", 4] == 2 * 4 * D
    assert added["rw+lr", 8] == 2 + 2 * 8 * D
    assert max(rank or 0 for _, rank in added) <= D
    assert report["parameters"]["added"] == added["rw+lr", 4]
    assert len(captures) == 1
    assert "Other configurations" in here("net.py", "--rank", "4", "--dry-run").stdout


@pytest.mark.parametrize("words", [("--plan", "missing.toml"), ("--plan", "broken.toml"), ("--plan-out", "nowhere/plan.toml")])
@pytest.mark.parametrize("model", ["net.py", "net.onnx"])
def test_files_are_looked_at_before_the_capture(words, model, net, here, monkeypatch):
    from laurel_rewrite.app import (
        graph_job,
        job,  # all of them before anything is replaced
    )
    from laurel_rewrite.files import onnx as graph_files

    def refuse(*arguments, **named):
        raise AssertionError("captured")

    monkeypatch.setattr(job, "_build_and_detect", refuse)
    monkeypatch.setattr(job, "_build", refuse)
    monkeypatch.setattr(graph_files, "read_onnx", refuse)
    monkeypatch.setattr(graph_job, "read_onnx", refuse)
    (net / "broken.toml").write_text("no plan")
    (net / "net.onnx").write_text("")
    for more in ((), ("--dry-run",)):
        done = here(model, *words, *more)
        assert done.returncode == 2, done.stderr
        assert words[1].partition("/")[0] in done.stderr


PARTLY = f"""
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear({D}, {D}), torch.nn.Linear({D}, {D})

    def forward(self, x):
        x = x + self.a(x)
        return sum([x, self.b(x)])

def build_model():
    return Net()

def example_inputs():
    return (torch.randn(2, {D}),)
"""


def test_a_site_that_cannot_be_rewritten_is_skipped_and_said_first(here, tmp_path):
    (tmp_path / "net.py").write_text(PARTLY)
    done = here("net.py", "--rank", "4", "--profile-seconds", "0", "--fail-if", "skipped > 1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 of 2 sites skipped")
    report = json.loads((tmp_path / "laurel_out" / "report.json").read_text())
    assert [site["where"].rpartition(":")[2] for site in report["skipped"]] == ["11"]
    page = (tmp_path / "laurel_out" / "report.html").read_text().partition("<h1>")[2]
    assert page.index("1 of 2 sites skipped") < page.index("LAuReL sites")
    failed = here("net.py", "--rank", "4", "--profile-seconds", "0", "--fail-if", "skipped > 0")
    assert failed.returncode == 1
    assert "skipped > 0 (skipped 1)" in failed.stderr
    assert here("net.py", "--rank", "4", "--unsupported", "refuse", "--out", "other").returncode not in (0, 1, 3)
    (tmp_path / "net.py").write_text(PARTLY.replace("x = x + self.a(x)", "x = self.a(x)"))
    assert here("net.py", "--rank", "4", "--profile-seconds", "0", "--out", "other").returncode == 3


def test_modules_and_factories(net, here):
    assert json.loads(here("sites", "net.py:Net", "--json").stdout)["sites"]
    assert json.loads(here("sites", "net:build_model", "--json").stdout)["sites"]


BAD = {
    "missing file": (None, ["missing.py"], 2, "There is no file missing.py"),
    "no factory": ("x = 1\n", ["bad.py"], 2, "has no build_model()"),
    "no inputs": (NET.replace("example_inputs", "other"), ["bad.py"], 2, "has no example_inputs()"),
    "not a model": (NET.replace("return Net()", "return 3"), ["bad.py"], 2, "gave int, not a torch.nn.Module"),
    "factory raises": (NET.replace("return Net()", "raise RuntimeError('no luck')"), ["bad.py"], 4, "build_model() raised RuntimeError: no luck"),
    "import fails": ("def (", ["bad.py"], 4, "could not be imported: SyntaxError"),
    "inputs do not fit": (NET.replace(f"randn(2, {D})", "randn(2, 5)"), ["bad.py"], 4, "could not be captured with the inputs (float32[2, 5])"),
    "unknown variant": (NET, ["bad.py", "--variant", "rw+xx"], 2, "Unknown variant 'rw+xx'"),
    "rank 0": (NET, ["bad.py", "--rank", "0"], 2, "rank must be a whole number of at least 1"),
    "rank above D": (NET, ["bad.py", "--rank", str(D + 1)], 2, f"rank {D + 1} is above its feature size {D}"),
    "selector": (NET, ["bad.py", "--include", "nothing*"], 2, "'nothing*' matches no site"),
    "no site": (NET.replace("x + self.l(x)", "self.l(x)"), ["bad.py"], 3, "no residual connection"),
    "plan and variant": (NET, ["bad.py", "--plan", "p.toml", "--rank", "4"], 2, "--rank cannot be given with it"),
    "missing plan": (NET, ["bad.py", "--plan", "p.toml"], 2, "p.toml cannot be read"),
    "out is a file": (NET, ["bad.py", "--rank", "4", "--out", "bad.py"], 2, "bad.py is a file"),
    "out cannot be written": (NET, ["bad.py", "--rank", "4", "--out", "/proc/nowhere"], 2, "cannot be written"),
    "rewritten already": (
        NET.replace("return Net()", f"import laurel_rewrite; return laurel_rewrite.rewrite(Net(), (torch.randn(2, {D}),), rank=2)"),
        ["bad.py"], 2, "rewritten already",
    ),
    "value-dependent": (
        NET.replace("return x + self.l(x)", "return x + self.l(x) if x.sum() > 1e9 else x"), ["bad.py"], 3,
        "additions in branches that this run did not take were not seen",
    ),
    "unknown option": (NET, ["bad.py", "--nothing"], 2, "No such option"),
    "unknown architecture": (None, ["hf:gtp2"], 2, "Nearest: gpt2"),
    "unknown timm": (None, ["timm:resnet5"], 2, "timm has no model"),
    "unknown field": (None, ["hf:gpt2", "--set", "layers=3"], 2, "has no field 'layers'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, here, tmp_path):
    text, words, code, message = BAD[name]
    if text is not None:
        (tmp_path / "bad.py").write_text(text)
    before = {p.name for p in tmp_path.iterdir()}
    done = here(*words)
    assert done.returncode == code, (done.stdout, done.stderr)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 4
    assert done.stdout == ""
    assert {p.name for p in tmp_path.iterdir()} - before <= {"__pycache__"}


def test_a_failed_verification_is_a_failed_exit(net, here, monkeypatch):
    right = Laurel.forward
    monkeypatch.setattr(Laurel, "forward", lambda self, *streams, **more: right(self, *streams, **more) + 1e-3)
    done = here("net.py", "--rank", "4", "--unsupported", "refuse")
    assert done.returncode == 1
    assert "does not compute what the original does: exact start, eval mode" in done.stderr
    assert "The first site with which it differs is" in done.stderr
    assert "FAILED" in done.stdout
    assert not (net / "laurel_out").exists()


def test_a_missing_package_says_how_to_install_it(tmp_path):
    code = "import sys, importlib.util as u\nreal = u.find_spec\nu.find_spec = lambda n, *a: None if n == 'timm' else real(n, *a)\nfrom laurel_rewrite.app.cli import main\nmain(['timm:resnet18'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 5
    assert 'pip install "laurel-rewrite[zoo]"' in done.stderr


def test_stages_are_shown_on_a_terminal(net):
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "laurel_rewrite", "net.py", "--rank", "4", "--profile-seconds", "0"],
        cwd=net, stdout=subprocess.DEVNULL, stderr=follower, env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )  # fmt: skip
    os.close(follower)
    shown, deadline = b"", time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            piece = os.read(leader, 4096)
        except OSError:  # the process has ended
            break
        if not piece:
            break
        shown += piece
    os.close(leader)
    assert process.wait(60) == 0
    text = shown.decode()
    assert all(stage in text for stage in ("build", "detect", "rewrite, verify", "verify gradients", "export", "verify ONNX", "save"))
    assert "1 site (" in text


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("/a/b/gpt.py", "gpt.py"), ("hf:/data/model", "hf:model"), ("hf:gpt2", "hf:gpt2"), ("--plan=/x/y.toml", "--plan=y.toml"), ("../net.py", "net.py"),
        ("model.py:factory", "model.py:factory"), ("/a/b.py:factory", "b.py:factory"), ("datasets:org/name", "datasets:org/name"), ("batch=1,8", "batch=1,8"),
        ("data=/a/b.bin,/c/d", "data=b.bin,d"), ("~/net.py", "net.py"), ("transformer.h.*/x", "transformer.h.*/x"),
    ],
)  # fmt: skip
def test_words_of_the_command_line_without_folders(word, shown):
    assert without_folders(word) == shown
