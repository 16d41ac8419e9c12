"""What every way to carry states past a model's own code must hold: each answer is the right one, or an error.

The reference is the formula with its states written out; LAuReL's parameters are random, for at the start PA is silent.
"""

from __future__ import annotations

import copy
import functools
import pickle
import threading

import pytest
import torch
from conftest import away_from_start
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toys import D, Plain

from laurel_rewrite import LaurelError, RewriteError, detect, load, remove, rewrite, save
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.operators.families.laurel import Laurel
from laurel_rewrite.operators.state import Stream
from laurel_rewrite.plan import LaurelConfig, Plan

A = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(1))
B = torch.randn(3, 4, D, generator=torch.Generator().manual_seed(2))
# float32 against the formula written out: the order of sums differs, and nothing else.
NEAR = {"rtol": 1e-4, "atol": 1e-5}
VARIANTS = ["pa", "rw+lr+pa"]


class Stack(nn.Module):
    """Six sites in three blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Plain() for _ in range(3))
        self.again = None  # how a block is called, where not plainly

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.again is None else self.again(block, x)
        return x


class Twice(nn.Module):
    """Two streams through one encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = Stack()

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.enc(a), self.enc(b)


class Shared(nn.Module):
    """A block of its own, one that is called three times, and a block of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = Plain(), Plain(), Plain()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(3):
            x = self.middle(x)
        return self.last(x)


@functools.cache
def _made(cls: type[nn.Module], variant: str) -> nn.Module:
    torch.manual_seed(0)
    inputs = (A, B) if cls is Twice else (A,)
    return away_from_start(rewrite(cls(), inputs, variant=variant, rank=4), spread=0.3).eval()


def made(cls: type[nn.Module] = Stack, variant: str = "rw+lr+pa") -> nn.Module:
    return copy.deepcopy(_made(cls, variant))


def connection(laurel: Laurel, x: Tensor, f: Tensor, states: list[Tensor]) -> Tensor:
    """PA and RW+LR+PA, written out; `states` gets x."""
    states.insert(0, x)
    window = states[: laurel.config.lags]
    skip = x
    if laurel.config.variant == "pa":
        mixed = sum(laurel.g[j] * state for j, state in enumerate(window))
        return f + x + mixed @ laurel.down.weight.T @ laurel.up.weight.T
    for j, state in enumerate(window):
        skip = skip + laurel.g[j] * (state @ laurel.down[j].weight.T @ laurel.up[j].weight.T)
    a, b = 2 * torch.softmax(laurel.mix, 0)
    return a * f + b * skip


def run(block: nn.Module, x: Tensor, states: list[Tensor]) -> Tensor:
    x = connection(block.laurel_0, x, block.f(x), states)
    return connection(block.laurel_1, x, block.g(x), states)


def reference(model: nn.Module, x: Tensor, blocks: list[nn.Module] | None = None) -> Tensor:
    states: list[Tensor] = []
    for block in blocks or list(model.blocks):
        x = run(block, x, states)
    return x


def gradients(model: nn.Module, loss: Tensor, **options: bool) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward(**options)
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **NEAR, msg=lambda text, name=name: f"{name}: {text}")


def checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=False)


# Passes


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_pass_is_the_formula(variant):
    model = made(variant=variant)
    torch.testing.assert_close(model(B), reference(model, B), **NEAR)
    compare(gradients(model, model(B).square().sum()), gradients(model, reference(model, B).square().sum()))


@pytest.mark.parametrize("grad", [False, True])
def test_threads_do_not_mix(grad):
    model = made()
    inputs = [torch.randn(2, 5, D) for _ in range(4)]
    expected = [reference(model, x).detach() for x in inputs]
    barrier = threading.Barrier(len(inputs))
    worst: list[float] = []

    def serve(x: Tensor, right: Tensor) -> None:
        barrier.wait()
        with torch.set_grad_enabled(grad):
            worst.extend((model(x) - right).abs().max().item() for _ in range(20))

    threads = [threading.Thread(target=serve, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(worst) == 80
    assert max(worst) < 1e-4  # float32, another order of sums


def test_replicas_of_data_parallel_do_not_mix():
    """As `torch.nn.parallel.replicate` makes them: shallow copies that share everything but the tree of modules."""

    def replica(module: nn.Module) -> nn.Module:
        made = module._replicate_for_data_parallel()
        for name, child in module.named_children():
            made._modules[name] = replica(child)
        for name, parameter in module._parameters.items():
            setattr(made, name, None if parameter is None else parameter.view_as(parameter))
        return made

    model = made()
    model.again = checkpointed
    replicas = [replica(model) for _ in range(2)]
    inputs, outputs = [A, B], {}
    barrier = threading.Barrier(2)

    def forward(index: int) -> None:
        barrier.wait()
        outputs[index] = replicas[index](inputs[index])

    def forward_all() -> None:
        threads = [threading.Thread(target=forward, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    forward_all()
    for index, x in enumerate(inputs):
        compare(gradients(model, outputs[index].square().sum()), gradients(model, reference(model, x).square().sum()))
    # On one device backward mixes what two threads did, and then nothing says which pass a block runs again for.
    forward_all()
    with pytest.raises(LaurelError, match="from several threads"):
        (outputs[0].sum() + outputs[1].sum()).backward()


def test_one_encoder_called_twice_has_two_passes():
    model = made(Twice)
    for found, x in zip(model(A, B), (A, B), strict=True):
        torch.testing.assert_close(found, reference(model.enc, x), **NEAR)
    assert torch.equal(model.enc(A), model.enc(A))
    torch.testing.assert_close(model.enc(B), reference(model.enc, B), **NEAR)
    a, b = model(A, A.flip(0))
    found = gradients(model, (a - b).square().sum())
    compare(found, gradients(model, (reference(model.enc, A) - reference(model.enc, A.flip(0))).square().sum()))


def test_a_part_of_a_stream_is_an_error():
    model = made()
    stage = copy.deepcopy(model)
    del stage.blocks[:2]
    with pytest.raises(LaurelError, match="pipeline stage"):
        stage(A)
    first = copy.deepcopy(model)
    del first.blocks[1:]
    torch.testing.assert_close(first(A), reference(first, A), **NEAR)  # what comes first needs nothing
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            model(A)
            with pytest.raises(LaurelError, match="block on its own"):
                model.blocks[1](A)


def test_a_pass_that_broke_off_leaves_no_states():
    model = made()

    def stop(module, args):
        raise RuntimeError("out of memory")

    handle = model.blocks[2].register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(A)
    handle.remove()
    with pytest.raises(LaurelError, match="block on its own"):
        model.blocks[2](A)
    torch.testing.assert_close(model(B), reference(model, B), **NEAR)


def test_blocks_called_one_by_one_in_order_are_a_pass():
    model = made()
    torch.testing.assert_close(model.forward(A), reference(model, A), **NEAR)
    x = B
    for block in model.blocks:
        x = block(x)
    torch.testing.assert_close(x, reference(model, B), **NEAR)
    model.blocks[0](A)
    with pytest.raises(LaurelError, match="out of order"):
        model.blocks[2](A)
    model.blocks[0](A)
    model.blocks[1](A)
    with pytest.raises(LaurelError, match="out of order"):
        model.blocks[1](A)


def test_variants_may_differ_within_a_stream():
    """The connections that read no history leave their skip for those that do."""
    torch.manual_seed(0)
    base = Stack()
    rows = Plan.from_sites(detect(base, (A,)), LaurelConfig(variant="pa", rank=4)).to_toml().split("[[site]]")
    rows[3] = '\nvariant = "rw"' + rows[3]
    model = away_from_start(rewrite(base, (A,), plan=Plan.from_toml("[[site]]".join(rows)))).eval()
    states: list[Tensor] = []
    x = B
    for block in model.blocks:
        for laurel, branch in ((block.laurel_0, block.f), (block.laurel_1, block.g)):
            if laurel.config.variant == "rw":
                states.insert(0, x)
                a, b = 2 * torch.softmax(laurel.mix, 0)
                x = a * branch(x) + b * x
            else:
                x = connection(laurel, x, branch(x), states)
    torch.testing.assert_close(model(B), x, **NEAR)


@pytest.mark.parametrize("history", [2, 3, 5])
def test_a_shared_block_reads_the_last_states_of_its_stream(history):
    torch.manual_seed(0)
    model = away_from_start(rewrite(Shared(), (A,), variant="rw+lr+pa", rank=4, history=history)).eval()
    order = [model.first, model.middle, model.middle, model.middle, model.last]
    torch.testing.assert_close(model(B), reference(model, B, order), **NEAR)
    assert [m.config.lags for m in sites_of(model).values()] == [min(n, history) for n in (1, 2, 7, 8, 5, 6)]


# Copies and pickles


def test_a_copy_of_the_model_has_streams_of_its_own():
    model = made()
    twin = copy.deepcopy(model)
    assert twin.blocks[0].laurel_0.link.stream is not model.blocks[0].laurel_0.link.stream
    assert len({id(m.link.stream) for m in sites_of(twin).values()}) == 1
    torch.testing.assert_close(twin(A), reference(twin, A), **NEAR)


@pytest.mark.parametrize("which", ["blocks", "laurel"])
def test_a_copied_part_takes_the_place_of_the_original(which):
    model = made()
    if which == "blocks":
        model.blocks = nn.ModuleList([copy.deepcopy(block) for block in model.blocks])
    else:  # as PEFT's modules_to_save does
        for block in model.blocks:
            block.laurel_0, block.laurel_1 = copy.deepcopy(block.laurel_0), copy.deepcopy(block.laurel_1)
    torch.testing.assert_close(model(B), reference(model, B), **NEAR)
    compare(gradients(model, model(B).sum()), gradients(model, reference(model, B).sum()))


def test_a_doubled_block_is_an_error():
    model = made()
    model.blocks = nn.ModuleList([model.blocks[0], model.blocks[1], copy.deepcopy(model.blocks[1]), model.blocks[2]])
    with pytest.raises(LaurelError, match="blocks out of order"):
        model(A)


def test_pickled_connections_stay_connected_and_a_single_one_is_an_error():
    model = made()
    blocks = pickle.loads(pickle.dumps([[block.laurel_0, block.laurel_1] for block in model.blocks]))
    for block, (first, second) in zip(model.blocks, blocks, strict=True):
        block.laurel_0, block.laurel_1 = first, second
    torch.testing.assert_close(model(B), reference(model, B), **NEAR)
    model.blocks[1].laurel_0 = pickle.loads(pickle.dumps(model.blocks[1].laurel_0))
    with pytest.raises(LaurelError, match="PA reads the states"):
        model(A)
    with pytest.raises(LaurelError, match="none were given"):
        Laurel(blocks[1][0].config)(A, A)


def test_a_loaded_model_has_the_same_passes(tmp_path):
    model = made(Twice)
    save(model, tmp_path)
    loaded = load(tmp_path).eval()
    for found, x in zip(loaded(A, B), (A, B), strict=True):
        torch.testing.assert_close(found, reference(model.enc, x), **NEAR)
    removed = remove(loaded)
    for module in removed.modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        assert not any(isinstance(getattr(hook, "__self__", None), Stream) for hook in hooks)
        assert not module._forward_hooks_always_called


class InTurns(nn.Module):
    """Two streams that take turns in the same blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Plain() for _ in range(2))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            a, b = block(a), block(b)
        return a, b


