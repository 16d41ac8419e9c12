"""Stages of a pipeline: the state of a cut stream goes beside it. The engines' table has real schedules on two processes; here are the stages
alone, each of a copy of the model of its own, against the whole model."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import away_from_start
from test_state import Shared, Stack
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toys import D

from laurel_rewrite import ConfigError, LaurelError, rewrite
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.training.pipeline import connect_stage, plan_of

pytestmark = [pytest.mark.usefixtures("toys"), pytest.mark.engines]
A = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(1))
BATCHES = torch.randn(4, 3, 4, D, generator=torch.Generator().manual_seed(2))
# float32 against the whole model: gradients of a stage are summed in another order.
NEAR = {"rtol": 1e-4, "atol": 1e-5}
VARIANTS = ["rw+lr", "pa", "rw+lr+pa", "toy-echo", "toy-dense", "toy-lanes", "toy-ladder"]


class Norms(nn.Module):
    """Blocks with a norm behind the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Behind() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Behind(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map, self.norm = nn.Linear(D, D), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + torch.tanh(self.map(x)))


def made(variant: str, cls: type[nn.Module] = Stack) -> nn.Module:
    torch.manual_seed(0)
    options = {"rank": 4} if {"lr", "pa"} & set(variant.split("+")) else {}
    return away_from_start(rewrite(cls(), (A,), variant=variant, **options)).eval()


def cut(model: nn.Module, first: int, last: int) -> nn.Module:
    """What is left of a copy of the model, which is itself the module whose call is a pass."""
    stage = copy.deepcopy(model)
    stage.blocks = nn.ModuleDict({str(place): stage.blocks[place] for place in range(first, last)})
    return connect_stage(stage)


class Parts(nn.Module):
    """A module of one's own around some blocks."""

    def __init__(self, model: nn.Module, first: int, last: int) -> None:
        super().__init__()
        blocks = copy.deepcopy(model).blocks
        self.blocks = nn.ModuleDict({str(place): blocks[place] for place in range(first, last)})

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks.values():
            x = block(x)
        return x


def around(model: nn.Module, first: int, last: int) -> nn.Module:
    return connect_stage(Parts(model, first, last), plan_of(model))


