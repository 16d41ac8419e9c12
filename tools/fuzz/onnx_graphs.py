"""Random ONNX graphs with LAuReL away from its start: lowered by every subset of the passes they compute what they computed before.

A case is made of its seed alone. What a lowered graph is held against is float64, in `fuzz.reference`; how far the graph itself is from
that in onnxruntime before it is lowered, by the worse of its two ways to run it, is the yardstick for how far it may be afterwards.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx import NodeProto, TensorProto, helper, numpy_helper

from laurel_rewrite import rewrite_onnx, write_onnx
from laurel_rewrite.backends.onnx.surgery import inline_laurel
from laurel_rewrite.errors import ConfigError, NoSiteError
from laurel_rewrite.lowering import SKIPPABLE, lower
from laurel_rewrite.passes.onnx_pass import check_graph
from laurel_rewrite.verification.onnx import run_onnx
from laurel_rewrite.verification.onnx_runs import shaken
from tools.fuzz.reference import evaluate

VARIANTS = ("rw", "lr", "pa", "rw+lr", "rw+pa", "lr+pa", "rw+lr+pa")
TOLERANCE = {TensorProto.FLOAT: 1e-5, TensorProto.FLOAT16: 1e-2}
"""Of an output, in units of its largest element: a few roundings of the coarsest type beside the yardstick."""
SPREAD = 20
"""How many times further from float64 a graph may be after lowering than before: the roundings fall at other places. In float64 itself only
the weights that lowering wrote are rounded, and it may be as far as the graph was; or, where an output hangs on the last place of the weights
(a chain that nearly cancels), as far as the graph is with every weight moved by one unit in it."""
PLAIN, OPTIMISED = "onnxruntime without its optimiser", "onnxruntime"
D = 8
SHAPES = {"rows": (3, D), "sequence": (2, 5, D), "image": (2, D, 4, 4)}
TRAPS = ("laurel_0", "laurel_0/Add_0", "laurel_0/Mul_0.out", "laurel_1.weight", "x/rescaled", "x.true", "x.scale", "laurel_0.mix.scaled")
"""Names that the lowering could come upon."""


def _rewritten(case: Case, variant: str) -> ir.Model:
    return rewrite_onnx(case.model, variant=variant, rank=2, normalize=case.normalize, history_map=case.history_map, verify=False)


def run(seed: int) -> str:
    """Try one case.

    Returns:
        Its kind: "form, type, length", or "nothing to do: ..." where the graph drawn has no site or no numbers.

    Raises:
        AssertionError: the lowered graph is not what the graph was.
    """
    case = cases(seed)
    try:
        model = _rewritten(case, case.variant)
    except NoSiteError:
        return f"nothing to do: no site, {case.kind}"
    except ConfigError as error:  # a stream with a history that goes on in a condition
        if "across the border of a subgraph" not in str(error):
            raise
        model = _rewritten(case, "rw+lr")
    _train(model, case)
    plain = model.clone()
    inline_laurel(plain)
    with np.errstate(all="ignore"):
        exact = evaluate(plain, case.feeds)
    if not all(np.isfinite(array).all() for array in exact):
        return f"nothing to do: no numbers, {case.kind}"
    with tempfile.TemporaryDirectory() as folder:
        given = write_onnx(model, Path(folder) / "before.onnx")
        before = {way: _distances(run_onnx(given, case.feeds, optimised=way == OPTIMISED), exact) for way in (PLAIN, OPTIMISED)}
        if not all(distance < 0.1 for distances in before.values() for distance in distances):
            return f"nothing to do: {case.kind}, ill-conditioned"
        lowered = model.clone()
        lower(lowered, skip=case.skip, verify=False)
        check_graph(lowered)
        assert [v.name for v in lowered.graph.outputs] == [v.name for v in model.graph.outputs], "the outputs have other names"
        after = write_onnx(lowered, Path(folder) / "after.onnx")
        found = {way: _distances(run_onnx(after, case.feeds, optimised=way == OPTIMISED), exact) for way in (PLAIN, OPTIMISED)}
    found["float64"] = _distances(evaluate(lowered, case.feeds), exact)
    # One of them is near by chance where the other shows what roundings do: the kernels differ, not the sums.
    yardsticks = [max(both) for both in zip(*before.values(), strict=True)]
    moved: list[float] = []
    for way, errors in found.items():
        for position, (output, error, yardstick) in enumerate(zip(model.graph.outputs, errors, yardsticks, strict=True)):
            allowed = case.tolerance + (1 if way == "float64" else SPREAD) * yardstick
            if way == "float64" and error > allowed:
                moved = moved or _distances(evaluate(_moved(plain), case.feeds), exact)
                allowed = case.tolerance + moved[position]
            assert error <= allowed, f"seed {seed}, {case.kind}, {way}: {output.name} is off by {error:.2g}, allowed are {allowed:.2g}"
    return case.kind


def _moved(model: ir.Model) -> ir.Model:
    """A copy with every weight moved by one unit in its last place, up or down."""
    copy, generator = model.clone(), np.random.default_rng(0)
    for name, value in copy.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.dtype in TOLERANCE:
            array = tensor.numpy()
            away = shaken(array.astype(np.float64), float(np.finfo(array.dtype).eps), generator)
            value.const_value = ir.tensor(away.astype(array.dtype), name=name)
    return copy


def _distances(found: list[np.ndarray], right: list[np.ndarray]) -> list[float]:
    return [_distance(*pair) for pair in zip(found, right, strict=True)]


def _distance(found: np.ndarray, right: np.ndarray) -> float:
    """The largest difference in units of the largest element; infinite where something is no number."""
    wide = np.asarray(found, np.float64)
    if wide.shape != right.shape or not np.isfinite(wide).all():
        return float("inf")
    return float(np.abs(wide - right).max(initial=0.0) / max(float(np.abs(right).max(initial=0.0)), 1e-6))


@dataclass
class Case:
    """One graph and what is done with it.

    Attributes:
        kind: in words, for counting.
        mixes: the range that a is drawn from; None for one pair (a, b) at all sites, so that scales run away.
    """

    kind: str
    model: ir.Model
    feeds: dict[str, np.ndarray]
    variant: str
    normalize: str
    history_map: str
    skip: tuple[str, ...]
    dtype: int
    generator: np.random.Generator
    mixes: tuple[float, float]

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.dtype]


def cases(seed: int) -> Case:
    """The case of a seed."""
    generator = np.random.default_rng(seed)
    form = str(generator.choice(list(SHAPES)))
    dtype = int(generator.choice([TensorProto.FLOAT, TensorProto.FLOAT16], p=[0.7, 0.3])) if form != "image" else int(TensorProto.FLOAT)
    deep = generator.random() < 0.15
    graph = _Graph(generator, form, dtype)
    for _ in range(int(generator.integers(24, 120)) if deep else int(generator.integers(2, 12))):
        graph.block() if deep or generator.random() < 0.6 else graph.step()
    b = float(generator.choice([0.54, 0.7, 1.29, 1.6])) if deep or generator.random() < 0.3 else 0.0
    return Case(
        kind=f"{form}, {'float16' if dtype == TensorProto.FLOAT16 else 'float32'}, {'deep' if deep else 'short'}",
        model=graph.model(),
        feeds=graph.feeds(),
        variant=str(generator.choice(VARIANTS)),
        normalize=str(generator.choice(["softmax", "none", "sigmoid", "paper"], p=[0.6, 0.2, 0.1, 0.1])),
        history_map=str(generator.choice(["low-rank", "identity"], p=[0.8, 0.2])),
        skip=tuple(name for name in SKIPPABLE if generator.random() < 0.2),
        dtype=dtype,
        generator=generator,
        mixes=(2 - b, 2 - b) if b else (0.3, 1.7),
    )


def _train(model: ir.Model, case: Case) -> None:
    """a and b away from 1, U and V of trained size."""
    generator = case.generator
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if "laurel_" not in name or tensor is None or name.rpartition(".")[2] not in ("mix", "g", "weight"):
            continue
        array = tensor.numpy().astype(np.float64)
        if name.endswith(".mix") and array.size == 2:
            a = generator.uniform(*case.mixes)
            logits = np.array([np.log(a / (2 - a)), 0.0])
            array = np.array([a - 1, 1 - a]) if case.normalize == "none" else logits
        elif name.endswith((".mix", ".g", ".weight")):
            array = array + generator.standard_normal(array.shape) * (0.3 if array.ndim == 1 else 0.3 / np.sqrt(max(array.shape[:2])))
        value.const_value = ir.tensor(array.astype(tensor.dtype.numpy()), name=name)


class _Graph:
    """A graph on its way: `values` are those of the main shape, `stream` is the last sum."""

    def __init__(self, generator: np.random.Generator, form: str, dtype: int) -> None:
        self.generator, self.form, self.shape, self.dtype = generator, form, SHAPES[form], dtype
        self.array = helper.tensor_dtype_to_np_dtype(dtype)
        self.axis = 1 if form == "image" else -1
        self.nodes: list[NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}
        self.values = ["x"]
        self.stream = "x"
        self.traps = list(generator.permutation(TRAPS)) if generator.random() < 0.3 else []

    # Parts

    def pick(self, *words: Any) -> Any:
        return words[int(self.generator.integers(len(words)))]

    def any(self) -> str:
        """A value, mostly a late one."""
        return self.stream if self.generator.random() < 0.6 else self.values[-1 - int(self.generator.integers(len(self.values))) // 2]

    def put(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        """The first output of a new node."""
        trap = self.traps.pop() if self.traps and self.generator.random() < 0.3 else ""
        names = [trap or f"v{len(self.nodes)}", *(f"v{len(self.nodes)}_{k}" for k in range(1, outputs))]
        domain = "com.microsoft" if op.startswith(("Fused", "Skip")) else ""
        name = self.pick(trap, f"n{len(self.nodes)}", "") or f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), names, name=name, domain=domain, **attributes))
        return names[0]

    def constant(self, array: np.ndarray, *, exact: bool = False) -> str:
        """An initializer, or now and then what a node gives."""
        array = array.astype(self.array if array.dtype == np.float64 else array.dtype)
        same = [name for name, other in self.weights.items() if other.shape == array.shape and other.dtype == array.dtype]
        if same and not exact and self.generator.random() < 0.1:
            return str(self.pick(*same))
        if self.generator.random() < 0.1:
            return self.put("Constant", value=numpy_helper.from_array(array))
        name = f"w{len(self.weights)}"
        self.weights[name] = array
        return name

    def ints(self, *numbers: int) -> str:
        return self.constant(np.array(numbers, np.int64), exact=True)

    def vector(self, low: float = 0.5, high: float = 1.5) -> str:
        return self.constant(self.generator.uniform(low, high, D))

    def matrix(self, *shape: int) -> str:
        return self.constant(self.generator.standard_normal(shape or (D, D)) / np.sqrt(D))

    # Values from values

    def linear(self, x: str) -> str:
        if self.form == "image":
            kind = self.pick("1x1", "3x3", "grouped", "fused", "norm")
            if kind == "1x1":
                return self.put("Conv", x, self.matrix(D, D, 1, 1), *([self.vector(-1, 1)] if self.pick(0, 1) else []))
            if kind == "grouped":
                return self.put("Conv", x, self.matrix(D, D // 2, 3, 3), pads=[1] * 4, group=2)
            if kind == "fused":
                return self.put("FusedConv", x, self.matrix(D, D, 1, 1), self.vector(-1, 1), activation="Relu")
            y = self.put("Conv", x, self.matrix(D, D, 3, 3), self.vector(-1, 1), pads=[1] * 4)
            return self.batch_norm(y) if kind == "norm" else y
        if self.form == "rows" and self.pick(0, 1):
            return self.put("Gemm", x, self.matrix(), self.vector(-1, 1), transB=self.pick(0, 1))
        if self.pick(0, 1, 2) == 0 and self.dtype == TensorProto.FLOAT:
            return self.put("FusedMatMul", x, self.matrix(), alpha=0.5)
        y = self.put("MatMul", x, self.matrix())
        return self.put("Add", y, self.vector(-1, 1)) if self.pick(0, 1) else y

    def batch_norm(self, x: str) -> str:
        variance = self.constant(self.generator.uniform(0.5, 1.5, D), exact=True)
        return self.put("BatchNormalization", x, self.vector(), self.vector(-1, 1), self.vector(-1, 1), variance)

    def norm(self, x: str) -> str:
        if self.form == "image":
            return self.batch_norm(x) if self.pick(0, 1) else self.put("InstanceNormalization", x, self.vector(), self.vector(-1, 1))
        kind = self.pick("layer", "simplified", "decomposed", "written out")
        if kind == "layer":
            return self.put("LayerNormalization", x, self.vector(), *([self.vector(-1, 1)] if self.pick(0, 1) else []), axis=-1)
        if kind == "simplified" and self.dtype == TensorProto.FLOAT:
            return self.put("SimplifiedLayerNormalization", x, self.vector(), axis=-1, epsilon=1e-6)
        if kind == "written out":
            x = self.put("Sub", x, self.put("ReduceMean", x, self.ints(-1)))
        square = self.put("Pow", x, self.constant(np.array(2.0))) if self.pick(0, 1) else self.put("Mul", x, x)
        variance = self.put("Add", self.put("ReduceMean", square, self.ints(-1)), self.constant(np.array(1e-3)))
        root = self.put("Sqrt", variance)
        y = self.put("Div", x, root) if self.pick(0, 1) else self.put("Mul", x, self.put("Reciprocal", root))
        return self.put("Mul", y, self.vector())

    def attention(self, x: str) -> str:
        if self.form != "sequence":
            return self.put("Sigmoid", self.linear(x))
        keys = self.put("Transpose", self.linear(x), perm=[0, 2, 1])
        scores = self.put("Mul", self.put("MatMul", self.linear(x), keys), self.constant(np.array(0.3)))
        return self.put("MatMul", self.put("Softmax", scores, axis=-1), self.linear(x))

    def view(self, x: str) -> str:
        rank = len(self.shape)
        kind = self.pick("reshape", "transpose", "roll", "squeeze", "dropout", "cast", "pool" if self.form == "image" else "identity")
        if kind == "reshape":
            return self.put("Reshape", self.put("Reshape", x, self.ints(0, -1)), self.ints(*self.shape))
        if kind == "transpose":
            return self.put("Transpose", self.put("Transpose", x, perm=[*range(rank)][::-1]), perm=[*range(rank)][::-1])
        if kind == "roll":
            first = self.put("Split", x, self.ints(D // 2, D // 2), outputs=2, axis=self.axis)
            return self.put("Concat", self.nodes[-1].output[1], first, axis=self.axis)
        if kind == "squeeze":
            return self.put("Squeeze", self.put("Unsqueeze", x, self.ints(0)), self.ints(0))
        if kind == "cast":
            other = TensorProto.FLOAT if self.dtype == TensorProto.FLOAT16 else self.pick(TensorProto.FLOAT16, TensorProto.DOUBLE)
            y = self.put("Cast", x, to=other)
            return self.put("Cast", self.put("Relu", y) if self.pick(0, 1) else y, to=self.dtype)
        if kind == "pool":
            return self.put("MaxPool", x, kernel_shape=[3, 3], pads=[1] * 4, strides=[1, 1])
        return self.put("Dropout" if kind == "dropout" else "Identity", x)

    def pointwise(self, x: str) -> str:
        op = self.pick(
            "Relu", "LeakyRelu", "Sigmoid", "Tanh", "Abs", "Neg", "Erf", "Softmax", "Clip", "Scale", "Shift", "Max", "Square", "Divide"
        )
        shape = (D, 1, 1) if self.form == "image" else (D,)
        numbers = self.generator.uniform(0.5, 1.5, shape)
        if op == "Clip":
            return self.put("Clip", x, self.constant(np.array(-1.0)), self.constant(np.array(1.0)))
        if op == "Square":
            return self.put("Tanh", self.put("Pow", x, self.constant(np.array(2.0))))
        if op in ("Scale", "Shift", "Max", "Divide"):
            op = {"Scale": "Mul", "Shift": self.pick("Add", "Sub"), "Divide": "Div"}.get(op, op)
            return self.put(op, x, self.constant(numbers))
        return self.put(op, x)

    def captured(self, x: str) -> str:
        """A condition or a loop whose body reads an outer value."""
        inner = f"i{len(self.nodes)}"
        if self.pick(0, 1):
            sides = []
            for side, op in (("then", "Tanh"), ("else", "Relu")):
                output = helper.make_tensor_value_info(f"{inner}_{side}", self.dtype, self.shape)
                sides.append(helper.make_graph([helper.make_node(op, [x], [output.name], name="inside")], side, [], [output]))
            return self.put("If", self.constant(np.array(bool(self.pick(0, 1))), exact=True), then_branch=sides[0], else_branch=sides[1])
        names = {what: f"{inner}_{what}" for what in ("turn", "go", "given", "on", "sum")}
        body = helper.make_graph(
            [helper.make_node("Identity", [names["go"]], [names["on"]]), helper.make_node("Add", [names["given"], x], [names["sum"]])], "body",
            [helper.make_tensor_value_info(names["turn"], TensorProto.INT64, []), helper.make_tensor_value_info(names["go"], TensorProto.BOOL, []),
             helper.make_tensor_value_info(names["given"], self.dtype, self.shape)],
            [helper.make_tensor_value_info(names["on"], TensorProto.BOOL, []), helper.make_tensor_value_info(names["sum"], self.dtype, self.shape)],
        )  # fmt: skip
        turns = self.constant(np.array(2), exact=True)
        return self.put("Tanh", self.put("Loop", turns, self.constant(np.array(True), exact=True), self.any(), body=body))

    # Residual connections

    def branch(self, x: str) -> str:
        y = self.linear(self.norm(x) if self.pick(0, 1) else self.put("Relu", x))
        ways: list[Callable[[str], str]] = [self.linear, self.pointwise, self.view, self.attention, lambda v: v]
        for _ in range(int(self.generator.integers(0, 3))):
            y = self.pick(*ways)(y)
        return y

    def block(self) -> None:
        """One residual connection, in one of the forms in which graphs have them."""
        x = self.any()
        kind = self.pick("add", "add", "add", "flipped", "nary", "nested", "post norm", "permuted", "fused", "relu")
        f = self.branch(x)
        if kind == "flipped":
            y = self.put("Add", f, x)
        elif kind == "nary":
            y = self.put("Sum", *self.generator.permutation([x, f, self.branch(x)]).tolist())
        elif kind == "nested":
            y = self.put("Add", self.put("Add", x, f), self.branch(x))
        elif kind == "permuted":
            order = [*range(len(self.shape))][::-1]
            y = self.put(
                "Transpose", self.put("Add", self.put("Transpose", x, perm=order), self.put("Transpose", f, perm=order)), perm=order
            )
        elif kind == "fused":
            y = self.fused_sum(x, f)
        else:
            y = self.put("Add", x, f)
            y = self.norm(y) if kind == "post norm" else self.put("Relu", y) if kind == "relu" else y
        self.stream = y
        self.values.append(y)

    def fused_sum(self, x: str, f: str) -> str:
        """The sum inside another node."""
        if self.form == "image":
            return self.put(
                "FusedConv", f, self.matrix(D, D, 1, 1), self.vector(-1, 1), x, **({"activation": "Relu"} if self.pick(0, 1) else {})
            )
        if self.form == "rows":
            return self.put("Gemm", self.put("Relu", f), self.matrix(), x)
        if self.dtype != TensorProto.FLOAT:
            return self.put("Add", x, f)
        if self.pick(0, 1):
            y = self.put("SkipLayerNormalization", x, f, self.vector(), self.vector(-1, 1), self.vector(-1, 1), outputs=4, epsilon=1e-5)
        else:
            y = self.put("SkipSimplifiedLayerNormalization", x, f, self.vector(), outputs=4, epsilon=1e-5)
        names = self.nodes[-1].output
        names[1] = names[2] = ""
        if self.pick(0, 1):  # the sum goes on, its normalisation is a branch's
            total = names[3]
            self.values.append(y)
            return total
        return y

    def step(self) -> None:
        """Something else that reads what there is."""
        kind = self.pick("pointwise", "view", "norm", "linear", "captured", "sum", "product", "difference")
        x = self.any()
        if kind in ("sum", "product", "difference"):
            y = self.put({"sum": "Add", "product": "Mul", "difference": "Sub"}[kind], x, self.put("Tanh", self.any()))
        else:
            y = getattr(self, kind)(x)
        self.values.append(y)
        if self.pick(0, 1):
            self.stream = y

    # The whole

    def model(self) -> ir.Model:
        last = self.put("Identity", self.stream) if self.stream == "x" else self.stream
        spare = [value for value in self.values if value not in ("x", last) and self.generator.random() < 0.25]
        outputs = [helper.make_tensor_value_info(name, self.dtype, self.shape) for name in (last, *spare)]
        inputs = [helper.make_tensor_value_info("x", self.dtype, self.shape)]
        weights = [numpy_helper.from_array(array, name) for name, array in self.weights.items()]
        graph = helper.make_graph(self.nodes, "graph", inputs, outputs, weights)
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))

    def feeds(self) -> dict[str, np.ndarray]:
        return {"x": self.generator.standard_normal(self.shape).astype(self.array)}
