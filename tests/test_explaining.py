"""Why is this (not) a site? The answer names the operands, the line and the rule."""

from __future__ import annotations

import inspect
import json

import pytest
import torch
from conftest import EXAMPLES
from test_detect import NONE
from torch import fx
from toys import CASES, D, Helper, Images, Net, ParallelSkipMiddle, Plain, X

from laurel_rewrite import ConfigError, detect, explain
from laurel_rewrite.detection.residuals import REASONS


def line_of(thing: object, text: str) -> int:
    """The number of the first line of a class or function that holds this text."""
    lines, first = inspect.getsourcelines(thing)  # type: ignore[arg-type]
    return first + next(number for number, line in enumerate(lines) if text in line)


@pytest.mark.parametrize("name", [name for name, (_, reason) in NONE.items() if reason])
def test_every_reason_has_a_rule_in_words(name):
    body, reason = NONE[name]
    sites = detect(Net(body), (X,))
    rejected = next(r for r in sites.rejected if r.reason == reason)
    explanation = next(e for e in explain(sites, rejected.where) if e.verdict == reason)
    assert explanation.rule == REASONS[reason]
    assert not explanation.id
    facts = dict(explanation.facts)
    assert facts["because"] == rejected.detail
    assert "operand" in facts


def test_a_site_by_its_id():
    (why,) = explain(detect(Plain(), (X,)), "laurel_1")
    assert (why.id, why.verdict, why.owner, why.code) == ("laurel_1", "identity", "", "return self.g(x) + x")
    assert why.where.endswith(f"toys.py:{line_of(Plain, 'return self.g(x) + x')}")
    facts = dict(why.facts)
    assert facts["skip"].startswith(f"add [2x5x{D}]")
    assert facts["branch"].startswith(f"dropout [2x5x{D}] in g.dropout")
    assert facts["path"] == "skip -> layer_norm -> linear -> gelu -> branch"
    assert facts["stream"] == f"number 0, position 1 of 2, feature axis -1, D {D}"


def test_a_line_with_or_without_its_file():
    sites = detect(Plain(), (X,))
    line = line_of(Plain, "x = x + self.f(x)")
    for selector in (f"{line}", f":{line}", f"toys.py:{line}", f"tests/toys.py:{line}", inspect.getsourcefile(Plain) + f":{line}"):
        assert [why.id for why in explain(sites, selector)] == ["laurel_0"]


def test_an_inner_sum_is_explained_as_part_of_the_whole():
    sites = detect(ParallelSkipMiddle(), (X,))
    for text in ("y = self.f(x) + x", "y += self.g(x)"):
        (why,) = explain(sites, f"toys.py:{line_of(ParallelSkipMiddle, text)}")
        assert why.id == "laurel_0"
        assert [label for label, _ in why.facts].count("branch") == 2


def test_the_line_that_calls_a_helper_is_a_place_too():
    sites = detect(Helper(), (X,))
    (why,) = explain(sites, f"toys.py:{line_of(Helper, 'x = add_dropped(self.f(x), x')}")
    assert why.code == "return residual + out"


def test_a_projection_names_both_paths_and_where_they_part():
    facts = dict(explain(detect(Images(), (torch.randn(2, 3, 8, 8),)), "laurel_0")[0].facts)
    assert facts["they part at"].startswith("conv2d [2x8x8x8] in stem")
    assert facts["skip path"] == "conv2d -> conv2d -> batch_norm -> skip"
    assert facts["path"] == "conv2d -> conv2d -> relu -> conv2d -> batch_norm -> branch"


def test_all_of_a_module_and_the_calls_of_a_shared_one():
    sites = detect(CASES["tied"].make(), (X,))
    assert [why.id for why in explain(sites, "block")] == [site.id for site in sites]
    assert [why.id for why in explain(sites, "block.laurel_1")] == ["block.laurel_1", "block.laurel_1@1", "block.laurel_1@2"]
    assert [why.id for why in explain(sites, "block.laurel_1@2")] == ["block.laurel_1@2"]


def test_a_node_of_a_graph_without_source():
    graph = fx.symbolic_trace(Plain())
    (why,) = explain(detect(graph, (X,)), "add_1")
    assert (why.id, why.where, why.code) == ("laurel_1", "add_1", "")
    with pytest.raises(ConfigError, match=r"No addition was run at 35\.$"):
        explain(detect(graph, (X,)), "35")


def test_what_is_not_there_is_an_error_with_the_nearest():
    sites = detect(CASES["tied"].make(), (X,))
    with pytest.raises(ConfigError, match=r"'block.laurel_7' is no site.*Nearest: block.laurel_"):
        explain(sites, "block.laurel_7")
    line = line_of(Plain, "x = x + self.f(x)")
    with pytest.raises(ConfigError, match=rf"No addition was run at toys.py:{line - 1}. The nearest: .*toys.py:{line}"):
        explain(sites, f"toys.py:{line - 1}")
    with pytest.raises(ConfigError, match=r"No addition was run at other.py:3\.$"):
        explain(sites, "other.py:3")


def test_the_command(here, golden):
    result = here("sites", str(EXAMPLES / "gpt.py"), "--explain", "gpt.py:35")
    assert result.returncode == 0, result.stderr
    golden("explain_gpt.txt", "\n".join(line.rstrip() for line in result.stdout.splitlines()) + "\n")
    result = here("sites", str(EXAMPLES / "gpt.py"), "--explain", "blocks.0", "--json")
    explanations = json.loads(result.stdout)["explanations"]
    assert [why["id"] for why in explanations] == ["blocks.0.laurel_0", "blocks.0.laurel_1"]
    result = here("sites", str(EXAMPLES / "gpt.py"), "--explain", "blocks.9")
    assert result.returncode == 2
    assert "'blocks.9' is no site" in result.stderr
