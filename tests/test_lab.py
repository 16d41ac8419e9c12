"""Comparisons: the same seeds and batches for all, runs that are stopped and go on, and what is refused before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path

import accelerate
import pytest
import torch
from conftest import EXAMPLES
from torch import nn
from torch._dynamo.utils import counters

from laurel_rewrite import ConfigError, LaurelConfig
from laurel_rewrite.errors import LaurelError
from laurel_rewrite.lab.candidates import Candidate
from laurel_rewrite.lab.comparing import compare
from laurel_rewrite.lab.comparison import slug
from laurel_rewrite.lab.runs import Recipe, Trainer
from laurel_rewrite.lab.tasks import CLASSES
from laurel_rewrite.sources.models import build

SMALL = {"width": 16, "depth": 2, "heads": 2, "vocabulary": 256, "context": 64, "dropout": 0.1}
GPT = str(EXAMPLES / "gpt.py")
USUAL = {"settings": SMALL, "tokens": 640, "batch": 4, "length": 32, "evaluations": 5, "profile_seconds": 0, "inspect": 0}


pytestmark = [pytest.mark.engines, pytest.mark.usefixtures("one_thread")]


def losses(found) -> dict:
    return {key: (run.curve, run.judge, run.learned) for key, run in found.runs.items()}


def test_a_comparison_goes_on_where_it_stopped_and_may_grow(text, tmp_path):
    class Stopped(Exception):
        pass

    class Stage:
        def __init__(self, stops):
            self.stops = stops

        def progress(self, fraction, text=""):
            if self.stops and fraction > 0.7:
                raise Stopped

        def done(self, text):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    asked = {**USUAL, "data": text, "variants": ["rw", "rw+lr"], "rank": 2, "seeds": 2}
    whole = compare(GPT, out=tmp_path / "whole", **asked)
    assert whole.done
    assert [candidate.name for candidate in whole.candidates] == ["baseline", "one more layer", "rw", "rw+lr"]
    stages = []

    def listener(name):
        stages.append(name)
        return Stage(len(stages) == 3)

    with pytest.raises(Stopped):
        compare(GPT, out=tmp_path / "part", listener=listener, **asked)
    assert (tmp_path / "part" / "state" / "run.json").is_file()
    resumed = compare(GPT, out=tmp_path / "part", **asked)
    assert losses(resumed) == losses(whole)
    assert not (tmp_path / "part" / "state").exists()
    files = sorted(path.name for path in (tmp_path / "part" / "runs").iterdir())
    assert files == sorted(f"{slug(key)}.json" for key in whole.planned())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "part" / "runs").iterdir()}
    more = compare(GPT, out=tmp_path / "part", **{**asked, "variants": ["rw", "lr"], "seeds": 3})
    assert len(more.runs) == 12
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert more.runs["rw", 1e-3, 1].judge == whole.runs["rw", 1e-3, 1].judge
    report = json.loads((tmp_path / "part" / "report.json").read_text())["comparison"]
    assert [row["name"] for row in report["rows"]] == ["baseline", "one more layer", "rw", "lr"]


def test_a_folder_of_another_comparison_is_refused(text, tmp_path):
    asked = {**USUAL, "data": text, "variants": "rw", "seeds": 1, "one_more_layer": False, "out": tmp_path / "out"}
    compare(GPT, **asked)
    kept = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    for other, message in [
        ({"tokens": 1280}, "another recipe, tokens: 640, not 1280"),
        ({"data": "builtin"}, "another data, name"),
        ({"settings": {**SMALL, "width": 32}}, "another settings, width: 16, not 32"),
    ]:
        with pytest.raises(ConfigError, match=message):
            compare(GPT, **{**asked, **other})
    with pytest.raises(ConfigError, match="is of another 'rw': candidate"):
        compare(GPT, **{**asked, "normalize": "sigmoid"})
    assert {path: path.read_bytes() for path in kept} == kept


def test_one_seed_is_not_judged_and_several_rates_are_chosen_from(text, tmp_path):
    found = compare(GPT, **USUAL, data=text, variants="rw", seeds=1, one_more_layer=False, rates=(1e-5, 1e-2), out=tmp_path)
    assert [row.judgement.verdict for row in found.rows()] == ["baseline", "one seed: not judged"]
    assert {row.rate for row in found.rows()} == {1e-2}
    assert len(found.runs) == 4


def test_a_run_that_diverges_is_a_result(text, tmp_path, monkeypatch):
    wild = Candidate("wild", LaurelConfig("rw"), rate=1e12)
    asked = {
        **USUAL,
        "tokens": 2560,
        "data": text,
        "variants": (),
        "candidates": [wild],
        "seeds": 2,
        "one_more_layer": False,
        "out": tmp_path,
    }
    _, row = compare(GPT, **asked).rows()
    assert row.judgement.verdict == "failed"
    assert all("the loss was" in reason for reason in row.failures.values())
    monkeypatch.setattr(Trainer, "run", lambda *args, **kwargs: pytest.fail("it has its runs"))
    _, again = compare(GPT, **asked).rows()
    assert again.failures == row.failures


def test_a_model_that_was_compiled_is_looked_into(text, tmp_path, monkeypatch):
    """In bfloat16, as GPUs train; its weights are those of the model that was not."""
    plugin = accelerate.utils.TorchDynamoPlugin
    monkeypatch.setattr(accelerate.utils, "TorchDynamoPlugin", lambda backend: plugin(backend="eager"))
    compare(
        GPT, **USUAL, data=text, variants=(), seeds=1, one_more_layer=False, max_seconds=0, out=tmp_path / "plain"
    )  # Accelerate's state is now of it
    counters.clear()
    asked = {**USUAL, "inspect": 2, "compile": True, "precision": "bf16"}
    found = compare(GPT, **asked, data=text, variants="rw+lr", rank=2, seeds=1, one_more_layer=False, out=tmp_path / "out")
    assert counters["stats"]["unique_graphs"] > 0
    (seen,) = found.inside
    assert seen["problem"] == ""
    assert {site["site"] for site in seen["inside"]["sites"]} == set(found.runs["rw+lr", 1e-3, 0].learned)


def test_the_steps_of_annealing_are_those_of_the_optimiser(text, tmp_path):
    asked = {**USUAL, "accumulate": 2}
    found = compare(
        GPT, **asked, data=text, variants="layerscale", anneal="linear", anneal_steps=1000, seeds=1, one_more_layer=False, out=tmp_path
    )
    (run,) = [run for (name, *_), run in found.runs.items() if name == "layerscale"]
    shares = {values["t"] for values in run.learned.values()}
    assert [*shares] == pytest.approx([run.curve[-1].step / 1000], rel=1e-6)


def test_no_run_begins_behind_the_time(text, tmp_path):
    found = compare(GPT, **USUAL, data=text, variants="rw", seeds=2, max_seconds=0, out=tmp_path)
    assert not found.runs
    assert not found.done
    assert found.rows() == []


def test_images(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.body, self.head = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 10)

        def forward(self, x):
            x = self.stem(x)
            return self.head((x + self.body(x).relu()).mean((2, 3)))

    found = compare(Net, (torch.randn(2, 1, 8, 8),), variants="rw", tokens=64, batch=8, seeds=2, profile_seconds=0, out=tmp_path)
    assert [candidate.name for candidate in found.candidates] == ["baseline", "rw"]
    assert found.notes == [
        "one more layer: Net: no layer of it can be put in once more, so that its example inputs run through it. It is left out."
    ]
    assert json.loads((tmp_path / "report.json").read_text())["notes"] == found.notes
    assert found.about["task"]["objective"] == CLASSES
    assert found.about["data"]["name"] == "builtin:digits"
    assert len(found.rows()) == 2


OWN = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, points, scale):
        return (points + self.inner(points)) * scale

def build_model():
    return Net()

def example_inputs():
    return {"points": torch.randn(2, 4), "scale": torch.tensor(2.0)}

def dataset(split):
    generator = torch.Generator().manual_seed(len(split))
    points = torch.randn(64, 4, generator=generator)
    return [{"points": p, "target": p.flip(0)} for p in points]

def loss(model, batch):
    return LOSS
"""


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("(model(batch['points'], torch.tensor(2.0)) - batch['target']).square().mean()", ""),
        ("(model(batch['points'], torch.tensor(2.0)) - batch['target'])", "must be a scalar tensor"),
        ("model(batch['points'], torch.tensor(2.0)).detach().mean()", "no gradient flows from its loss"),
        ("model(batch['points'], torch.tensor(2.0)).mean() / 0 * 0", "its loss is nan before the first step"),
        ("model(batch['nothing'])", "its loss raised KeyError"),
    ],
)
def test_the_loss_and_the_data_of_a_model_file(written, message, tmp_path):
    path = tmp_path / f"points_{abs(hash(written))}.py"
    path.write_text(OWN.replace("LOSS", written))
    asked = {"variants": "rw", "tokens": 64, "batch": 8, "seeds": 1, "one_more_layer": False, "profile_seconds": 0, "out": tmp_path / "out"}
    if message:
        with pytest.raises(LaurelError, match=message):
            compare(str(path), **asked)
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    else:
        assert compare(str(path), **asked).done


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"settings": {**SMALL, "vocabulary": 300}, "tokenizer": "words.json"}, "words, and the model knows 300"),
        ({"length": 32, "batch": 4, "data": "short.txt"}, r"short.txt: the split 'choose' has \d examples of 32, and a batch 4"),
        ({"variants": "rw+xx"}, "rw\\+xx"),
        ({"variants": "lr", "rank": 0}, "rank"),
        ({"length": 128}, "does not run with its first argument"),
        ({"rates": (0.0,)}, "Learning rates must be above 0"),
        ({"batch": 4, "accumulate": 3}, "cannot be computed in 3 equal parts"),
        ({"inspect": 1}, "two batches or more"),
        ({"precision": "int8"}, "precision must be one of"),
    ],
)
def test_what_cannot_be_meant_is_said_before_training(changed, message, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("too short for this\n" * 30)
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{n}": n for n in range(400)} | {"[UNK]": 400}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]")).save("words.json")
    with pytest.raises(LaurelError, match=message):
        compare(GPT, **{**USUAL, "data": text, "seeds": 1, "out": tmp_path / "out", **changed})
    assert not (tmp_path / "out" / "runs").exists()


