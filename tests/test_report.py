"""The report: the page opens in a browser without an error and without a request, whatever names are in the graph."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

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


def drawings(text: str) -> dict[str, ElementTree.Element]:
    """The drawings of a page by their places, read as XML."""
    found = re.findall(r'<div class="plot" tabindex="0" id="plot-(\w+)">(<svg .*?</svg>)</div>', text, re.DOTALL)
    assert len(found) == text.count("<svg")
    return {name: ElementTree.fromstring(svg) for name, svg in found}


def words_of(drawing: ElementTree.Element) -> list[str]:
    return ["".join(text.itertext()) for text in drawing.iter("text")]


def opens(path: Path, folder: Path, plots: set[str]) -> str:
    """The page has these plots, each with a title, needs nothing else, and a browser has nothing to say."""
    text = path.read_text(encoding="utf-8")
    found = drawings(text)
    assert set(found) == plots
    assert len(text.encode()) < 600_000
    assert "<script src" not in text
    assert text.count('class="scroll"') == text.count('class="scroll" tabindex="0"')  # a keyboard gets there
    assert not re.search(r'(href|src)="(?!#|data:)', text)
    ids = re.findall(r'\sid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    for drawing in found.values():
        own = {element.get("id"): element for element in drawing.iter()}
        assert drawing.get("role") == "img"
        assert all(own[name].text for name in drawing.attrib["aria-labelledby"].split())
        assert {element.get("href", "#")[1:] for element in drawing.iter("use")} <= own.keys()
        assert words_of(drawing)
        assert not any("font-family" in element.get("style", "") for element in drawing.iter())
    dom, console, asked = open_page(path, folder)
    assert console == ""
    assert asked == []
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
    drawn = drawings((tmp_path / "laurel_out" / "report.html").read_text())
    assert {site["id"] for site in report["plan"]["sites"]} <= set(words_of(drawn["sites"]))
    assert {"resnet18.onnx", "laurel.onnx", "one more layer"} <= set(words_of(drawn["runs"]))
    time = report["profile"]["rows"][1]["latencies"][0]
    assert f"{time['ratio']:.3f} [{time['low']:.3f}, {time['high']:.3f}]" in words_of(drawn["ratios"])
    time["runs_ms"] = [time["median_ms"] * (1 + run / 1000) for run in range(50)] + [1e6, 2e6]  # those measured may have some far off, too
    runs = drawings(page(report))["runs"]
    assert "2 beyond, to 2e+06 ms" in words_of(runs)
    assert not {"500000", "1000000"} & set(words_of(runs)), "what is far off squeezes nothing"


def test_hostile_names(tmp_path, here):
    result = here(hostile(tmp_path).name, "--rank", "2", "--profile-seconds", "0.05", "--out", "out")
    assert result.returncode == 0, result.stderr
    assert len(check_json(tmp_path / "out" / "report.json")["plan"]["sites"]) == len(HOSTILE)
    page_text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "onerror=alert(1)>" not in page_text
    assert "<script>document.title" not in page_text
    assert "x" * 1000 not in page_text.partition("<script>")[0]
    drawn = drawings(page_text)
    assert any(HOSTILE["html"] in text for text in words_of(drawn["sites"]))
    dom = opens(tmp_path / "out" / "report.html", tmp_path, {"streams", "ratios", "runs", "ops", "memory", "modules", "sites"})
    assert "<title>model.onnx" in dom
    assert "<img" not in dom


def test_names_in_a_drawing_are_what_they_are():
    """Whatever they hold for XML and for Matplotlib, and whatever is set there."""
    import matplotlib

    from laurel_rewrite.report.drawing import labels, style
    from laurel_rewrite.report.plots import intervals

    names = ["a <b>&amp; $x_1$ and $y$", "]]></svg>\\$\\frac", "numbers", "a\nb\t\x00\ud800c", "\u6728\U0001f333", "", "numbers"]
    with matplotlib.rc_context({"text.usetex": True, "font.size": 40, "axes.facecolor": "red"}):
        before = dict(matplotlib.rcParams)
        with style():
            drawing = intervals(
                labels(names), {"$a$ & <b>": [(1.0, 0.9, 1.1)] * 7, "b": [(1.0, 0.9, 1.1)] * 6 + [(5e9, 4e9, 6e9)]}, 1.0, "$ratio$", ".2f"
            )
        text = drawing.svg("one", "<title> & $more$")
        assert dict(matplotlib.rcParams) == before
    found = ElementTree.fromstring(text)
    known = [
        *names[:2],
        "numbers (3)",
        "a b   c",
        names[4],
        "(none)",
        "numbers (7)",
        "$a$ & <b>",
        "$ratio$",
        "5000000000.00 [4000000000.00, 6000000000.00]",
    ]
    assert set(known) <= set(words_of(found))
    assert "1e9" not in words_of(found)
    assert found.findtext("title") == "<title> & $more$"
    assert f"{names[0]}: 1.00 [0.90, 1.10]" in [title.text for title in found.iter("title")]
    assert text == drawing.svg("one", "<title> & $more$")
    other = re.findall(r' id="([^"]*)"', drawing.svg("other", ""))
    assert other
    assert not set(other) & set(re.findall(r' id="([^"]*)"', text))
    assert not re.search(r"#0[0-9a-f]0[0-9a-f]0[0-9a-f]", text), "a colour that stands for one of the page"


def test_series_stand_out_from_paper_in_light_and_dark():
    from laurel_rewrite.report import drawing

    def light(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return float(np.dot([0.2126, 0.7152, 0.0722], parts)) + 0.05

    style = Path(drawing.__file__).with_name("page.css").read_text()
    papers = re.findall(r"--paper: (#[0-9a-f]{6})", style)
    assert len(papers) == 2
    for colour in drawing.COLOURS:
        for paper in papers:
            darker, lighter = sorted((light(colour), light(paper)))
            assert lighter / darker >= 3, (colour, paper)


def test_who_draws_nothing_needs_no_matplotlib():
    code = "import sys, laurel_rewrite, laurel_rewrite.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


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
