"""What may be an operator and where it may come from: what is refused, files, plugins, folders, the command, the cache of functions."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import laurel_rewrite.operators.registry as registry
from laurel_rewrite import (
    ConfigError,
    Connection,
    LaurelConfig,
    Option,
    VerificationError,
    detect,
    load,
    load_operators,
    register_operator,
    rewrite,
    save,
)
from laurel_rewrite.plan import Plan
from laurel_rewrite.testing import Stack, check_operator, moved

TOY_FILE = Path(__file__).with_name("operators.py")
pytestmark = pytest.mark.usefixtures("toys")
D = 16


def refused(text: str, match: str, **data: object) -> None:
    body = {"name": "toy-refused", "formula": "x", "step": lambda self, x, f: x + f, **data}
    cls = type("Refused", (Connection,), body)
    with pytest.raises(ConfigError, match=match):
        register_operator(cls)
    assert "toy-refused" not in registry.operators(), text


def test_what_cannot_be_registered_is_refused():
    refused("a name that is taken", "the name is taken by laurel_rewrite.operators.families.laurel.Laurel", name="rw+lr")
    refused("no name", "its name must be", name="Not A Name")
    refused("an option of the command", "its option 'seed' has the name of one of ours", seed=Option(1, "x"))
    refused("a fact of the place", "its option 'dim' has the name of one of ours", dim=Option(1, "x"))
    refused("a start", "start must be one of exact, evaluation, scale-free, inexact, not 'roughly'", start="roughly")
    refused("a need", "needs are .*, not 'luck'", needs={"luck"})
    refused("a default", "the default of its own: k must be a whole number of at least 3", k=Option(1, "x", minimum=3))
    refused("neither", "neither step nor skip and branch", step=Connection.step)
    refused("both", "both step and one of skip and branch", branch=lambda self, f: f)
    with pytest.raises(ConfigError, match=r"an operator is a subclass of laurel_rewrite.Connection"):
        register_operator(nn.Linear)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (lambda self, x, f: x + 2 * f, "does not compute what the original does"),
        (lambda self, x, f: x.add_(f), "input 0|changed in place"),
        (lambda self, x, f: (x + f).sum(-1, keepdim=True).expand_as(x)[..., :1], "shape|does not compute"),
        (lambda self, x, f: (x + f).half(), "float16|does not compute"),
        (lambda self, x, f, *state: (x + f, x), "leaves states, and declares no reader"),
    ],
)
def test_check_operator_names_what_is_wrong(step, words):
    cls = type("Wrong", (Connection,), {"name": "toy-wrong", "formula": "?", "step": step, "__module__": __name__})
    sys.modules[__name__].Wrong = cls
    try:
        with pytest.raises((AssertionError, VerificationError), match=words):
            check_operator(cls)
    finally:
        registry.forget(["toy-wrong"])


def test_a_stateful_operator_takes_its_whole_stream():
    x = torch.randn(2, 5, D)
    sites = detect(Stack(), (x,))
    text = Plan.from_sites(sites, LaurelConfig("toy-echo")).to_toml()
    assert Plan.from_toml(text).sites == Plan.from_sites(sites, LaurelConfig("toy-echo")).sites
    with pytest.raises(ConfigError, match=r"toy-vector cannot stand in one stream with toy-echo \(blocks.0.laurel_1\)"):
        Plan.from_toml(text.replace('id = "blocks.0.laurel_0"', 'id = "blocks.0.laurel_0"\nvariant = "toy-vector"')).check(sites)
    with pytest.raises(ConfigError, match=r"toy-dense needs every connection of its stream, and blocks.0.laurel_0"):
        Plan.from_sites(sites, LaurelConfig("toy-dense", exclude="blocks.0.laurel_0"))


def test_a_start_for_readers_without_a_scale_is_tried(caplog):
    """The stack's readers are norms; without the last one its head sees the half."""
    x = torch.randn(2, 5, D)
    rewrite(Stack(), (x,), variant="toy-half")
    assert "without a scale" not in caplog.text
    seen = Stack()
    seen.norm = nn.Identity()
    rewrite(seen, (x,), variant="toy-half")
    assert re.search(r"not verified: start for readers without a scale, eval mode: .*; a reader of the stream is no norm", caplog.text)


