"""Random PyTorch programs whose residual connections are known by construction, rewritten and held to what a rewrite promises.

    run(seed)     one case; its kind, or an exception: a fault

`tools.fuzz.grammar` writes the programs. A refusal with a reason is a kind of its own.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import linecache
import logging
import pickle
import random
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, fx, nn

import laurel_rewrite
from laurel_rewrite.backends.module.saved_folder import importable
from laurel_rewrite.backends.rewriting import apply_plan
from laurel_rewrite.errors import ConfigError, RewriteError
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.operators.families.laurel import Laurel
from laurel_rewrite.passes import InsertLaurel
from laurel_rewrite.plan import LaurelConfig, Plan
from tools.fuzz.grammar import Program, program

VARIANTS = ("rw", "lr", "pa", "rw+lr", "rw+pa", "lr+pa", "rw+lr+pa")
ONNX_EVERY = 10
"""Of so many seeds one goes through ONNX, too."""
RTOL, ATOL = 1e-4, 1e-5
"""Module against graph and ONNX, the second in units of the largest element: float32, other kernels, some ten layers."""


class Fault(Exception):
    """What must not happen, with the seed of the case."""


def run(seed: int) -> str:
    """Try one case.

    Returns:
        Its kind: the program's theme, with what was left out; or "refused: theme".

    Raises:
        Fault: a law does not hold, or something else than a refusal was raised.
    """
    case = program(seed)
    with _quiet(), _imported(case, seed) as model:
        try:
            return _tried(case, model, seed)
        except RewriteError:
            return f"refused: {case.theme}"
        except Exception as error:
            reason = " ".join(str(error).split())[:600]
            raise Fault(f"seed {seed}, {case.theme}: {type(error).__name__}: {reason}") from error


def _tried(case: Program, model: nn.Module, seed: int) -> str:
    draw = random.Random(seed)
    variant, normalize = draw.choice(VARIANTS), draw.choice(["softmax", "none", "sigmoid"])
    config = LaurelConfig(variant=variant, rank=2, normalize=normalize, history_map=draw.choice(["low-rank", "identity"]), seed=seed)
    x, other = (torch.randn(shape, generator=torch.Generator().manual_seed(seed + n)) for n, shape in enumerate(case.shapes))
    sites = laurel_rewrite.detect(model, (x,))
    found = [f"{site.id} ({site.where})" for site in sites]
    assert len(found) == case.sites, f"{len(found)} sites and not {case.sites}: {', '.join(found)}"
    better = apply_plan(model, sites, Plan.from_sites(sites, config), (x,)).model
    for given in (x, other):
        for train in (False, True):
            _same(_outcome(model, given, train), _outcome(better, given, train), f"the start on {tuple(given.shape)}, train={train}")
    _refused_again(better, x)
    _same(_outcome(model, other, False), _outcome(laurel_rewrite.remove(better), other, False), "after remove")
    left_out = "" if _gradients(model, better, other) else ", no backward"
    _move(better, seed)
    _same(_outcome(better, other, False), _outcome(pickle.loads(pickle.dumps(better)), other, False), "after pickle")
    plain = laurel_rewrite.remove(better)
    _same(_outcome(model, other, False), _outcome(plain, other, False), "after training and remove")
    assert plain.state_dict().keys() == model.state_dict().keys(), "the state dict after remove has other keys"
    left_out += _as_graph(model, better, config, x, [site.module for site in sites])
    if seed % ONNX_EVERY == 0:
        _as_onnx(better, x)
        left_out += ", ONNX too"
    return case.theme + left_out


# The laws


def _outcome(model: nn.Module, x: Tensor, train: bool) -> tuple[list[Tensor], list[tuple[int, ...]]]:
    """The result, the input and all buffers after a run of a copy, with the strides of the first."""
    model, x = copy.deepcopy(model).train(train), x.clone()
    torch.manual_seed(0)
    with torch.no_grad():
        y = model(x)
    return [y, x, *model.buffers()], [y.stride()]


def _same(one: tuple[list[Tensor], list[tuple[int, ...]]], two: tuple[list[Tensor], list[tuple[int, ...]]], what: str) -> None:
    for a, b in zip(one[0], two[0], strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{what}: {text}")
    assert one[1] == two[1], f"{what}: strides {two[1]} and not {one[1]}"


def _refused_again(better: nn.Module, x: Tensor) -> None:
    try:
        laurel_rewrite.rewrite(better, (x,))
    except ConfigError:
        return
    raise AssertionError("a rewritten model was rewritten again")


def _gradients(model: nn.Module, better: nn.Module, x: Tensor) -> bool:
    """Whether the original can be trained at all; if so, every parameter of LAuReL has a gradient after two steps."""
    # torch crashes in GroupNorm's backward where a channels-last input needs no gradient.
    x = x.clone().requires_grad_()
    try:
        copy.deepcopy(model).train()(x.clone()).square().mean().backward()
    except RuntimeError:  # it changes in place what its backward needs
        return False
    trained = copy.deepcopy(better).train()
    # No element moves further than this, whatever its gradient is: a step that is too long kills ReLUs.
    optimizer = torch.optim.Adam(trained.parameters(), lr=1e-3)
    torch.manual_seed(0)
    for _ in range(2):
        optimizer.zero_grad()
        y = trained(x.clone())
        (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape).sin()).sum().backward()
        optimizer.step()
    lost = [
        f"{site}.{name}"
        for site, laurel in sites_of(trained).items()
        for name, parameter in laurel.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert not lost, f"no gradient arrives at {', '.join(lost)}"
    return True


def _move(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for laurel in sites_of(model).values():
            for parameter in laurel.parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def _as_graph(model: nn.Module, better: nn.Module, config: LaurelConfig, x: Tensor, modules: list[str]) -> str:
    """The rewritten graph computes what the rewritten module does; what could not be compared.

    `modules` are the paths of the LAuReL modules, one for each site in order of execution.
    """
    graph = torch.export.export(copy.deepcopy(model).eval(), (x.clone(),)).module()
    assert isinstance(graph, fx.GraphModule)
    sites = laurel_rewrite.detect(graph, (x.clone(),))
    assert len(sites) == len(modules), (
        f"{len(sites)} sites in the exported graph and not {len(modules)}: {', '.join(site.id for site in sites)}"
    )
    try:
        InsertLaurel(Plan.from_sites(sites, config))(graph)
    except RewriteError:
        return ", graph refused"
    ours, theirs = sites_of(better), sites_of(graph)
    for site, module in zip(
        sites, modules, strict=True
    ):  # by order: a graph has its own numbers for calls of shared modules, and for turns
        _copy(ours[module], theirs[site.module])
    with torch.no_grad():
        _close(graph(x.clone()), copy.deepcopy(better).eval()(x.clone()), "the rewritten graph")
    return ""


def _copy(source: Laurel, target: Laurel) -> None:
    """Parameters by name; a call of a shared module may read fewer states than the module can."""
    theirs = source.state_dict()
    target.load_state_dict({name: theirs[name][: len(value)] for name, value in target.state_dict().items()})


def _as_onnx(better: nn.Module, x: Tensor) -> None:
    import onnxruntime

    model = copy.deepcopy(better).eval()
    with torch.no_grad():
        right = copy.deepcopy(model)(x.clone())
    with tempfile.TemporaryDirectory() as folder:
        path = laurel_rewrite.export_onnx(model, (x.clone(),), None, Path(folder) / "model.onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    _close(torch.from_numpy(found[0]), right, "the ONNX file")


def _close(found: Tensor, right: Tensor, what: str) -> None:
    atol = ATOL * max(1.0, float(right.abs().max()))
    torch.testing.assert_close(found, right, rtol=RTOL, atol=atol, msg=lambda text: f"{what}: {text}")


# The program as a module


@contextlib.contextmanager
def _imported(case: Program, seed: int) -> Iterator[nn.Module]:
    """The program's model, of a module that can be imported for as long as this lasts."""
    name = f"fuzzed_program_{seed}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.py"
        path.write_text(case.text)
        try:
            with importable(Path(folder), [path.name]):
                module = importlib.import_module(name)
            torch.manual_seed(seed)
            yield module.Model()
        finally:
            del sys.modules[name]
            linecache.checkcache()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings and the progress of exporters."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
