"""The rewritten text, as a person reads it."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys

import pytest
import torch
from conftest import LLAMA, real
from toys import CASES, D

from laurel_rewrite import RewriteError, load, rewrite, save
from laurel_rewrite.backends.module.saving import source_of
from laurel_rewrite.backends.module.surgery import rewriting_of
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.sources.models import build


def registered(function):
    assert function.__code__.co_filename == __file__
    return function


def no_grad_twice(function):
    @functools.wraps(function)
    def no_grad_wrapper(*args):
        return function(*args)

    return no_grad_wrapper


class Decorated(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(D, D)

    @registered
    @no_grad_twice
    @registered
    def forward(self, x):
        return x + self.linear(x)


GOLDEN = [name for name in CASES if name not in ("tied", "post_norm", "sequence_1d", "transformer_layer")]


def text_of(model: torch.nn.Module) -> str:
    text, _ = source_of(rewriting_of(model), type(model).__name__)
    return text.split('"""\n\n', 1)[1]  # without the header, which names the version


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_text(name, golden):
    case = CASES[name]
    golden(f"{name}.txt", text_of(rewrite(case.make(), (torch.randn(case.shape),), rank=4)))


@pytest.mark.parametrize("name", ["gpt2", "falcon_sequential", "vit_small", "cohere"])
def test_golden_text_of_real_classes(name, golden):
    example = real(name)
    golden(f"{name}.txt", text_of(rewrite(example.model, example.args, example.kwargs, rank=4)))


def test_the_text_is_the_originals_but_for_the_sums(golden):
    """A difference of two lines: one a site."""
    import difflib
    import inspect

    from transformers.models.gpt2.modeling_gpt2 import GPT2Block

    example = real("gpt2")
    text = text_of(rewrite(example.model, example.args, example.kwargs, rank=4))
    before = inspect.getsource(GPT2Block.forward).splitlines()
    after = text[text.index("    def forward") :].splitlines()
    changed = [line for line in difflib.ndiff(before, after) if line[0] in "+-"]
    assert [line.strip() for line in changed] == [
        "-         hidden_states = attn_output + residual",
        "+         hidden_states = self.laurel_0(f=attn_output, x=residual)",
        "-         hidden_states = residual + feed_forward_hidden_states",
        "+         hidden_states = self.laurel_1(residual, feed_forward_hidden_states)",
    ]


@pytest.mark.parametrize("name", ["helper", "falcon_sequential"])
def test_the_module_can_be_imported_in_a_fresh_process(name, tmp_path):
    example = real(name) if name not in CASES else None
    model = CASES[name].make() if example is None else example.model
    args, kwargs = ((torch.randn(CASES[name].shape),), {}) if example is None else (example.args, example.kwargs)
    text, names = source_of(rewriting_of(rewrite(model, args, kwargs, rank=4)), "model")
    (tmp_path / "modeling_laurel.py").write_text(text)
    path = [str(tmp_path), str(importlib.util.find_spec("toys").origin.rsplit("/", 1)[0])]
    stub = "from laurel_rewrite.sources.built import declare_torchvision_ops; declare_torchvision_ops()"
    code = f"import sys, warnings; warnings.simplefilter('ignore'); sys.path[:0] = {path}; {stub}; import modeling_laurel as m; print([m.{next(iter(names.values()))}.__mro__[1].__name__])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert type(model).__name__ in done.stdout or "Layer" in done.stdout


def test_decorators_that_do_nothing_at_run_time_are_left_out():
    """One that looks at the file it stands in would fail in another file; one that wraps must stay."""
    better = rewrite(Decorated(), (torch.randn(2, D),), rank=4)
    text = text_of(better)
    assert "@no_grad_twice" in text
    assert "@registered" not in text
    x = torch.randn(3, D)
    assert torch.equal(better(x), Decorated.forward(better, x))


def test_owners_that_the_export_copies_are_found_by_their_path():
    built = build(
        "hf:phi4_multimodal",
        {**LLAMA, "pad_token_id": 0, "vision_config": {"num_hidden_layers": 1}, "audio_config": {"num_blocks": 1}},
        device="meta",
    )
    better = rewrite(built.model, (), built.kwargs, rank=4)
    assert list(sites_of(better)) == [f"model.layers.{n}.laurel_{k}" for n in range(3) for k in (0, 1)]


LAYER = """
import torch

WEIGHT = {weight}


def join(x, f):
    return x + WEIGHT * f


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(16, 16)

    def forward(self, x):
        return join(x, self.linear(x))
"""


def test_equal_names_of_two_modules_do_not_collide(tmp_path, monkeypatch):
    """Two classes, two helpers and two constants of one name each."""
    monkeypatch.syspath_prepend(tmp_path)
    for name, weight in (("first_layers", 0.5), ("second_layers", 2.0)):
        (tmp_path / f"{name}.py").write_text(LAYER.format(weight=weight))
    first, second = (importlib.import_module(name) for name in ("first_layers", "second_layers"))
    model = torch.nn.Sequential(first.Layer(), second.Layer())
    x = torch.randn(3, D)
    better = rewrite(model, (x,), rank=4).eval()
    assert torch.equal(better(x), model(x))
    save(better, tmp_path / "out")
    assert torch.equal(load(tmp_path / "out").eval()(x), model(x))
    text = text_of(better)
    assert "class Layer(_Layer):" in text
    assert "class Layer_2(_Layer_2):" in text
    assert "WEIGHT_2" in text


def test_a_class_inside_a_function_is_rewritten_but_not_saved():
    class Local(CASES["plain"].make().__class__):
        def forward(self, x):
            return x + self.f(x)

    model = Local()
    better = rewrite(model, (torch.randn(2, 5, D),), rank=4)
    with pytest.raises(RewriteError, match="defined inside a function"):
        source_of(rewriting_of(better), "Local")


def test_closures_keep_their_values():
    scale = 0.5

    class Scaled(CASES["plain"].make().__class__):
        def forward(self, x):
            return scale * x + self.f(x)

    model = Scaled().eval()
    x = torch.randn(2, 5, D)
    assert torch.equal(rewrite(model, (x,), rank=4)(x), model(x))


def test_without_source_there_is_a_reason():
    namespace: dict = {"__name__": "nowhere"}
    exec(
        "import torch\nclass Net(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.l = torch.nn.Linear(16, 16)\n"
        "    def forward(self, x):\n        return x + self.l(x)\n",
        namespace,
    )
    with pytest.raises(RewriteError, match="source is not available"):
        rewrite(namespace["Net"](), (torch.randn(2, D),), rank=4)
