"""Tensor parallelism: connections beside a stream that lies in parts on several devices.

Under sequence parallelism each device has a part of the sequence, and the gradient of a connection's parameter there is a part of a sum. As
replicated DTensors beside a stream that is a sharded one, the parameters get the whole gradient, as those of a norm under torch's
`SequenceParallel` do:

    plan = {"layers.0.norm1": SequenceParallel(), ..., **parallel_plan(model)}
    parallelize_module(model, mesh["tp"], plan)
    check_parallel(model)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import ParallelStyle

from laurel_rewrite.errors import ConfigError
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.operators.protocol import Connection
from laurel_rewrite.operators.turns import Turns
from laurel_rewrite.private import pytree


class ConnectionParallel(ParallelStyle):
    """The parallel style of a connection: its parameters and buffers are replicated, its stream is sharded along the sequence or replicated.

    The skip, the branches and what the branch reads become DTensors; states stay such in their slots. Where the stream's own code has plain
    tensors, the device's parts, it gets these back, and DTensors where it has DTensors.

    Args:
        sequence_dim: the dimension of the stream that is shared out, counted from 0; None where each device has the whole stream.
    """

    def __init__(self, *, sequence_dim: int | None = 1) -> None:
        super().__init__()
        self.sequence_dim = sequence_dim

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, Connection):
            raise ConfigError(f"ConnectionParallel is the style of connections, and {type(module).__name__} is none. See parallel_plan.")
        _check(module, self.sequence_dim)
        edges = _Edges(device_mesh, self.sequence_dim, module.config.ndim)
        distribute_module(module, device_mesh)
        edges.tried(module)
        module.register_forward_pre_hook(edges.enter, with_kwargs=True)
        module.register_forward_hook(edges.leave)
        return module

    def __repr__(self) -> str:
        return f"ConnectionParallel(sequence_dim={self.sequence_dim})"


class _Edges:
    """The hooks of one connection, by which its stream becomes DTensors and comes back.

    Attributes:
        plain: the call that runs now came with plain tensors.
    """

    def __init__(self, mesh: DeviceMesh, sequence_dim: int | None, ndim: int) -> None:
        self.mesh, self.sequence_dim, self.ndim = mesh, sequence_dim, ndim
        self.plain = True

    def __deepcopy__(self, memo: dict[int, Any]) -> _Edges:
        """A copy of the model lies on the same devices."""
        return _Edges(self.mesh, self.sequence_dim, self.ndim)

    def tried(self, connection: Connection) -> None:
        """Run the operator on zeros, as far as it goes without a state.

        Raises:
            ConfigError: it makes tensors that lie on each device for itself.
        """
        shape = [2] * self.ndim  # a tensor of one element would pass for a number
        shape[connection.config.axis] = connection.config.dim
        device = next((value.device for value in connection.state_dict().values()), torch.device("cpu"))
        x = self._distributed(torch.zeros(shape, device=device))
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                connection.connect(x, x, state=(), n=x)
        except RuntimeError as error:
            if "mixed torch.Tensor and DTensor" in str(error):
                raise ConfigError(
                    f"{connection.site}: {connection.config.variant} makes tensors of its own beside the stream, random ones perhaps, which would "
                    "be others on each device. Make them from the stream's (x.new_zeros, torch.rand_like(x)), or use another operator."
                ) from error
        except Exception:  # it wants the state that its stream will bring it
            pass

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """The hook before the call."""
        assert isinstance(module, Connection)
        x = args[0] if args else kwargs["x"]  # by name, where the source's sum has the branch first
        self.plain = not isinstance(x, DTensor)
        if module.needs_input and (len(args) > 1 or "f" in kwargs) and kwargs.get("n") is None:
            kwargs = {**kwargs, "n": module.branch_input(x)}
        return pytree.tree_map_only(Tensor, self._distributed, args), pytree.tree_map_only(Tensor, self._distributed, kwargs)

    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The hook after the call."""
        return pytree.tree_map_only(DTensor, self._local, output) if self.plain else output

    def _distributed(self, value: Tensor) -> DTensor:
        placements = self._placements(value)
        if not isinstance(value, DTensor):
            return DTensor.from_local(value, self.mesh, placements, run_check=False)
        return value if value.placements == placements else value.redistribute(placements=placements)

    def _local(self, value: DTensor) -> Tensor:
        return self._distributed(value).to_local()

    def _placements(self, value: Tensor) -> tuple[Placement, ...]:
        """A state has leading dimensions in front of the stream's."""
        return (Replicate() if self.sequence_dim is None else Shard(self.sequence_dim + value.ndim - self.ndim),)


def parallel_plan(model: nn.Module, *, sequence_dim: int | None = 1) -> dict[str, ParallelStyle]:
    """The styles of a rewritten model's connections, to merge into the plan of `torch.distributed.tensor.parallel.parallelize_module`.

    Args:
        model: what `rewrite` or `load` returned.
        sequence_dim: see `ConnectionParallel`. With None the connections' parameters become DTensors all the same, so that optimisers and
            the clipping of gradients find DTensors alone.

    Raises:
        ConfigError: there is no connection, or the dimension is none of a stream's, or the one of its features.
    """
    connections = sites_of(model)
    if not connections:
        raise ConfigError(f"This {type(model).__name__} has no connections to be parallel: rewrite the model first.")
    for connection in connections.values():
        _check(connection, sequence_dim)
    return {path: ConnectionParallel(sequence_dim=sequence_dim) for path in connections}


def check_parallel(model: nn.Module) -> None:
    """Find the connections that were forgotten beside norms under sequence parallelism: their gradients would be parts of sums.

    Args:
        model: what `parallelize_module` gave, before its first step; before or after `fully_shard`.

    Raises:
        ConfigError: a norm has DTensors, and a connection beside it plain tensors.
    """
    for path, connection in sites_of(model).items():
        owner = model.get_submodule(path.rpartition(".")[0])
        if isinstance(owner, Turns):
            owner = model.get_submodule(path.rpartition(".")[0].rpartition(".")[0])
        if not any(not isinstance(p, DTensor) for p in connection.parameters()):
            continue
        for name, module in owner.named_modules():
            weight = module._parameters.get("weight")
            if isinstance(weight, DTensor) and weight.ndim == 1:
                raise ConfigError(
                    f"{path}: the norm {name} beside it is parallel along the sequence, and this connection has plain parameters: each device "
                    "would train it with the gradient of its own part of the sequence. Merge laurel_rewrite.training.tensor_parallel."
                    "parallel_plan(model) into the plan of parallelize_module."
                )


def _check(connection: Connection, sequence_dim: int | None) -> None:
    config = connection.config
    if sequence_dim is None:
        if config.separate or config.fed:
            raise ConfigError(
                f"{connection.site}: {config.variant} gives queries, keys and values what they read apart, through norms that have plain tensors "
                "where each device has the whole stream. Leave the connections out of the plan: their gradients are whole as they are."
            )
        return
    if not 0 <= sequence_dim < config.ndim:
        raise ConfigError(
            f"{connection.site}: sequence_dim must be from 0 to {config.ndim - 1}, for the stream has {config.ndim} dimensions, not {sequence_dim}."
        )
    if sequence_dim == config.axis % config.ndim:
        raise ConfigError(
            f"{connection.site}: dimension {sequence_dim} of the stream is that of its features, on which the operator works as a whole. "
            "Choose the dimension of the sequence, or sequence_dim=None where each device has the whole stream."
        )
