"""From a live module to graphs that can be analysed, with the exact source position of every add.

One graph is trusted where a run in the other mode (train, eval) adds nothing that it lacks; `capture` says how it goes on elsewhere.
The graphs are only looked at. What they cannot do (switch train and eval, keep classes, pickle) nobody asks of them.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx.traceback
import torch.utils.checkpoint
from torch import fx, nn

from laurel_rewrite.errors import CaptureError
from laurel_rewrite.graph import concrete
from laurel_rewrite.graph.recording import Call, Recorder, Span
from laurel_rewrite.graph.snapshot import fits_twice, preserved
from laurel_rewrite.private import FakeTensorMode, forget_compiled_scripts, pytree, reparametrized

__all__ = ["Call", "Capture", "Span", "capture", "describe", "parameters_of", "quiet", "training", "without_caches"]

Sums = Counter[tuple[str, tuple[Span, ...]]]
_SLICE = re.compile(r"slice\((?P<bounds>[^)]*)\)|[^.]+")


@dataclass
class Capture:
    """A graph of a model, and the calls recorded while it was made; nodes refer to them by `meta["custom"]["laurel_call"]`.

    Attributes:
        graph: with shapes, source lines and module stacks in its nodes' metadata.
        parameters: of the placeholders that hold parameters, buffers and constants, the names of parameters in the model; "" for others.
        train: in which mode it was made.
        by_values: it was made in one run on concrete values.
        sums: see `Recorder`.
    """

    graph: fx.Graph
    parameters: Mapping[str, str]
    train: bool
    by_values: bool = False
    calls: list[Call] = field(default_factory=list)
    sums: Sums = field(default_factory=Counter)


def capture(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> tuple[list[Capture], list[str]]:
    """Capture a model, and record where each add stands. The model, its inputs and all random states are left as they were.

    The first way that works is taken: `torch.export` in train mode, then in eval mode (where dropouts are missing and the sums are the
    same), then one run on concrete values, which knows no data-dependent branch, then the same without gradients. A model on the meta
    device, or one that does not fit into memory twice, cannot be run so.

    Then the model runs in the other mode on fake tensors, without a graph, and its adds are counted. Where one stands that the capture
    lacks, or is run more often (a layer that train mode drops at random, a branch on `self.training`), that mode is captured too. Where
    sizes of a graph depend on values, the model is captured on concrete values, which have sizes.

    Args:
        model: on any device, meta included; in train or eval mode.
        args, kwargs: inputs of its forward, on its device.
        dynamic_shapes: as `torch.export.export` takes them. None exports with the sizes of the inputs, which is all that detection
            needs.

    Returns:
        One or two captures, and sentences for the user about what could not be seen.

    Raises:
        CaptureError: the model cannot be called with these inputs, or can be captured in no way.
    """
    return _Captor(model, tuple(args), dict(kwargs or {}), dynamic_shapes).capture()


class _Captor:
    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> None:
        self.model = model
        self.args = args
        self.kwargs = kwargs
        self.dynamic_shapes = dynamic_shapes
        self.failed: dict[tuple[str, bool], BaseException] = {}  # way and mode -> why
        self.notes: list[str] = []

    def capture(self) -> tuple[list[Capture], list[str]]:
        first = self._try("export", True) or self._try("export", False)
        if first is None:
            first = self._try("run", True) or self._try("run", False)
        if first is None:
            with torch.no_grad():  # some kernels have no backward
                self.failed, failed = {}, self.failed
                first = self._try("export", False) or self._try("run", False)
                self.failed = failed | self.failed if first is None else failed
        if first is None:
            raise CaptureError(self._explain()) from next(iter(self.failed.values()))
        if first.by_values:
            why = _reason(self.failed.get(("export", first.train)) or next(iter(self.failed.values())))
            self.notes.append(
                "The model was captured in one run on these inputs, because torch.export could not; additions in branches that this run did "
                f"not take were not seen ({why})."
            )
        if _has_sizes_by_value(first.graph):
            first = self._try("run", first.train) or first
        other = self._other(first)
        return [first] if other is None else [first, other], self.notes

    def _other(self, first: Capture) -> Capture | None:
        """The other mode, where it adds what the first capture lacks."""
        train = not first.train
        mode = "train" if train else "eval"
        sums = self._rehearse(train)
        if sums is None:
            self.notes.append(f"What {mode} mode adds is not known: {_reason(self.failed['rehearsal', train])}.")
            return None
        if not sums - first.sums:
            return None
        other = self._try("export", train) or self._try("run", train)
        if other is None:
            places = ", ".join(sorted({f"{owner or 'the model'} ({steps[-1].line})" for owner, steps in sums - first.sums})[:4])
            self.notes.append(f"Additions that only {mode} mode runs could not be captured: {places}.")
        return other

    def _try(self, way: str, train: bool) -> Capture | None:
        """One capture; None where it fails, or failed before."""
        if (way, train) in self.failed:
            return None
        recorder = Recorder(self.model)
        try:
            with self._prepared(train, values=way == "run"):
                if way == "run":
                    module, parameters = concrete.trace(self.model, self.args, self.kwargs, recorder)
                    graph = module.graph
                else:
                    graph, parameters = self._export(recorder)
        except (Exception, SystemExit) as error:  # whatever the user's code raises, and torch
            self.failed[way, train] = error
            return None
        return Capture(graph, parameters, train, way == "run", recorder.calls, recorder.sums)

    def _export(self, recorder: Recorder) -> tuple[fx.Graph, dict[str, str]]:
        with torch.fx.traceback.preserve_node_meta(), recorder:
            program = torch.export.export(self.model, self.args, self.kwargs, dynamic_shapes=self.dynamic_shapes, strict=False)
        for node in program.graph.nodes:
            stack = node.meta.get("nn_module_stack") or {}
            for key, (path, cls) in stack.items():
                if "slice(" in path:
                    stack[key] = (_real_path(self.model, path), cls)
        return program.graph, parameters_of(program)

    def _rehearse(self, train: bool) -> Sums | None:
        """What a run in this mode adds, without a graph: on fake tensors, or where values decide, on real ones."""
        for real in (False, True):
            recorder = Recorder(self.model)
            try:
                with self._prepared(train, values=real), contextlib.nullcontext(self) if real else self._fake() as stage, recorder:
                    self.model(*stage.args, **stage.kwargs)
            except (Exception, SystemExit) as error:
                self.failed["rehearsal", train] = error
            else:
                return recorder.sums
        return None

    @contextlib.contextmanager
    def _fake(self) -> Iterator[_Captor]:
        """Fake tensors stand in for the model's tensors and for the inputs."""
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            args, kwargs, state = pytree.tree_map_only(
                torch.Tensor,
                fake.from_tensor,
                (self.args, self.kwargs, dict((*self.model.named_parameters(), *self.model.named_buffers()))),
            )
            with reparametrized(self.model, state, tie_weights=True):
                yield _Captor(self.model, args, kwargs, None)

    @contextlib.contextmanager
    def _prepared(self, train: bool, *, values: bool) -> Iterator[None]:
        """In one mode, quietly, with everything put back. With `values`, the model is to run."""
        if values:
            if any(p.is_meta for p in (*self.model.parameters(), *self.model.buffers())):
                raise CaptureError("a model on the meta device has no values to run with")
            if not fits_twice(self.model):
                raise CaptureError("the model does not fit into memory twice, and so cannot be run and put back")
        with (
            preserved(self.model, self.args, self.kwargs, values=values),
            training(self.model, train),
            without_caches(self.model),
            plain_checkpoints(),
            _unoptimised_scripts(self.model),
            quiet(),
        ):
            yield

    def _explain(self) -> str:
        inputs = [describe(a) for a in self.args] + [f"{k}={describe(v)}" for k, v in self.kwargs.items()]
        first = next(iter(self.failed.values()))
        run = self.failed.get(("run", False), first)
        name = type(self.model).__name__
        text = f"{name} could not be captured with the inputs ({', '.join(inputs)}): "
        if isinstance(run, CaptureError):
            return f"{text}{_reason(first)}. One run on concrete values could go on where torch.export stops, but {run}."
        problem = self._call_plainly()
        if problem is not None:
            return f"{text}{_reason(problem)}. The model cannot be called with these inputs, in train mode or in eval mode."
        return (
            f"{text}{_reason(first)}. The model itself runs with these inputs; the trace of such a run failed too: {_reason(run)}. "
            "Leave out what cannot be traced (a compiled or scripted part, a custom kernel), or pass a graph: a .pt2 or .onnx file."
        )

    def _call_plainly(self) -> BaseException | None:
        """Why the model cannot be called, None where it can."""
        problem: BaseException | None = None
        for train in (True, False):
            try:
                with self._prepared(train, values=True), torch.no_grad():
                    self.model(*self.args, **self.kwargs)
            except (Exception, SystemExit) as error:
                problem = problem or error
            else:
                return None
        return problem


