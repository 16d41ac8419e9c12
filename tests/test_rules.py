"""Rules: what some sites get instead of what all get, from Python and in a plan file that lists no site."""

from __future__ import annotations

import pytest
import torch
from conftest import run
from pages import ROOT, blocks

from laurel_rewrite import ConfigError, LaurelConfig, detect, export_onnx, learned, load, rewrite, rewrite_onnx, save
from laurel_rewrite.lab.candidates import Candidate
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.plan import Plan, read_plan
from laurel_rewrite.testing import moved
from laurel_rewrite.testing.stacks import AttentionStack, D, Stack

X = torch.randn(2, 5, D)
RULES = [{"match": "blocks.{0..1}*", "variant": "layerscale", "init": 1.0}, {"match": "blocks.1", "variant": "lr", "rank": 2}]
FILE = """
include = ["blocks.*"]
exclude = ["blocks.3"]
seed = 5

[defaults]
variant = "rw+lr"
rank = 4

[[rule]]
match = "blocks.{0..1}*"
variant = "layerscale"
init = 1.0

[[rule]]
match = "blocks.1"
variant = "lr"
rank = 2
"""


def got(model) -> list[tuple[str, int | None]]:
    return [(module.config.variant, module.config.options.get("rank")) for module in sites_of(model).values()]


def test_rules_from_python():
    """The later one before the earlier one; by hand, site by site, it is the same model."""
    model = rewrite(Stack(4), (X,), variant="rw+lr", rank=4, rules=RULES)
    assert got(model) == [("layerscale", None)] * 2 + [("lr", 2)] * 2 + [("rw+lr", 4)] * 4
    base = Stack(4)
    sites = detect(base, (X,))
    parts = [
        Plan.from_sites(sites, LaurelConfig("layerscale", init=1.0, include="blocks.0")),
        Plan.from_sites(sites, LaurelConfig("lr", rank=2, include="blocks.1")),
        Plan.from_sites(sites, LaurelConfig("rw+lr", rank=4, include=("blocks.2", "blocks.3"))),
    ]
    by_hand = Plan(tuple(row for part in parts for row in part.sites))
    ruled = Plan.from_sites(sites, LaurelConfig("rw+lr", rank=4, rules=RULES))
    assert ruled.sites == by_hand.sites
    other = torch.randn(3, 7, D)
    found = []
    for plan in (ruled, by_hand):
        torch.manual_seed(0)
        found.append(moved(rewrite(base, (X,), plan=plan)).eval()(other))
    assert torch.equal(*found)


def test_a_plan_without_sites(tmp_path):
    """For the module, for its graph and for what is saved of it."""
    path = tmp_path / "rules.toml"
    path.write_text(FILE)
    base = Stack(4).eval()
    model = rewrite(base, (X,), plan=str(path))
    assert got(model) == [("layerscale", None)] * 2 + [("lr", 2)] * 2 + [("rw+lr", 4)] * 2
    assert "blocks.3.laurel_0" not in learned(model)
    save(moved(model), tmp_path / "saved")
    saved = load(tmp_path / "saved").eval()
    other = torch.randn(3, 5, D)
    torch.testing.assert_close(saved(other), model.eval()(other), rtol=1e-6, atol=1e-6)
    plan = Plan.read(tmp_path / "saved" / "plan.toml")
    assert plan.seed == 5
    assert [row.id for row in plan.sites] == [*sites_of(model)]
    graph = export_onnx(base, (X,), None, tmp_path / "base.onnx")
    names = {node.name or node.op_type for node in rewrite_onnx(graph, plan=str(path)).graph if "laurel" in node.domain}
    assert len(names) == 6


def test_a_rule_is_of_a_stream_or_a_role():
    sites = detect(AttentionStack(2), (X,))
    plan = Plan.from_sites(sites, LaurelConfig("rw", rules=[{"match": "attention", "variant": "rezero"}]))
    assert [row.variant for row in plan.sites] == ["rezero" if "attention" in row.role else "rw" for row in plan.sites]
    assert len({row.variant for row in plan.sites}) == 2
    plan = Plan.from_sites(sites, LaurelConfig("rw", rules=[{"stream": 0, "normalize": "sigmoid"}]))
    assert {row.options["normalize"] for row in plan.sites} == {"sigmoid"}


