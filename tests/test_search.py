"""Searches under a budget, and what candidates cost in onnxruntime."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from test_lab import GPT, SMALL, USUAL

from laurel_rewrite import ConfigError, LaurelConfig
from laurel_rewrite.lab import trials
from laurel_rewrite.lab.budget import Budget, excess, precision_for
from laurel_rewrite.lab.candidates import Candidate, Source, variants
from laurel_rewrite.lab.comparing import compare
from laurel_rewrite.lab.runs import Trainer
from laurel_rewrite.lab.searching import SEED, Space
from laurel_rewrite.lab.serving import Graphs, Served
from laurel_rewrite.sources.models import build

pytestmark = [pytest.mark.engines, pytest.mark.usefixtures("one_thread")]

ASKED = {
    **USUAL, "settings": {**SMALL, "dropout": 0.0}, "tokens": 128 * 9, "evaluations": 9, "variants": ["rw", "rw+lr"], "rank": [2, 4], "seeds": 2,
    "one_more_layer": False,
}  # fmt: skip


def served(ratio: float, low: float, high: float) -> Served:
    return Served({"latency_ratio": ratio, "latency_low": low, "latency_high": high, "flops_ratio": 1.01})


# Budgets


def test_a_budget_is_a_figure_and_its_limit():
    assert Budget.parse("parameters <= 1%") == Budget("parameters <= 1%", "parameters", 0.01)
    assert Budget.parse(" latency_ratio<1.02 ").limit == 1.02
    latency = Budget.parse("latency_ratio <= 1.02")
    assert latency.value(served(1.0, 0.98, 1.05).figures) == 1.05, "the upper end is what is judged"
    assert latency.over({"latency_high": 1.122}) == pytest.approx(0.1, abs=1e-12)
    assert Budget.parse("fusions_lost <= 0").over({"fusions_lost": 2}) == 2
    assert excess((latency, Budget.parse("flops_ratio <= 1.0")), served(1.0, 0.99, 1.01).figures) == pytest.approx(0.01, abs=1e-12)
    assert excess((), {}) == -math.inf


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("latency_ratio", "is no limit such as"),
        ("latency_ratio >= 1", "is no limit such as"),
        ("latncy_ratio <= 1", "there is no figure 'latncy_ratio'. Nearest: latency_ratio"),
        ("verdict <= 1", "there is no figure 'verdict'"),
    ],
)
def test_what_is_no_budget_is_said(words, message):
    with pytest.raises(ConfigError, match=message):
        Budget.parse(words)


def test_a_latency_is_measured_longer_where_that_would_tell():
    budgets = (Budget.parse("latency_ratio <= 1.02"), Budget.parse("parameters <= 1%"))
    assert precision_for(budgets, served(1.0, 0.9, 1.1)) == pytest.approx(0.02, abs=1e-12)
    assert precision_for(budgets, served(1.0, 0.99, 1.01)) is None, "it is within"
    assert precision_for(budgets, served(1.05, 1.04, 1.06)) is None, "it is above"
    assert precision_for(budgets, Served(problem="no graph")) is None


# Spaces


def test_a_space_has_each_set_of_sites_once():
    source = Source(lambda: build(GPT, SMALL))
    space = Space.of(source, variants(source, ["rw", "rw+lr"], {"rank": [2, 4]}))
    assert list(space.operators) == ["rw", "rw+lr rank 2", "rw+lr rank 4"]
    assert list(space.roles) == ["everywhere", "attention only", "feed-forward only"]
    assert list(space.depths) == ["everywhere", "first half", "last half"], "of two blocks the last half is every other one"
    sites = [one.id for one in source.sites()]
    found = {one.name: [site.id for site in source.plan(one).sites] for one in space.candidates()}
    assert found["rw"] == sites
    assert found["rw, attention only"] == [site for site in sites if source.sites().spots[site].role == "attention"]
    assert found["rw+lr rank 4, feed-forward only, last half"] == [sites[-1]]
    of_rw = [tuple(sites) for name, sites in found.items() if name.partition(",")[0] == "rw"]
    assert len(of_rw) == len(set(of_rw))
    assert space.candidate("rw+lr rank 2", "everywhere", "everywhere") == space.operators["rw+lr rank 2"]


def test_selected_sites_are_the_space():
    source = Source(lambda: build(GPT, SMALL))
    space = Space.of(source, variants(source, ["rw"], {}, include="attention"))
    assert {site for one in space.candidates() for site in (s.id for s in source.plan(one).sites)} == set(space.sites)
    assert list(space.roles) == ["everywhere"]


# Searches


def told(found) -> list:
    return [(one.candidate.name, one.state, one.figures, one.loss, one.tokens) for one in found.search.trials]


def test_a_search_keeps_its_budget_and_goes_on_where_it_stopped(text, tmp_path, monkeypatch):
    asked = {**ASKED, "data": text, "search": 3, "budget": "parameters <= 1%"}
    found = compare(GPT, out=tmp_path / "whole", **asked)
    search = found.search
    assert found.done
    assert search.finalists
    assert len(search.of(trials.TRAINED, trials.STOPPED)) == 3
    for trial in search.trials:
        plan = trial.candidate.config
        assert (trial.state == trials.OVER) == (trial.figures["parameters"] > 0.01), plan
        assert (trial.loss is None) == (trial.difference is None) == (trial.state == trials.OVER)
        assert (trial.tokens == 128 * 9) == (trial.state == trials.TRAINED)
    assert search.of(trials.OVER)
    assert {candidate.name for candidate in found.candidates} == {"baseline", *(one.name for one in search.finalists)}
    assert SEED not in found.seeds
    ended = [trial for trial in search.trials if trial.state == trials.TRAINED]
    assert [trial.difference for trial in ended] == [pytest.approx(trial.loss - search.baseline, abs=1e-12) for trial in ended]
    runs = [json.loads(path.read_text())["run"] for path in (tmp_path / "whole" / "search" / "runs").iterdir()]
    assert all(run["judge"] is None and run["seed"] == SEED for run in runs), "a search never sees the third split"
    plan = (tmp_path / "whole" / "plan.toml").read_text()
    assert found.chosen is not None
    assert f'variant = "{found.chosen.config.variant}"' in plan

    trained = Trainer.run
    begun = []

    def some(self, *args, **kwargs):
        begun.append(args)
        if len(begun) > 2:  # behind the unchanged model and a trial
            raise KeyboardInterrupt
        return trained(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "run", some)
    with pytest.raises(KeyboardInterrupt):
        compare(GPT, out=tmp_path / "part", **asked)
    monkeypatch.undo()
    again = compare(GPT, out=tmp_path / "part", **asked)
    assert told(again) == told(found)
    assert {key: run.judge for key, run in again.runs.items()} == {key: run.judge for key, run in found.runs.items()}

    monkeypatch.setattr(Trainer, "run", lambda *args, **kwargs: pytest.fail("everything is trained"))
    assert told(compare(GPT, out=tmp_path / "part", **asked)) == told(found)


def test_an_operator_that_needs_its_whole_stream_is_searched_there_alone(text, tmp_path, toys):
    asked = {name: value for name, value in ASKED.items() if name != "rank"}
    found = compare(GPT, out=tmp_path, data=text, **{**asked, "variants": ["toy-dense"], "search": 3, "seeds": 1}).search
    states = {trial.candidate.name: trial.state for trial in found.trials}
    assert states.pop("toy-dense") == trials.TRAINED
    assert set(states.values()) == {trials.UNFIT}
    assert all("toy-dense" in trial.problem for trial in found.of(trials.UNFIT))


def test_a_search_that_is_late_is_not_done(text, tmp_path):
    found = compare(GPT, out=tmp_path, data=text, **{**ASKED, "search": 3, "max_seconds": 0})
    assert not found.search.done
    assert not found.done
    assert not found.runs
    assert found.chosen is None
    assert found.search.choices == 3 * 9  # of two blocks: all, of a role, of a half
    ranks = {name: value for name, value in ASKED.items() if name != "rank"}
    assert compare(GPT, out=tmp_path, data=text, **{**ranks, "search": 3, "max_seconds": 0}).search.choices == 4 * 9, "rank 32 has no room"
    assert compare(GPT, out=tmp_path, data=text, **{**ranks, "variants": "rw", "search": 3, "max_seconds": 0}).search.choices == 9


def test_a_budget_that_cannot_be_met_names_the_nearest(text, tmp_path, here):
    words = [
        "compare",
        GPT,
        *(f"--set={name}={value}" for name, value in SMALL.items()),
        "--tokens",
        "256",
        "--batch",
        "4",
        "--length",
        "32",
    ]
    words += [
        "--data",
        text,
        "--out",
        str(tmp_path / "out"),
        "--profile-seconds",
        "0",
        "--variant",
        "rw",
        "--variant",
        "rw+lr",
        "--rank",
        "2",
    ]
    done = here(*words, "--search", "--trials", "8", "--budget", "parameters <= 0.01%")
    assert done.returncode == 1
    assert "is within parameters <= 0.01%. The nearest is rw, " in " ".join(done.stderr.split())
    assert not (tmp_path / "out" / "runs").exists()
    report = json.loads((tmp_path / "out" / "report.json").read_text())["comparison"]
    assert {trial["state"] for trial in report["search"]["trials"]} == {"over budget"}
    for more, message in [
        (["--budget", "parameters <= 1%"], "--budget is for a --search"),
        (["--search", "--budget", "latency_ratio <= 1"], "--profile-seconds 0 leaves it out"),
        (["--search", "--budget", "latency <= 1"], "there is no figure 'latency'"),
    ]:
        wrong = here(*words, "--out", str(tmp_path / "wrong"), *more)
        assert wrong.returncode == 2
        assert message in " ".join(wrong.stderr.split())
        assert not (tmp_path / "wrong").exists()


def test_a_latency_that_is_not_resolved_is_measured_again_and_then_over(text, tmp_path, monkeypatch):
    """rw's interval becomes narrow enough, that of rw+lr does not."""
    asked = []

    def measured(self, files, name, precision):
        asked.append((name, precision))
        narrow = 0.01 if precision is not None and "lr" not in name else 0.1
        return served(1.0, 1 - narrow, 1 + narrow)

    monkeypatch.setattr(Graphs, "_measured", measured)
    monkeypatch.setattr(Graphs, "_exported", lambda self, candidate, name: name)
    search = {**ASKED, "data": text, "rank": 2, "search": 4, "budget": "latency_ratio <= 1.02", "profile_seconds": 0.1, "out": tmp_path}
    found = compare(GPT, **search)
    for trial in found.search.trials:
        name = trial.candidate.name
        assert [precision for one, precision in asked if one == name] == [None, pytest.approx(0.02, abs=1e-12)]
        assert (trial.state == trials.OVER) == ("lr" in name)
        assert trial.figures["latency_ratio"] == pytest.approx(1.1 if "lr" in name else 1.01, abs=1e-12)
    assert {one.config.variant for one in found.search.finalists} == {"rw"}
    before = len(asked)
    compare(GPT, **search)
    assert len(asked) == before, "what was measured is kept"