def parameters_of(program: torch.export.ExportedProgram) -> dict[str, str]:
    """The placeholders that hold parameters, buffers and constants rather than data, with the names of parameters in the model."""
    given = (spec for spec in program.graph_signature.input_specs if spec.kind.name != "USER_INPUT")
    return {spec.arg.name: (spec.target or "") if spec.kind.name == "PARAMETER" else "" for spec in given}


def _has_sizes_by_value(graph: fx.Graph) -> bool:
    """Whether a size depends on the values of tensors."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    values = (node.meta.get("val") for node in graph.nodes)
    return any(isinstance(value, torch.Tensor) and free_unbacked_symbols(value.shape) for value in values)


def _real_path(model: nn.Module, path: str) -> str:
    """The path of a module that was reached through a slice of a container, which an export writes as `layers.slice(1, None, None).0`."""
    module, names, chosen = model, [], None
    for part in _SLICE.finditer(path):
        if part["bounds"] is not None:
            bounds = [None if b.strip() == "None" else int(b) for b in part["bounds"].split(",")]
            chosen = (chosen or list(module._modules))[slice(*bounds)]
            continue
        name = part[0]
        if chosen is not None and not isinstance(module, nn.Sequential):  # a slice of a list counts anew
            name = chosen[int(name)]
        chosen = None
        names.append(name)
        module = module.get_submodule(name)
    return ".".join(names)


def _reason(error: BaseException) -> str:
    text = str(error).strip()
    first = text.splitlines()[0].rstrip(".")[:400] if text else ""
    return first if isinstance(error, CaptureError) else f"{type(error).__name__}: {first}"


def describe(value: Any) -> str:
    """A short word for an input: dtype and shape of a tensor, else its type."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return repr(value) if isinstance(value, int | float | bool | str | None) else type(value).__name__


