"""A `.pt2` file as a model: its graph is written as source, built with the program's weights, and held against the program."""

from __future__ import annotations

import atexit
import keyword
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from laurel_rewrite.errors import CaptureError
from laurel_rewrite.files.checked import require_file, shown
from laurel_rewrite.files.pt2 import read_program
from laurel_rewrite.graph.capture import quiet
from laurel_rewrite.private import OpOverload, pytree
from laurel_rewrite.sources.built import Built
from laurel_rewrite.sources.code import from_code
from laurel_rewrite.sources.inputs import copied_inputs
from laurel_rewrite.sources.programs.source import source_of

_FOREIGN = {
    "quantized": "quantised",
    "quantized_decomposed": "quantised",
    "torchao": "quantised",
    "prims": "lowered",
    "inductor": "lowered",
    "executorch": "lowered",
}
_MODED = {"dropout": 2, "dropout_": 2, "feature_dropout": 2, "native_dropout": 2, "batch_norm": 5}
"""Ops that are told whether they train: the place of that operand."""
_EVALUATED = frozenset({"_native_batch_norm_legit_no_training"})
_DRAWS = frozenset(
    "bernoulli bernoulli_ rand rand_like randn randn_like randint randint_like uniform uniform_ normal normal_ randperm multinomial".split()
)
_PART = re.compile(r"(?!__)\w{1,200}(@\d{1,9})?")
_RTOL, _ATOL = 1e-5, 1e-6


