"""Toy nets x variants x invariants, and the same invariants on real architectures. Traced with one input, compared with another."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import REAL, Example, away_from_start, output, real
from torch import nn
from torch.nn.utils import parametrize
from toys import CASES, Branch, D, Helper, Plain, TwoBranches

from laurel_rewrite import ConfigError, NoSiteError, RewriteError, detect, load, remove, rewrite, save
from laurel_rewrite.backends.module.surgery import rewriting_of
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.operators.families.laurel import Laurel
from laurel_rewrite.plan import LaurelConfig, Plan
from laurel_rewrite.testing import Stack

VARIANTS = ["rw", "lr", "pa", "rw+lr", "rw+pa", "lr+pa", "rw+lr+pa"]


def toy(name: str) -> Example:
    case = CASES[name]
    batch, *rest = case.shape
    other = (torch.randn(batch + 1, *[n if n in (D, 3) else n + 3 for n in rest]),)
    return Example(case.make(), (torch.randn(case.shape),), {}, (other, {}), case.sites)


def check_invariants(example: Example, variant: str, modules: int | None = None) -> nn.Module:
    model = example.model
    keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    better = rewrite(model, example.args, example.kwargs, variant=variant, rank=4)
    assert list(model.state_dict()) == keys, "the caller's model was changed"
    assert [type(m) for m in model.modules()] == classes
    assert len(sites_of(better)) == (modules or example.sites)

    # The start is exact, on inputs that were not captured.
    for train in (False, True):
        copies = [copy.deepcopy(m) for m in (model, better)]
        expected, found = (output(m, example.other_args, example.other_kwargs, train=train) for m in copies)
        assert torch.equal(expected, found), f"train={train}: {(expected - found).abs().max()}"
        for (name, a), b in zip(copies[0].named_buffers(), dict(copies[1].named_buffers()).values(), strict=True):
            assert torch.equal(a, b), name

    # Checkpoints load both ways, with LAuReL keys alone left over.
    result = better.load_state_dict(model.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert result.missing_keys
    assert all("laurel_" in key for key in result.missing_keys)
    back = copy.deepcopy(model).load_state_dict(better.state_dict(), strict=False)
    assert not back.missing_keys
    assert all("laurel_" in key for key in back.unexpected_keys)

    # Every parameter takes part.
    away_from_start(better)
    assert not torch.equal(output(model, example.args, example.kwargs), output(better, example.args, example.kwargs))

    # A second time is refused, and removal restores everything.
    with pytest.raises(ConfigError, match="rewritten already"):
        rewrite(better, example.args, example.kwargs)
    restored = remove(copy.deepcopy(better))
    assert [type(m) for m in restored.modules()] == classes
    assert list(restored.state_dict()) == keys
    assert torch.equal(output(restored, example.other_args, example.other_kwargs), output(model, example.other_args, example.other_kwargs))
    return better


@pytest.mark.parametrize(
    ("name", "variant"),
    [(name, variant) for name in CASES for variant in ("rw", "rw+lr+pa")]
    + [(name, variant) for name in ("loop", "parallel", "tied") for variant in VARIANTS if variant not in ("rw", "rw+lr+pa")],
)
def test_toys(name, variant):
    check_invariants(toy(name), variant, CASES[name].modules)


@pytest.mark.parametrize("name", REAL)
def test_real_architectures(name):
    check_invariants(real(name), "rw+lr+pa")


# float32 against formulas written out: rtol 1e-5, atol 1e-6 leave room for another order of sums and nothing else.


def hand_written(blocks: list[Branch], lasts: list[Laurel], x: torch.Tensor, k: int) -> torch.Tensor:
    """RW+LR+PA over a chain of residual connections, written out."""
    states = []
    for block, laurel in zip(blocks, lasts, strict=True):
        states.insert(0, x)
        mix = 2 * torch.softmax(laurel.mix, 0)
        skip = x
        for j, state in enumerate(states[:k]):
            skip = skip + laurel.g[j] * (state @ laurel.down[j].weight.T @ laurel.up[j].weight.T)
        x = mix[0] * block(x) + mix[1] * skip
    return x


def test_history_reads_the_stream_of_the_paper():
    model = CASES["loop"].make().eval()
    better = away_from_start(rewrite(model, (torch.randn(2, 5, D),), variant="rw+lr+pa", rank=4)).eval()
    x = torch.randn(3, 7, D)
    lasts = list(better.laurel_0)
    assert [m.config.lags for m in lasts] == [1, 2, 3]
    with torch.no_grad():  # float32; the order of the sums differs
        torch.testing.assert_close(better(x), hand_written(list(better.layers), lasts, x, 3), rtol=1e-5, atol=1e-6)


def test_a_shared_block_reads_its_own_former_calls():
    model = CASES["tied"].make().eval()
    better = away_from_start(rewrite(model, (torch.randn(2, 5, D),), variant="rw+lr+pa", rank=4, history=2)).eval()
    block = better.block
    x, states = torch.randn(3, 7, D), []
    with torch.no_grad():
        expected = x
        for _ in range(3):
            for branch, laurel in ((block.f, block.laurel_0), (block.g, block.laurel_1)):
                states.insert(0, expected)
                mix = 2 * torch.softmax(laurel.mix, 0)
                skip = expected
                for j, state in enumerate(states[:2]):
                    skip = skip + laurel.g[j] * (state @ laurel.down[j].weight.T @ laurel.up[j].weight.T)
                expected = mix[0] * branch(expected) + mix[1] * skip
        torch.testing.assert_close(better(x), expected, rtol=1e-5, atol=1e-6)  # float32; the order of the sums differs


def test_states_do_not_outlive_a_pass():
    model = rewrite(CASES["loop"].make(), (torch.randn(2, 5, D),), variant="pa", rank=4).eval()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            first = model(torch.randn(2, 5, D))
            assert all(slot.value is None for m in sites_of(model).values() for slot in m.link.stream.slots)
            x = torch.randn(4, 3, D)
            assert torch.equal(model(x), model(x))
        assert first.shape == (2, 5, D)


def test_a_turn_that_is_left_out_stays_plain(tmp_path):
    model, x = CASES["loop"].make().eval(), torch.randn(2, 5, D)
    better = rewrite(model, (x,), variant="rw+lr+pa", rank=4, exclude="laurel_0.1").eval()
    assert list(sites_of(better)) == ["laurel_0.0", "laurel_0.2"]
    assert torch.equal(better(x), model(x))
    assert sites_of(better)["laurel_0.2"].config.lags == 2  # the stream of the sites that were rewritten
    away_from_start(better)
    save(better, tmp_path)
    assert torch.equal(load(tmp_path).eval()(x), better(x))
    assert list(remove(better, inplace=True).state_dict()) == list(model.state_dict())


def test_a_list_of_layers_of_ones_own_is_not_called_so_the_stream_begins_above_it():
    """GPT-2's `h` is a ModuleList: a hook on it would never run."""
    model = rewrite(real("gpt2").model, (), real("gpt2").kwargs, variant="pa", rank=4).eval()
    ids = real("gpt2").kwargs["input_ids"]
    with torch.no_grad():
        first = model(input_ids=ids[:, :5]).logits
        model(input_ids=ids)
        assert torch.equal(model(input_ids=ids[:, :5]).logits, first)
    model(input_ids=ids).logits.sum().backward()  # states of the pass with gradients are kept, and cleared by the next
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids[:, :5]).logits, first)