@contextlib.contextmanager
def training(model: nn.Module, mode: bool) -> Iterator[None]:
    """Every module in train or eval mode for a while, each put back as it was."""
    before = [(module, module.training) for module in model.modules()]
    try:
        with contextlib.suppress(NotImplementedError):  # an exported graph has one mode
            model.train(mode)
        yield
    finally:
        for module, was in before:
            module.training = was


def _unoptimised_scripts(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Scripted functions and modules op by op. What has run before, TorchScript differentiates by itself, behind a detach that no code of the
    model's has; what it compiled is forgotten, and compiled again when it runs next."""
    forget_compiled_scripts(model)
    off: contextlib.AbstractContextManager[None] = torch.jit.optimized_execution(False)  # type: ignore[attr-defined]  # public, not in __all__
    return off


@contextlib.contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """`use_cache` off in every configuration that the model's modules hold: an export refuses the cache objects."""
    changed: list[Any] = []
    seen: set[int] = set()
    stack: list[Any] = [vars(module).get("config") for module in model.modules()]
    while stack:
        config = stack.pop()
        if config is None or id(config) in seen or not hasattr(config, "__dict__") or isinstance(config, nn.Module):
            continue
        seen.add(id(config))
        if getattr(config, "use_cache", None) is True:
            config.use_cache = False
            changed.append(config)
        stack.extend(v for k, v in vars(config).items() if k.endswith("config"))
    try:
        yield
    finally:
        for config in changed:
            config.use_cache = True


class _PlainCheckpoint:
    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


@contextlib.contextmanager
def plain_checkpoints() -> Iterator[None]:
    """Reentrant activation checkpoints call their function as it is. They run it under no_grad, and again in backward, so that in a graph of
    the forward pass their blocks would look like code that is never trained."""
    checkpoint: Any = torch.utils.checkpoint
    before, checkpoint.CheckpointFunction = checkpoint.CheckpointFunction, _PlainCheckpoint
    try:
        yield
    finally:
        checkpoint.CheckpointFunction = before


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what exporting other people's models prints, logs and warns of: where it fails, the exception says why."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)
