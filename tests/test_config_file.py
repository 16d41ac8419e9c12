"""Options in `laurel.toml`: what it may say, what goes before it, and what is said of its mistakes."""

from __future__ import annotations

import json
import tomllib

import pytest
from test_cli import NET

MINE = """
from laurel_rewrite import Connection, Option, register_operator

@register_operator
class Kept(Connection):
    name = "kept-in-a-file"
    formula = "x + f"
    needs = set()
    spread = Option(0.5, "Of nothing", minimum=0.0)

    def step(self, x, f):
        return x + f
"""


@pytest.fixture
def values(here):
    """The effective options of a command line, by name: value and source."""

    def read(*words: str) -> dict[str, tuple[object, str]]:
        done = here(*words, "--print-config", "--json")
        assert done.returncode == 0, done.stderr
        ((_, found),) = json.loads(done.stdout).items()
        return {name: (one["value"], one["source"]) for name, one in found.items()}

    return read


def test_an_option_goes_before_the_plan_the_file_and_the_default(values, tmp_path):
    (tmp_path / "laurel.toml").write_text('rank = 8\nvariant = "lr"\nseed = 7\nout = "there"\n')
    (tmp_path / "plan.toml").write_text('[defaults]\nvariant = "rw"\nrank = 4\n')
    found = values("net.py", "--seed", "3")
    assert found["seed"] == (3, "option")
    assert found["rank"] == (8, "laurel.toml")
    assert found["variant"] == ("lr", "laurel.toml")
    assert found["history"] == (3, "default")
    planned = values("net.py", "--plan", "plan.toml", "--seed", "3")
    assert planned["rank"] == (4, "plan.toml")
    assert planned["variant"] == ("rw", "plan.toml")
    assert planned["out"] == ("there", "laurel.toml")
    assert planned["seed"] == (3, "option")


def test_what_is_printed_says_the_same_as_a_file(here, values, tmp_path):
    (tmp_path / "laurel.toml").write_text('[profile]\nprofile-seconds = 3\nfail-if = ["latency_ratio > 2"]\nself-check = true\n')
    before = values("profile")
    printed = here("profile", "--print-config").stdout
    (tmp_path / "laurel.toml").write_text(printed)
    after = values("profile")
    assert {name: value for name, (value, _) in before.items()} == {name: value for name, (value, _) in after.items()}
    assert after["fail-if"] == (["latency_ratio > 2"], "laurel.toml")
    assert set(tomllib.loads(printed)) == {"profile"}


def test_a_table_is_for_its_verb_alone(values, tmp_path):
    (tmp_path / "laurel.toml").write_text('rank = 2\n[rewrite]\nhistory = 2\n[compare]\nrank = [4, 8]\ntokens = "20k"\nlr = [1e-3, 3e-3]\n')
    (tmp_path / "other.toml").write_text("[compare]\ntokens = 5\n")
    assert values("m.py")["rank"] == (2, "laurel.toml")
    assert values("m.py")["history"] == (2, "laurel.toml")
    found = values("compare")
    assert found["rank"] == ([4, 8], "laurel.toml")
    assert found["tokens"] == (20_000, "laurel.toml")
    assert found["lr"] == ([1e-3, 3e-3], "laurel.toml")
    assert values("compare", "--config", "other.toml")["tokens"] == (5, "other.toml")
    assert values("sites")["set"] == ([], "default")


def test_the_main_job_does_what_the_file_says(here, tmp_path):
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "laurel.toml").write_text('variant = "lr"\nrank = 3\nprofile-seconds = 0\nout = "there"\n')
    plan = json.loads(here("net.py", "--dry-run", "--json").stdout)["plan"]["sites"][0]
    assert (plan["variant"], plan["rank"]) == ("lr", 3)
    other = here("net.py", "--dry-run", "--json", "--variant", "layerscale")  # which has no rank: the file's is for others
    assert json.loads(other.stdout)["plan"]["sites"][0]["variant"] == "layerscale"
    refused = here("net.py", "--dry-run", "--variant", "layerscale", "--rank", "3")
    assert refused.returncode == 2
    assert here("net.py", "--plan-out", "plan.toml").returncode == 0
    planned = here("net.py", "--plan", "plan.toml", "--dry-run", "--json")  # the file's rank is no contradiction, an option is
    assert planned.returncode == 0, planned.stderr
    assert here("net.py", "--plan", "plan.toml", "--rank", "4").returncode == 2
    assert here("net.py").returncode == 0
    assert (tmp_path / "there" / "laurel.onnx").exists()


def test_options_of_operators_in_files(values, tmp_path):
    from laurel_rewrite.operators import registry

    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "laurel.toml").write_text('operator-file = "mine.py"\nvariant = "kept-in-a-file"\nspread = 0.25\n')
    try:
        assert values("m.py")["spread"] == (0.25, "laurel.toml")
    finally:
        registry.forget(["kept-in-a-file"])


WRONG = {
    "unknown key": ("seed = 1\nrnak = 4\n", "laurel.toml, line 2: rewrite has no option 'rnak'. Nearest: rank"),
    "an old name": (
        "[profile]\nmin-time = 4\n",
        "laurel.toml, line 2: profile has no option 'min-time'. It is called profile-seconds now.",
    ),
    "unknown table": ("[profil]\n", "there is no command 'profil' for the table [profil]. Nearest: profile."),
    "no whole number": ("[profile]\nseed = 1.5\n", "laurel.toml, line 2: seed must be a whole number, not 1.5."),
    "no truth": ("\ntrain = 1\n", "laurel.toml, line 2: train must be true or false, not 1."),
    "no list": ("include = [1]\n", "include must be a text, or a list of such, not [1]."),
    "a truth": ("rank = true\n", "rank must be a whole number, not True."),
    "out of range": ("[profile]\nthreads = 0\n", "laurel.toml, line 2: threads: 0 is not in the range x>=1"),
    "no choice": ('target = "ort"\n', "laurel.toml, line 1: target: 'ort' is not one of"),
    "seconds": ("profile-seconds = -1\n", "laurel.toml, line 1: profile-seconds: it must be a number of seconds"),
    "twice": ("rank = 1\n[rewrite]\nrank = 2\n", "rank stands above all tables and in [rewrite]"),
    "no TOML": ("rank 4\n", "laurel.toml is not valid TOML"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_said_with_its_place(name, here, tmp_path):
    content, message = WRONG[name]
    (tmp_path / "laurel.toml").write_text(content)
    verb = [word for word in ("profile",) if f"[{word}]" in content]
    done = here(*verb, "model.onnx")
    assert done.returncode == 2
    assert message in done.stderr
    assert here(*verb, "--help").returncode == 0  # which a file does not stand before


def test_an_old_name_of_an_option_says_the_new_one(here, tmp_path):
    for word in ("--min-time", "--min-time=3"):
        done = here("profile", "a.onnx", word, "3")
        assert done.returncode == 2
        assert "'--min-time'. It is called --profile-seconds now." in done.stderr
    missing = here("profile", "a.onnx", "--config", "nowhere.toml")
    assert missing.returncode == 2
    assert "nowhere.toml cannot be read" in missing.stderr