def test_inplace_changes_the_model_itself():
    model = Plain()
    assert rewrite(model, (torch.randn(2, 5, D),), inplace=True, rank=4) is model
    assert isinstance(model.laurel_0, Laurel)
    assert type(model).__name__ == "Plain"
    assert isinstance(model, Plain)


def test_a_class_that_was_changed_again_stops_remove():
    better = rewrite(Plain(), (torch.randn(2, 5, D),), rank=4)
    owner = better.get_submodule(next(iter(sites_of(better))).rpartition(".")[0])
    owner.scale = nn.Parameter(torch.ones(2))
    parametrize.register_parametrization(owner, "scale", nn.Identity())
    with pytest.raises(ConfigError, match="was changed to Parametrized"):
        remove(better, inplace=True)
    parametrize.remove_parametrizations(owner, "scale")
    remove(better, inplace=True)


def test_new_parameters_follow_device_and_dtype():
    model = Plain().to(torch.bfloat16)
    better = rewrite(model, (torch.randn(2, 5, D, dtype=torch.bfloat16),), rank=4)
    assert {p.dtype for p in better.parameters()} == {torch.bfloat16}
    with torch.device("meta"):
        model, x = Plain(), torch.randn(2, 5, D)
    better = rewrite(model, (x,), rank=4)
    assert all(p.is_meta for p in better.parameters())


