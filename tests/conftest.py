"""What the tests share: real architectures made small, and LAuReL parameters away from their start."""

from __future__ import annotations

import copy
import fcntl
import functools
import gc
import importlib.util
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch.onnx._internal.exporter._constants import TORCHLIB_OPSET
from torch.onnx._internal.exporter._registration import ONNXRegistry
from torch.utils import _pytree as pytree

from laurel_rewrite import export_onnx, load_operators
from laurel_rewrite.app import cli
from laurel_rewrite.files.onnx import write_onnx
from laurel_rewrite.graph.feeds import draw_feeds
from laurel_rewrite.lowering import lower
from laurel_rewrite.operators import registry
from laurel_rewrite.profiling.sessions import session_of, settings
from laurel_rewrite.sources.built import declare_torchvision_ops
from laurel_rewrite.sources.models import build
from laurel_rewrite.verification.onnx import run_onnx

collect_ignore = ["operators.py"]
"""Importing it registers operators, and other tests count those that there are."""
os.environ.setdefault("LAUREL_REWRITE_CACHE", str(Path(tempfile.gettempdir()) / f"laurel-rewrite-tests-{os.getuid()}"))

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
gc.set_threshold(50_000, 20, 50)  # exports make millions of objects, and a twelfth of the tests' time went to looking at them
hypothesis.settings.register_profile("suite", derandomize=True, deadline=None)  # new cases are the fuzzer's to find
hypothesis.settings.load_profile("suite")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of torchvision's import
    declare_torchvision_ops()

LLAMA = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
}
REAL: dict[str, tuple[str, dict[str, Any], int]] = {
    "resnet18": ("torchvision:resnet18", {}, 8),
    "vit_small": ("timm:vit_small_patch16_224", {"img_size": 64, "drop_path_rate": 0.1, "depth": 4}, 8),
    "gpt2": ("hf:gpt2", {"n_layer": 3, "n_embd": 32, "n_head": 4, "vocab_size": 99}, 6),
    "llama": ("hf:llama", LLAMA, 6),
    "bert": (
        "hf:bert",
        {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 99},
        6,
    ),
    "t5": ("hf:t5", {"num_layers": 2, "d_model": 32, "d_ff": 64, "num_heads": 4, "d_kv": 8, "vocab_size": 99}, 10),
    "falcon": ("hf:falcon", {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 99}, 3),
    "falcon_sequential": (
        "hf:falcon",
        {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 99, "parallel_attn": False, "alibi": True},
        6,
    ),
    "gptj": ("hf:gptj", {"n_layer": 3, "n_embd": 32, "n_head": 4, "rotary_dim": 4, "vocab_size": 99}, 3),
    "cohere": ("hf:cohere", LLAMA, 3),
}
"""Name -> MODEL, settings, number of sites."""


EXAMPLES = Path(__file__).parent.parent / "tools" / "examples"


class Example:
    """A model with inputs, and a second set of inputs of another shape to compare with."""

    def __init__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], other: tuple[Any, dict[str, Any]], sites: int
    ) -> None:
        self.model, self.args, self.kwargs, self.sites = model, args, kwargs, sites
        self.other_args, self.other_kwargs = other


def slow(*values: Any) -> Any:
    """A case of a law that others hold too: `make test` leaves it out, `make test-all` does not."""
    return pytest.param(*values, marks=pytest.mark.slow)


def real(name: str) -> Example:
    spec, settings, sites = REAL[name]
    torch.manual_seed(0)
    built = build(spec, settings)
    model, args, kwargs = built.model, built.args, built.kwargs
    if name == "resnet18":
        args = (torch.randn(2, 3, 64, 64),)
    generator = torch.Generator().manual_seed(7)

    def other(leaf: Any) -> Any:
        if leaf.is_floating_point():
            return torch.randn(3, *leaf.shape[1:], generator=generator)
        return torch.randint(0, 90, (3, leaf.shape[1] - 4), generator=generator)

    return Example(model, args, kwargs, pytree.tree_map(other, (args, kwargs)), sites)


def output(model: nn.Module, args: Any = (), kwargs: dict[str, Any] | None = None, *, train: bool = False, seed: int = 0) -> Tensor:
    """The first floating-point output, in eval mode or in train mode with a seed."""
    model.train(train)
    torch.manual_seed(seed)
    with torch.no_grad():
        result = model(*args, **(kwargs or {}))
    return next(leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point())


def away_from_start(model: nn.Module, seed: int = 0, spread: float = 0.2) -> nn.Module:
    """Random LAuReL parameters, for good."""
    from laurel_rewrite.operators.connections import sites_of

    generator = torch.Generator().manual_seed(seed)
    for module in sites_of(model).values():
        for parameter in module.parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * spread)
    return model