def test_an_operator_has_the_options_of_all_its_bases():
    class One(Connection):
        first = Option(1, "One")

    class Two(Connection):
        second = Option(2, "Two")

    class Both(One, Two):
        first = Option(3, "Mine")

    assert {name: option.default for name, option in Both.declared.items()} == {
        "first": 3,
        "second": 2,
        "anneal": "none",
        "anneal_steps": 0,
    }


def test_what_was_verified_of_another_start_is_said():
    from laurel_rewrite.backends.rewriting import apply_plan

    base, x = Stack(), torch.randn(2, 5, D)
    sites = detect(base, (x,))
    checks = apply_plan(base, sites, Plan.from_sites(sites, LaurelConfig("toy-gate")), (x,)).checks
    assert all("with plain sums in the place of those at which toy-gate starts" in check.detail for check in checks[:2])


class PostNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(3))
        self.norm = nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.norm(x + torch.tanh(layer(x)))
        return x


def test_a_norm_between_connections_is_refused_where_the_state_would_be_wrong():
    x = torch.randn(2, 5, D)
    with pytest.raises(ConfigError, match="toy-dense cannot carry its state there: a normalisation stands between"):
        rewrite(PostNorm(), (x,), variant="toy-dense")
    rewrite(PostNorm(), (x,), variant="toy-vector")  # local ones have no state


# Files, plugins and the command


GATE = (
    TOY_FILE.read_text().partition("@register_operator")[0]
    + '''

@register_operator
class FromAFile(Connection):
    """Local: x + (1 + a) f."""

    name = "from-a-file"
    formula = "x + (1 + a)*f"
    spread = Option(0.0, "Start of a")

    def build(self) -> None:
        self.a = nn.Parameter(torch.full((1,), self.config.spread))

    def step(self, x: Tensor, f: Tensor) -> Tensor:
        return x + (1 + self.a.to(f.dtype)) * f
'''
)
NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = x + torch.relu(self.a(x))
        return torch.tanh(x + torch.relu(self.b(x)))

def build_model():
    return Net()

def example_inputs():
    return (torch.randn(2, 5, 8),)
