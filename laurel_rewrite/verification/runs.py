"""What a call of a model gives, kept in a form that two models can be compared in: at its start a rewritten one equals the original."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from laurel_rewrite.graph.capture import quiet, training, without_caches
from laurel_rewrite.graph.snapshot import preserved
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.operators.prepared import plain_start
from laurel_rewrite.operators.protocol import Connection
from laurel_rewrite.sources.inputs import copied_inputs, copied_tensor
from laurel_rewrite.verification.checks import Check, tensors_of


@dataclass(frozen=True)
class Allowed:
    """How far a tensor may be from what it was.

    Attributes:
        words: for the report.
        share: of its largest element.
        eps: the same in units of its type's eps.
    """

    words: str
    share: float = 0.0
    eps: float = 0.0

    def of(self, tensor: Tensor) -> float:
        """The bound for one tensor."""
        if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel() or self == EXACT:
            return 0.0
        return (self.share + self.eps * torch.finfo(tensor.dtype).eps) * float(tensor.abs().max())


EXACT = Allowed("max |difference| = 0")
REGROUPED = Allowed("64 eps of the largest element, for sums in another order of adds", eps=64)
SCALE_FREE = Allowed("1e-3 of the largest element, for the epsilons of normalisations", share=1e-3)


@dataclass
class Run:
    """What one call of a model gave.

    Attributes:
        tensors: by name: every tensor of the output, of the inputs afterwards, and (in train mode) the buffers.
        error: what it raised instead.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    error: Exception | None = None


class Watch(contextlib.AbstractContextManager["Watch"]):
    """What looks on while a model runs, and may look at what it gave."""

    def __exit__(self, *_: object) -> None:
        pass

    def done(self, output: Any, inputs: Any) -> None:
        """The model has returned."""


def run_once(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, train: bool, seed: int = 0, watch: Watch | None = None
) -> Run:
    """Call a model on copies of its inputs, with a fixed random state, and put everything back as it was.

    Without gradients where it runs so; some models take a derivative in their forward.
    """
    result = Run()
    for gradients in (False, True):
        given_args, given_kwargs = copied_inputs(args, kwargs)
        with preserved(model), training(model, train), without_caches(model), torch.set_grad_enabled(gradients), quiet():
            seeded(seed)
            try:
                with watch or contextlib.nullcontext():
                    output = model(*given_args, **given_kwargs)
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # whatever the user's model raises
                result.error = result.error or error
                continue
            if watch is not None:
                watch.done(output, (given_args, given_kwargs))
            held = {"output": output, "input": (given_args, given_kwargs)}
            named = {f"{kind} {n}": leaf for kind, tree in held.items() for n, leaf in enumerate(tensors_of(tree))}
            own = {id(buffer) for module in sites_of(model).values() for buffer in module.buffers()}
            named |= {f"buffer {name}": buffer for name, buffer in _buffers(model) if id(buffer) not in own} if train else {}
            return Run({name: copied_tensor(tensor) for name, tensor in named.items()})
    return result


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers of a model by name. The constants of a graph are attributes, and buffers of its copies."""
    yield from model.named_buffers()
    for path, module in model.named_modules():
        for name, value in vars(module).items() if isinstance(module, fx.GraphModule) else ():
            if isinstance(value, Tensor):
                yield f"{path}.{name}".lstrip("."), value


def seeded(seed: int) -> None:
    """One state for every generator that a model may draw from."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def check_start(original: nn.Module, rewritten: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, seed: int = 0) -> list[Check]:
    """At the start the rewritten model equals the original bit for bit, in eval mode and, with one seed, in train mode.

    The outputs of both, their strides and types, what they leave in their inputs and, in train mode, in their buffers are compared.
    Neither model is changed. A start that is declared inexact is compared with a = b = 1 in its place.
    """
    with plain_start(rewritten):
        return [
            compare_runs(
                *(run_once(model, args, kwargs, train=mode, seed=seed) for model in (original, rewritten)),
                train=mode,
                declared=declared(rewritten),
                allowed=allowed(rewritten),
            )
            for mode in (False, True)
        ]


def compare_runs(before: Run, after: Run, *, train: bool, declared: str = "", allowed: Allowed = EXACT, name: str = "exact start") -> Check:
    """One check of two runs in one mode."""
    name = f"{name}, train mode, one seed" if train else f"{name}, eval mode"
    if before.error is not None:
        return Check.not_run(name, f"the model itself raises {type(before.error).__name__}: {_line(before.error)}")
    if after.error is not None:
        return Check(name, False, float("inf"), allowed.words, f"{type(after.error).__name__}: {_line(after.error)}")
    if before.tensors.keys() != after.tensors.keys():
        return Check(name, False, float("inf"), allowed.words, f"{len(before.tensors)} tensors became {len(after.tensors)}")
    worst, detail = 0.0, f"{len(before.tensors)} tensors"
    for key, mine in before.tensors.items():
        theirs = after.tensors[key]
        facts = [(mine.shape, theirs.shape), (mine.dtype, theirs.dtype), (mine.layout, theirs.layout), (_strides(mine), _strides(theirs))]
        changed = next((f"{key}: {a} became {b}" for a, b in facts if a != b), "")
        difference = float("inf") if changed else difference_of(mine, theirs)
        if difference > max(worst, allowed.of(mine)):
            worst, detail = difference, changed or key
    if any(tensor.is_meta for tensor in before.tensors.values()) and worst == 0:
        detail += ", of which the meta device knows shapes alone"
    return Check(name, worst == 0.0, worst, allowed.words, detail + declared)


def declared(model: nn.Module) -> str:
    """Which starts are declared to be another function, in words for a check that left them out; "" where there is none."""
    inexact = dict.fromkeys(_declaration(m) for m in sites_of(model).values() if m.start_of(m.config) != "exact")
    return f"; with plain sums in the place of those at which {', '.join(inexact)} starts" if inexact else ""


def _declaration(module: Connection) -> str:
    """The words that make a start another function: options that are not at their defaults, or else the operator's name."""
    options = {name: option for name, option in module.declared.items() if option.choices}
    return (
        " ".join(f"{n}={module.config.options[n]}" for n, o in options.items() if module.config.options[n] != o.default)
        or module.config.variant
    )


def allowed(model: nn.Module) -> Allowed:
    """How far a rewritten model may be from its original with plain sums: where a connection took the place of several adds, these are in another
    order than the source's."""
    return REGROUPED if any(module.regrouped for module in sites_of(model).values()) else EXACT


def difference_of(a: Tensor, b: Tensor) -> float:
    """Largest difference; a NaN is equal to a NaN, and infinitely far from a number."""
    if a.shape != b.shape:
        return float("inf")
    if a.is_meta or not a.numel():
        return 0.0
    if a.layout != torch.strided or a.is_nested or a.is_quantized:
        return 0.0 if torch.equal(a, b) else float("inf")
    same = (a == b) | (a.isnan() & b.isnan() if a.is_floating_point() or a.is_complex() else False)
    if bool(same.all()):
        return 0.0
    wide = torch.complex128 if a.is_complex() else torch.float64
    worst = torch.where(same, 0.0, (a.to(wide) - b.to(wide)).abs()).max().item()
    return float("inf") if worst != worst else worst


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides of the dimensions that have more than one element: the others' say nothing."""
    if tensor.layout != torch.strided or tensor.is_nested or not tensor.numel():
        return ()
    return tuple(stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1)


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else ""
