"""Mutated files of every format that is read: each is read or refused with a LaurelError, in time, and nothing else happens.

    run(seed)     one case; the kind of file, or an exception: a fault

Bytes are flipped, cut, inserted and moved; and what a format is made of is changed: types, huge and negative numbers, deep nesting, odd
texts, paths that lead elsewhere, keys that are missing, double or of another's value.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import random
import signal
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import laurel_rewrite
from laurel_rewrite.backends.module.saving import load, save
from laurel_rewrite.backends.onnx.surgery import GraphRewrite
from laurel_rewrite.errors import LaurelError
from laurel_rewrite.files.manifest import MANIFEST
from laurel_rewrite.files.onnx import read_onnx, write_onnx
from laurel_rewrite.graph.feeds import check_feeds, draw_feeds, read_feeds
from laurel_rewrite.plan import LaurelConfig, Plan

LIMIT = 20  # seconds of the processor for one case
WIDTH = 8
KINDS = ("onnx", "safetensors", "plan", "config", "npz", "manifest", "weights")
PROGRAM_EVERY = 71
"""One seed of so many is a .pt2 file, which takes longest; the others take turns."""
ODD: list[Any] = [
    None, True, -1, 0, 2**31, 2**63, 2**64, 10**400, -(2**70), 1.5, float("inf"), "", "x", "../../x", "/etc/passwd", "a\0b", "\x1b[2J", "\ud800",
    "e\u0301\u2028\u202e", "x" * 70_000, [], {}, [[]], {"a": 1}, ["../x"], [1, "a", None], b"\xff\xfe", "__class__", "forward", "laurel_0",
    "laurel_0." + "9" * 5000, "subprocess:getoutput", "skeleton", "spec", "graph",
]  # fmt: skip


class Fault(Exception):
    """What must not happen, with the seed of the case."""


class Block(nn.Module):
    """A residual block with a loop's turns and a buffer in its state."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(self.norm(x))


def run(seed: int) -> str:
    """Mutate one file and read it. Returns its kind; raises Fault with what happened."""
    draw = random.Random(seed)
    kind = KINDS[seed % len(KINDS)] if seed % PROGRAM_EVERY else "pt2"
    _saved(), _program(), _graph()  # what is mutated is made once, outside the limit
    with tempfile.TemporaryDirectory() as scratch, _in_time(seed, kind):
        try:
            _CASES[kind](draw, Path(scratch))
        except LaurelError:
            pass
        except Exception as error:
            raise Fault(f"seed {seed}, {kind}: {type(error).__name__}: {error}") from error
    return kind


@contextlib.contextmanager
def _in_time(seed: int, kind: str) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise Fault(f"seed {seed}, {kind}: no answer within {LIMIT} seconds")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


