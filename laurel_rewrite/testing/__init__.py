"""What every residual operator must hold, tried on one: `check_operator(MyOperator)`.

A stack of blocks gets the operator at all of its sites, its parameters are moved off their start, and what the model then computes through
every back end is held against the operator's own `connect`, called by hand (`laurel_rewrite.testing.stacks`).
"""

from __future__ import annotations

import copy
import io
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from laurel_rewrite import targets
from laurel_rewrite.backends.module.saving import load, save
from laurel_rewrite.backends.module.surgery import remove
from laurel_rewrite.backends.onnx.surgery import rewrite_onnx
from laurel_rewrite.backends.rewriting import rewrite
from laurel_rewrite.errors import LaurelError
from laurel_rewrite.exporting import export_onnx
from laurel_rewrite.files.onnx import write_onnx
from laurel_rewrite.graph.capture import quiet
from laurel_rewrite.operators.annealing import Annealing
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.operators.protocol import Connection
from laurel_rewrite.operators.registry import operators, register_operator
from laurel_rewrite.operators.state import FED
from laurel_rewrite.testing.stacks import D, Stack, by_hand, stacks_for
from laurel_rewrite.verification.onnx_runs import run_onnx

_EXACT = 1e-10  # of float64 against the loop, relative to the largest element
_ONNX = 1e-5  # of onnxruntime in float32 against PyTorch, likewise
_SCALE_FREE = 1e-3  # of a start that is exact for readers without a scale: epsilons
_GRAPHS = 5  # that equal blocks may be compiled into: the first, the last, and those around a change on the way


@dataclass(frozen=True)
class Outcome:
    """What one law of `check_operator` came to."""

    law: str
    passed: bool
    detail: str

    def __str__(self) -> str:
        return f"{'ok    ' if self.passed else 'FAILED'} {self.law}: {self.detail}"


def check_operator(operator: type[Connection] | str, options: Mapping[str, Any] | None = None, *, seed: int = 0) -> list[Outcome]:
    """Hold an operator to the laws of `laurel_rewrite.operators.protocol.Connection`, in every back end.

    Args:
        operator: the class, or the name of a registered one.
        options: of the operator, where they are not its defaults.
        seed: of inputs and weights.

    Returns:
        What each law came to.

    Raises:
        AssertionError: laws that it breaks, all of them.
        ConfigError: what it declares cannot be.
    """
    if not isinstance(operator, str):
        known = {entry.connection: name for name, entry in operators().items()}
        if operator not in known:
            register_operator(operator)
        operator = known.get(operator, operator.name)
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stacks = stacks_for(operators()[operator]).items()
        outcomes = [outcome for place, stack in stacks for outcome in _Trial(operator, dict(options or {}), stack, place).outcomes()]
    failed = [outcome for outcome in outcomes if not outcome.passed]
    if failed:
        raise AssertionError(f"{operator} breaks {len(failed)} of {len(outcomes)} laws:\n" + "\n".join(map(str, failed)))
    return outcomes


