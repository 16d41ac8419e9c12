"""What a training step costs in PyTorch: forward, backward, optimiser, interleaved as latencies are; eager and compiled."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laurel_rewrite.graph.capture import quiet, without_caches
from laurel_rewrite.operators.connections import param_groups
from laurel_rewrite.private import pytree
from laurel_rewrite.profiling.latency import Latency, interleaved, summarised
from laurel_rewrite.sources.inputs import copied_inputs

_BLOCKS = 6
_MODES = ("eager", "compiled")


@dataclass(frozen=True)
class TrainingRow:
    """One model's training step in one mode.

    Attributes:
        name: of the model.
        mode: "eager" or "compiled" (torch.compile).
        step: time of a step: forward, backward and AdamW.
        saved_bytes: of activations that the forward pass keeps for backward, each storage once.
        peak_bytes: most memory that the device's allocator gave out in a step; 0 on a CPU, whose allocator does not count.
        parameters: number of them.
    """

    name: str
    mode: str
    step: Latency
    saved_bytes: int
    peak_bytes: int
    parameters: int


@dataclass(frozen=True)
class Training:
    """Rows by mode and model, the first of each mode the baseline; and what could not be measured."""

    rows: tuple[TrainingRow, ...]
    device: str
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def profile_training(
    models: Mapping[str, nn.Module],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    seconds: float = 10.0,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    modes: Sequence[str] | None = None,
) -> Training:
    """Training steps of models, eager and compiled, against the first of them. The models themselves are not changed.

    The loss is the mean square of the floating-point outputs: its own cost is small, and the same for all.

    Args:
        models: by name.
        args, kwargs: inputs of all. They are moved to CUDA where there is one.
        seconds: for the steps of each mode.
        seed: of the order.
        clock: what a step is measured by, in seconds. On a CPU that others use, too, `time.thread_time` of one thread leaves their share out.
        modes: "eager", "compiled"; None for both.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    moved: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(
        Tensor, lambda tensor: tensor.to(device), (tuple(args), dict(kwargs))
    )
    rows: list[TrainingRow] = []
    notes: list[str] = []
    for mode in modes or _MODES:
        try:
            steps = {name: _Step(model, *moved, device, compiled=mode == "compiled") for name, model in models.items()}
            order = random.Random(seed)
            with quiet():
                blocks = [interleaved(list(steps.values()), seconds / _BLOCKS, 2, order, clock=clock) for _ in range(_BLOCKS)]
        except Exception as error:  # a compiler's exceptions share no base class
            notes.append(
                f"{mode} training could not be measured: {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
            )
            continue
        for (name, step), latency in zip(steps.items(), summarised(blocks, seed), strict=True):
            count = sum(p.numel() for p in step.model.parameters())
            rows.append(TrainingRow(name, mode, latency, step.saved_bytes(), step.peak_bytes(), count))
    where = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return Training(tuple(rows), where, tuple(notes))


class _Step:
    """A model with its optimiser; a call is one step."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], device: str, *, compiled: bool) -> None:
        self.model = copy.deepcopy(model).train().to(device)
        self.args, self.kwargs, self.device = args, kwargs, device
        self.optimizer = torch.optim.AdamW(param_groups(self.model, lr=1e-6, weight_decay=0.01))
        self.forward: Callable[..., Any] = torch.compile(self.model) if compiled else self.model

    def __call__(self) -> None:
        with without_caches(self.model):
            self.optimizer.zero_grad()
            torch.autograd.backward(self._loss())
            self.optimizer.step()
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _loss(self) -> Tensor:
        args, kwargs = copied_inputs(self.args, self.kwargs)
        leaves = pytree.tree_leaves(self.forward(*args, **kwargs))
        floats = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.requires_grad]
        return torch.stack([leaf.float().square().mean() for leaf in floats]).sum()

    def saved_bytes(self) -> int:
        """Bytes that autograd keeps for backward, parameters aside."""
        own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), without_caches(self.model):
            loss = self._loss()
        del loss
        return sum(storages.values())

    def peak_bytes(self) -> int:
        if self.device != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats()
        self()
        return int(torch.cuda.max_memory_allocated())


def one_more_block(
    model: nn.Module, owners: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any], *, donor: nn.Module | None = None
) -> nn.Module | None:
    """A copy of a model with one more layer: the last block of a list of modules that owns sites, once more behind itself.

    Args:
        model: not rewritten.
        owners: paths of the modules that own residual connections.
        args, kwargs: inputs; a copy that does not run with them, or leaves the new block out, is not taken. Where it leaves it out, the
            numbers of layers in its configuration are raised, as transformers' models need it.
        donor: a model of the same architecture whose block is put in, with other weights; by default the model itself.

    Returns:
        None where no list of modules holds the blocks, or the model itself counts them.
    """
    places: dict[str, str] = {}  # list of modules -> its last block that owns a site
    for owner in owners:
        parts = owner.split(".")
        for depth in range(len(parts)):
            path = ".".join(parts[:depth])
            if parts[depth].isdigit() and isinstance(model.get_submodule(path), nn.ModuleList | nn.Sequential):
                places.pop(path, None)
                places[path] = parts[depth]
                break
    for path, name in reversed(places.items()):
        for counted in (False, True):
            taller = copy.deepcopy(model)
            blocks = taller.get_submodule(path)
            assert isinstance(blocks, nn.ModuleList | nn.Sequential)
            if counted:
                _count_one_more(taller, path, len(blocks))
            new = copy.deepcopy((model if donor is None else donor).get_submodule(f"{path}.{name}" if path else name))
            blocks.insert(int(name) + 1, new)
            if _runs(taller, new, args, kwargs):
                return taller
    return None


def _count_one_more(model: nn.Module, path: str, layers: int) -> None:
    """Raise the numbers of layers, and lengthen the lists with an entry for each, in the configurations of what holds the blocks."""
    parts = path.split(".") if path else []
    modules = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1)]
    configs = {id(config): config for module in modules if hasattr(config := vars(module).get("config"), "__dict__")}
    for config in configs.values():
        for key, value in list(vars(config).items()):
            if "layer" in key and value == layers and isinstance(value, int):
                setattr(config, key, layers + 1)
            elif "layer" in key and isinstance(value, list) and len(value) == layers:
                setattr(config, key, [*value, value[-1]])


def _runs(model: nn.Module, block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a model runs, and a block in it."""
    calls: list[object] = []
    hook = block.register_forward_pre_hook(lambda *_: calls.append(None))
    try:
        with torch.no_grad(), quiet(), without_caches(model):
            model(*args, **kwargs)
    except Exception:  # whatever a block says to an input that does not fit
        return False
    finally:
        hook.remove()
    return bool(calls)
