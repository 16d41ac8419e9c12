"""From PyTorch to ONNX: the model is exported with a marker in the place of each LAuReL, and the ONNX back end puts the nodes in.

So the graph around the sites is what `torch.onnx.export` makes of the baseline, and one inserter serves exported and given graphs.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import ConstantArgument

from laurel_rewrite import __version__, targets
from laurel_rewrite.backends.onnx.surgery import check_form, inline_laurel
from laurel_rewrite.detection.site import portable
from laurel_rewrite.errors import ExportError, reason
from laurel_rewrite.files.drafts import replacing
from laurel_rewrite.files.onnx import place_onnx
from laurel_rewrite.files.onnx_weights import note_kinds
from laurel_rewrite.graph.capture import describe, quiet, training, without_caches
from laurel_rewrite.graph.from_onnx import METADATA
from laurel_rewrite.lowering import lower
from laurel_rewrite.operators.affine import Weight
from laurel_rewrite.operators.annealing import unfinished
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.operators.onnx_function import CALL, DOMAIN, Call
from laurel_rewrite.operators.protocol import Connection
from laurel_rewrite.operators.reads import parted
from laurel_rewrite.private import pytree
from laurel_rewrite.sources.inputs import call_inputs
from laurel_rewrite.sources.past import Past
from laurel_rewrite.verification.checks import require
from laurel_rewrite.verification.export import check_export, numbered, widened

if TYPE_CHECKING:
    import onnx_ir as ir

_MARKER = "laurel_rewrite.marker"
_log = logging.getLogger(__name__)


@dataclass
class Export:
    """An exported file, and where the sites are in it.

    Attributes:
        path: of the file.
        values: the site of each value that is the sum of one, by the value's name, in order; "site@1" is the second call of its module.
        scales: c of each value that is 1/c of what it was before the lowering.
    """

    path: Path
    values: dict[str, str] = field(default_factory=dict)
    scales: dict[str, Weight] = field(default_factory=dict)


def export_onnx(
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any] | None,
    path: Path | str,
    *,
    target: str = targets.DEFAULT,
    functions: str = "keep",
    skip: Collection[str] = (),
    past: bool = False,
    verify: bool = True,
) -> Path:
    """Write a model, rewritten or not, as ONNX. It is exported in eval mode and left as it was.

    The file appears when onnxruntime computes with it what the model does; where that cannot be tried here, a warning is logged.

    Args:
        model: on any device but meta.
        args, kwargs: example inputs: a tuple, one tensor, or a dictionary of keyword arguments. Batch and sequence become dynamic
            where the model allows it; a batch of 1 is doubled, because an export takes the size 1 for a constant.
        path: of the `.onnx` file; above 1 GiB the weights go into `path` + ".data".
        target: see `laurel_rewrite.targets`.
        functions: of a portable graph: "keep" LAuReL's functions, or "inline" them into ordinary nodes.
        skip: passes of a target that lowers to leave out.
        past: write a causal decoder of transformers as it is deployed: keys and values of earlier tokens are inputs, and those of all are
            outputs (`laurel_rewrite.sources.past`), so that one graph computes a prompt and each token after it. Of the example inputs
            it takes `input_ids`.
        verify: whether to compare the file with the model.

    Returns:
        The path. A site's nodes are named by the site's id, and their `metadata_props` say site, variant, rank and version.

    Raises:
        ConfigError: an unknown target or pass, another word for `functions`, or other inputs than `past` takes.
        ExportError: the model cannot be exported, has no past to export, or the result is no valid ONNX. Nothing is written then.
        VerificationError: the file does not compute what the model does; the message names the first site. Nothing is written then.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ExportError(f"{path} could not be written: there is no folder {path.parent}.")
    args, kwargs = call_inputs(args, kwargs)
    if why := unfinished(model):
        _log.warning("%s: %s", path.name, why)
    behind = Past.of(model, args, kwargs) if past else None
    with replacing(path.parent) as draft:
        exported = Exporter(model, args, kwargs, target=target, functions=functions, skip=skip, past=behind).write(draft / path.name)
        if verify:
            require(check_export(model, exported, args, kwargs, name=path.name, past=behind)[0])
    return path


