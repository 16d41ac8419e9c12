"""The report: the page opens in a browser without an error and without a request, whatever names are in the graph."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from toys import D

from laurel_rewrite.report import page, schema
from laurel_rewrite.report.answer import answer
from laurel_rewrite.report.card import card
from laurel_rewrite.report.words import breakable, count, shortened, size

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = {
    "html": "<img src=x onerror=alert(1)>",
    "script": "</script><script>document.title='owned'</script>",
    "quotes": "\"'`{{ 7 * 7 }}${alert(1)}&amp;<!--",
    "long": "x" * 10_000,
    "unicode": "\u202eנמל \U0001f333\u2028\u0000name".replace("\u0000", ""),
    "newline": "a\nb\tc",
}


def open_page(path: Path, folder: Path, *options: str) -> tuple[str, str, list[str]]:
    """The page after its scripts ran, what the console said, and the addresses that it asked for."""
    if BROWSER is None:
        pytest.skip("there is no Chromium")
    log = folder / "net.json"
    words = [
        BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'browser'}", "--disable-background-networking",
        "--disable-component-update", "--no-first-run", "--enable-logging=stderr", "--v=0", f"--log-net-log={log}", "--virtual-time-budget=8000",
        *options, "--dump-dom", path.resolve().as_uri(),
    ]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    # What the browser asks for itself, updates and the like, has no origin.
    lines = [line for line in log.read_text().splitlines() if '"initiator":"' in line and '"initiator":"not an origin"' not in line]
    asked = {url for line in lines for url in re.findall(r'"url":"([^"]+)"', line)}
    return done.stdout, console, [url for url in asked if not url.startswith(("file:", "data:"))]


def opens(path: Path, folder: Path, plots: set[str]) -> str:
    dom, console, asked = open_page(path, folder)
    assert console == ""
    assert asked == []
    drawn = {name for name in re.findall(r'id="plot-(\w+)"', dom) if re.search(rf'id="plot-{name}"[^>]*js-plotly-plot', dom)}
    drawn |= set(re.findall(r'class="[^"]*js-plotly-plot[^"]*" id="plot-(\w+)"', dom))
    assert drawn == plots
    return dom


def hostile(folder: Path) -> Path:
    """A residual block for each hostile name, whose nodes, values, weights and module all have it."""
    nodes, weights, skip = [], [], "x"
    for number, name in enumerate(HOSTILE.values()):
        out = "y" if number == len(HOSTILE) - 1 else f"{name}y"
        block = [
            helper.make_node("Relu", [skip], [f"{name}r"], name=f"{name}1"),
            helper.make_node("MatMul", [f"{name}r", f"{name}w"], [f"{name}f"], name=f"{name}2"),
            helper.make_node("Add", [skip, f"{name}f"], [out], name=f"{name}3"),
        ]
        for node in block:
            node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=repr(["", f"{name}.block", "op"]))
        nodes, skip = nodes + block, out
        weights.append(numpy_helper.from_array(np.eye(D, dtype=np.float32), f"{name}w"))
    shape = ["batch", D]
    inputs, outputs = ([helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)] for name in "xy")
    graph = helper.make_graph(nodes, HOSTILE["html"], inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), folder / "model.onnx")
    return folder / "model.onnx"


def check_json(path: Path) -> dict:
    report = json.loads(path.read_text())
    jsonschema.validate(report, schema())
    return report


def test_the_browser_tells_of_errors_and_requests(tmp_path):
    (tmp_path / "bad.html").write_text('<img src="http://example.invalid/x.png"><script>console.error("broken")</script>')
    _, console, asked = open_page(tmp_path / "bad.html", tmp_path)
    assert "broken" in console
    assert asked == ["http://example.invalid/x.png"]


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(schema())


def test_a_profile_of_files(exported, tmp_path, here):
    given = exported("gpt2")
    result = here("profile", str(given), str(given), "--profile-seconds", "0.2", "--shape", "batch=1,2", "--self-check", "--out", "out")
    assert result.returncode == 0, result.stderr
    report = check_json(tmp_path / "out" / "report.json")
    assert [row["name"] for row in report["profile"]["rows"]] == [f"{given} (1)", f"{given} (2)", "one more layer", "the same again"]
    assert len(report["profile"]["rows"][0]["latencies"]) == 2
    assert set(report["files"]) == {path.name for path in (tmp_path / "out").iterdir()}
    assert "one more layer" in result.stdout
    opens(tmp_path / "out" / "report.html", tmp_path, {"ratios", "runs", "ops", "memory", "modules"})


def test_the_main_job(exported, tmp_path, here):
    result = here(str(exported("resnet18")), "--rank", "4", "--profile-seconds", "0.2")
    assert result.returncode == 0, result.stderr
    report = check_json(tmp_path / "laurel_out" / "report.json")
    assert [row["name"] for row in report["profile"]["rows"]] == ["resnet18.onnx", "laurel.onnx", "one more layer"]
    assert len(report["profile"]["rows"][1]["time"]["sites"]) == 8
    dom = opens(tmp_path / "laurel_out" / "report.html", tmp_path, {"streams", "ratios", "runs", "ops", "memory", "modules", "sites"})
    assert "layer4.<wbr>1.<wbr>laurel_0<" in dom  # broken behind dots alone


def test_hostile_names(tmp_path, here):
    result = here(hostile(tmp_path).name, "--rank", "2", "--profile-seconds", "0.05", "--out", "out")
    assert result.returncode == 0, result.stderr
    assert len(check_json(tmp_path / "out" / "report.json")["plan"]["sites"]) == len(HOSTILE)
    page_text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "onerror=alert(1)>" not in page_text
    assert "<script>document.title" not in page_text
    assert "x" * 1000 not in page_text.partition("<script>")[0]
    dom = opens(tmp_path / "out" / "report.html", tmp_path, {"streams", "ratios", "runs", "ops", "memory", "modules", "sites"})
    assert "<title>model.onnx" in dom
    assert "<img" not in dom


def test_names_are_escaped_and_broken_behind_dots():
    assert str(breakable("blocks.0.laurel_0")) == "blocks.<wbr>0.<wbr>laurel_0"
    assert str(breakable("a.<b>&/c:1")) == "a.<wbr>&lt;b&gt;&amp;/<wbr>c:<wbr>1"


def test_words():
    assert [size(n) for n in (0, 12, 2048, 3 << 20, 5 << 30)] == ["-", "12 B", "2.0 KiB", "3.0 MiB", "5.0 GiB"]
    assert [count(n) for n in (12, 1500, 8.2e9)] == ["12", "1.50 k", "8.20 G"]
    assert shortened("abcdefghij", 4) == "ab…ij"


def test_a_report_without_a_profile(exported, tmp_path, here):
    result = here(str(exported("gpt2")), "--rank", "4", "--profile-seconds", "0")
    assert result.returncode == 0, result.stderr
    report = check_json(tmp_path / "laurel_out" / "report.json")
    assert report["profile"] is None
    assert page(report) == (tmp_path / "laurel_out" / "report.html").read_text()
    opens(tmp_path / "laurel_out" / "report.html", tmp_path, {"streams"})


def test_training_steps(tmp_path, here, monkeypatch):
    monkeypatch.setattr("laurel_rewrite.profiling.training._MODES", ("eager",))  # a compiler takes a minute
    example = Path(__file__).parent.parent / "tools" / "examples" / "gpt.py"
    words = ["--set", "depth=2", "--set", "width=40", "--set", "heads=2", "--set", "vocabulary=4096", "--rank", "4"]
    result = here(str(example), *words, "--train", "--profile-seconds", "0.1", "--out", "out")
    assert result.returncode == 0, result.stderr
    assert "Training steps in PyTorch" in result.stdout
    report = check_json(tmp_path / "out" / "report.json")
    assert [row["name"] for row in report["training"]["rows"]] == ["baseline", "laurel", "one more layer"]
    plots = {"streams", "ratios", "runs", "ops", "memory", "modules", "sites", "training"}
    opens(tmp_path / "out" / "report.html", tmp_path, plots)
    assert here("graph.onnx", "--train").returncode == 2


def measured(name, verdict="slower", low=1.02, high=1.06, memory=1.01):
    time = {"median_ms": 10.0, "ratio": (low + high) / 2, "low": low, "high": high, "verdict": verdict}
    return {"name": name, "latencies": [time], "figures": [{"key": "activation", "ratio": memory}]}


def answered(**report) -> list[str]:
    return answer({"comparison": None, "plan": None, "profile": None, "parameters": None, "skipped": [], "model": None, **report})


def test_what_a_report_says_first():
    """In sentences, which say no more than was measured."""
    rows = [measured("baseline.onnx", "baseline"), measured("laurel.onnx"), measured("one more layer", "slower", 1.1, 1.2)]
    said = answered(
        model="/a/b/gpt.py", plan={"sites": [{"variant": "rw+lr"}] * 12}, parameters={"model": 1000, "added": 12}, skipped=[{}],
        profile={"rows": rows, "shapes": [{"x": "float32[1]"}], "phases": [""]},
    )  # fmt: skip
    assert said == [
        "12 residual connections are rw+lr now, with 1.20 % more parameters; 1 kept their plain sum.",
        "laurel.onnx takes 1.04 times as long as the baseline (between 1.02 and 1.06), and 1.01 times the memory for activations.",
        "One more layer, for comparison, would take 1.15 times as long as the baseline (between 1.10 and 1.20), and 1.01 times the memory for activations.",
        "Whether it learns better was not measured: laurel-rewrite compare gpt.py --plan plan.toml --tokens 1M trains and judges it.",
    ]
    for verdict, words in (("unresolved", "cannot tell apart"), ("within noise", "as long as the baseline, within noise")):
        (said,) = answered(profile={"rows": [rows[0], measured("a.onnx", verdict)], "shapes": [{}], "phases": [""]})
        assert words in said
    (said,) = answered(profile={"rows": rows[:1], "shapes": [{}], "phases": [""]})
    assert said.startswith("baseline.onnx takes 10.00 ms a run")
    assert answered(plan={"sites": [{"variant": "rw"}]}) == ["1 residual connection is rw now.", "Latency and memory were not measured."]


def test_what_a_comparison_says_first():
    def row(name, verdict, difference=0.0):
        return {
            "name": name,
            "judgement": {"verdict": verdict, "difference": difference, "low": difference - 0.01, "high": difference + 0.01},
        }

    rows = [
        row("unchanged", "baseline"),
        row("rw", "not told apart"),
        row("hc", "better", -0.05),
        row("lr", "worse", 0.02),
        row("pa", "failed"),
    ]
    assert answered(comparison={"rows": rows, "seeds": [0, 1, 2], "done": True}) == [
        "hc is better than unchanged: its loss differs by -0.0500 [-0.0600, -0.0400].",
        "lr is worse than unchanged: its loss differs by +0.0200 [+0.0100, +0.0300].",
        "pa failed to train.",
        "3 seeds cannot tell rw from unchanged.",
    ]
    rows = [row("unchanged", "baseline"), row("rw", "one seed: not judged")]
    assert answered(comparison={"rows": rows, "seeds": [0], "done": False}) == [
        "With one seed nothing is judged: rw may differ from unchanged.",
        "Not all of the models are trained yet.",
    ]


@pytest.mark.parametrize("loadable", [True, False])
def test_a_card_says_of_a_graph_what_is_so(loadable):
    """A graph that was rewritten may have been given trained connections; one that a model was exported to has them at their start."""
    files = ["laurel.onnx", *(["laurel_config.json", "baseline.onnx"] if loadable else [])]
    report = {
        "title": "gpt.onnx", "plan": {"sites": [{"variant": "rw"}]}, "comparison": None, "profile": None, "parameters": None, "skipped": [], "model": "gpt.onnx",
        "files": files, "verification": [{"outcome": "passed"}, {"outcome": "not run"}], "command": "laurel-rewrite gpt.onnx", "version": "1", "versions": {},
    }  # fmt: skip
    text = card(report)
    assert ("connections at their start." in text) is loadable
    assert ("laurel_rewrite.load" in text) is loadable
    assert "1 of 2 checks passed." in text
    assert "    laurel-rewrite gpt.onnx\n" in text