# Bytes and values


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Bytes with a few of them changed, cut out, doubled, moved or put in."""
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 5))):
        at, length = draw.randrange(len(data) + 1), draw.choice((1, 1, 2, 4, 8, 64))
        match draw.randrange(7):
            case 0 if data:
                data[min(at, len(data) - 1)] ^= 1 << draw.randrange(8)
            case 1 if data:
                data[min(at, len(data) - 1)] = draw.randrange(256)
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = draw.randbytes(length)
            case 4:
                data[at:at] = data[at : at + length]
            case 5:
                del data[at:]
            case 6:
                other = draw.randrange(len(data) + 1)
                data[at : at + length], data[other : other + length] = data[other : other + length], data[at : at + length]
    return bytes(data)


def changed(data: Any, draw: random.Random) -> Any:
    """A value of JSON or TOML with one part of it changed."""
    places: list[tuple[Any, Any]] = []

    def visit(item: Any) -> None:
        for key in item if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else ():
            places.append((item, key))
            visit(item[key])

    data = json.loads(json.dumps(data))
    visit(data)
    holder, key = draw.choice(places)
    match draw.randrange(6):
        case 0 | 1 | 2:
            holder[key] = copy.deepcopy(draw.choice(ODD))
        case 3:
            del holder[key]
        case 4:
            other, place = draw.choice(places)
            with contextlib.suppress(LookupError):
                holder[key] = json.loads(json.dumps(other[place]))
        case 5 if isinstance(holder, dict):
            holder[str(draw.choice(ODD))[:50]] = copy.deepcopy(draw.choice(ODD))
    return data


def _json(data: Any, draw: random.Random) -> bytes:
    if draw.random() < 0.05:
        deep = draw.choice((100, 100_000))
        return b'{"a":' * deep + b"1" + b"}" * draw.choice((0, deep))
    text = json.dumps(data, default=lambda value: value.decode("latin-1"))
    return text.encode()


# The formats


@functools.cache
def _saved() -> dict[str, bytes]:
    torch.manual_seed(0)
    model = laurel_rewrite.rewrite(nn.Sequential(Block(), Block()), (torch.randn(2, WIDTH),), variant="rw+lr+pa", rank=2)
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _folder(folder: Path, draw: random.Random, name: str, data: bytes) -> None:
    for own, content in _saved().items():
        (folder / own).write_bytes(content)
    (folder / name).write_bytes(data)
    if name != MANIFEST:
        (folder / MANIFEST).unlink()
    load(folder, device=draw.choice((None, "meta")))


def _safetensors(draw: random.Random, folder: Path) -> None:
    data = _saved()["model.safetensors"]
    size = int.from_bytes(data[:8], "little")
    if draw.random() < 0.5:
        header = _json(changed(json.loads(data[8 : 8 + size]), draw), draw)
        claimed = draw.choice((len(header), len(header), len(header), 0, 2**63, 2**32))
        data = claimed.to_bytes(8, "little") + header + data[8 + size :]
    else:
        data = mutated(data, draw)
    _folder(folder, draw, "model.safetensors", data)


def _weights(draw: random.Random, folder: Path) -> None:
    """Weights for a graph."""
    (folder / "x.safetensors").write_bytes(mutated(_saved()["model.safetensors"], draw))
    rewrite = GraphRewrite(ir.from_proto(_graph()))
    rewrite.apply(Plan.from_sites(rewrite.sites, LaurelConfig(variant="rw", rank=2)))
    rewrite.load(folder / "x.safetensors")


def _plan(draw: random.Random, folder: Path) -> None:
    import tomllib

    import tomlkit

    data = _saved()["plan.toml"]
    if draw.random() < 0.7:
        changes = changed(tomllib.loads(data.decode()), draw)
        try:
            data = tomlkit.dumps(changes).encode(errors="surrogatepass")
        except Exception:  # what TOML cannot hold
            data = _json(changes, draw)
    else:
        data = mutated(data, draw)
    if draw.random() < 0.03:
        data = draw.choice((b"a = " + b"[" * 100_000, b"a." * 20_000 + b"b = 1", b"[a." + b"a." * 20_000 + b"b]", b"seed = " + b"9" * 6000))
    _folder(folder, draw, "plan.toml", data)


def _config(draw: random.Random, folder: Path) -> None:
    data = _saved()["laurel_config.json"]
    data = _json(changed(json.loads(data), draw), draw) if draw.random() < 0.8 else mutated(data, draw)
    _folder(folder, draw, "laurel_config.json", data)


def _manifest(draw: random.Random, folder: Path) -> None:
    data = _saved()[MANIFEST]
    data = _json(changed(json.loads(data), draw), draw) if draw.random() < 0.8 else mutated(data, draw)
    _folder(folder, draw, MANIFEST, data)


def _npz(draw: random.Random, folder: Path) -> None:
    buffer = io.BytesIO()
    array = draw.choice((np.ones((2, WIDTH), np.float32), np.ones(3), np.array(["a"]), np.array([{}], object), np.zeros(2, [("a", "f4")])))
    np.savez(buffer, **{draw.choice(("x", "y", "", "x" * 100)): array})
    data = buffer.getvalue()
    if draw.random() < 0.4:  # whole archives of odd members
        member = io.BytesIO()
        np.save(member, np.ones((2, WIDTH), np.float32))
        shape = draw.choice((b"(2, 8)", b"(9999999999999,)", b"(-2, 8)", b"(2,8", b"('a',)", b"(2**99,)"))
        inner = mutated(member.getvalue(), draw) if draw.random() < 0.5 else member.getvalue().replace(b"(2, 8)", shape)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
            archive.writestr(draw.choice(("x.npy", "x", "../x.npy", "x.npy")), inner)
        data = buffer.getvalue()
    else:
        data = mutated(data, draw)
    (folder / "x.npz").write_bytes(data)
    check_feeds(ir.from_proto(_graph()), read_feeds(folder / "x.npz"), "model")


@functools.cache
def _program() -> bytes:
    buffer = io.BytesIO()
    batch = torch.export.Dim("batch", min=2)
    torch.export.save(torch.export.export(Block(), (torch.randn(2, WIDTH),), dynamic_shapes={"x": {0: batch}}), buffer)
    return buffer.getvalue()


def _pt2(draw: random.Random, folder: Path) -> None:
    data = _program()
    if draw.random() < 0.6:
        buffer = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(buffer, "w") as made:
            names = archive.namelist()
            chosen = draw.choice([name for name in names if name.endswith(".json")] if draw.random() < 0.7 else names)
            for name in names:
                content = archive.read(name)
                if name == chosen:
                    structured = name.endswith(".json") and draw.random() < 0.7
                    content = _json(changed(json.loads(content), draw), draw) if structured else mutated(content, draw)
                made.writestr(name, content)
        data = buffer.getvalue()
    else:
        data = mutated(data, draw)
    (folder / "x.pt2").write_bytes(data)
    laurel_rewrite.detect(folder / "x.pt2")


@functools.cache
def _graph() -> onnx.ModelProto:
    """Two residual blocks, one of them in a function of functions, a subgraph, weights in a file and in the graph."""
    node = helper.make_node
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    functions = [
        helper.make_function("own", "Inner", ["x", "w"], ["y"], [node("MatMul", ["x", "w"], ["h"]), node("Relu", ["h"], ["y"])], opsets),
        helper.make_function("own", "Outer", ["x", "w"], ["y"], [node("Inner", ["x", "w"], ["y"], domain="own")], opsets),
    ]
    branch = helper.make_graph([node("Identity", ["s"], ["t"])], "then", [], [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)])
    nodes = [
        node("Outer", ["x", "w"], ["f"], "call", domain="own"), node("Add", ["x", "f"], ["r"], "sum0"),
        node("MatMul", ["r", "w"], ["g"], "product"), node("Add", ["r", "g"], ["s"], "sum1"),
        node("If", ["condition"], ["y"], "if", then_branch=branch, else_branch=branch),
    ]  # fmt: skip
    weight = np.linspace(-1, 1, WIDTH * WIDTH, dtype=np.float32).reshape(WIDTH, WIDTH)
    made = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", WIDTH])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.array(True), "condition")],
    )
    return helper.make_model(made, functions=functions, opset_imports=opsets, ir_version=10)


def _onnx(draw: random.Random, folder: Path) -> None:
    proto = onnx.ModelProto()
    proto.CopyFrom(_graph())
    tensor = proto.graph.initializer[0]
    if draw.random() < 0.3:
        (folder / "w.bin").write_bytes(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": "w.bin", "offset": "0", "length": "256"}.items():
            tensor.external_data.add(key=key, value=value)
    if draw.random() < 0.5:
        for _ in range(draw.choice((1, 1, 3))):
            _change_proto(proto, draw)
        data = proto.SerializeToString()
    else:
        data = mutated(proto.SerializeToString(), draw)
    path = folder / "x.onnx"
    path.write_bytes(data)
    model = read_onnx(path)
    rewrite = GraphRewrite(model)
    rewrite.apply(Plan.from_sites(rewrite.sites, LaurelConfig(variant=draw.choice(("rw", "rw+lr")), rank=2)))
    draw_feeds(model)
    (folder / "out").mkdir()
    write_onnx(rewrite.model, folder / "out" / "x.onnx")


def _change_proto(message: Any, draw: random.Random) -> None:
    """Change one field somewhere below a message of protobuf."""
    for _ in range(draw.randrange(1, 9)):  # down to a random depth
        inner = [v for f, v in message.ListFields() if f.type == 11]
        parts = [part for value in inner for part in (value if hasattr(value, "__len__") and not hasattr(value, "ListFields") else [value])]
        if not parts or draw.random() < 0.1:
            break
        message = draw.choice(parts)
    fields = list(message.DESCRIPTOR.fields)
    field = draw.choice([f for f, _ in message.ListFields()] or fields) if draw.random() < 0.7 else draw.choice(fields)
    values = {9: ["", "x", "../x", "/etc/passwd", "w.bin", "y", "Add", "own", "Outer", "ai.onnx", "9" * 30, "-5", "a\0b", "\u2028"]}
    choices = values.get(field.type, [0, 1, 2, 5, 7, 10, 99, 2**31 - 1, -1, -(2**31)])
    with contextlib.suppress(ValueError, TypeError, AttributeError, LookupError, OverflowError):
        if draw.random() < 0.2:
            message.ClearField(field.name)
        elif field.is_repeated and field.type == 11:
            part = getattr(message, field.name)
            part.add().CopyFrom(draw.choice(part)) if len(part) and draw.random() < 0.6 else len(part) and part.pop()
        elif field.is_repeated:
            getattr(message, field.name).append(draw.choice(choices))
        elif field.type == 12:
            setattr(message, field.name, mutated(getattr(message, field.name), draw))
        else:
            setattr(message, field.name, draw.choice(choices))


_CASES: dict[str, Callable[[random.Random, Path], None]] = {
    "onnx": _onnx,
    "safetensors": _safetensors,
    "plan": _plan,
    "config": _config,
    "npz": _npz,
    "pt2": _pt2,
    "manifest": _manifest,
    "weights": _weights,
}
