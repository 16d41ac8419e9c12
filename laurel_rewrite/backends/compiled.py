"""Connections in the graphs that `torch.compile` captures.

    model = laurel_rewrite.prepare(model, (x,), variant="rw+lr", rank=16)
    fast = torch.compile(model, backend=laurel_rewrite.compile_backend(model))

The connections are made once, in the model, where an optimiser finds their parameters; the model's code stays as it is. Each graph that
TorchDynamo captures gets them on its way to the compiler. What is not served so is never computed without them in silence: the code of a module with
sites begins with an op that only this back end takes out, and that raises wherever it runs.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from laurel_rewrite.backends.module.functions import BASE, made_quietly, without_fast_path
from laurel_rewrite.backends.module.surgery import PREPARED, attach, change_classes, copied, original_class, take_out
from laurel_rewrite.backends.proof import Proof, failure
from laurel_rewrite.backends.rewriting import found_and_planned, warn
from laurel_rewrite.detection.sites import Sites, sites_of_graph
from laurel_rewrite.errors import ConfigError, LaurelError, RewriteError, VerificationError
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.operators.prepared import prepare as scale_branches
from laurel_rewrite.operators.prepared import restore
from laurel_rewrite.operators.unserved import OP, marked
from laurel_rewrite.passes.insert_laurel import InsertLaurel
from laurel_rewrite.plan import Plan
from laurel_rewrite.plan.fitting import places_beside
from laurel_rewrite.private import compiled_call

_FRAME = 'File "'  # of a stack trace


@dataclass(frozen=True)
class Prepared:
    """What a model was prepared with.

    Attributes:
        plan: what each site has.
        known: ids of all sites of the model.
    """

    plan: Plan
    known: frozenset[str]


@dataclass(frozen=True)
class Marked:
    """By what a module with connections pickles: its class, whose forward begins with the mark, is made from this one, for its path alone."""

    base: type
    owner: str

    @property
    def cls(self) -> type:
        """The class; the same one each time."""
        return _marked(self.base, self.owner)


@functools.cache
def _marked(base: Any, owner: str) -> type:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = marked(self, owner, args, kwargs)
        return base.forward(self, *args, **kwargs)

    functools.update_wrapper(forward, base.forward)
    forward.__code__ = forward.__code__.replace()  # TorchDynamo keeps graphs, and counts them, by code: another block has its own
    return made_quietly(base.__name__, (base,), {"forward": forward, BASE: base, **without_fast_path(base)}, Marked(base, owner))


def prepare(
    model: nn.Module,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    plan: Plan | str | None = None,
    inplace: bool = False,
    verify: bool = True,
    **config: Any,
) -> nn.Module:
    """Give a model its connections, for `torch.compile` with `compile_backend`. Its code is not edited, so that its source need not be at hand.

    Names of parameters, start and numbers are those of `rewrite`, and so is what the arguments say. The model works where that back end compiles
    it; called in another way, it raises. What TorchDynamo made before is forgotten. Trained parameters go into what `rewrite` gives with the same plan, by `load_state_dict`.

    Args:
        model: not rewritten.
        args, kwargs: inputs of its forward, for the capture and the verification.
        config: variant, rank, include, rules, seed, ...: see `LaurelConfig`.
        plan: instead of that, a plan, or the path of one.
        verify: run it through the back end, with a compiler that changes nothing, in eval and in train mode, and compare.

    Returns:
        The model with connections as children of the sites' owners; a copy, but for `inplace`.

    Raises:
        ConfigError, NoSiteError, CaptureError: as `rewrite` does.
        VerificationError: the graphs that TorchDynamo makes of it have not all connections, or do not compute at the start what the model does. The
            model is as it was.
    """
    args, kwargs, sites, chosen = found_and_planned(model, args, kwargs, plan=plan, **config)
    chosen.check(sites)
    factors = chosen.factors(sites)
    original, proof = model, None
    if verify:
        with _compiling(original, "eager"):  # where torch.nn's fused kernels give way to its ops
            proof = Proof(original, args, kwargs, chosen.seed, regrouped=True)
    model = model if inplace else copied(model)
    attach(model, chosen)
    scale_branches(model, factors)
    object.__setattr__(model, PREPARED, Prepared(chosen, frozenset(site.module for site in sites)))
    owners = dict.fromkeys(row.owner for row in chosen.sites)
    change_classes(model, {owner: Marked(original_class(model.get_submodule(owner)), owner).cls for owner in owners})
    if proof is None:
        warn(sites, ())
        return model
    with _compiling(model, _Inserting(model)):
        evidence = proof.of(model, chosen, {})
    if evidence.failed:
        if inplace:
            restore(model, sites_of(model).values())
            take_out(model)
        for error in evidence.errors:  # of ours, TorchDynamo makes one of its own
            if isinstance(inner := getattr(error, "inner_exception", None), LaurelError):
                raise inner
        with _compiling(original, "eager"):
            steady = proof.steady(original, evidence)
        if not steady:
            raise failure(evidence, "")
        if inplace:
            raise VerificationError(
                f"{type(model).__name__} differs from itself from run to run, so that nothing could be verified. verify=False leaves that out."
            )
    warn(sites, evidence.checks)
    return model


@contextlib.contextmanager
def _compiling(model: nn.Module, backend: Any) -> Iterator[None]:
    """A model that is compiled when it is called, for a while."""
    try:
        with compiled_call(model, backend):
            yield
    finally:
        torch.compiler.reset()  # of one code TorchDynamo keeps eight graphs, and no more


def compile_backend(model: nn.Module, *, inner: str | Callable[..., Any] = "inductor", **options: Any) -> Callable[..., Any]:
    """A back end for `torch.compile` that puts the connections of a prepared model into its graphs, and compiles these.

    Args:
        model: what `prepare` returned, or a copy of it.
        inner: the back end that compiles the graphs.
        options: more for it, as `torch.compile` takes them: `mode`, `options`.

    Returns:
        What `torch.compile(model, backend=...)`, `model.compile(backend=...)` or, for operators without history, the same of its blocks take. It raises
        RewriteError where a graph has a site that the preparation did not see, where the graph breaks between the beginning of a module and its
        sums, and where a stream with a history is not in one graph.

    Raises:
        ConfigError: the model was not prepared.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> layer = nn.TransformerEncoderLayer(32, 4, batch_first=True)
        >>> ready = prepare(layer, (torch.randn(2, 5, 32),), variant="rw+lr", rank=4)
        >>> fast = torch.compile(ready, backend=compile_backend(ready, inner="aot_eager"))
        >>> fast(torch.randn(3, 7, 32)).shape
        torch.Size([3, 7, 32])
    """
    return _Inserting(model, lambda graph: torch.compile(graph, backend=inner, fullgraph=True, **options))


class _Inserting:
    """The back end.

    Args:
        model: a prepared one.
        compiled: what compiles a graph with connections; None leaves it as it is. It traces the graph once more, for compilers keep what they
            made by a graph's ops, and take two modules of one name in it for the same.
    """

    def __init__(self, model: nn.Module, compiled: Callable[[fx.GraphModule], Any] | None = None) -> None:
        record = vars(model).get(PREPARED)
        if not isinstance(record, Prepared):
            raise ConfigError(f"This {type(model).__name__} was not prepared: compile_backend takes what laurel_rewrite.prepare returned.")
        self.model, self.compiled = model, compiled
        self.plan, self.known = record.plan, record.known

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Any:
        graph = self._served(graph)
        return graph if self.compiled is None else self.compiled(graph)

    def _served(self, graph: fx.GraphModule) -> fx.GraphModule:
        """A graph with the connections of its sites."""
        begun = self._begun(graph)
        sites = sites_of_graph(graph, rooms=False)
        self._check_known(sites)
        present = {site.module for site in sites}
        rows = [row for row in self.plan.sites if row.id in present]
        for row in self.plan.sites:
            if row.owner in begun and row.id not in present:
                raise RewriteError(
                    f"{row.id} ({row.where}): the graph that TorchDynamo made has the beginning of {row.owner or 'the model'}, and not this sum: it breaks "
                    "between them. torch.compile(..., fullgraph=True) says where."
                )
        return self._inserted(graph, sites, rows) if rows else graph

    def _begun(self, graph: fx.GraphModule) -> set[str]:
        """Name the modules in a graph as they are named in the model, and take out the marks of modules with sites; returns these modules' paths."""
        paths = {str(id(module)): path for path, module in self.model.named_modules(remove_duplicate=False)}
        root = _root(graph, self.model)
        frame = {str(id(self.model.get_submodule(root))): (root, type(self.model.get_submodule(root)))}
        begun = set()
        for inner in [module for module in graph.modules() if isinstance(module, fx.GraphModule)]:
            for node in inner.graph.nodes:
                stack = node.meta.get("nn_module_stack") or {}
                node.meta["nn_module_stack"] = stack = {
                    key: (paths.get(key.partition("@")[0], path), cls) for key, (path, cls) in {**frame, **stack}.items()
                }
                if trace := node.meta.get("stack_trace"):
                    begin, *frames = trace.split(_FRAME)
                    kept = [frame for frame in frames if not frame.startswith(__file__)]
                    node.meta["stack_trace"] = _FRAME.join([begin, *kept]) if kept else ""
                if node.op == "call_function" and node.target is OP:
                    begun.add(str(node.args[1]))
                    node.replace_all_uses_with(node.args[0])
                    inner.graph.erase_node(node)
            inner.recompile()
        return begun

    def _check_known(self, sites: Sites) -> None:
        for site in sites:
            if site.module not in self.known:
                raise RewriteError(
                    f"{site.id} ({site.where}) is a residual connection that was not there when the model was prepared. Prepare it with inputs that "
                    "run this code, too, or compile it with fullgraph=True where the graph breaks."
                )

    def _inserted(self, graph: fx.GraphModule, sites: Sites, rows: Sequence[Any]) -> fx.GraphModule:
        calls = Counter(site.module for site in sites)
        first = {site.module: site for site in reversed(list(sites))}
        placed = []
        for row in rows:
            site = first[row.id]
            beside = places_beside(sites, site, row.operator, calls[row.id])
            placed.append(replace(row, stream=site.stream, index=site.index, calls=calls[row.id], **beside))
        plan = replace(self.plan, sites=tuple(placed))
        connections: dict[str, Any] = {row.id: self.model.get_submodule(row.id) for row in rows}
        self._check_streams(plan, connections)
        return InsertLaurel(plan, connections, rooms=False)(graph).graph_module

    def _check_streams(self, plan: Plan, connections: Mapping[str, Any]) -> None:
        """A stream with a history is whole, and each of its connections stands as it was made to."""
        streams = {row.id: row.stream for row in plan.sites}
        for rows in self.plan.streams():
            here = [row for row in rows if row.id in streams]
            if not here or not self.plan.has_history(rows[0].stream):
                continue
            missing = next((row for row in rows if row.id not in streams), None)
            if missing is not None or len({streams[row.id] for row in rows}) > 1:
                other = missing or rows[-1]
                raise RewriteError(
                    f"{here[0].id}: {here[0].variant} reads the states of its whole stream, and {other.id} ({other.where}) is not in the same graph: "
                    "it breaks between them. Compile the whole model with fullgraph=True, or use an operator without history."
                )
        for row in plan.sites:
            made, found = connections[row.id].config, plan.config(row)
            facts = ("linked", "fed", "separate", "last") if plan.has_history(row.stream) else ()
            if any(getattr(made, fact) != getattr(found, fact) for fact in facts):
                raise RewriteError(f"{row.id} ({row.where}): what stands around it in the graph is not what it was prepared for.")


def _root(graph: fx.GraphModule, model: nn.Module) -> str:
    """Path of the module whose forward a graph was captured from, as the parameters that it reads say: their paths, less the modules that their
    names in the graph go through. "" where it reads none."""
    paths = {id(parameter): path for path, parameter in model.named_parameters(remove_duplicate=False)}
    for node in graph.graph.nodes:
        given: Any = node.meta.get("grapharg") if node.op == "placeholder" else None
        path = paths.get(id(given.example)) if given is not None and isinstance(given.example, nn.Parameter) else None
        if path is not None:
            steps = str(given.source.name).count("._modules[")
            return ".".join(path.split(".")[: -1 - steps])
    return ""