LIGHT = {
    "bvlc_alexnet": {},
    "densenet121": {},
    "inception_v1": {},
    "inception_v2": {},
    "resnet50": {"identity": 12, "projection": 4},
    "shufflenet": {"identity": 13},
    "squeezenet": {},
    "vgg19": {},
    "zfnet512": {},
}
"""Graphs in the onnx package, and what is in them."""


def light(name: str) -> Path:
    return Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / f"light_{name}.onnx"


def yolo() -> Path:
    """YOLOv8n; the package that ships it is not imported."""
    spec = importlib.util.find_spec("nudenet")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "320n.onnx"


def trained(model: ir.Model, seed: int = 0) -> ir.Model:
    """a and b in [0.5, 1.5], U and V of trained size, all g away from their start."""
    generator = np.random.default_rng(seed)
    for name, value in model.graph.initializers.items():
        if "laurel_" not in name:
            continue
        array = value.const_value.numpy()
        if name.endswith(".mix") and array.size == 2:  # 2 softmax(w, 0) = (a, 2 - a)
            a = generator.uniform(0.5, 1.5)
            array = np.array([np.log(a / (2 - a)), 0.0])
        else:
            array = array + generator.standard_normal(array.shape) * (0.3 if array.ndim == 1 else 0.5 / np.sqrt(max(array.shape[:2])))
        value.const_value = ir.tensor(array.astype(value.const_value.dtype.numpy()), name=name)
    return model


def compared(model: ir.Model, folder: Path, *, skip=(), seed: int = 3, **drawn) -> tuple[Path, object]:
    """Lower a copy, and compare both in onnxruntime with and without its optimiser. The lowered file, and what was done."""
    before = write_onnx(model, folder / "before.onnx")
    lowered = model.clone()
    done = lower(lowered, skip=skip, verify=False)  # compared below
    assert not lowered.functions
    assert {node.domain for node in lowered.graph} <= {node.domain for node in model.graph}
    after = write_onnx(lowered, folder / "after.onnx")
    feeds = draw_feeds(model, seed=seed, **drawn)
    expected = run_onnx(before, feeds, optimised=False)
    for optimised in (False, True):
        close(run_onnx(after, feeds, optimised=optimised), expected)
    return after, done


def fused(path: Path, folder: Path) -> Path:
    """The graph after onnxruntime's fusions, as people save it."""
    session_of(path, settings(), optimised=folder / "fused.onnx", level="extended")
    return folder / "fused.onnx"


def onnx_graph(nodes: list[object], shapes: dict[str, tuple[object, ...]], inner: str = "", **weights: tuple[int, ...]) -> ir.Model:
    """A model with these nodes and inputs, and the output y; weights are zeros. The values named in `inner` have x's shape."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shapes["x"] if inner else None)],
        [helper.make_tensor(name, TensorProto.FLOAT, shape, [0.0] * torch.Size(shape).numel()) for name, shape in weights.items()],
        value_info=[helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes["x"]) for name in inner.split()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return ir.serde.deserialize_model(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run([sys.executable, "-m", "laurel_rewrite", *words], cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def toys():
    """The small operators of every class, registered for one module's tests alone: others count the operators that there are."""
    names = load_operators(Path(__file__).with_name("operators.py"))
    yield
    registry.forget(names)


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """The command in this process, in an empty folder: most of a process of its own is importing torch."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        code = 0
        try:
            cli.main(words)
        except SystemExit as error:
            code = int(error.code or 0)
        captured = capsys.readouterr()
        return subprocess.CompletedProcess(words, code, captured.out, captured.err)

    return call


def close(found: Sequence[Any], expected: Sequence[Any], rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """Lists of arrays agree; atol counts in units of the largest value. The default is for float32 in other kernels and orders of rounding."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol * max(1.0, float(np.abs(b).max())))


@pytest.fixture(scope="session", autouse=True)
def torchlib_once() -> Iterator[None]:
    """Half of the export of a small model is torch parsing its own library of operators, each time anew."""
    parse = functools.cache(ONNXRegistry.from_torchlib)

    def parsed(opset_version: int = TORCHLIB_OPSET) -> ONNXRegistry:
        registry = copy.copy(parse(opset_version))
        registry.functions = {target: [*functions] for target, functions in registry.functions.items()}
        return registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(parsed))
        yield


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Exports of the small real architectures, once each for all workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "exported"
    folder.mkdir(exist_ok=True)

    def export(name: str) -> Path:
        path = folder / f"{name}.onnx"
        with (folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                example = real(name)
                export_onnx(example.model, example.args, example.kwargs, path)
        return path

    return export


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regen-golden", action="store_true", help="write the golden files anew; then read the difference")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with the file of this name, or write it with --regen-golden."""

    def check(name: str, text: str) -> None:
        path = Path(__file__).parent / "golden" / name
        if request.config.getoption("--regen-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        assert text == path.read_text()

    return check


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """Small models: two threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def text(tmp_path):
    """A file to train on."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{n * n} is the square of {n}\n" for n in range(1500)))
    return str(path)