def test_sharding_that_would_not_happen_is_refused(text, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"shards models \(FSDP\) on accelerators alone"):
        compare(GPT, **USUAL, data=text, variants="rw", seeds=1, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_processes_that_would_train_by_themselves_are_refused(text, tmp_path, monkeypatch):
    """As torchrun starts them, where Accelerate looks for accelerators alone."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="2 processes were started, and Accelerate sees 1"):
        compare(GPT, **USUAL, data=text, variants="rw", seeds=1, out=tmp_path / "out")


def test_a_state_of_accelerate_that_was_there_comes_back(text, tmp_path):
    before = accelerate.Accelerator(cpu=True)
    try:
        found = compare(GPT, **USUAL, precision="bf16", data=text, variants=(), seeds=1, one_more_layer=False, out=tmp_path)
        assert found.done
        assert before.state.mixed_precision == accelerate.Accelerator(cpu=True).state.mixed_precision == "no"
    finally:
        accelerate.state.AcceleratorState._reset_state()


def test_a_recipe_warms_up_and_cools_down():
    recipe = Recipe(1000, warmup=0.1, final=0.1)
    rates = [recipe.rate(step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (n + 1) for n in range(10)], rel=1e-12)
    assert rates[10] == 1
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert recipe.stops(5) == [1, 2, 3, 4, 5]
    assert recipe.stops(32)[-1] == 32


def test_the_command(text, tmp_path):
    from click.testing import CliRunner

    from laurel_rewrite.app.compare_command import compare as command

    given = [f"--set={name}={value}" for name, value in SMALL.items()]
    words = [GPT, *given, "--variant", "rw", "--variant", "rw+lr", "--rank", "2,4", "--tokens", "0.64k", "--seeds", "2", "--batch", "4"]
    words += ["--length", "32", "--data", text, "--out", str(tmp_path / "out"), "--no-one-more-layer", "--profile-seconds", "0"]
    done = CliRunner().invoke(command, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "rw+lr rank 4" in done.output
    assert "not told apart" in done.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["comparison"]["rows"]) == 4


def test_the_report_is_as_its_schema_says_and_draws(text, tmp_path):
    jsonschema = pytest.importorskip("jsonschema")
    from laurel_rewrite.report import page, schema
    from laurel_rewrite.report.comparison_plots import comparison_figures

    wild = Candidate("wild <b>", LaurelConfig("rw"), rate=1e12)
    asked = {**USUAL, "inspect": 2, "data": text, "candidates": [wild], "seeds": 2, "one_more_layer": False, "out": tmp_path}
    found = compare(GPT, variants="rw", **asked)
    assert [one["name"] for one in found.inside] == [
        one.name for one in found.candidates if one.rewritten and found.runs[one.name, 1e-3, 0].judge
    ]
    report = json.loads((tmp_path / "report.json").read_text())
    jsonschema.validate(report, schema())
    assert set(comparison_figures(report["comparison"])) == {"curves", "differences", "costs", "inside"}
    drawn = page(report)
    assert drawn.count("<svg") == 4
    assert "wild &lt;b&gt;" in drawn
    assert "not told apart" in drawn
    assert "sites gain by more than two standard errors" in drawn
    before = (tmp_path / "inside.json").read_bytes()
    assert compare(GPT, variants="rw", **asked).inside == report["comparison"]["inside"]
    assert (tmp_path / "inside.json").read_bytes() == before


def test_what_was_trained_is_looked_into_and_its_gaining_sites_are_a_plan(text, tmp_path):
    from click.testing import CliRunner

    from laurel_rewrite.app.compare_command import compare as compared
    from laurel_rewrite.app.inspect_command import inspect as command
    from laurel_rewrite.lab.inspecting import inspect
    from laurel_rewrite.plan import Plan

    asked = {**USUAL, "tokens": 5120, "rates": 1e-2, "data": text, "seeds": 1, "one_more_layer": False, "out": tmp_path / "out"}
    found = compare(GPT, variants=["rw", "rw+lr+pa"], rank=2, **asked)
    looked = {one.name: one for one in inspect(tmp_path / "out", batches=2)}
    assert set(looked) == {"rw", "rw+lr+pa"}
    for name, one in looked.items():
        run = found.runs[name, 1e-2, 0]
        learned = {site.site: site.learned for site in one.inside.sites}
        assert learned == {site: pytest.approx(values, rel=1e-6) for site, values in run.learned.items()}  # float32 from a file
        assert one.inside.loss == pytest.approx(run.judge, abs=0.5)  # of fewer batches
    assert looked["rw+lr+pa"].inside.plain.loss != 0
    plan = tmp_path / "gaining.toml"
    done = CliRunner().invoke(command, [str(tmp_path / "out"), "--candidate", "rw+lr+pa", "--plan-out", str(plan)], catch_exceptions=True)
    assert "Inside rw+lr+pa" in done.output
    if done.exit_code == 0:
        sites = [row.id for row in Plan.read(plan).sites]
        assert 0 < len(sites) < 4
        words = [GPT, *(f"--set={name}={value}" for name, value in SMALL.items()), "--plan", str(plan), "--tokens", "128", "--seeds", "1"]
        words += [
            "--batch",
            "4",
            "--length",
            "32",
            "--data",
            text,
            "--no-one-more-layer",
            "--profile-seconds",
            "0",
            "--out",
            str(tmp_path / "again"),
        ]
        again = CliRunner().invoke(compared, words, catch_exceptions=False)
        assert again.exit_code == 0
        assert "gaining" in again.output
    else:
        assert "No plan was written" in str(done.exception)
    for wrong, message in [
        ({"candidate": "baseline"}, "no weights of 'baseline' with an operator"),
        ({"batches": 1}, "two batches or more"),
    ]:
        with pytest.raises(ConfigError, match=message):
            inspect(tmp_path / "out", **wrong)
    with pytest.raises(ConfigError, match="is not the model that was compared"):
        inspect(tmp_path / "out", lambda: build(GPT, {**SMALL, "width": 32}).model, torch.zeros(2, 32, dtype=torch.int64))
