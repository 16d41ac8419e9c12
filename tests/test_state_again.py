"""States of PA where blocks run again in backward, and where they are compiled: each answer is the right one, or an error."""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch
from test_state import NEAR, VARIANTS, A, B, Shared, Twice, checkpointed, compare, gradients, made, reference
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from laurel_rewrite import LaurelError
from laurel_rewrite.operators.state import _Kept

# Activation checkpointing


def selective(block: nn.Module, x: Tensor) -> Tensor:
    def policy(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op is torch.ops.aten.addmm.default else CheckpointPolicy.PREFER_RECOMPUTE

    return checkpoint(block, x, use_reentrant=False, context_fn=functools.partial(create_selective_checkpoint_contexts, policy))


@pytest.mark.parametrize("how", [checkpointed, selective])
@pytest.mark.parametrize("variant", VARIANTS)
def test_several_passes_before_a_checkpointed_backward(variant, how):
    model = made(variant=variant)
    model.again = how
    inputs = (A, A + 1e-3, B)
    found = gradients(model, sum(model(x).square().sum() for x in inputs))
    compare(found, gradients(model, sum(reference(model, x).square().sum() for x in inputs)))
    assert all(slot.value is None for slot in model.blocks[0].laurel_0.link.stream.slots)


def test_only_some_blocks_are_checkpointed():
    model = made()
    model.again = lambda block, x: checkpointed(block, x) if block is model.blocks[2] else block(x)
    compare(gradients(model, model(B).sum()), gradients(model, reference(model, B).sum()))


def test_checkpoints_inside_checkpoints():
    model = made()
    model.again = checkpointed
    found = gradients(model, checkpointed(model, A).square().sum())
    compare(found, gradients(model, reference(model, A).square().sum()))


def test_backward_twice():
    model = made()
    model.again = checkpointed
    expected = gradients(model, reference(model, A).sum())
    loss = model(A).sum()
    compare(gradients(model, loss, retain_graph=True), expected)
    compare(gradients(model, loss), expected)


def test_reentrant_checkpointing_is_an_error():
    model = made()
    model.again = lambda block, x: checkpoint(block, x, use_reentrant=True)
    with pytest.raises(LaurelError, match="use_reentrant=False"):
        model(A.clone().requires_grad_()).sum().backward()


def test_checkpointed_blocks_of_no_pass_are_an_error():
    """`forward` called past the hooks: nothing says which pass a block runs again for."""
    model = made()
    model.again = checkpointed
    loss = model.forward(A).sum() + model.forward(B).sum()
    with pytest.raises(LaurelError, match="rather than its forward"):
        loss.backward()


def test_a_checkpointed_shared_block_is_an_error_and_its_model_as_a_whole_is_not():
    model = made(Shared)
    order = [model.first, model.middle, model.middle, model.middle, model.last]
    expected = gradients(model, reference(model, A, order).sum())
    compare(gradients(model, checkpointed(model, A).sum()), expected)
    middle = model.middle
    del model.middle
    object.__setattr__(model, "middle", lambda x: checkpointed(middle, x))
    with pytest.raises(LaurelError, match="layer that is shared"):
        model(A).sum().backward()


def test_a_dropped_loss_frees_the_states():
    model = made()
    model.again = checkpointed
    loss = model(A).sum()
    kept = [weakref.ref(thing) for thing in gc.get_objects() if type(thing) is _Kept]
    assert kept
    del loss
    gc.collect()
    assert all(reference() is None for reference in kept)
    assert all(slot.value is None for slot in model.blocks[0].laurel_0.link.stream.slots)


# torch.compile


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiled_and_checkpointed_blocks(compiler):
    model = made()
    fast = {block: torch.compile(block, backend="aot_eager", fullgraph=True) for block in model.blocks}
    model.again = lambda block, x: checkpointed(fast[block], x)
    inputs = (A, A.flip(0) + 1e-3)
    found = gradients(model, sum(model(x).square().sum() for x in inputs))
    compare(found, gradients(model, sum(reference(model, x).square().sum() for x in inputs)))


def test_compiled_blocks_refuse_what_eager_ones_refuse(compiler):
    model = made()
    for block in model.blocks:
        block.compile(backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(model(A), reference(model, A), **NEAR)
        with pytest.raises(LaurelError, match="block on its own"):
            model.blocks[1](A)


def test_a_whole_model_is_one_graph(compiler):
    model = made(Twice)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    fast = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(2):
        for found, x in zip(fast(A, B), (A, B), strict=True):
            torch.testing.assert_close(found, reference(model.enc, x), **NEAR)
    assert len(graphs) == 1
    model.enc(A)
    fast(A, B)
    assert len(graphs) == 1