class Reused(nn.Module):
    """A block that goes on with a stream in its first call, and begins one in its second, behind a map."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.map = Plain(), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(torch.tanh(self.map(self.block(self.block(x)))))


@pytest.mark.parametrize(("model", "inputs"), [(InTurns(), (A, A.flip(0))), (Reused(), (A,))])
def test_histories_that_modules_cannot_tell_apart_are_refused(model, inputs):
    with pytest.raises(RewriteError, match="called in several streams in turns"):
        rewrite(model, inputs, variant="pa", rank=4)
    assert sites_of(rewrite(model, inputs, variant="rw+lr", rank=4))


# Graphs


def test_a_graph_has_states_as_edges():
    """The same numbers where one encoder, or one block, is called again."""
    for cls, inputs in ((Twice, (A, A.flip(0))), (Shared, (A,))):
        model = made(cls)
        program = torch.export.export(remove(copy.deepcopy(model)), inputs, strict=False)
        graph = rewrite(program.module(check_guards=False), inputs, variant="rw+lr+pa", rank=4)
        ours, theirs = sites_of(model), sites_of(graph)
        if list(ours) == list(theirs):
            graph.load_state_dict({k: v for k, v in model.state_dict().items() if "laurel_" in k}, strict=False)
            found, expected = graph(*inputs), model(*inputs)
            for a, b in zip(found, expected, strict=True) if cls is Twice else [(found, expected)]:
                torch.testing.assert_close(a, b, **NEAR)