"""


def test_the_main_job_with_an_operator_file(tmp_path, here):
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "mine.py").write_text(GATE)
    command = ("net.py", "--operator-file", "mine.py", "--variant", "from-a-file", "--profile-seconds", "0.1")
    done = here(*command)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "laurel_out" / "report.json").read_text())
    assert all(check["passed"] for check in report["verification"])
    assert {site["variant"] for site in report["plan"]["sites"]} == {"from-a-file"}
    assert report["parameters"]["added"] == 2
    wrong = here("net.py", "--operator-file", "mine.py", "--variant", "from-a-file", "--spread", "much")
    assert wrong.returncode == 2
    assert "--spread" in wrong.stderr
    wrong = here(*command[:5], "--rank", "3", "--out", "other")
    assert (wrong.returncode, "from-a-file has no option 'rank'" in wrong.stderr) == (2, True), wrong.stderr
    registry.forget(["from-a-file"])  # the command runs in this process
    assert here("net.py", "--variant", "from-a-file").returncode == 2
    assert "There is no operator file" in here("net.py", "--operator-file", "nothing.py").stderr


def test_a_saved_folder_brings_its_operator_file(tmp_path):
    """A process that never heard of the operator finds it there."""
    (tmp_path / "mine.py").write_text(GATE)
    load_operators(tmp_path / "mine.py")
    x = torch.randn(2, 5, D)
    model = moved(rewrite(Stack(), (x,), variant="from-a-file"))
    save(model, tmp_path / "saved")
    registry.forget(["from-a-file"])
    loaded = load(tmp_path / "saved")
    assert torch.equal(loaded(x), model(x))
    save(loaded, tmp_path / "again")
    assert (tmp_path / "again" / "operators" / "mine.py").read_text() == GATE
    registry.forget(["from-a-file"])
    (tmp_path / "again" / "operators" / "mine.py").unlink()
    with pytest.raises(ConfigError, match=r"mine\.py cannot be read"):
        load(tmp_path / "again")


def test_operator_files_that_cannot_be_loaded(tmp_path):
    for text, words in (
        ("1 / 0", "ZeroDivisionError"),
        ("x = 1", "registers no operator"),
        (GATE.replace('"from-a-file"', '"rw"'), "the name is taken"),
    ):
        (tmp_path / "mine.py").write_text(text)
        with pytest.raises(ConfigError, match=words):
            load_operators(tmp_path / "mine.py")


def test_a_plugin_that_fails_is_named_and_the_others_go_on(monkeypatch, caplog):
    class Entry:
        name, value = "broken", "nowhere.at.all"

        def load(self):
            raise ImportError("no such module")

    monkeypatch.setattr(registry, "_loaded", [])
    monkeypatch.setattr(registry, "_failed", {})
    monkeypatch.setattr(registry.importlib.metadata, "entry_points", lambda group: [Entry()])
    assert "rw+lr" in registry.operators()
    assert "the plugin broken (nowhere.at.all) was left out: ImportError: no such module" in caplog.text
    with pytest.raises(ConfigError, match="The plugin broken could not be loaded"):
        registry.canonical("something-of-broken")


def test_sites_share_a_function_unless_their_operator_looks_at_the_place():
    """A trace takes a while: of ninety sites with one formula there is one."""
    from laurel_rewrite.operators.config import SiteConfig
    from laurel_rewrite.operators.onnx_function import Call, step_function

    def at(name: str, position: int) -> object:
        operator = registry.operator(name)
        connection = operator.connection(operator.prepare(SiteConfig(name, 12, position=position, length=9, role="attention")))
        return step_function(connection, Call(connection.config), torch.float32)

    assert at("rw", 1) is at("rw", 5)
    assert at("toy-dense", 1) is not at("toy-dense", 5)


def test_bodies_of_functions_are_kept_whole_or_made_anew(tmp_path, monkeypatch):
    from laurel_rewrite.operators import onnx_function
    from laurel_rewrite.operators.config import SiteConfig

    operator = registry.operator("rw+lr")
    connection = operator.connection(operator.prepare(SiteConfig("rw+lr", 12, rank=4)))
    made = []
    export = onnx_function._exported
    monkeypatch.setattr(onnx_function, "_exported", lambda *given: made.append(1) or export(*given))

    def body() -> bytes:
        onnx_function._step_function.cache_clear()
        call = onnx_function.Call(connection.config)
        return onnx_function.step_function(connection, call, torch.float32).body.SerializeToString(deterministic=True)

    monkeypatch.setenv("LAUREL_REWRITE_CACHE", str(tmp_path / "cache"))
    first = body()
    assert (body(), len(made)) == (first, 1)
    (kept,) = (tmp_path / "cache" / "functions").iterdir()
    kept.write_bytes(kept.read_bytes()[:-7])
    assert (body(), len(made)) == (first, 2)
    assert (body(), len(made)) == (first, 2)
    monkeypatch.setenv("LAUREL_REWRITE_CACHE", "0")
    assert (body(), len(made)) == (first, 3)


def test_the_compiler_is_not_imported_for_operators():
    code = "import sys, laurel_rewrite.exporting; from laurel_rewrite.operators import registry; registry.operators(); print('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_the_list_for_the_help_is_that_of_the_registry():
    path = Path(__file__).parent.parent / "tools"
    sys.path.insert(0, str(path))
    try:
        import list_operators
    finally:
        sys.path.remove(str(path))
    assert list_operators.FILE.read_text() == list_operators.listed()


def test_a_copy_of_a_connection_is_one(tmp_path):
    model = moved(rewrite(Stack(), (torch.randn(2, 5, D),), variant="toy-lanes"))
    x = torch.randn(2, 3, D)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
