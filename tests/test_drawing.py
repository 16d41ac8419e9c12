"""The drawing holds every site once, the skip of each as a thick edge, and what lies between."""

from __future__ import annotations

import sys
from xml.etree import ElementTree

import pygraphviz
import pytest
import torch
from conftest import EXAMPLES, real
from torch import fx, nn
from toys import CASES, D

from laurel_rewrite import ConfigError, MissingPackageError, detect, draw
from laurel_rewrite.detection.drawing import graph_of

SVG = "{http://www.w3.org/2000/svg}"


def sites_of(name: str):
    case = CASES[name]
    return detect(case.make(), (torch.randn(case.shape),))


def edges(graph, kind: str = "") -> set[tuple[str, str]]:
    return {(str(edge[0]), str(edge[1])) for edge in graph.edges() if not kind or edge.attr["class"] == kind}


def test_a_chain_of_two():
    graph = graph_of(sites_of("plain"))
    assert {str(node) for node in graph.nodes()} == {"end:x", "site:laurel_0", "site:laurel_1", "box:0", "box:1", "end:outputs"}
    assert edges(graph, "skip") == {("end:x", "site:laurel_0"), ("site:laurel_0", "site:laurel_1")}
    assert edges(graph) - edges(graph, "skip") == {
        ("end:x", "box:0"), ("box:0", "site:laurel_0"), ("site:laurel_0", "box:1"), ("box:1", "site:laurel_1"), ("site:laurel_1", "end:outputs"),
    }  # fmt: skip
    assert graph.get_node("box:0").attr["label"] == "f\nlayer_norm · linear · gelu"


def test_a_projection_has_a_box_on_its_skip():
    graph = graph_of(sites_of("images"))
    skip = edges(graph, "skip")
    (box,) = {start for start, end in skip if end == "site:laurel_0"}
    assert graph.get_node(box).attr["label"] == "down\nconv2d · batch_norm"
    (relu,) = {start for start, end in skip if end == "site:laurel_1"}
    assert graph.get_node(relu).attr["label"] == "relu\nrelu"
    assert ("site:laurel_0", relu) in skip  # the stream goes on through the activation


def test_a_box_is_called_after_the_module_of_its_ops():
    """GPT-2: the dropout of the embeddings stands outside of the first block, and between it and the attention."""
    example = real("gpt2")
    graph = graph_of(detect(example.model, example.args, example.kwargs))
    boxes = [graph.get_node(start) for start, end in edges(graph) - edges(graph, "skip") if str(end) == "site:transformer.h.0.laurel_0"]
    assert [box.attr["label"].split("\n")[0] for box in boxes] == ["transformer.h.0"]


@pytest.mark.parametrize("name", ["parallel", "tied", "loop", "post_norm"])
def test_every_site_has_a_skip_and_its_branches(name):
    sites = sites_of(name)
    graph = graph_of(sites)
    for site in sites:
        incoming = list(graph.in_edges(f"site:{site.id}"))
        assert sum(edge.attr["class"] == "skip" for edge in incoming) == 1
        assert len(incoming) == 1 + len(sites.bindings[site.id].residual.branches)


@pytest.mark.parametrize("name", ["resnet18", "gpt2", "t5"])
def test_real_architectures_are_drawn(name, tmp_path):
    example = real(name)
    sites = detect(example.model, example.args, example.kwargs)
    draw(sites, tmp_path / "model.svg", f"{name}: {len(sites)} sites")
    root = ElementTree.parse(tmp_path / "model.svg").getroot()
    texts = {text.text for text in root.iter(f"{SVG}text")}
    assert {f"+ {site.id}" for site in sites} <= texts
    assert f"{name}: {len(sites)} sites" in texts
    draw(sites, tmp_path / "model.dot")
    parsed = pygraphviz.AGraph(str(tmp_path / "model.dot"))
    assert {f"site:{site.id}" for site in sites} <= {str(node) for node in parsed.nodes()}


def test_hostile_names_are_only_text(tmp_path):
    """Names come from other people's files: they may look like HTML, escapes, quotes, and be long."""
    names = {"x": '<b>"x\\N\\l</b>', "l": "lé\u202e&amp;" + "y" * 3000}
    graph = fx.Graph()
    x = graph.placeholder("x")
    f = graph.call_module("l", (x,))
    graph.output(graph.call_function(torch.add, (x, f)))
    sites = detect(fx.GraphModule(nn.ModuleDict({"l": nn.Linear(D, D)}), graph), (torch.randn(2, D),))
    for value in sites.flow.values:
        value.name = names.get(value.name, value.name)
        value.owner = names["l"]
    draw(sites, tmp_path / "model.svg", "<i>title</i>\\G")
    texts = {(text.text or "").strip() for text in ElementTree.parse(tmp_path / "model.svg").getroot().iter(f"{SVG}text")}
    assert {names["x"], names["l"], "<i>title</i>\\G"} <= texts


def test_a_model_without_sites(tmp_path):
    sites = detect(nn.Sequential(nn.Linear(D, D), nn.ReLU()), (torch.randn(2, D),))
    draw(sites, tmp_path / "model.svg")
    assert (tmp_path / "model.svg").exists()


def test_what_cannot_be_drawn_leaves_nothing(tmp_path, monkeypatch):
    sites = sites_of("plain")
    with pytest.raises(ConfigError, match=r"ends in \.svg or \.dot, not 'model\.png'"):
        draw(sites, tmp_path / "model.png")
    with pytest.raises(ConfigError, match="cannot be written: No such file or directory"):
        draw(sites, tmp_path / "nowhere" / "model.svg")
    monkeypatch.setitem(sys.modules, "pygraphviz", None)
    with pytest.raises(MissingPackageError, match="pip install pygraphviz"):
        draw(sites, tmp_path / "model.svg")
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path, here):
    result = here("sites", str(EXAMPLES / "resnet.py"), "--graph", "resnet.svg")
    assert result.returncode == 0, result.stderr
    assert "Drawn to resnet.svg." in result.stderr
    assert (tmp_path / "resnet.svg").read_text().startswith("<?xml")
    result = here("sites", str(EXAMPLES / "resnet.py"), "--graph", "resnet.pdf")
    assert result.returncode == 2
    assert "ends in .svg or .dot" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["resnet.svg"]
