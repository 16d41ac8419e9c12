"""What a person sees, at the widths of a page, of a terminal and of half a terminal."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from rich.console import Console

from laurel_rewrite.app import cli, terminal
from laurel_rewrite.backends import Skipped
from laurel_rewrite.profiling import Profile
from laurel_rewrite.profiling.latency import Latency
from laurel_rewrite.verification.checks import Check

WIDTHS = (160, 80, 40)
SITES = [f"transformer.h.{block}.laurel_{number}" for block in range(2) for number in range(2)]
CHECKS = [
    Check("exact start, eval mode", True, 0.0, "max |difference| = 0", "25 tensors"),
    Check("laurel.onnx, random LAuReL", True, 2.3e-6, "rtol 1e-4 of the tensor's own scale, atol 1e-5", "25 tensors, " + "batch 3 and length 17, " * 9),
    Check.not_run("laurel.onnx against PyTorch", "onnxruntime has no kernel for bfloat16"),
    Check("baseline.onnx", False, 0.3, "1e-4", "logits"),
]  # fmt: skip


@pytest.fixture(scope="module")
def profiled(exported):
    """A real profile, with intervals of all kinds in it."""
    from dataclasses import replace

    from laurel_rewrite import profile

    path = exported("gpt2")
    result = profile([path] * 2, names=["baseline.onnx", "laurel.onnx"], seconds=0, min_rounds=1, threads=1, control=True)
    wide = Latency(12.3, 11.9, 14.2, 1.013, 0.904, 1.139, "unresolved", 312, (12.3,))
    rows = [
        replace(row, latencies=(replace(wide, verdict=verdict),))
        for row, verdict in zip(result.rows, ("baseline", "slower", "unresolved"), strict=True)
    ]
    return replace(result, rows=tuple(rows))


def shown(show, width, *things) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    show(console, *things)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    return text


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("width", WIDTHS)
def test_the_profile_keeps_names_and_verdicts(width, profiled: Profile):
    text = shown(terminal.show_profile, width, profiled)
    for name in ("baseline.onnx", "laurel.onnx", "one more layer", "unresolved", "slower", "baseline", "[0.904, 1.139]", "FLOPs", "MiB"):
        assert name in words(text), text
    assert "…" not in text


@pytest.mark.parametrize("width", WIDTHS)
def test_a_check_takes_a_line_or_two_and_keeps_its_outcome(width, profiled: Profile):
    report = SimpleNamespace(
        model="hf:gpt2", plan=SimpleNamespace(sites=[SimpleNamespace(id=site, variant="rw+lr", options={"rank": 16}, dim=768, changed_options=dict, operator=SimpleNamespace(uses_maps=True)) for site in SITES], left_out=[], narrowed=()),
        sites=SimpleNamespace(notes=()), notes=["Lowered: 4 streams"], parameters={"model": 1000, "added": 10}, checks=CHECKS, profile=None, training=None, files=["a"], out="out", skipped=(Skipped("head.laurel_0", "net.py:7", "its source is not at hand"),),
    )  # fmt: skip
    text = shown(terminal.show_report, width, report)
    lines = text.partition("Verification")[2].partition("Written to")[0].strip().splitlines()
    assert text.count("passed") == 2
    assert text.count("FAILED") == text.count("not run") == 1
    assert "no kernel for bfloat16" in words(text)  # only what passed is cut
    if width < 160:
        passed = [number for number, line in enumerate(lines) if "passed" in line]
        assert [lines[number + 1].startswith(" ") for number in passed] == [False, False]
    assert SITES[0] in text
    assert words(text).startswith("1 of 5 sites skipped: they keep their plain sum. head.laurel_0 (net.py:7): its source is not at hand")


@pytest.mark.parametrize("width", WIDTHS)
def test_ids_of_sites_stay_whole(width, exported):
    from laurel_rewrite import detect

    sites = detect(exported("gpt2"))
    text = shown(terminal.show_sites, width, "gpt2.onnx", sites)
    assert all(site.id in text for site in sites)


@pytest.mark.parametrize("columns", [80, 40, 30])
@pytest.mark.parametrize("command", ["rewrite", *cli.COMMANDS])
def test_help_breaks_no_words(command, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    commands = {"rewrite": cli.rewrite, **cli.COMMANDS}
    text = CliRunner().invoke(commands[command], ["--help"]).output
    shown = [option for option in commands[command].params if not getattr(option, "hidden", False)]
    whole = {word for option in shown for word in str(getattr(option, "help", "") or "").split() if len(word) < columns - 10}
    missing = {word for word in whole if word not in words(text)}
    assert not missing
    assert max(len(line) for line in text.splitlines()) <= max(columns, 42)  # the longest name of an option
    assert "\u2011" not in text
    assert re.search(r"^  --json", text, re.M)