class Exporter:
    """One model on its way to ONNX, which may be written several times: what an export takes long for is done once.

    Args:
        model, args, kwargs, target, functions, skip: see `export_onnx`.
        past: how the model is called with one; None to export it as it is called with the inputs.

    Raises:
        ConfigError: an unknown target or pass, or another word for `functions`.
        ExportError: the model is on the meta device.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None,
        *,
        target: str = targets.DEFAULT,
        functions: str = "keep",
        skip: Collection[str] = (),
        past: Past | None = None,
    ) -> None:
        self.target = check_form(target, functions)
        if any(p.is_meta for p in model.parameters()):
            raise ExportError("A model on the meta device has no weights to export. Move it to a device first.")
        self.model, self.args, self.kwargs = model, args, dict(kwargs or {})
        self.functions, self.skip, self.past = functions, skip, past
        self._traced: ir.Model | None = None

    def write(self, path: Path) -> Export:
        """Write the model with LAuReL's parameters as they are now into a draft folder, and compare nothing."""
        exported = Export(path)
        graph = self._graph()
        if not self.target.writes_nodes and sites_of(self.model):
            exported.values = _insert(graph, self.model)
        if self.target.lowers:
            exported.scales = lower(graph, target=self.target.name, skip=self.skip, verify=False).scales
        elif self.functions == "inline":
            inline_laurel(graph)
        loadable = place_onnx(graph, path)
        if loadable != path:  # its weights lie in the draft folder, too
            loadable.unlink()
        return exported

    def _graph(self) -> ir.Model:
        """The graph with a marker in the place of each LAuReL; where these become nodes, it holds their parameters, and must be made anew."""
        if self.target.writes_nodes:
            return _export(self.model, self.args, self.kwargs, self.past, markers=False)
        if self._traced is None:
            self._traced = _export(self.model, self.args, self.kwargs, self.past, markers=True)
        return self._traced.clone()


def _export(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], past: Past | None, *, markers: bool) -> ir.Model:
    """The graph with as many dynamic dimensions as the model, its capture and the exporter go along with; with a past it has all of them."""
    args, kwargs = widened(tuple(args), kwargs) if past is None else ((), past.drawn(model, 2, 5, 3))
    # A view of a larger tensor would put a guard on its strides into the program, which the exporter cannot carry out; and a tensor that is
    # given twice would be one input.
    args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: tensor.contiguous().clone(), (args, kwargs))
    problems: list[str] = []
    dynamics = (
        (_dynamic(model, args, kwargs, sequence=True), _dynamic(model, args, kwargs, sequence=False), None)
        if past is None
        else (past.dynamic_shapes(kwargs),)
    )
    for dynamic in dynamics:
        try:
            marks = marked(model) if markers else contextlib.nullcontext()
            called = without_caches(model) if past is None else past.calling(model)
            with training(model, False), called, quiet(), torch.no_grad(), marks:
                program = torch.export.export(model, tuple(args), kwargs, dynamic_shapes=dynamic, strict=False)
                _only_tensors(program)
                exported = torch.onnx.export(program, (), dynamo=True, optimize=True, verbose=False)
            assert exported is not None
            note_kinds(exported.model, program.graph_signature.parameters, program.graph_signature.buffers)
            _fix_dimensions(exported.model, _fixed_symbols(program))
            _name_dimensions(exported.model, _symbols(exported.model) if past is None else past.symbols(exported.model.graph))
            if past is not None:
                past.name_values(exported.model.graph)
            _forget_places(exported.model)
            return exported.model
        except Exception as error:  # what the exporters raise for a foreign model is not documented
            problems.append(_said(error))
            _log.info("export with dynamic shapes %s failed: %s", dynamic, problems[-1])
    inputs = ", ".join([describe(a) for a in args] + [f"{k}={describe(v)}" for k, v in kwargs.items()])
    raise ExportError(f"{type(model).__name__} could not be exported in eval mode with the inputs ({inputs}): {problems[-1]}")


def _said(error: BaseException) -> str:
    """What an exporter failed of: the innermost cause, for what is around it tells how to report bugs of PyTorch."""
    while error.__cause__ is not None:
        error = error.__cause__
    return re.sub(r"\x1b\[\d+m", "", reason(error))


def _only_tensors(program: torch.export.ExportedProgram) -> None:
    """Leave out what a model returns beside tensors, a number or None, which ONNX has no outputs for."""
    signature, output = program.graph_signature, program.graph.output_node()
    kept = [not isinstance(spec.arg, ConstantArgument) for spec in signature.output_specs]
    if all(kept):
        return
    output.args = (tuple(value for value, keep in zip(output.args[0], kept, strict=True) if keep),)
    signature.output_specs[:] = [spec for spec, keep in zip(signature.output_specs, kept, strict=True) if keep]
    entry = program.module_call_graph[0].signature
    if entry is not None:
        entry.outputs = [spec.arg for spec in signature.output_specs]
        entry.out_spec = pytree.tree_structure(tuple(entry.outputs))