def test_the_rank_of_a_rule_is_bound_by_its_own_sites():
    sites = detect(Stack(2), (X,))
    with pytest.raises(ConfigError, match=f"blocks.1.laurel_0: rank {D + 1} is above its feature size {D}"):
        Plan.from_sites(sites, LaurelConfig("rw+lr", rank=4, rules=[{"match": "blocks.1", "rank": D + 1}]))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([{"variant": "rw"}], "each with match or stream"),
        ([{"match": "blocks.0", "stream": 0, "variant": "rw"}], "each with match or stream"),
        ({"match": "blocks.0"}, "rules must be a list"),
        (["blocks.0"], "rules must be a list"),
        ([{"match": "blocks.7", "variant": "rw"}], "no site is of the rule 'blocks.7'"),
        ([{"stream": 3, "variant": "rw"}], "no site is of the stream 3"),
        ([{"match": "blocks.0", "variant": "layrscale"}], "layerscale"),
        ([{"match": "blocks.0", "variant": "layerscale", "rank": 4}], "layerscale has no option rank"),
        ([{"match": "blocks.0", "streams": 4}], "says streams, which the operators of its sites do not have"),
        ([{"match": "blocks.0", "rang": 4}], "unknown key 'rang'. Nearest: rank"),
        ([{"match": "blocks.0", "rank": 0}], "blocks.0.laurel_0: rank must be a whole number of at least 1"),
        ([{"match": "blocks.0", "anneal": "linear"}], "blocks.0.laurel_0: anneal"),
        (
            [{"match": "blocks.0", "variant": "denseformer"}],
            "rw\\+lr cannot stand in one stream with denseformer",
        ),
    ],
)
def test_a_rule_that_cannot_be_meant(rules, message):
    """Nothing is changed then."""
    model = Stack(2)
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ConfigError, match=message):
        rewrite(model, (X,), variant="rw+lr", rank=4, rules=rules, inplace=True)
    assert [name for name, _ in model.named_modules()] == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists no site and has no"),
        ('[[rule]]\nmatch = "blocks.0"\nvariant = "rw"', "lists no site and has no"),
        ('[defaults]\nvariant = "rw"\nblock_size = 4', "block_size"),
        ('version = 9\n[defaults]\nvariant = "rw"', "version"),
        ('[defaults]\nvariant = "rw"\n[[rule]]\nvariant = "lr"', "match"),
        ('site = 3\n[defaults]\nvariant = "rw"', "site must be"),
    ],
)
def test_a_file_without_sites_that_cannot_be_meant(tmp_path, text, message):
    path = tmp_path / "rules.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"rules.toml.*{message}"):
        read_plan(path)


def test_a_plan_with_sites_has_no_selectors():
    text = Plan.from_sites(detect(Stack(2), (X,)), LaurelConfig("rw")).to_toml()
    with pytest.raises(ConfigError, match="lists its sites, so exclude cannot stand in it"):
        Plan.from_toml(text.replace("version = 2", 'version = 2\nexclude = ["blocks.0"]'))


def test_a_plan_says_of_a_site_what_is_not_usual():
    text = Plan.from_sites(detect(Stack(2), (X,)), LaurelConfig("rw")).to_toml()
    assert not any(f"\n{key} = " in text for key in ("calls", "turns", "holder", "side", "repeats", "reads"))


def test_the_command_takes_rules_and_writes_the_plan_of_them(tmp_path):
    (tmp_path / "model.py").write_text(
        "import torch\nfrom torch import nn\n\n\nclass Block(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.map = nn.Linear(16, 16)\n\n    def forward(self, x):\n        return x + self.map(x)\n\n\n"
        "def build_model():\n    return nn.Sequential(nn.Linear(16, 16), Block(), Block())\n\n\n"
        "def example_inputs():\n    return (torch.randn(2, 16),)\n"
    )
    (tmp_path / "rules.toml").write_text('[defaults]\nvariant = "rw+lr"\nrank = 4\n\n[[rule]]\nmatch = "2"\nvariant = "rezero"\n')
    made = run(tmp_path, "model.py", "--plan", "rules.toml", "--plan-out", "full.toml")
    assert "Written to full.toml" in made.stdout, made.stderr
    plan = Plan.read(tmp_path / "full.toml")
    assert [(row.id, row.variant) for row in plan.sites] == [("1.laurel_0", "rw+lr"), ("2.laurel_0", "rezero")]
    assert plan.model == "model.py"
    made = run(tmp_path, "model.py", "--plan", "rules.toml", "--profile-seconds", "0", "--out", "out")
    assert made.returncode == 0, made.stderr
    assert [row.variant for row in Plan.read(tmp_path / "out" / "plan.toml").sites] == ["rw+lr", "rezero"]


def test_a_plan_is_given_alone(tmp_path):
    plan = Plan.from_sites(detect(Stack(2), (X,)), LaurelConfig("rw"))
    with pytest.raises(ConfigError, match="A plan says what each site gets, so rank cannot be given with it"):
        rewrite(Stack(2), (X,), plan=plan, rank=4)
    assert len(sites_of(rewrite(Stack(2), (X,), plan=plan, include=[]))) == 4
    graph = export_onnx(Stack(2).eval(), (X,), None, tmp_path / "base.onnx")
    with pytest.raises(ConfigError, match="so variant cannot be given with it"):
        rewrite_onnx(graph, plan=plan, variant="lr")


def test_the_plan_of_the_page(tmp_path):
    (tmp_path / "plan.toml").write_text(*blocks(ROOT / "docs" / "sites.md", "toml"))
    plan = Plan.from_sites(detect(AttentionStack(4), (X,)), read_plan(tmp_path / "plan.toml"))
    found = {row.id: (row.variant, row.options.get("rank")) for row in plan.sites}
    assert "blocks.0.laurel_0" not in found
    assert found["blocks.1.laurel_0"] == ("rw+lr", 8)
    assert found["blocks.1.laurel_1"] == ("layerscale", None)
    assert found["blocks.3.laurel_0"] == ("rw+lr", 16)


def test_what_compare_trains_is_known_by_its_rules(tmp_path):
    """And a configuration without any is what it always was, so that old results go on."""
    (tmp_path / "mixed.toml").write_text(FILE)
    candidate = Candidate.of_plan(tmp_path / "mixed.toml")
    assert (candidate.name, candidate.plan) == ("mixed", None)
    assert [rule["match"] for rule in candidate.to_dict()["config"]["rules"]] == ["blocks.{0..1}*", "blocks.1"]
    assert "rules" not in Candidate("rw", LaurelConfig("rw")).to_dict()["config"]
