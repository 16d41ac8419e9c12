"""One process: the plain loop, the compiler, and torch's ways to call a model."""

from __future__ import annotations

import copy

import torch
from torch.func import functional_call, grad, vmap
from torch.optim.swa_utils import AveragedModel

from tools.engines.case import Case, Result, gradients, loss_of, trained
from tools.engines.table import engine


@engine("plain loop", "forward, backward, after an optimiser step that was taken back")
def plain(case: Case) -> Result:
    model = case.model
    before = copy.deepcopy(model.state_dict())
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trained(model, case.ids)
    optimiser.step()
    model.load_state_dict(before)
    optimiser.zero_grad()
    return trained(model, case.ids)


@engine("torch.compile, whole", "`torch.compile(model, fullgraph=True)`, aot_eager")
def compiled(case: Case) -> Result:
    torch._dynamo.reset()
    return trained(torch.compile(case.model, backend="aot_eager", fullgraph=True), case.ids)


class Graphs:
    """A backend that counts the graphs that it is given."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: object) -> object:
        self.count += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


def by_blocks(case: Case, **options: object) -> tuple[torch.nn.Module, Graphs]:
    """The case's model with each block compiled, and the count of graphs. Where states grow, connections are left out of the graphs on purpose."""
    torch._dynamo.reset()
    model, graphs = case.model, Graphs()
    for block in model.model.layers:
        block.compile(backend=graphs, fullgraph=case.operator != "whole history", **options)
    return model, graphs


@engine(
    "torch.compile, per block", "`block.compile(fullgraph=True)`, at most 3 graphs for 4 blocks; not of whole histories, which split graphs"
)
def per_block(case: Case) -> Result:
    model, graphs = by_blocks(case)
    result = trained(model, case.ids)
    # A window is clipped in the first block, and a wide stream begins there; after the last one nobody reads a state.
    most = {"local": 1, "window": 3, "wide stream": 3}.get(case.operator, graphs.count)
    assert graphs.count <= most, f"{graphs.count} graphs of {len(model.model.layers)} blocks"
    return result


@engine("torch.compile, dynamic lengths", "`block.compile(dynamic=True)`, two batches of other sizes and lengths in the same graphs")
def dynamic(case: Case) -> Result:
    model, graphs = by_blocks(case, dynamic=True)
    trained(model, case.ids[:3, :6])
    model.zero_grad()
    before = graphs.count
    result = trained(model, case.ids)
    assert graphs.count == before, "another length was compiled anew"
    return result


@engine("gradient accumulation", "two micro-batches, one backward pass each")
def accumulated(case: Case) -> Result:
    return trained(case.model, case.ids, case.ids.chunk(2))


@engine("several forward passes before one backward", "two micro-batches, then the sum of their losses")
def together(case: Case) -> Result:
    model = case.model
    loss = sum(loss_of(model, part) / 2 for part in case.ids.chunk(2))
    loss.backward()
    return Result(loss.item(), gradients(model))


@engine("EMA", "`AveragedModel` beside the model, and the averaged copy trained on")
def averaged(case: Case) -> Result:
    model = case.model
    ema = AveragedModel(model)
    ema.update_parameters(model)
    result = trained(model, case.ids)
    for name, gradient in trained(ema.module, case.ids).gradients.items():  # its streams are its own
        torch.testing.assert_close(gradient, result.gradients[name], rtol=0, atol=0)
    return result


@engine("functional_call", "`torch.func.functional_call` with the parameters as arguments")
def functional(case: Case) -> Result:
    model = case.model
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    loss = functional_call(model, parameters, (), {"input_ids": case.ids, "labels": case.ids, "use_cache": False}).loss
    found = torch.autograd.grad(loss, list(parameters.values()))
    return Result(loss.item(), dict(zip(parameters, found, strict=True)))


@engine("vmap", "`vmap` over two sets of parameters, an ensemble")
def ensemble(case: Case) -> Result:
    model = case.model
    parameters = {name: torch.stack([p.detach()] * 2).requires_grad_() for name, p in model.named_parameters()}

    def one(values: dict[str, torch.Tensor]) -> torch.Tensor:
        return functional_call(model, values, (), {"input_ids": case.ids, "labels": case.ids, "use_cache": False}).loss

    losses = vmap(one)(parameters)
    found = torch.autograd.grad(losses[1], list(parameters.values()))
    return Result(losses[1].item(), {name: gradient[1] for name, gradient in zip(parameters, found, strict=True)})


@engine("per-sample gradients", "`vmap(grad(...))` over the batch; their mean")
def per_sample(case: Case) -> Result:
    model = case.model
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def one(values: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
        ids = ids.unsqueeze(0)
        return functional_call(model, values, (), {"input_ids": ids, "labels": ids, "use_cache": False}).loss

    found = vmap(grad(one), in_dims=(None, 0))(parameters, case.ids)
    return Result(None, {name: gradient.mean(0) for name, gradient in found.items()})
