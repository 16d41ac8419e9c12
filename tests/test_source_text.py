"""Files as editors and people leave them: tabs, form feeds, odd line ends inside strings, other encodings, globals."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from conftest import away_from_start

from laurel_rewrite import RewriteError, load, rewrite, save

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
TEXT = """\
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(16, 16)

    def forward(self, x):
        word = "BEFORE"  # x + self.a(x)
        x = x + self.a(x) * len("AFTER")
        return x, word
"""
FILES = {
    "tabs": TEXT.replace("    ", "\t"),
    "a form feed between functions": TEXT.replace("    def forward", "\f    def forward"),
    "line ends of Unicode in a string": TEXT.replace("BEFORE", "a\u2028b\u0085c").replace("AFTER", "\u2028"),
    "letters of several bytes": TEXT.replace("BEFORE", "träge 🌳").replace("AFTER", "é"),
    "Latin 1": "# -*- coding: latin-1 -*-\n" + TEXT.replace("BEFORE", "träge").replace("AFTER", "é"),
    "line ends of Windows": TEXT.replace("\n", "\r\n"),
    "a mark of byte order": "\ufeff" + TEXT,
}


def imported(folder, name, text):
    path = folder / f"{name}.py"
    path.write_bytes(text.encode("latin-1" if "latin-1" in text else "utf-8"))
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", FILES)
def test_a_file_means_what_it_meant(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    module = imported(tmp_path, f"text_{list(FILES).index(name)}", FILES[name])
    model = module.Net()
    better = rewrite(model, (X,), rank=4)
    assert torch.equal(better(X)[0], model(X)[0])
    assert better(X)[1] == model(X)[1]
    laurel, count = away_from_start(better).laurel_0, 1 if "AFTER" not in FILES[name] else 5
    a, b = laurel.weights()
    expected = a * better.a(X) * count + b * (X + X @ laurel.down.weight.T @ laurel.up.weight.T)
    torch.testing.assert_close(better(X)[0], expected, rtol=1e-5, atol=1e-5)  # float32, another order of products
    save(better, tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    assert torch.equal(loaded(X)[0], better(X)[0])
    assert loaded(X)[1] == model(X)[1]


def test_a_function_that_sets_a_global_is_rewritten_and_not_saved(tmp_path):
    text = TEXT.replace('word = "BEFORE"', "global COUNT; COUNT = word = COUNT + 1").replace("class Net", "COUNT = 0\n\n\nclass Net")
    module = imported(tmp_path, "text_global", text)
    better = rewrite(module.Net(), (X,), rank=4)
    before = module.COUNT
    assert better(X)[1] == before + 1 == module.COUNT
    with pytest.raises(RewriteError, match="sets a global variable of its module, so that it cannot be saved"):
        save(better, tmp_path / "saved")