def test_the_report_of_a_search(text, tmp_path):
    jsonschema = pytest.importorskip("jsonschema")
    from laurel_rewrite.report import page, schema
    from laurel_rewrite.report.comparison_plots import comparison_figures

    compare(GPT, out=tmp_path, data=text, **{**ASKED, "search": 3, "budget": "parameters <= 3%", "seeds": 1})
    report = json.loads((tmp_path / "report.json").read_text())
    jsonschema.validate(report, schema())
    assert "search" in comparison_figures(report["comparison"])
    assert "What was searched" in page(report)


# Graphs


def test_a_comparison_has_latencies_and_keeps_them(text, tmp_path, monkeypatch):
    asked = {
        **USUAL,
        "data": text,
        "variants": "rw+lr",
        "rank": 2,
        "seeds": 1,
        "one_more_layer": False,
        "profile_seconds": 0.05,
        "out": tmp_path,
    }
    unchanged, row = compare(GPT, **asked).rows()
    assert unchanged.latency == 1
    ratio, low, high = row.size.latency
    assert low <= ratio <= high
    assert row.latency == ratio
    kept = json.loads((tmp_path / "graphs.json").read_text())["rw+lr"]["found"]
    assert kept["shapes"] == {"ids": "int64[1, 32]"}, "one example of the length that is trained on"
    assert kept["figures"]["parameter_ratio"] > 1
    monkeypatch.setattr(Graphs, "_measured", lambda *args: pytest.fail("it was measured"))
    assert compare(GPT, **asked).rows()[1].size.latency == row.size.latency