class _Trial:
    def __init__(self, name: str, options: dict[str, Any], stack: type[Stack], place: str) -> None:
        self.stack, self.place = stack, place
        self.options: dict[str, Any] = {"variant": name, **options}
        self.operator = operators()[name]
        if "rank" in self.operator.options:
            self.options.setdefault("rank", 4)
        self.x = torch.randn(2, 5, D)
        self.other = torch.randn(3, 4, D, dtype=torch.float64)
        self.base = stack().eval()
        self.started: Any = rewrite(self.base, (self.x,), **self.options)
        self.model: Any = moved(copy.deepcopy(self.started)).eval()
        self.wide: Any = copy.deepcopy(self.model).double()

    def outcomes(self) -> list[Outcome]:
        laws = [getattr(self, name) for name in dir(type(self)) if name.startswith("law_")]
        return [self._tried(law) for law in laws]

    def _tried(self, law: Callable[[], str]) -> Outcome:
        words = f"{law.__name__.removeprefix('law_').replace('_', ' ')} {self.place}".strip()
        try:
            return Outcome(words, True, law())
        except Exception as error:  # whatever an operator raises
            return Outcome(words, False, f"{type(error).__name__}: {str(error)[:600]}")

    # The step itself

    def law_each_parameter_is_a_tensor_of_its_own(self) -> str:
        """Files of weights refuse parts of larger ones."""
        for name, value in self.started.state_dict().items():  # a copy of the model would have made them whole
            whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
            assert whole, f"{name} is a part of a larger tensor: clone it"
        return ""

    def law_a_step_leaves_its_arguments_and_keeps_shape_and_type(self) -> str:
        state: tuple[Tensor, ...] = ()
        counts = []
        for module in sites_of(self.wide).values():
            x, f = (torch.randn(2, 5, D, dtype=torch.float64) for _ in range(2))
            before = [value.clone() for value in (x, f, *state)]
            out, left = module.connect(x, f, state=state, n=x)
            given = x, f, *state
            if module.config.linked:
                given, before = (*given, out, *left), [value.clone() for value in (*given, out, *left)]
                out, left = module.connect_behind(out, left)
            for value, old in zip(given, before, strict=True):
                assert torch.equal(value, old), f"{module.site}: an argument was changed in place"
            assert out.shape == x.shape, f"{module.site}: the stream of shape {list(x.shape)} became {list(out.shape)}"
            assert out.dtype == x.dtype, f"{module.site}: {x.dtype} became {out.dtype}"
            apart = FED if module.config.separate else 0
            for place, value in enumerate(left):
                lead = module.lead if place >= apart else 0
                assert list(value.shape[lead:]) == list(x.shape), (
                    f"{module.site}: a state of shape {list(value.shape)}, {lead} of them leading"
                )
                assert value.dtype == x.dtype, f"{module.site}: a state of {value.dtype}"
            counts.append(len(left) - apart)
            state = left
        if self.operator.uses_history:
            assert any(counts[:-1]), "it declares a reader of states, and leaves none"
            # At one place of two blocks that are neither the first nor the stream's end.
            assert self.operator.connection.grows or counts[2] == counts[4], f"its state grows, {counts}, which it does not declare (grows)"
        else:
            assert not any(counts), "it leaves states, and declares no reader of them"
        return f"states behind each connection: {counts}"

    def law_equal_seeds_give_equal_numbers(self) -> str:
        model = copy.deepcopy(self.wide).train()
        runs = []
        for _ in range(2):
            torch.manual_seed(1)
            runs.append(model(self.other).detach())
        assert torch.equal(*runs), "two runs with one seed differ"
        return "in training mode"

    def law_every_parameter_learns(self) -> str:
        model = copy.deepcopy(self.wide).train()
        with torch.no_grad():
            for module in sites_of(model).values():
                for name in module.prepared:  # a branch that starts at 0 would hide what weighs it
                    parameter = model.get_parameter(name)
                    parameter.add_(torch.randn_like(parameter))
        gradients = gradients_of(model, model(self.other))
        lost = [name for name, value in gradients.items() if ".laurel_" in name and not value.any()]
        missing = [name for name, p in model.named_parameters() if ".laurel_" in name and p.requires_grad and name not in gradients]
        assert not lost + missing, f"without a gradient: {', '.join((lost + missing)[:4])}"
        return f"{sum('.laurel_' in name for name in gradients)} parameters"

    # The start

    def law_the_start_is_the_declared_one(self) -> str:
        module = next(iter(sites_of(self.started).values()))
        start = module.start_of(module.config)
        with torch.no_grad():
            apart = (self.started.eval()(self.x) - self.base(self.x)).abs().max().item()
        allowed = {"exact": 0.0, "evaluation": 0.0, "scale-free": _SCALE_FREE}.get(start, float("inf"))
        assert apart <= allowed, f"declared {start}, and off by {apart:.2g}"
        return f"{start}, off by {apart:.2g}"

    # The module back end

    def law_the_model_is_what_it_is_by_hand(self) -> str:
        found, right = self.wide(self.other), by_hand(self.wide, self.other)
        near(found, right, _EXACT)
        equal(gradients_of(self.wide, found), gradients_of(self.wide, right), _EXACT)
        return f"outputs and gradients within {_EXACT:g} in float64"

    def law_checkpointed_blocks(self) -> str:
        right = gradients_of(self.wide, by_hand(self.wide, self.other))
        model = copy.deepcopy(self.wide)
        model.call = lambda block, x: checkpoint(block, x, use_reentrant=False)
        equal(gradients_of(model, model(self.other)), right, _EXACT)
        model.call = lambda block, x: checkpoint(block, x, use_reentrant=True)
        x = self.other.clone().requires_grad_()
        try:
            found = gradients_of(model, model(x))
        except LaurelError:
            return "use_reentrant=True is refused"
        equal(found, right, _EXACT)
        return "both use_reentrant"

    def law_several_passes_before_backward(self) -> str:
        inputs = [self.other, self.other.flip(0) + 1e-3]
        right = gradients_of(self.wide, torch.stack([by_hand(self.wide, x) for x in inputs]))
        model = copy.deepcopy(self.wide)
        model.call = lambda block, x: checkpoint(block, x, use_reentrant=False)
        equal(gradients_of(model, torch.stack([model(x) for x in inputs])), right, _EXACT)
        return "two, of checkpointed blocks"

    def law_threads_do_not_mix(self) -> str:
        inputs = [torch.randn(2, 5, D, dtype=torch.float64) for _ in range(4)]
        right = [by_hand(self.wide, x).detach() for x in inputs]
        worst: list[float] = []
        errors: list[Exception] = []

        def serve(x: Tensor, expected: Tensor) -> None:
            try:
                worst.extend((self.wide(x) - expected).abs().max().item() for _ in range(10))
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=serve, args=pair) for pair in zip(inputs, right, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, str(errors[0])
        assert max(worst) < _EXACT, f"off by {max(worst):.2g}"
        return f"{len(threads)} threads"

    def law_a_stage_without_what_comes_before_is_right_or_refused(self) -> str:
        stage = copy.deepcopy(self.wide)
        del stage.blocks[:2]
        try:
            found = stage(self.other)
        except LaurelError:
            assert self.operator.uses_history, "refused, though it has no state"
            return "refused"
        assert not self.operator.uses_history, "it ran without the state of the blocks before it"
        near(found, by_hand(stage, self.other), _EXACT)
        return "right"

    def law_compiled_whole(self) -> str:
        graphs: list[Any] = []

        def backend(graph: Any, inputs: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        torch.compiler.reset()
        fast: Any = torch.compile(self.wide, backend=backend, fullgraph=True)
        near(fast(self.other), by_hand(self.wide, self.other), _EXACT)
        near(fast(self.other), by_hand(self.wide, self.other), _EXACT)
        torch.compiler.reset()
        assert len(graphs) == 1, f"{len(graphs)} graphs"
        return "one graph"

    def law_compiled_block_by_block(self) -> str:
        deep = self.stack(12).eval()
        model: Any = moved(rewrite(deep, (self.x,), **self.options, verify=False)).eval().double()
        right = by_hand(model, self.other)
        graphs: list[Any] = []

        def backend(graph: Any, inputs: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        torch.compiler.reset()
        fast: list[Any] = [torch.compile(block, backend=backend) for block in model.blocks]
        model.call = lambda block, x: fast[[*model.blocks].index(block)](x)
        near(model(self.other.clone().requires_grad_()), right, _EXACT)
        torch.compiler.reset()
        allowed = _GRAPHS * (2 if self.operator.connection.grows else 1)  # what grows stays between graphs
        assert len(graphs) <= allowed, (
            f"12 equal blocks became {len(graphs)} graphs; let step read config.first and config.last, not positions"
        )
        return f"12 equal blocks are {len(graphs)} graphs"

    # Files, copies and the way back

    def law_copies_pickles_and_folders(self) -> str:
        right = self.model(self.x)
        assert torch.equal(copy.deepcopy(self.model)(self.x), right), "a copy differs"
        assert torch.equal(self._written(self.model)(self.x), right), "a pickle differs"
        again = rewrite(self.base, (self.x,), **self.options, verify=False).eval()
        again.load_state_dict(self._written(self.model.state_dict()))
        assert torch.equal(again(self.x), right), "a state dict does not bring everything back"
        with tempfile.TemporaryDirectory() as folder:
            save(self.model, Path(folder) / "saved")
            assert torch.equal(load(Path(folder) / "saved").eval()(self.x), right), "a saved folder does not bring everything back"
        return "equal bit for bit"

    @staticmethod
    def _written(thing: Any) -> Any:
        """What a file of it holds."""
        buffer = io.BytesIO()
        torch.save(thing, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)

    def law_removed(self) -> str:
        assert torch.equal(remove(self.model)(self.x), self.base(self.x)), "without it the model is another one"
        return "the model is as it was"

    # Graphs

    def law_an_fx_graph_computes_the_same(self) -> str:
        graph: Any = torch.export.export(self.base, (self.x,)).module(check_guards=False)
        made = rewrite(graph, (self.x,), **self.options, verify=False).eval()
        mine = sites_of(self.model)
        for (_, target), source in zip(sites_of(made).items(), mine.values(), strict=True):
            target.load_state_dict(source.state_dict())
        near(made(self.x), self.model(self.x), 1e-6)
        return "within 1e-6"

    def law_onnx_computes_the_same(self) -> str:
        found = []
        with tempfile.TemporaryDirectory() as folder:
            for target in (targets.PORTABLE, targets.DEFAULT):
                path = export_onnx(self.model, (self.x,), None, Path(folder) / f"{target}.onnx", target=target)
                x = torch.randn(3, 4, D)
                for optimised in (False, True):
                    out = run_onnx(path, {"x": x.numpy()}, optimised=optimised)[0]
                    near(torch.from_numpy(out), self.model(x).detach(), _ONNX)
                found.append(target)
            base = export_onnx(self.base, (self.x,), None, Path(folder) / "base.onnx")
            save(self.model, Path(folder) / "saved")
            weights = Path(folder) / "saved" / "model.safetensors"
            for target in (targets.PORTABLE, targets.DEFAULT):
                path = write_onnx(rewrite_onnx(base, **self.options, target=target, weights=weights), Path(folder) / "graph.onnx")
                near(torch.from_numpy(run_onnx(path, {"x": x.numpy()}, optimised=True)[0]), self.model(x).detach(), _ONNX)
        return f"{', '.join(found)}, and a graph that another exporter wrote, within {_ONNX:g}"


# Comparing


@torch.no_grad()
def moved(model: nn.Module, spread: float = 0.3) -> nn.Module:
    """A model whose connections' parameters are off their start: at it, most faults are hidden."""
    for module in sites_of(model).values():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * spread)
        if isinstance(module, Annealing):
            module.annealed.fill_(module.config.anneal_steps // 3)
    return model


def gradients_of(model: nn.Module, output: Tensor) -> dict[str, Tensor]:
    """Gradients of a fixed loss by parameter, as far as there are."""
    model.zero_grad()
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    (output * weights).sum().backward()  # type: ignore[no-untyped-call]  # torch's
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def near(found: Tensor, right: Tensor, tolerance: float) -> None:
    """AssertionError unless both are equal up to a share of the largest element."""
    assert found.shape == right.shape, f"shape {list(found.shape)} instead of {list(right.shape)}"
    apart = (found - right).abs().max().item()
    assert apart <= tolerance * max(right.abs().max().item(), 1.0), f"off by {apart:.2g}"


def equal(found: Mapping[str, Tensor], right: Mapping[str, Tensor], tolerance: float) -> None:
    """The same of tensors by name."""
    assert found.keys() == right.keys(), f"other tensors: {sorted(found.keys() ^ right.keys())[:4]}"
    for name, value in right.items():
        try:
            near(found[name], value, tolerance)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
