"""A grammar of PyTorch programs whose residual connections are known by construction.

A program is source text, for rewriting edits source. Its statements change one tensor, `x`, [2, time, 8] or [2, 8, height, width], and each
says how many residual connections one run of it has. What looks like one and is none is in the grammar too.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

D = 8
HEAD = """\
import functools
import operator

import torch
import torch.nn.functional as F
from torch import nn
"""
FORMS = {"sequence": ((2, 5, D), (3, 7, D)), "image": ((2, D, 6, 6), (3, D, 8, 6))}
"""Shapes of the input: the one that is captured, and another to compare with."""


@dataclass(frozen=True)
class Program:
    """A module of source text with a class `Model`.

    Attributes:
        sites: how many residual connections a run has.
        theme: what the program has for certain.
        shapes: of the input, at the capture and for the comparison.
    """

    text: str
    sites: int
    theme: str
    form: str

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return FORMS[self.form]


def program(seed: int) -> Program:
    """The program of a seed."""
    draw = random.Random(seed)
    theme = draw.choice(list(THEMES))
    file = _File(draw, draw.choice(list(FORMS)))
    model = _Class(file, "Model")
    for at in range(draw.randint(1, 3)):
        model.statement(theme if at == 0 else draw.choice(list(THEMES)))
    if not model.sites:
        model.statement("plain")
    file.classes.append(model.text())
    return Program("\n\n".join([HEAD, *file.helpers.values(), *file.classes]), model.sites, theme, file.form)


class _File:
    """What the classes of one program share."""

    def __init__(self, draw: random.Random, form: str) -> None:
        self.draw, self.form = draw, form
        self.helpers: dict[str, str] = {}
        self.classes: list[str] = []

    def helper(self, name: str, text: str) -> str:
        self.helpers[name] = text
        return name


class _Class:
    """One nn.Module on its way: layers, the lines of its forward, further methods, and the sites of one call."""

    def __init__(self, file: _File, name: str, depth: int = 0) -> None:
        self.file, self.draw, self.form, self.name, self.depth = file, file.draw, file.form, name, depth
        self.layers: list[str] = []
        self.methods: list[str] = []
        self.lines: list[str] = []
        self.sites = 0
        self.names = 0

    def text(self) -> str:
        init = ["def __init__(self):", "    super().__init__()", *(f"    {line}" for line in self.layers)]
        forward = ["def forward(self, x):", *(f"    {line}" for line in self.lines), "    return x"]
        methods = [*init, "", *forward, *(line for method in self.methods for line in ("", *method.splitlines()))]
        return "\n".join([f"class {self.name}(nn.Module):", *(f"    {line}".rstrip() for line in methods), ""])

    # Parts

    def fresh(self, stem: str) -> str:
        self.names += 1
        return f"{stem}{self.names}"

    def own(self, value: str, stem: str = "layer") -> str:
        """Give the class an attribute; the expression that reads it."""
        name = self.fresh(stem)
        self.layers.append(f"self.{name} = {value}")
        return f"self.{name}"

    def linear(self) -> str:
        """A layer that is linear in what it reads, and mixes."""
        return self.own(
            f"nn.Linear({D}, {D})" if self.form == "sequence" else f"nn.Conv2d({D}, {D}, {self.draw.choice(['1', '3, padding=1'])})"
        )

    def norm(self) -> str:
        images = [f"nn.BatchNorm2d({D})", f"nn.GroupNorm(2, {D})"]
        return self.own(f"nn.LayerNorm({D})" if self.form == "sequence" else self.draw.choice(images), "norm")

    def activation(self) -> str:
        return self.draw.choice(["F.gelu({})", "torch.tanh({})", "F.silu({})", "F.relu({})", "{}.sigmoid()"])

    def layer(self) -> str:
        """The constructor of a module from the stream's shape to the stream's shape, without a residual connection."""
        linear = f"nn.Linear({D}, {D})" if self.form == "sequence" else f"nn.Conv2d({D}, {D}, 3, padding=1)"
        return self.draw.choice([linear, f"nn.Sequential({linear}, nn.GELU(), {linear})", f"nn.Sequential({linear}, nn.Dropout(0.1))"])

    def branch(self, of: str = "x") -> str:
        """An expression that is computed from `of` by at least one op that mixes; its last op keeps no result for the backward."""
        draw, linear = self.draw, self.linear()
        if draw.random() < 0.3:
            of = f"{self.norm()}({of})"
        match draw.randrange(7), self.form:
            case 0, _:
                return f"{linear}({of})"
            case 1, _:
                return f"{linear}({self.activation().format(f'{self.linear()}({of})')})"
            case 2, _:
                return self.own("nn.Dropout(0.1)") + f"({linear}({of}))"
            case 3, _:
                return f"{linear}({of}).double().to(torch.float32)"
            case 4, "sequence":
                return f"{linear}({of}.flip(1)).roll(1, 1)"
            case 5, "sequence":
                conv = self.own(f"nn.Conv1d({D}, {D}, 3, padding=1)")
                return f"{conv}({linear}({of}).transpose(1, 2)).transpose(1, 2)"
            case 6, "sequence":
                return f"{self.linear()}(torch.softmax({of} @ {of}.transpose(1, 2), -1) @ {linear}({of}))"
            case 4, _:
                return f"{linear}({of}).contiguous(memory_format=torch.channels_last)"
            case _:
                last = self.own(f"nn.Linear({D}, {D})")
                return f"{last}({linear}({of}).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)"

    def sum(self, a: str, b: str) -> str:
        """a + b, in one of its forms."""
        if self.draw.random() < 0.5:
            a, b = b, a
        forms = [
            "{} + {}",
            "torch.add({}, {})",
            "({}).add({})",
            "operator.add({}, {})",
            "torch.add(input={}, other={})",
            "({}).__add__({})",
        ]
        return self.draw.choice(forms).format(a, b)

    def add(self, *lines: str, sites: int = 0) -> None:
        self.lines += lines
        self.sites += sites

    def statement(self, theme: str) -> None:
        THEMES[theme](self)

    def block(self) -> _Class:
        """Another class of the same file, of a few statements."""
        block = _Class(self.file, f"Block{len(self.file.classes)}", self.depth + 1)
        themes = [name for name in THEMES if self.depth < 1 or name not in ("nested", "shared")]
        for _ in range(self.draw.randint(1, 2)):
            block.statement(self.draw.choice(themes))
        block.name = f"Block{len(self.file.classes)}"
        self.file.classes.append(block.text())
        return block


# Statements, by theme


def _plain(c: _Class) -> None:
    forms = ["x = {}", "x = {norm}({})", "x = {drop}({})"]
    form = c.draw.choice(forms)
    names = {"norm": c.norm() if "norm" in form else "", "drop": c.own("nn.Dropout(0.1)") if "drop" in form else ""}
    c.add(form.format(c.sum("x", c.branch()), **names), sites=1)


def _nested(c: _Class) -> None:
    block = c.block()
    attribute = c.own(f"{block.name}()", "block")
    match c.draw.randrange(4):
        case 0:
            c.add(f"x = {attribute}(x)", sites=block.sites)
        case 1:  # the branch has connections of its own
            c.add(f"x = {c.sum('x', f'{c.linear()}({attribute}(x))')}", sites=block.sites + 1)
        case 2:  # one sum in the middle of another's branch
            inner = c.activation().format(f"({c.sum('x', c.branch())})")
            c.add(f"x = {c.sum('x', f'{c.linear()}({inner})')}", sites=2)
        case 3:  # and read again after it
            inner = f"{c.norm()}(h := {c.sum('x', c.branch())})"
            c.add(f"x = {c.sum('x', f'{c.linear()}({inner})')} * h.sigmoid()", sites=2)


def _n_ary(c: _Class) -> None:
    one, two, three = c.branch(), c.branch(), c.branch()
    forms = [
        "x + {} + {}",
        "{} + x + {}",
        "x + ({} + {})",
        "{} + ({} + x)",
        "torch.add(x + {}, {})",
        "x + {} + {} + {}",
        "(x + {}).add_({})",
    ]
    c.add(f"x = {c.draw.choice(forms).format(one, two, three)}", sites=1)


def _parallel(c: _Class) -> None:
    h, again = c.fresh("h"), c.fresh("h")
    c.add(f"{h} = {c.norm()}(x)", f"{again} = {c.branch(h)}")
    if c.draw.random() < 0.5:
        c.add(f"x = x + {again} + {c.branch(h)}", sites=1)
    else:
        c.add(f"x = {again} + x", f"x = {c.sum('x', c.branch())}", sites=2)


def _shared(c: _Class) -> None:
    block = c.block()
    attribute = c.own(f"{block.name}()", "block")
    if c.draw.random() < 0.2:
        c.file.helper("Join", "class Join(nn.Module):\n    def forward(self, a, b):\n        return a + b\n")
        join = c.own("Join()", "join")
        second = c.draw.choice(["x, {}", "b={}, a=x", "{}, x"])
        c.add(f"x = {join}(x, {c.branch()})", f"x = {join}({second.format(c.branch())})", sites=2)
        return
    times = c.draw.randint(2, 3)
    c.add(*[f"x = {attribute}(x)"] * times, sites=times * block.sites)


def _loop(c: _Class) -> None:
    turns = c.draw.randint(2, 3)
    layers = c.own(f"nn.ModuleList([{c.layer()} for _ in range({turns})])", "layers")
    match c.draw.randrange(6):
        case 0:
            c.add(f"for layer in {layers}:", f"    x = {c.sum('x', 'layer(x)')}", sites=turns)
        case 1:
            c.add("i = 0", f"while i < {turns}:", f"    x = {c.sum('x', f'{layers}[i](x)')}", "    i += 1", sites=turns)
        case 2:
            c.add(f"x = functools.reduce(lambda h, layer: {c.sum('h', 'layer(h)')}, {layers}, x)", sites=turns)
        case 3:
            norms = c.own(
                f"nn.ModuleList([nn.LayerNorm({D}) if {c.form == 'sequence'} else nn.GroupNorm(2, {D}) for _ in range({turns})])", "norms"
            )
            c.add(f"for layer, norm in zip({layers}, {norms}):", f"    x = {c.sum('x', 'layer(norm(x))')}", sites=turns)
        case 4:
            c.add(f"for layer in {layers}:", "    h = x", f"    x = layer(x) + h + {c.linear()}(h)", sites=turns)
        case 5:
            c.add(f"for layer in {layers}:", f"    x = {c.sum('x', 'layer(x)')}", f"    x = {c.sum('x', c.branch())}", sites=2 * turns)


def _conditional(c: _Class) -> None:
    turns = c.draw.randint(3, 4)
    match c.draw.randrange(7):
        case 0:
            layers = c.own(f"nn.ModuleList([{c.layer()} for _ in range({turns})])", "layers")
            test = [
                f"    if i % 2:\n        x = layer(x)\n    else:\n        x = {c.sum('x', 'layer(x)')}",
                f"    x = {c.sum('x', 'layer(x)')} if i % 2 == 0 else layer(x)",
            ]
            c.add(f"for i, layer in enumerate({layers}):", *c.draw.choice(test).splitlines(), sites=(turns + 1) // 2)
        case 1:
            layers = c.own(f"nn.ModuleList([{c.layer()} for _ in range({turns})])", "layers")
            c.add(
                f"for i, layer in enumerate({layers}):",
                "    if i == 1:",
                "        continue",
                f"    x = {c.sum('x', 'layer(x)')}",
                sites=turns - 1,
            )
        case 2:
            layers = c.own(f"nn.ModuleList([{c.layer()} for _ in range({turns})])", "layers")
            c.add(f"for i, layer in enumerate({layers}):", f"    x = {c.sum('x', 'layer(x)')}", "    if i == 1:", "        break", sites=2)
        case 3:
            flag = c.own("True", "flag")
            c.add(f"x = {c.sum('x', c.branch())} if {flag} else {c.branch()}", sites=1)
        case 4:
            flag = c.own("False", "flag")
            c.add(f"x = {c.sum('x', f'({c.branch()} if {flag} else {c.branch()})')}", sites=1)
        case 5:
            c.add("if x.dim() > 2:", f"    x = {c.sum('x', c.branch())}", "else:", "    x = x + 1", sites=1)
        case 6:
            h = c.fresh("h")
            c.add(f"{h} = {c.branch()}", f"x = {h} if x is None else {c.sum('x', h)}", sites=1)


def _helper(c: _Class) -> None:
    name = c.fresh("turn")
    match c.draw.randrange(6):
        case 0:
            c.methods.append(f"def {name}(self, x):\n    return {c.sum('x', c.branch())}")
            c.add(f"x = self.{name}(x)", sites=1)
        case 1:
            c.methods.append(f"def {name}(self, x, y):\n    return {c.sum('x', 'y')}")
            c.add(f"x = self.{name}(x, {c.branch()})", f"x = self.{name}(y={c.branch()}, x=x)", sites=2)
        case 2:
            turns = c.draw.randint(2, 3)
            layers = c.own(f"nn.ModuleList([{c.layer()} for _ in range({turns})])", "layers")
            c.methods.append(f"def {name}(self, x, layer, scale=1.0):\n    y = layer(x) * scale\n    return {c.sum('x', 'y')}")
            c.add(f"for layer in {layers}:", f"    x = self.{name}(x, layer)", sites=turns)
        case 3:
            join = c.file.helper("join", "def join(a, b):\n    return a + b\n")
            second = c.draw.choice(["x, b={}", "a=x, b={}", "{}, b=x"])  # the last: another operand holds the skip
            c.add(f"x = {join}(x, {c.branch()})", f"x = {join}({second.format(c.branch())})", sites=2)
        case 4:  # the outer name calls the inner one
            c.methods.append(f"def {name}(self, x):\n    return self.{name}_inner(x, {c.branch()})")
            c.methods.append(f"def {name}_inner(self, x, y):\n    return {c.sum('x', 'y')}")
            c.add(f"x = self.{name}(x)", sites=1)
        case 5:
            c.methods.append(
                f"def {name}(self, x):\n    for layer in (self.first{name}, self.second{name}):\n        x = x + layer(x)\n    return x"
            )
            c.layers += [f"self.first{name} = {c.layer()}", f"self.second{name} = {c.layer()}"]
            c.add(f"x = self.{name}(x)", sites=2)


def _in_place(c: _Class) -> None:
    y, z = c.fresh("y"), c.fresh("z")
    match c.draw.randrange(7):
        case 0:
            c.add(f"{y} = {c.branch()}", f"{y} += x", f"x = {y}", sites=1)
        case 1:
            c.add(f"{y} = {c.branch()}", f"x = {y}.add_(x)", sites=1)
        case 2:
            c.add(f"{y} = x.clone()", f"{z} = {y}", f"{y} += {c.branch()}", f"x = {z}", sites=1)
        case 3:
            c.add(f"{y} = x.clone()", f"{z} = {y}.view({y}.shape)", f"{y}.add_({c.branch()})", f"x = {z}", sites=1)
        case 4:
            c.add(f"x += {c.branch()}", sites=1)
        case 5:
            c.add(f"{y} = x.clone()", f"{y} = {y}.add_({c.branch()}).add_({c.branch()})", f"x = {y}", sites=1)
        case 6:
            c.add(f"{y} = {c.branch()}", f"torch.add(x, {y}, out={y}) if False else {y}.add_(x)", f"x = {y}", sites=1)


def _cast(c: _Class) -> None:
    forms = [
        "x = ({} + x.double()).float()",
        "x = (x.to(torch.float64) + {}).to(x.dtype)",
        "x = x + ({}).double()\nx = x.float()",
        "x = torch.add(x.double(), {}).type_as(x)",
    ]
    c.add(*c.draw.choice(forms).format(c.branch()).splitlines(), sites=1)


def _permuted(c: _Class) -> None:
    y = c.fresh("y")
    if c.form == "sequence":
        conv = c.own(f"nn.Conv1d({D}, {D}, 3, padding=1)")
        c.add(f"{y} = x.transpose(1, 2)", f"{y} = {c.sum(y, f'{conv}({y})')}", f"x = {y}.transpose(1, 2)", sites=1)
        return
    if c.draw.random() < 0.5:
        c.add("x = x.to(memory_format=torch.channels_last)", f"x = {c.sum('x', c.branch())}", sites=1)
        return
    linear, norm = c.own(f"nn.Linear({D}, {D})"), c.own(f"nn.LayerNorm({D})")
    c.add(f"{y} = x.permute(0, 2, 3, 1)", f"{y} = {c.sum(y, f'{linear}({norm}({y}))')}", f"x = {y}.permute(0, 3, 1, 2)", sites=1)


def _none(c: _Class) -> None:
    """Sums that are no residual connections."""
    size = f"({D})" if c.form == "sequence" else f"({D}, 1, 1)"
    gate = c.fresh("g")
    match c.draw.randrange(8):
        case 0:
            c.add(f"x = x + {c.own('nn.Parameter(torch.randn' + size + ')', 'table')}")
        case 1:
            c.add("x = x + 0.5")
        case 2:
            c.add(f"x = x + {c.activation().format('x')}")
        case 3:
            c.add("x = x + x * torch.sigmoid(x)")
        case 4:
            c.add(f"{gate} = torch.sigmoid({c.linear()}(x))", f"x = {gate} * x + (1 - {gate}) * {c.linear()}(x)")
        case 5:
            c.add("x = x + (x.round() - x).detach()")
        case 6:
            c.add(f"x = {c.linear()}(x) + {c.linear()}(x)")
        case 7:
            c.add(f"x = F.gelu({c.linear()}(x)) + F.silu({c.linear()}(x))")


def _form(c: _Class) -> None:
    """Places in which people write an addition."""
    name = c.fresh("f")
    match c.draw.randrange(8):
        case 0:
            c.methods.append(f"@staticmethod\ndef {name}(a, b):\n    return {c.sum('a', 'b')}")
            c.add(f"x = self.{name}(x, {c.branch()})", sites=1)
        case 1:
            c.methods.append(f"def __{name}(self, x):\n    return {c.sum('x', c.branch())}")
            c.add(f"x = self.__{name}(x)", sites=1)
        case 2:
            c.add(f"{name} = lambda a, b: {c.sum('a', 'b')}", f"x = {name}(x, {c.branch()})", sites=1)
        case 3:
            c.add(f"def {name}(b):", f"    return {c.sum('x', 'b')}", f"x = {name}({c.branch()})", sites=1)
        case 4:
            c.add(f"x = [{c.sum('h', c.branch('h'))} for h in (x,)][0]", sites=1)
        case 5:
            c.methods.append(f"@classmethod\ndef {name}(cls, a, b):\n    return {c.sum('a', 'b')}")
            c.add(f"x = self.{name}(x, {c.branch()})", sites=1)
        case 6:
            c.layers.append(f"self.__{name} = {c.layer()}")
            c.add(f"x = {c.sum('x', f'self.__{name}(x)')}", sites=1)
        case 7:
            c.add(f"x = (  # both\n    x\n    + {c.branch()}  # the branch\n)".replace("\n", "\n        "), sites=1)


THEMES: dict[str, Callable[[_Class], None]] = {
    "plain": _plain,
    "nested": _nested,
    "n-ary": _n_ary,
    "parallel": _parallel,
    "shared": _shared,
    "loop": _loop,
    "conditional": _conditional,
    "helper": _helper,
    "in place": _in_place,
    "cast": _cast,
    "permuted": _permuted,
    "none": _none,
    "form": _form,
}