def from_program(spec: str, *, inference: bool = False) -> Built:
    """The model of an exported program.

    Args:
        spec: path of a `.pt2` file.
        inference: take a program that was exported in evaluation mode, too.

    Raises:
        ConfigError: there is no such file.
        CaptureError: it cannot be read, its graph is none that a model can be made of (quantised, lowered, with a backward pass, with inputs that it
            changes, with control flow), or one of evaluation that was not asked for.
    """
    path = Path(spec)
    require_file(path)
    program = read_program(path)
    _refuse_foreign(program, path)
    lost = [*_lost(program)]
    if (mode := _mode(program)) is False and not inference:
        raise CaptureError(
            f"{path} was exported in evaluation mode. A model made of it trains, but lacks what the export left out: {'; '.join(lost)}. Export it "
            "in train mode, or accept that: --allow-inference-graph."
        )
    name = re.sub(r"\W", "_", path.stem)
    folder = Path(tempfile.mkdtemp(prefix="laurel_program_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    file = folder / f"{name}_program.py"
    try:
        file.write_text(source_of(program, f"The model of {path.name}."), encoding="utf-8")
    except CaptureError as error:
        raise CaptureError(f"{path}: {error}") from error
    built = from_code(f"{file}:build_model", {}, offered=False)
    _put_weights(built.model, program, path)
    built.model.train(mode is not False)
    examples = program.example_inputs
    assert examples is not None  # source_of asked for them
    args, kwargs = copied_inputs(*examples)
    _compare(built.model, program, args, kwargs, path)
    dynamic = any(not isinstance(size, int) for shape in _shapes(program) for size in shape)
    return Built(
        built.model.train(),
        args,
        kwargs,
        f"{file.name}:build_model",
        files={file.name: file},
        notes=(f"Of {path.name}: {'; '.join(lost)}.",),
        resizable=dynamic,
    )


def _refuse_foreign(program: torch.export.ExportedProgram, path: Path) -> None:
    stacks = (entry for node in program.graph.nodes for entry in (node.meta.get("nn_module_stack") or {}).values())
    for name in {*program.state_dict, *program.constants, *(str(inner).removeprefix("L['self'].") for inner, _ in stacks)}:
        # PyTorch writes them into code, too, and a file may say anything.
        if any(not _PART.fullmatch(part) or keyword.iskeyword(part) for part in name.split(".") if part):
            raise CaptureError(f"{path}: {shown(name)} is no name in Python, and is not written as source.")
    signature = program.graph_signature
    if signature.backward_signature is not None:
        raise CaptureError(f"{path} holds a forward and a backward pass. Give the program of the forward alone.")
    if signature.user_inputs_to_mutate:
        raise CaptureError(
            f"{path} changes its inputs ({', '.join(signature.user_inputs_to_mutate.values())}), which a model that is trained cannot."
        )
    if signature.buffers_to_mutate:
        raise CaptureError(
            f"{path} was decomposed: its buffers ({next(iter(signature.buffers_to_mutate.values()))} first) are outputs. Save what torch.export.export gave, "
            "without run_decompositions."
        )
    for node in _nodes(program):
        target: Any = node.target
        if isinstance(target, OpOverload) and target.namespace in _FOREIGN:
            raise CaptureError(f"{path} is {_FOREIGN[target.namespace]}: it calls {target}. Give the program from before that.")


def _nodes(program: torch.export.ExportedProgram) -> Iterator[fx.Node]:
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            yield from (node for node in module.graph.nodes if node.op == "call_function")


def _op(node: fx.Node) -> str:
    """Name of an op of PyTorch."""
    return node.target.overloadpacket.__name__ if isinstance(node.target, OpOverload) else ""


def _mode(program: torch.export.ExportedProgram) -> bool | None:
    """Whether it was exported in train mode; None where nothing in it depends on that."""
    found = set()
    for node in _nodes(program):
        name = _op(node)
        if name in _MODED:
            found.add(bool(node.args[_MODED[name]]) if len(node.args) > _MODED[name] else True)
        elif name in _EVALUATED:
            found.add(False)
    return None if not found else True in found


def _shapes(program: torch.export.ExportedProgram) -> list[Any]:
    given = {name for name in program.graph_signature.user_inputs if isinstance(name, str)}
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder" and node.name in given]
    return [value.shape for value in values if isinstance(value, Tensor)]


def _lost(program: torch.export.ExportedProgram) -> Iterator[str]:
    """What of the model the graph does not have, in words."""
    if _mode(program) is False:
        yield "dropouts and batch norms follow the mode again, attention dropout and other code of training alone are gone"
    if draws := sorted({name for node in _nodes(program) if (name := _op(node)) in _DRAWS}):
        yield f"it draws random numbers in evaluation, too, for its own code does ({', '.join(draws)}: stochastic depth, noise)"
    fixed = sorted({str(tuple(shape)) for shape in _shapes(program) if all(isinstance(size, int) for size in shape)})
    if fixed:
        yield f"the sizes of its inputs are fixed at {', '.join(fixed)}"
    yield "its guards on inputs are not checked, and branches that the export did not take are gone"


@torch.no_grad()
def _put_weights(model: nn.Module, program: torch.export.ExportedProgram, path: Path) -> None:
    state = {**program.state_dict, **{name: value for name, value in program.constants.items() if isinstance(value, Tensor)}}
    own = model.state_dict(keep_vars=True)
    if missing := sorted(own.keys() - state.keys()):
        raise CaptureError(f"{path} has no values for {', '.join(missing[:3])}.")
    for name, tensor in own.items():
        tensor.copy_(state[name])


def _compare(model: nn.Module, program: torch.export.ExportedProgram, args: Any, kwargs: Any, path: Path) -> None:
    """The source computes what the program does, with its example inputs and one random state."""
    found = []
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for one in (program.module(check_guards=False), model):
        given = copied_inputs(args, kwargs)
        with quiet(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found.append([leaf for leaf in pytree.tree_leaves(one(*given[0], **given[1])) if isinstance(leaf, Tensor)])
    model.load_state_dict(state)  # statistics that the run changed
    for place, (right, left) in enumerate(zip(*found, strict=True)):
        if right.shape != left.shape or not torch.allclose(left.double(), right.double(), rtol=_RTOL, atol=_ATOL, equal_nan=True):
            raise CaptureError(
                f"{path}: the source written of it does not compute what the program does (output {place}); this is a fault of laurel-rewrite, please report it."
            )
