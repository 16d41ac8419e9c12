"""The ONNX back end: put LAuReL into a graph that anyone's exporter wrote."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import torch
from onnx_ir import tensor_adapters

from laurel_rewrite import __version__, targets
from laurel_rewrite.backends import Applied, BackEnd
from laurel_rewrite.backends.onnx.sums import SumRewriter
from laurel_rewrite.detection.site import Site
from laurel_rewrite.detection.sites import read_onnx_sites
from laurel_rewrite.errors import CaptureError, ConfigError, ExportError, RewriteError, nearest
from laurel_rewrite.files.onnx import external, read_onnx
from laurel_rewrite.graph.capture import quiet
from laurel_rewrite.graph.from_onnx import METADATA, OnnxFlow
from laurel_rewrite.graph.ops.onnx import SPLIT_LAYOUT
from laurel_rewrite.graph.shapes import twice_named
from laurel_rewrite.lowering import lower
from laurel_rewrite.operators.onnx_function import DOMAIN, IR_VERSION, MADE_IN, Call, step_function
from laurel_rewrite.operators.plain import Plain
from laurel_rewrite.operators.protocol import Connection
from laurel_rewrite.passes.algebra import scaled
from laurel_rewrite.passes.insert_laurel_onnx import Feed, InsertLaurelOnnx
from laurel_rewrite.plan import Plan, PlanSite, asked_for, planned
from laurel_rewrite.verification.checks import require
from laurel_rewrite.verification.onnx import check_rewrite

FUNCTIONS = ("keep", "inline")
_NODE = f"{METADATA}node"
_LAUREL_KEY = re.compile(r"(^|\.)laurel_\d+(\.\d+)?\.")


def rewrite_onnx(
    model: ir.Model | str | PathLike[str],
    *,
    plan: Plan | str | None = None,
    weights: Path | str | None = None,
    target: str = targets.PORTABLE,
    functions: str = "keep",
    verify: bool = True,
    **options: Any,
) -> ir.Model:
    """Replace the residual connections of an ONNX graph by LAuReL. At the start it computes what it computed, which onnxruntime is asked to show.

    Args:
        model: a model, or the path of a file; it stays as it is, and its external weights are not read.
        plan: instead of the options, a plan, or the path of one.
        weights: a safetensors file with trained LAuReL parameters, instead of the start.
        target: see `laurel_rewrite.targets`.
        functions: of a portable graph: "keep" LAuReL's functions, or "inline" them into ordinary nodes.
        verify: whether to compare both at the start, on inputs that are drawn; where that cannot be done here, a warning is logged.
        options: variant, rank, ...: see `LaurelConfig`.

    Returns:
        A new model; `write_onnx` writes it. Inputs and outputs are as they were.

    Raises:
        ConfigError, NoSiteError, CaptureError, RewriteError, ExportError: see `GraphRewrite`.
        VerificationError: the start is another function; the message names the first site.
    """
    chosen = check_form(target, functions)
    rewrite = GraphRewrite(model if isinstance(model, ir.Model) else read_onnx(Path(model)))
    rewrite.apply(planned(rewrite.sites, asked_for(plan, **options)))
    if verify:
        given = model if isinstance(model, ir.Model) else Path(model)
        require(check_rewrite(given, rewrite.exact_start(), rewrite.values, exact=rewrite.exact))
    if weights is not None:
        rewrite.load(Path(weights))
    if chosen.lowers:
        lower(rewrite.model, target=target, verify=verify)
    elif chosen.writes_nodes or functions == "inline":
        inline_laurel(rewrite.model)
    return rewrite.model


def check_form(target: str, functions: str) -> targets.Target:
    """The target of a name; ConfigError unless this is one, and the other a word for functions."""
    chosen = targets.target(target)
    if functions not in FUNCTIONS:
        raise ConfigError(f"functions must be one of {', '.join(FUNCTIONS)}, not {functions!r}.")
    return chosen


class GraphRewrite(BackEnd):
    """One ONNX model on its way: detected, and then rewritten. The model that is given stays as it was.

    Args:
        model: the graph.
        feeds: inputs that it runs with, by name, for sizes that cannot be inferred; else they are drawn where they are needed.
        plain: put plain sums in the places of operators whose start is declared to be another function.

    Attributes:
        model: a copy with local functions inlined and shapes inferred, into which the plan is carried out.
        sites: its residual connections.
        notes: what was done beside the insertion, in sentences for the user.
        exact: whether at the start every sum adds the same operands in the same order as before.
        values: the site of each value that is a sum of one, by the value's name, in order.
        connections: what was put at each site.

    Raises:
        ConfigError: the model was rewritten already.
        CaptureError: the graph cannot be read, or its tensors are laid out for one machine.
    """

    def __init__(self, model: ir.Model, feeds: Mapping[str, np.ndarray] | None = None, *, plain: bool = False) -> None:
        self.plain = plain
        if any(node.domain == DOMAIN or f"{METADATA}site" in node.metadata_props for node in model.graph.all_nodes()):
            raise ConfigError("The graph was rewritten already: it has LAuReL nodes. Give the file that it was made from.")
        if SPLIT_LAYOUT in {node.domain for node in model.graph.all_nodes()}:
            raise CaptureError(
                f"The graph was optimised by onnxruntime for one machine ({SPLIT_LAYOUT}, channels in blocks). Give the file before that."
            )
        self.notes = [f"{len(model.functions)} local functions were inlined."] if model.functions else []
        self.exact = True
        self.given = model
        self.values: dict[str, str] = {}
        self.connections: dict[str, Connection] = {}
        try:
            copy = model.clone()
        except Exception as error:  # onnx-ir's
            raise CaptureError(f"The graph could not be copied; are its nodes in topological order? {error.__cause__ or error}") from error
        again = len(twice_named(copy))
        self.notes += [f"{again} nodes had the name of another one, and got names of their own."] if again else []
        self._feeds = feeds
        self._read_sites(copy)
        self.notes += [undecided] if (undecided := self.sites.undecided()) else []

    def _read_sites(self, model: ir.Model) -> None:
        self._read: OnnxFlow
        self.sites, self._read, self.model = read_onnx_sites(model, self._feeds)

    def again(self) -> GraphRewrite:
        """The same model before its rewrite."""
        return GraphRewrite(self.given, self._feeds, plain=self.plain)

    def check(self, plan: Plan) -> None:
        plan.check(self.sites)

    def apply(self, plan: Plan, *, split: bool = False) -> Applied:
        """Insert the LAuReL nodes of a plan, at their start. What that computes, others verify (`laurel_rewrite.backends.onnx.proof`).

        Args:
            plan: for these sites.
            split: take products that add something apart at the sites, so that each LAuReL node computes a whole sum.

        Raises:
            ConfigError: the plan does not fit the graph.
            RewriteError: a sum cannot be replaced.
            ExportError: the graph's opset must be raised, and cannot be.
        """
        self.check(plan)
        connections = self.connections = {row.id: self._connection(plan, row) for row in plan.sites}
        if self.model.opset_imports.get("", 0) < MADE_IN or self.model.ir_version < IR_VERSION:
            self._raise_versions(self._opset(plan, connections))
        rewriter = SumRewriter(self._read.sums, split=split)
        values, rows = dict(self._read.onnx), {row.id: row for row in plan.sites}
        for site in self.sites:  # several may be calls of one connection
            if site.module not in rows:
                continue
            row, before = rows[site.module], plan.before(rows[site.module])
            residual, connection = self.sites.bindings[site.id].residual, connections[row.id]
            reads = values[self.sites.read_by(site)] if connection.needs_input else None
            feeds = self._read_apart(site, values) if connection.config.fed else ()
            rewriter.site(row.id, residual, connection, before.id if before is not None else "", reads, feeds)
            if connection.config.linked:
                end = self.sites.named(row.behind, site)
                values[end] = rewriter.at_end(row.id, connection, values[end])
        self.plan, self.exact, self.values = plan, rewriter.exact, rewriter.values
        InsertLaurelOnnx(rewriter.sites, __version__)(self.model)
        for name, weights in plan.factors(self.sites).items():
            for weight, factor in weights.items() if not isinstance(connections[name], Plain) else ():
                value = self.model.graph.initializers[weight]
                assert value.const_value is not None
                value.const_value = scaled(value.const_value, factor)
        return Applied(self.model, plan)

    def _read_apart(self, site: Site, values: Mapping[int, ir.Value]) -> tuple[Feed, ...]:
        """q, k and v of a branch, which read what the connection before it leaves for each."""
        sites, before = self.sites, self.sites.after(site, -1)
        assert before is not None
        spot = sites.spots[site.id]
        start = sites.named(spot.link_end, site) if spot.link_end else sites.bindings[before.id].residual.output
        made = [values.get(index) for index in (start, *sites.way_in(site, start))]
        norm = tuple(dict.fromkeys(node for value in made[1:] if value is not None and (node := value.producer()) is not None))
        if None in made:
            raise RewriteError(f"{site.id}: a fused node hides what its branch reads. Give the graph from before it was optimised.")
        read = values[sites.read_by(site)]
        readers = [values[sites.named(name, site)].producer() for name in spot.projected]
        return tuple(Feed(reader, read, norm, values[start]) for reader in readers if reader is not None)

    def _connection(self, plan: Plan, row: PlanSite) -> Connection:
        """The connection of a site, of the type of its stream; one that stands in for another start adds plainly."""
        values = self._read.onnx
        residual = self.sites.bindings[row.id].residual
        stream = values.get(residual.skip) or values[residual.branches[0]]  # one of them may lie inside a fused node
        dtype = tensor_adapters.to_torch_dtype(stream.dtype or ir.DataType.FLOAT)
        connection = plan.build(row, torch.empty(0, dtype=dtype))
        return Plain.like(connection) if self.plain and connection.start_of(connection.config) != "exact" else connection

    def _opset(self, plan: Plan, connections: Mapping[str, Connection]) -> int:
        """The first opset that has the operators of a plan's functions."""
        needed, left = 1, dict.fromkeys(("", *connections), 0)
        for row in plan.sites:
            before, connection = plan.before(row), connections[row.id]
            states = left[before.id if before is not None else ""]
            step = step_function(connection, Call(connection.config, states=states, reads=connection.needs_input), torch.float32)
            needed = max(needed, step.opset)
            if connection.config.linked:
                step = step_function(connection, Call(connection.config, "read", 0, len(step.handed_on)), torch.float32)
                needed = max(needed, step.opset)
            left[row.id] = len(step.handed_on)
        return needed

    def exact_start(self) -> ir.Model:
        """The model; where a start is declared to be another function, the same with plain sums there, which shows what the insertion does."""
        if all(row.operator.start_of(self.plan.config(row)) == "exact" for row in self.plan.sites):
            return self.model
        twin = GraphRewrite(self.given, self._feeds, plain=True)
        twin.apply(self.plan)
        return twin.model

    def _raise_versions(self, opset: int) -> None:
        """What LAuReL's functions need, and no more."""
        had = self.model.opset_imports.get("", 0)
        if had < opset:
            from onnxscript import version_converter

            try:
                with quiet():
                    converted = version_converter.ConvertVersionPass(opset, fallback=True)(self.model.clone()).model
            except Exception as error:  # the converter's exceptions share no base class
                raise ExportError(f"The graph's opset {had} could not be raised to {opset}: {str(error)[:300]}") from error
            if converted.opset_imports.get("", 0) < opset:
                raise ExportError(f"onnx's version converter cannot raise this graph from opset {had} to {opset}.")
            self.notes.append(f"The opset was raised from {had} to {opset} by onnx's version converter.")
            ids = [site.id for site in self.sites]
            self._read_sites(converted)
            if ids != [site.id for site in self.sites]:
                raise ExportError(f"Raising the graph from opset {had} to {opset} changed its residual connections.")
        if self.model.ir_version < IR_VERSION:
            if self.model.ir_version < 4:  # where an initializer was an input too, and no caller could set it
                inputs = self.model.graph.inputs
                inputs[:] = [value for value in inputs if value.name not in self.model.graph.initializers]
            self.notes.append(f"The IR version was raised from {self.model.ir_version} to {IR_VERSION}, for functions and metadata.")
            self.model.ir_version = IR_VERSION

    def load(self, weights: Path) -> None:
        """Put trained LAuReL parameters in the place of the start.

        Args:
            weights: a safetensors file with `site.mix`, `site.down.weight` and so on, as `save` writes it; its other tensors are ignored.

        Raises:
            ConfigError: the file cannot be read, lacks a parameter, has one for another site, or of another shape.
        """
        from safetensors import safe_open

        initializers = self.model.graph.initializers
        wanted = {f"{site}.{name}": value for site, module in self.connections.items() for name, value in module.state_dict().items()}
        try:
            with safe_open(str(weights), "pt") as file:
                given = {key for key in file.keys() if _LAUREL_KEY.search(key)}  # noqa: SIM118  # not a dict
                _check_keys(weights, set(wanted), given)
                for name, old in sorted(wanted.items(), key=lambda item: item[0]):
                    tensor = file.get_tensor(name)
                    if tuple(tensor.shape) != tuple(old.shape):
                        raise ConfigError(
                            f"{weights}: {name} is of shape {list(tensor.shape)}, and the plan gives it {list(old.shape)}. "
                            "Was it trained with another rank?"
                        )
                    value = tensor.to(old.dtype).contiguous()
                    if name in initializers:  # a parameter that nothing reads there is in no graph
                        initializers[name].const_value = tensor_adapters.TorchTensor(value, name=name)
        except ConfigError:
            raise
        except Exception as error:  # safetensors' and the file system's
            raise ConfigError(f"{weights} could not be read as safetensors: {type(error).__name__}: {error}") from error


