"""LAuReL as ONNX local functions: one body for each form that occurs, in standard ops."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import onnx_ir as ir
from onnx_ir import tape

from laurel_rewrite.operators.config import SiteConfig

DOMAIN = "laurel_rewrite"
DOMAIN_VERSION = 1
FORM = "laurel_rewrite.form"
"""Key of a function's form in its `metadata_props`."""
BRANCH = "_branch"
"""End of the name of a function that weights one branch."""
IR_VERSION = 10
"""The first with `metadata_props` at nodes; functions came with 8."""


@dataclass(frozen=True)
class FunctionForm:
    """What tells one function body from another.

    Attributes:
        config: variant and options; its sizes (D, r) do not matter to the body.
        branches: number of branches of the sum; 0 gives the skip's term alone, b (x + ...), for a node that adds by itself.
        lags: which lags of PA's window are given, 0 first.
        cast: the parameters' type is not the stream's.
        flat: features of axis 1 by products with [B, C, positions]: onnxruntime has no convolution of float64.
    """

    config: SiteConfig
    branches: int = 1
    lags: tuple[int, ...] = (0,)
    cast: bool = False
    flat: bool = False

    @property
    def name(self) -> str:
        c = self.config
        parts = ["LAuReL", c.variant.replace("+", "_")]
        parts += [c.normalize] if c.weights and c.normalize != "softmax" else []
        parts += ["identity"] if c.lags and not c.maps else []
        parts += ["channels_first"] if c.maps and c.axis == 1 else []
        if c.lags:
            parts.append(f"lags{c.lags}")
            parts += ["of" + "".join(map(str, self.lags))] if self.lags != tuple(range(c.lags)) else []
        parts += ["skip"] if not self.branches else [f"branches{self.branches}"] if self.branches > 1 else []
        parts += ["cast"] if self.cast else []
        parts += ["flat"] if self.flat else []
        return "_".join(parts)

    def to_json(self) -> str:
        """As the function's metadata say it, so that a file can be lowered without its plan."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> FunctionForm:
        data = json.loads(text)
        return FunctionForm(SiteConfig(**data.pop("config")), **{**data, "lags": tuple(data["lags"])})

    @property
    def opset(self) -> int:
        """The first opset whose operators the body needs: integer constants came with 9, CastLike with 15."""
        return 15 if self.cast or (self.config.weights and self.config.normalize == "none") else 9


def parameter_names(config: SiteConfig) -> list[str]:
    """Names of the operator's parameters below the site id, in the order of the function's inputs."""
    names = (["mix"] if config.weights else []) + (["g"] if config.lags else [])
    if {"lr", "pa"} <= config.terms:
        return names + [f"{side}.{lag}.weight" for side in ("down", "up") for lag in range(config.maps)]
    return names + (["down.weight", "up.weight"] if config.maps else [])


def laurel_function(form: FunctionForm, opsets: dict[str, int]) -> ir.Function:
    """The function of a form.

    Inputs: the skip, the branches, the earlier states of the lags above 0, the parameters in the order of `parameter_names`.
    Output: the sum, ((skip + first branch) + second) ..., or the skip's term where there is no branch.
    """
    body = _Body()
    config = form.config
    x = body.input("x")
    branches = [body.input(f"f{i}") for i in range(form.branches)]
    states = [x] + [body.input(f"x_{lag}") for lag in form.lags[1:]]
    parameters = {name: body.input(name.replace(".", "_")) for name in parameter_names(config)}
    skip = x
    if config.lags:
        skip = body.op("Add", x, body.augment(form, list(zip(form.lags, states, strict=True)), parameters))
    elif config.maps:
        skip = body.op("Add", x, body.low_rank(form, x, parameters["down.weight"], parameters["up.weight"]))
    if config.weights:
        a, b = body.weights(config, parameters["mix"])
        branches = [body.op("Mul", body.like(form, a, f), f) for f in branches]
        skip = body.op("Mul", body.like(form, b, x), skip)
    out = skip
    for branch in branches:
        out = body.op("Add", branch, out)
    out.name = "z"
    return body.function(form.name, form, out, opsets)


def branch_function(form: FunctionForm, opsets: dict[str, int]) -> ir.Function:
    """a f, for a branch that the graph adds on its own."""
    body = _Body()
    f, mix = body.input("f"), body.input("mix")
    a, _ = body.weights(form.config, mix)
    out = body.op("Mul", body.like(form, a, f), f)
    return body.function(f"{form.name}{BRANCH}", form, out, opsets)


class _Body:
    def __init__(self) -> None:
        self.tape = tape.Tape()
        self.inputs: list[ir.Value] = []

    def input(self, name: str) -> ir.Value:
        self.inputs.append(ir.Value(name=name))
        return self.inputs[-1]

    def op(self, kind: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        return self.tape.op(kind, list(inputs), attributes=attributes or None)

    def ints(self, values: Sequence[int]) -> ir.Value:
        return self.op("Constant", value=ir.tensor(list(values), dtype=ir.DataType.INT64))

    def take(self, vector: ir.Value, position: int) -> ir.Value:
        """The element of a vector at a position, of shape [1]."""
        return self.op("Gather", vector, self.ints([position]), axis=0)

    def like(self, form: FunctionForm, value: ir.Value, other: ir.Value) -> ir.Value:
        return self.op("CastLike", value, other) if form.cast else value

    def weights(self, config: SiteConfig, mix: ir.Value) -> tuple[ir.Value, ir.Value]:
        if config.normalize == "sigmoid":  # 2 - 2 sigmoid(w) = 2 sigmoid(-w)
            halves = self.op("Sigmoid", mix), self.op("Sigmoid", self.op("Neg", mix))
            return self.op("Add", halves[0], halves[0]), self.op("Add", halves[1], halves[1])
        if config.normalize == "none":
            one = self.op("CastLike", self.op("Constant", value=ir.tensor([1.0])), mix)
            both = self.op("Add", one, mix)
        else:
            both = self.op("Softmax", mix, axis=0)
            if config.normalize == "softmax":
                both = self.op("Add", both, both)
        return self.take(both, 0), self.take(both, 1)

    def low_rank(self, form: FunctionForm, x: ir.Value, down: ir.Value, up: ir.Value) -> ir.Value:
        """U V x: two 1x1 convolutions, or two matrix products over the last axis."""
        value = self.op("CastLike", x, down) if form.cast else x
        if form.flat:
            value = self.op("Reshape", value, self.ints([0, 0, -1]))
        for weight in (down, up):
            if form.flat:
                value = self.op("MatMul", self.op("Flatten", weight, axis=1), value)
            elif form.config.axis == 1:
                value = self.op("Conv", value, weight)
            else:
                value = self.op("MatMul", value, self.op("Transpose", weight, perm=[1, 0]))
        if form.flat:
            value = self.op("Reshape", value, self.op("Shape", x))
        return self.like(form, value, x)

    def augment(self, form: FunctionForm, window: list[tuple[int, ir.Value]], parameters: dict[str, ir.Value]) -> ir.Value:
        config = form.config
        per_lag = {"lr", "pa"} <= config.terms
        total: ir.Value | None = None
        for lag, state in window:
            term = self.op("Mul", self.like(form, self.take(parameters["g"], lag), state), state)
            if per_lag:
                term = self.low_rank(form, term, parameters[f"down.{lag}.weight"], parameters[f"up.{lag}.weight"])
            total = term if total is None else self.op("Add", total, term)
        assert total is not None
        return self.low_rank(form, total, parameters["down.weight"], parameters["up.weight"]) if config.maps and not per_lag else total

    def function(self, name: str, form: FunctionForm, output: ir.Value, opsets: dict[str, int]) -> ir.Function:
        graph = ir.Graph(self.inputs, [output], nodes=list(self.tape.nodes), opset_imports=opsets, name=name)
        function = ir.Function(DOMAIN, name, "", graph=graph, attributes=[])
        function.metadata_props[FORM] = form.to_json()
        return function