def test_selectors_and_plan(tmp_path):
    model, x = Plain(), torch.randn(2, 5, D)
    only = rewrite(model, (x,), include="laurel_1", rank=4)
    assert list(sites_of(only)) == ["laurel_1"]
    assert list(sites_of(rewrite(model, (x,), exclude=["laurel_1"], rank=4))) == ["laurel_0"]
    with pytest.raises(ConfigError, match=r"'laurel_7' matches no site\. Nearest: laurel_"):
        rewrite(model, (x,), include="laurel_7", rank=4)
    with pytest.raises(ConfigError, match=r"laurel_0: rank 17 is above its feature size 16"):
        rewrite(model, (x,), rank=17)
    path = tmp_path / "plan.toml"
    text = Plan.from_sites(detect(model, (x,)), LaurelConfig(rank=4)).to_toml()
    path.write_text(text.replace('id = "laurel_0"', 'id = "laurel_0"\nvariant = "lr"\nrank = 2'))
    edited = rewrite(model, (x,), plan=str(path))
    assert [(m.config.variant, m.config.rank) for m in sites_of(edited).values()] == [("lr", 2), ("rw+lr", 4)]
    path.write_text(text.replace('id = "laurel_1"', 'id = "laurel_9"'))
    with pytest.raises(ConfigError, match="names the site 'laurel_9'"):
        rewrite(model, (x,), plan=str(path))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("version = 2", "version = 7", "version 7"),
        ("rank = 4", "rank = 400", "not between 1 and its feature size 16"),
        ("rank = 4", "rang = 4", "unknown key 'rang'. Nearest: rank"),
        ('id = "laurel_0"', 'id = "laurel_0"\nrang = 4', "site laurel_0: unknown key 'rang'. Nearest: rank"),
        ('variant = "rw+lr"', 'variant = "rw+xx"', "Unknown variant"),
        ("version = 2", "version = [", "not valid TOML"),
        ("\n[defaults]", '\n[[rule]]\nmatch = "blocks.*"\nvariant = "rw"\n\n[defaults]', "no site is of the rule 'blocks.*'"),
        ("\n[defaults]", "\n[[stream]]\nstream = 7\nrank = 2\n\n[defaults]", "no site is of the stream 7"),
        ('id = "laurel_0"', 'id = "laurel_0"\nhistory = 0', "history must be a whole number of at least 1"),
        ('id = "laurel_1"', 'id = "laurel_0"', "twice"),
    ],
)
def test_a_damaged_plan_says_what_is_wrong(old, new, message):
    text = Plan.from_sites(detect(Plain(), (torch.randn(2, 5, D),)), LaurelConfig(rank=4)).to_toml()
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        Plan.from_toml(text.replace(old, new))


OLD_PLAN = """
version = 1
seed = 3

[[site]]
id = "laurel_0"
kind = "identity"
owner = ""
where = "toys.py:10"
shape = ["batch", 5, 16]
axis = -1
dim = 16
stream = 0
index = 0
variant = "rw+lr"
rank = 4
history = 3
normalize = "sigmoid"
init_down = "orthogonal"
history_map = "low-rank"
calls = 1
"""


def test_plans_of_the_first_version_are_read():
    """Their sites said everything themselves."""
    plan = Plan.from_toml(OLD_PLAN)
    (site,) = plan.sites
    assert (site.variant, site.rank, site.normalize, plan.seed) == ("rw+lr", 4, "sigmoid", 3)
    assert Plan.from_toml(plan.to_toml()) == plan
    better = rewrite(Plain(), (torch.randn(2, 5, D),), plan=plan)
    assert list(sites_of(better)) == ["laurel_0"]
    with pytest.raises(ConfigError, match="the key 'rank' is missing"):
        Plan.from_toml(OLD_PLAN.replace("rank = 4\n", ""))


def test_a_plan_says_operator_and_options_once():
    x = torch.randn(2, 5, D)
    sites = detect(Stack(4), (x,))
    plan = Plan.from_sites(sites, LaurelConfig("rw+lr", rank=4))
    text = plan.to_toml()
    assert text.count("rw+lr") == text.count("rank = 4") == 1
    rules = """
[[rule]]
match = "blocks.[01]*"
variant = "rw"

[[rule]]
match = "blocks.1"
variant = "lr"
rank = 2
"""
    edited = Plan.from_toml(
        text.replace("\n[[site]]", rules + "\n[[site]]", 1).replace('id = "blocks.3.laurel_1"', 'id = "blocks.3.laurel_1"\nrank = 3')
    )
    found = [(row.variant, row.options["rank"]) for row in edited.sites]
    assert found == [("rw", 4)] * 2 + [("lr", 2)] * 2 + [("rw+lr", 4)] * 3 + [("rw+lr", 3)]
    assert Plan.from_toml(edited.to_toml()) == edited
    assert list(sites_of(rewrite(Stack(4), (x,), plan=edited)))[-1] == "blocks.3.laurel_1"


def test_a_plan_round_trips():
    plan = Plan.from_sites(detect(real("gpt2").model, (), real("gpt2").kwargs), LaurelConfig(variant="rw+lr+pa", rank=4, seed=3))
    assert Plan.from_toml(plan.to_toml()) == plan


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x):
        return self.linear(x)