def test_a_model_without_a_graph_is_compared_without_latency(text, tmp_path, monkeypatch):
    from laurel_rewrite.errors import ExportError

    def refused(self, candidate, name):
        raise ExportError("no such graph")

    monkeypatch.setattr(Graphs, "_exported", refused)
    found = compare(GPT, **{**USUAL, "profile_seconds": 0.1}, data=text, variants="rw", seeds=1, one_more_layer=False, out=tmp_path)
    assert found.done
    assert found.rows()[1].latency is None
    assert "no such graph" in json.loads((tmp_path / "graphs.json").read_text())["rw"]["found"]["problem"]


def test_other_candidates_of_a_name_are_measured_again(text, tmp_path):
    one = Candidate("mine", LaurelConfig("rw"))
    asked = {
        **USUAL,
        "profile_seconds": 0.05,
        "data": text,
        "variants": (),
        "seeds": 1,
        "one_more_layer": False,
        "max_seconds": 0,
        "out": tmp_path,
    }
    compare(GPT, candidates=[one], **asked)
    first = json.loads((tmp_path / "graphs.json").read_text())["mine"]["found"]
    compare(GPT, candidates=[dataclasses.replace(one, config=LaurelConfig("lr", rank=2))], **asked)
    second = json.loads((tmp_path / "graphs.json").read_text())["mine"]["found"]
    assert second["figures"]["parameter_ratio"] > first["figures"]["parameter_ratio"]