def _dynamic(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, sequence: bool) -> dict[str, Any]:
    """Batch dynamic, and the sequence of ids ([B, S]), masks and embeddings ([B, S, D]): where the model allows it."""

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.ndim:
            return None
        dims = {0: torch.export.Dim.AUTO}
        if sequence and ((leaf.ndim == 3) or (leaf.ndim == 2 and not leaf.is_floating_point())):
            dims[1] = torch.export.Dim.AUTO
        return dims

    signature = inspect.signature(model.forward)
    named = signature.bind(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named |= named.pop(name, {})
    return {name: pytree.tree_map(of, value) for name, value in named.items()}


@contextlib.contextmanager
def marked(model: nn.Module) -> Iterator[None]:
    """Each LAuReL module leaves a marker node in an export, which holds its operands and its site."""
    modules = sites_of(model)
    try:
        for site, module in modules.items():
            module.connect = _Marker(site, module).connect  # type: ignore[method-assign]  # on the instance, for a while
            module.branch = _Marker(site, module).branch  # type: ignore[method-assign]  # likewise
            module.connect_behind = _Marker(site, module).connect_behind  # type: ignore[method-assign]  # likewise
        yield
    finally:
        for module in modules.values():
            del module.connect, module.branch, module.connect_behind
            if module.link is not None:
                module.link.stream.end()


class _Marker:
    def __init__(self, site: str, module: Connection) -> None:
        self.site = site
        self.module = module
        self.keeps_branches = module.keeps_branches  # asked here, where nothing is traced

    def connect(
        self, x: Tensor, f: Tensor, *more: Tensor, state: Sequence[Tensor], n: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        module = self.module
        left: tuple[Tensor, ...] = ()
        if module.config.leaves != 0 or module.config.linked:  # what is traced of it here leads nowhere, and the exporter drops it
            named = {"n": n} if module.needs_input else {}
            _, left = (
                parted(module.skip(x, *state, **named)) if module.additive else Connection.connect(module, x, f, *more, state=state, n=n)
            )
        operands = (x, f, *more, *state, *([] if n is None else [n]))
        dtype = functools.reduce(torch.promote_types, (term.dtype for term in (x, f, *more)))
        facts = {"branches": 1 + len(more), "states": len(state), "reads": int(n is not None)}
        return self._node("Residual", operands, facts, torch.empty_like(x, dtype=dtype), left)

    def connect_behind(self, y: Tensor, state: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        out, left = Connection.connect_behind(self.module, y, state)
        return self._node("Read", (y, *state), {}, out, left)

    def _node(
        self, op: str, operands: Sequence[Tensor], facts: Mapping[str, int], out: Tensor, left: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """A marker that gives a value like `out`, and what of the state is no operand: what is handed on as it is needs no output."""
        places = [next((i for i, operand in enumerate(operands) if operand is value), -1) for value in left]
        computed = [value for value, place in zip(left, places, strict=True) if place < 0]
        values = torch.onnx.ops.symbolic_multi_out(
            f"{_MARKER}::{op}",
            operands,
            {"site": self.site, **facts},
            dtypes=[out.dtype, *(value.dtype for value in computed)],
            shapes=[out.shape, *(value.shape for value in computed)],
            version=1,
        )
        rest = iter(values[1:])
        return values[0], tuple(next(rest) if place < 0 else operands[place] for place in places)

    def branch(self, f: Tensor) -> Tensor:
        if self.keeps_branches:
            return f
        return torch.onnx.ops.symbolic(f"{_MARKER}::Branch", (f,), {"site": self.site}, dtype=f.dtype, shape=f.shape, version=1)


def _insert(model: ir.Model, module: nn.Module) -> dict[str, str]:
    """Function nodes in the places of the markers; the site of each node's result, by name."""
    from laurel_rewrite.passes.insert_laurel_onnx import InsertLaurelOnnx, OnnxSite

    modules = sites_of(module)
    sites: list[OnnxSite] = []
    for node in model.graph.all_nodes():
        if node.domain != _MARKER:
            continue
        name = node.attributes["site"].as_string()
        connection = modules[name]
        operands = [value for value in node.inputs if value is not None]
        if node.op_type == "Branch":
            sites.append(OnnxSite(name, node, None, tuple(operands), connection))
            continue
        if node.op_type == "Read":
            sites.append(OnnxSite(name, node, operands[0], (), connection, tuple(operands[1:]), link=True))
            continue
        count = 1 + node.attributes["branches"].as_int()
        branches, rest = tuple(operands[1:count]), operands[count:]
        reads = rest.pop() if node.attributes["reads"].as_int() else None
        sites.append(OnnxSite(name, node, operands[0], branches, connection, tuple(rest), reads=reads))
    for key in laurel_initializers(model, modules):
        del model.graph.initializers[key]
    InsertLaurelOnnx(sites, __version__)(model)
    for node in model.graph.all_nodes():
        if node.domain == DOMAIN:
            node.outputs[0].name = node.name  # the exporter calls what a marker gives "_symbolic"
    model.opset_imports.pop(_MARKER, None)
    calls: Counter[str] = Counter()
    nodes = [node for node in model.graph if node.domain == DOMAIN and Call.from_json(node.metadata_props[CALL]).part in ("whole", "skip")]
    return {str(node.outputs[0].name): numbered(node.metadata_props[f"{METADATA}site"], calls) for node in nodes}


def laurel_initializers(model: ir.Model, modules: Mapping[str, Connection]) -> list[str]:
    """Parameters of connections that the exporter listed although nothing reads them behind the markers."""
    names = {f"{site}.{name}" for site, module in modules.items() for name in module.state_dict()}
    return [key for key in model.graph.initializers if key in names]


def _forget_places(model: ir.Model) -> None:
    """Name the files of stack traces by their modules: the same model gives the same bytes on every machine and in every folder."""
    places: dict[str, str] = {}

    def moved(match: re.Match[str]) -> str:
        file = match[1]
        if file not in places:
            places[file] = re.sub(r"^(<laurel .*) [0-9a-f]+>$", r"\1>", portable(f"{file}:0").removesuffix(":0"))
        return f'File "{places[file]}"'

    for node in _all_nodes(model):
        for key, text in node.metadata_props.items():
            if 'File "' in text:
                node.metadata_props[key] = re.sub(r'File "([^"\n]+)"', moved, text)


def _all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _fixed_symbols(program: torch.export.ExportedProgram) -> dict[str, int]:
    """Symbols that the model turned out to fix, by a loop over the sequence for instance; the exporter still calls them dynamic."""
    fixed: dict[str, int] = {}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        for size in value.shape if isinstance(value, Tensor) else ():
            if isinstance(size, torch.SymInt):
                replaced = size.node.shape_env.replacements
                fixed |= {str(symbol): int(number) for symbol, number in replaced.items() if number.is_number}
    return fixed


def _size(dim: Any, fixed: Mapping[str, int]) -> Any:
    """A dimension as a number where it is one; the exporter writes some numbers as symbols."""
    symbol = str(getattr(dim, "value", dim))
    return int(symbol) if symbol.isdigit() else fixed.get(symbol, dim)


def _values(model: ir.Model) -> list[ir.Value]:
    return [*model.graph.inputs, *model.graph.outputs, *(v for node in model.graph for v in node.outputs)]


def _fix_dimensions(model: ir.Model, fixed: Mapping[str, int]) -> None:
    """Call fixed dimensions by their size."""
    import onnx_ir as ir

    for value in _values(model):
        if value.shape is not None:
            value.shape = ir.Shape([_size(d, fixed) for d in value.shape])


def _symbols(model: ir.Model) -> dict[str, str]:
    """Names for the dynamic dimensions, batch and sequence, by the symbols that stand for them."""
    import onnx_ir as ir

    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for position, dim in enumerate(value.shape or ()):
            symbol = dim.value if isinstance(dim, ir.SymbolicDim) else None
            if symbol is not None and symbol not in names:
                wanted = "batch" if position == 0 else "sequence" if position == 1 else f"dim_{position}"
                taken = sum(name.split(".")[0] == wanted for name in names.values())
                names[symbol] = wanted if not taken else f"{wanted}.{taken}"
    return names


def _name_dimensions(model: ir.Model, names: Mapping[str, str]) -> None:
    """Call the dynamic dimensions by names instead of s77."""
    import onnx_ir as ir

    if not names:
        return
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")
    for value in _values(model):
        if value.shape is not None:
            value.shape = ir.Shape(
                [
                    ir.SymbolicDim(pattern.sub(lambda m: names[m.group()], d.value)) if isinstance(d, ir.SymbolicDim) and d.value else d
                    for d in value.shape
                ]
            )