class Looped(Stack):
    """A stack that can lose blocks."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks.values() if isinstance(self.blocks, nn.ModuleDict) else self.blocks:
            x = block(x) if self.again is None else self.again(block, x)
        return x


def forward(stages: list[nn.Module], x: Tensor) -> list[tuple[list[Tensor], list[Tensor]]]:
    """One micro-batch through all stages, each with leaves of its own; what went in and came out."""
    kept, given = [], [x.clone().requires_grad_()]
    for stage in stages:
        out = stage(*given)
        left = list(out) if isinstance(out, tuple) else [out]
        kept.append((given, left))
        given = [value.detach().clone().requires_grad_() for value in left]
    return kept


def backward(kept: list[tuple[list[Tensor], list[Tensor]]]) -> None:
    """The same back, as a schedule does it."""
    gradients = [2 * value.detach() for value in kept[-1][1]]
    for given, left in reversed(kept):
        torch.autograd.backward(left, gradients)
        gradients = [torch.zeros_like(value) if value.grad is None else value.grad for value in given]


def compare(stages: list[nn.Module], model: nn.Module) -> None:
    model.zero_grad()
    for x in BATCHES:
        model(x).square().sum().backward()
    found = {name: p for stage in stages for name, p in stage.named_parameters()}
    assert sorted(found) == sorted(name for name, _ in model.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name].grad, p.grad, **NEAR, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("how", [cut, around])
@pytest.mark.parametrize("variant", VARIANTS)
def test_several_passes_wait_for_their_backward_passes(variant, how):
    model = made(variant, Looped)
    stages = [how(model, *ends) for ends in ((0, 1), (1, 2), (2, 3))]
    waiting = [forward(stages, BATCHES[0]), forward(stages, BATCHES[1])]
    for place in (0, 1):  # one forward, one backward
        backward(waiting[place])
        waiting.append(forward(stages, BATCHES[place + 2]))
    for kept in waiting[2:]:
        backward(kept)
    compare(stages, model)


@pytest.mark.parametrize("variant", ["rw+lr+pa", "toy-dense", "toy-lanes"])
def test_blocks_of_a_stage_may_be_checkpointed(variant):
    model = made(variant, Looped)
    stages = [cut(model, 0, 1), cut(model, 1, 3)]
    for stage in stages:
        stage.again = lambda block, x: checkpoint(block, x, use_reentrant=False)
    waiting = [forward(stages, x) for x in BATCHES]
    for kept in waiting:
        backward(kept)
    compare(stages, model)


@pytest.mark.parametrize("variant", ["rw+lr+pa", "toy-dense", "toy-lanes"])
def test_blocks_of_a_stage_may_be_compiled(variant):
    torch._dynamo.reset()
    model = made(variant, Looped)
    stages = [cut(model, 0, 1), cut(model, 1, 3)]
    for stage in stages:
        for block in stage.blocks.values():
            block.compile(backend="eager")
    waiting = [forward(stages, x) for x in BATCHES]
    for kept in waiting:
        backward(kept)
    compare(stages, model)


def test_without_gradients_and_after_a_pass_that_broke_off():
    model = made("rw+lr+pa", Looped)
    first, second = cut(model, 0, 1), cut(model, 1, 3)
    with torch.no_grad():
        torch.testing.assert_close(second(*first(A)), model(A), **NEAR)
        with pytest.raises(RuntimeError):
            second(*(value[..., :3] for value in first(A)))
        torch.testing.assert_close(second(*first(A)), model(A), **NEAR)


def test_a_state_behind_a_norm_goes_on_and_is_not_cut_off_from_it():
    model = made("toy-behind", Norms)
    stages = [around(model, 0, 2), around(model, 2, 3)]
    for x in BATCHES:
        backward(forward(stages, x))
    compare(stages, model)

    class Half(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.norm = block.norm
            self.block = None

    part = Half(model.blocks[0])
    part.rest = nn.ModuleList(model.blocks[1:])
    with pytest.raises(ConfigError, match=r"blocks\.0\.laurel_0: the norm or activation behind it is in the next stage"):
        connect_stage(part, plan_of(model))
    last = nn.ModuleList([model.blocks[0].laurel_0])
    with pytest.raises(ConfigError, match="the norm or activation behind it is not in its stage"):
        connect_stage(last, plan_of(model))


@pytest.mark.parametrize(("variant", "count"), [("rw+lr+pa", 2), ("toy-dense", 3), ("toy-lanes", 1)])
def test_a_state_that_is_not_all_there_is_an_error(variant, count):
    model = made(variant, Looped)
    first, second = cut(model, 0, 1), cut(model, 1, 3)
    out, *state = first(A)
    assert len(state) == count
    for some in ((), state[1:], [*state, A]):
        with pytest.raises(LaurelError, match=f"the stage got {len(some)} tensors of state behind 1 of its own.* leave {count}"):
            second(out, *some)
    torch.testing.assert_close(second(out, *state), model(A), **NEAR)


def test_what_is_no_stage_is_refused_and_unchanged():
    model = made("rw+lr+pa", Looped)
    apart = Parts(model, 0, 3)
    del apart.blocks["1"]
    with pytest.raises(ConfigError, match=r"blocks\.1\.laurel_0 lies between the connections of this stage"):
        connect_stage(apart, plan_of(model))
    assert not apart._forward_hooks
    with pytest.raises(ConfigError, match="was not made by laurel_rewrite"):
        connect_stage(Parts(model, 0, 1))
    ring = made("pa", Shared)
    with pytest.raises(ConfigError, match="comes back to a shared module, and cannot be cut"):
        connect_stage(nn.ModuleList([ring.middle]), plan_of(ring))


def test_the_whole_model_and_what_has_no_history_need_nothing():
    model = made("rw+lr+pa", Looped)
    expected = model(A)
    hooks = len(model._forward_hooks)
    assert connect_stage(model) is model
    assert len(model._forward_hooks) == hooks
    assert torch.equal(model(A), expected)
    local = made("rw+lr", Looped)
    assert torch.equal(cut(local, 1, 3)(cut(local, 0, 1)(A)), local(A))


def test_stages_of_one_process_share_a_model_and_a_copy_of_a_stage_has_its_own_states():
    model = made("rw+lr+pa", Looped)
    stages = []
    for ends in ((0, 1), (1, 3)):
        parts = Parts(model, *ends)
        for place in parts.blocks:
            parts.blocks[place] = model.blocks[int(place)]
        stages.append(connect_stage(parts, plan_of(model)))
    expected = model(A)
    torch.testing.assert_close(stages[1](*stages[0](A)), expected, **NEAR)
    torch.testing.assert_close(model(A), expected, **NEAR)
    twin = copy.deepcopy(stages[1])
    assert all(a.link.stream is not b.link.stream for a, b in zip(sites_of(twin).values(), sites_of(stages[1]).values(), strict=True))
    torch.testing.assert_close(twin(*stages[0](A)), expected, **NEAR)