class Listed(Plain):
    """Written in a way that is not rewritten."""

    def forward(self, x):
        return sum([x, self.f(x)])


class Overridden(Plain):
    def forward(self, x):
        return super().forward(x) * 2


def test_what_has_no_site():
    with pytest.raises(NoSiteError, match="no residual connection"):
        rewrite(Bare(), (torch.randn(2, D),))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Listed, r"sum\(\[x, self.f\(x\)\]\), which is not rewritten; write it with \+"),
        (Overridden, "overrides and calls through super"),
    ],
)
def test_what_cannot_be_rewritten_is_refused_before_anything_changes(make, message):
    model = make()
    keys = list(model.state_dict())
    with pytest.raises(RewriteError, match=message):
        rewrite(model, (torch.randn(2, 5, D),), rank=4, inplace=True)
    assert list(model.state_dict()) == keys
    assert type(model) is make


def test_an_instance_forward_is_refused():
    model = Plain()
    model.forward = model.forward
    with pytest.raises(RewriteError, match="replaced on the instance"):
        rewrite(model, (torch.randn(2, 5, D),), rank=4)


def test_a_taken_name_is_refused():
    model = Plain()
    model.laurel_0 = nn.Identity()
    with pytest.raises(RewriteError, match="has an attribute 'laurel_0' already"):
        rewrite(model, (torch.randn(2, 5, D),), rank=4)


class Positions(nn.Module):
    """Skip and branch of different memory layouts, each first once, and readers that mind: a view, and dropout's mask."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv1d(D, D, 3, padding=1), nn.Conv1d(D, D, 3, padding=1)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        x = x + self.one(x.transpose(1, 2)).transpose(1, 2)
        x = self.dropout(x).view(-1, D).view(x.shape)
        y = self.two(x.transpose(1, 2)).transpose(1, 2) + x
        return self.dropout(y), x, y


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_memory_layout_is_the_sums(variant):
    model, x = Positions(), torch.randn(2, 6, D)
    better = rewrite(model, (x,), variant=variant, rank=4)
    assert [row.side for row in rewriting_of(better).plan.sites] == [0, 1]
    graph = rewrite(torch.fx.symbolic_trace(model), (x,), variant=variant, rank=4)
    other = torch.randn(3, 7, D)
    for train in (False, True):
        outputs = []
        for net in (model, better, graph):
            torch.manual_seed(0)
            outputs.append(net.train(train)(other))
        for found in outputs[1:]:
            for a, b in zip(found, outputs[0], strict=True):
                assert torch.equal(a, b)
                assert a.stride() == b.stride()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stream_of_two_dtypes(variant):
    class Wide(TwoBranches):
        def forward(self, x):
            x = (x.double() + self.f(x).double()).float()
            return x.double() + self.g(x)

    model, x = Wide().eval(), torch.randn(2, 5, D)
    better = rewrite(model, (x,), variant=variant, rank=4).eval()
    assert better(x).dtype == torch.float64
    assert torch.equal(better(x), model(x))


def test_an_old_plan_is_read():
    plan = Plan.from_sites(detect(CASES["tied"].make(), (torch.randn(2, 5, D),)), LaurelConfig(variant="pa", rank=4))
    text = "".join(line for line in plan.to_toml().splitlines(True) if not line.startswith(("side", "repeats")))
    assert [(row.side, row.repeats) for row in Plan.from_toml(text).sites] == [(0, 3), (0, 3)]


def test_helpers_keep_their_keyword_arguments():
    better = rewrite(Helper(), (torch.randn(2, 5, D),), rank=4)
    assert len(sites_of(better)) == 2


class SixDimensions(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return x + torch.relu(self.conv(x.flatten(2, 4)).reshape(x.shape))


def test_a_feature_axis_that_no_convolution_maps():
    x = torch.randn(2, 8, 2, 2, 2, 2)
    with pytest.raises(ConfigError, match="No site has a feature axis that maps fit"):
        rewrite(SixDimensions(), (x,), rank=4)
    assert sites_of(rewrite(SixDimensions(), (x,), variant="rw"))


@pytest.mark.parametrize("case", ["parallel", "parallel_skip_middle"])
def test_a_start_that_is_declared_inexact_is_verified_with_further_branches_too(case):
    x = torch.randn(2, 5, D)
    base = CASES[case].make().eval()
    model = rewrite(base, (x,), variant="rw", normalize="paper").eval()
    torch.testing.assert_close(model(x), base(x) / 2, rtol=1e-6, atol=1e-6)  # each term is halved, and not the sum