def inline_laurel(model: ir.Model) -> None:
    """Write LAuReL's functions out as ordinary nodes in place; their names begin with the name of the node they come from."""
    for node in model.graph.all_nodes():
        if node.domain == DOMAIN:
            node.metadata_props[_NODE] = node.name or ""
    common.InlinePass()(model)
    for node in model.graph.all_nodes():
        call = node.metadata_props.pop(_NODE, None)
        if call is not None:
            node.name = f"{call}/{node.name}"
    model.opset_imports.pop(DOMAIN, None)


@contextlib.contextmanager
def away_from_start(path: Path, seed: int = 0, *, inline: bool = False) -> Iterator[Path]:
    """A copy of a file whose LAuReL parameters are random where they are at their start; the file itself where there is nothing to do.

    What is 0 or 1 at the start could be lost or swapped unseen, and a runtime deletes it. Where the model has external weights, the copy
    lies beside it for a while, for it refers to them.

    Args:
        path: of the file.
        seed: of the numbers.
        inline: write LAuReL's functions out as ordinary nodes, as every runtime does.
    """
    model = ir.load(path)
    generator = np.random.default_rng(seed)
    drawn: dict[str, ir.TensorProtocol] = {}
    for name in _laurel_names(model):
        tensor = model.graph.initializers[name].const_value
        array = tensor.numpy() if tensor is not None else np.ones(1)
        if np.issubdtype(array.dtype, np.floating) and (not array.any() or (array.size > 1 and (array == 1).all())):
            noise = generator.standard_normal(array.shape) * (0.25 if array.ndim == 1 else 0.1)
            drawn[name] = ir.tensor((array + noise).astype(array.dtype), name=name)
    inline = inline and any(node.domain == DOMAIN for node in model.graph.all_nodes())
    if not drawn and not inline:
        yield path
        return
    for name, tensor in drawn.items():
        model.graph.initializers[name].const_value = tensor
    if inline:
        inline_laurel(model)
    with tempfile.TemporaryDirectory(prefix="laurel-") as scratch:
        # Beside a draft's file, with the draft's name first, so that it is removed with the draft whatever happens.
        prefix = path.name[: len(".laurel-") + 8] + "-" if path.name.startswith(".laurel-") else ".laurel-"
        handle, file = tempfile.mkstemp(prefix=prefix, suffix=".onnx", dir=path.parent if external(model) else scratch)
        os.close(handle)
        try:
            ir.save(model, file)
            yield Path(file)
        finally:
            Path(file).unlink(missing_ok=True)


def _laurel_names(model: ir.Model) -> list[str]:
    """The initializers that are parameters of connections."""
    found: dict[str, None] = {}
    for node in model.graph.all_nodes():
        site = node.metadata_props.get(f"{METADATA}site")
        for value in node.inputs if site else ():
            if value is not None and value.is_initializer() and str(value.name).startswith(f"{site}."):
                found[str(value.name)] = None
    return [*found]


def _check_keys(weights: Path, wanted: set[str], given: set[str]) -> None:
    missing, foreign = sorted(wanted - given), sorted(given - wanted)
    if missing:
        raise ConfigError(
            f"{weights} lacks {len(missing)} of {len(wanted)} LAuReL parameters, the first {missing[0]!r}. {nearest(missing[0], given)}"
        )
    if foreign:
        raise ConfigError(
            f"{weights} has {len(foreign)} LAuReL parameters that this plan has not, the first {foreign[0]!r}. "
            "Give the plan that it was trained with (--plan)."
        )
