"""What people train with: caches, activation checkpointing, torch.compile."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import away_from_start, real
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from toys import CASES, D

from laurel_rewrite import ConfigError, LaurelError, load, rewrite, save
from laurel_rewrite.operators import registry
from laurel_rewrite.profiling.training import profile_training

IDS = torch.randint(0, 90, (2, 9), generator=torch.Generator().manual_seed(3))


def rewritten(name: str, variant: str) -> nn.Module:
    example = real(name)
    return away_from_start(rewrite(example.model, example.args, example.kwargs, variant=variant, rank=4), spread=0.1)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("variant", ["rw+lr", "rw+lr+pa"])
def test_generate_with_and_without_cache(variant):
    model = rewritten("gpt2", variant).eval()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, use_cache=True, **options), model.generate(IDS, use_cache=False, **options))


@pytest.mark.parametrize("variant", ["rw+lr", "rw+lr+pa", "pa"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_gradient_checkpointing_gives_the_same_gradients(name, variant):
    model = rewritten(name, variant).train()
    plain = gradients(model)
    assert all(g.abs().max() > 0 for n, g in plain.items() if "laurel_" in n)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    again = gradients(model)
    for key, gradient in plain.items():
        # float32: the model without LAuReL differs by 6e-8 under checkpointing, too.
        torch.testing.assert_close(again[key], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", ["rewritten", "loaded", "copied", "pickled"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_checkpointing_is_as_much_on_as_in_the_original(name, how, tmp_path):
    """transformers wraps forward in `__init_subclass__`, and checkpoints where the wrapper finds itself in the class."""
    model = rewritten(name, "rw+lr")
    if how == "loaded":
        save(model, tmp_path)
        model = load(tmp_path)
    elif how != "rewritten":
        model = copy.deepcopy(model) if how == "copied" else pickle.loads(pickle.dumps(model))
    assert checkpoints_in(model) == checkpoints_in(real(name).model) == 3


def checkpoints_in(model: nn.Module) -> int:
    """How many blocks a forward pass in train mode checkpoints."""
    model.train().activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    calls = []
    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            plain = module._gradient_checkpointing_func
            module._gradient_checkpointing_func = lambda *a, plain=plain, **k: calls.append(1) or plain(*a, **k)
    model(input_ids=IDS)
    return len(calls)


def test_reentrant_checkpointing_with_history_is_refused():
    model = rewritten("gpt2", "rw+lr+pa").train()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(LaurelError, match="use_reentrant=False"):
        gradients(model)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_forwards_before_a_backward(checkpointing):
    model = rewritten("gpt2", "rw+lr+pa").eval()
    apart = {name: gradient.double() for name, gradient in gradients(model).items()}
    model.zero_grad()
    model(input_ids=IDS.flip(0), labels=IDS).loss.backward()
    if checkpointing:
        model.train()  # without its dropout, which transformers' checkpointing needs the mode for
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    expected = {name: apart[name] + p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    (model(input_ids=IDS, labels=IDS).loss + model(input_ids=IDS.flip(0), labels=IDS).loss).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad.double(), expected[name], rtol=1e-4, atol=1e-6)  # float32 in another order of sums


def test_checkpointing_inside_a_loop_of_ones_own():
    class Checkpointed(CASES["tied"].make().__class__):
        def forward(self, x):
            return checkpoint(self.block, x, use_reentrant=False)

    model = Checkpointed()
    better = away_from_start(rewrite(model.block, (torch.randn(2, 5, D),), variant="rw+lr+pa", rank=4))
    model.block = better
    x = torch.randn(2, 5, D)
    model.eval()
    model(x).sum().backward()
    checkpointed = {n: p.grad.clone() for n, p in better.named_parameters()}
    better.zero_grad()
    better(x).sum().backward()
    for name, p in better.named_parameters():
        torch.testing.assert_close(p.grad, checkpointed[name], rtol=0, atol=0)


@pytest.mark.parametrize(("variant", "graphs"), [("rw+lr", 1), ("lr", 1), ("rw+lr+pa", 3)])
def test_compiled_blocks_share_a_graph(variant, graphs):
    """PA: the windows are clipped in the first block (lags 1 and 2), and the second is the first to read two states of others."""
    torch._dynamo.reset()
    model = rewritten("llama", variant).eval()
    expected = model(input_ids=IDS, use_cache=False).logits
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    for block in model.model.layers:
        block.compile(backend=backend, fullgraph=True)
    # float32, and dynamo's graph may order sums otherwise.
    torch.testing.assert_close(model(input_ids=IDS, use_cache=False).logits, expected, rtol=1e-5, atol=1e-6)
    assert len(compiled) == graphs


def test_growing_states_split_graphs_in_a_process_that_unpickled_the_model_too(toys):
    torch._dynamo.reset()
    example = real("llama")
    packed = pickle.dumps(away_from_start(rewrite(example.model, example.args, example.kwargs, variant="toy-dense")))
    operator = registry.operator("toy-dense").connection
    del operator.between_graphs  # as in a process that has made none
    model = pickle.loads(packed).eval()
    expected = model(input_ids=IDS, use_cache=False).logits
    for block in model.model.layers:
        block.compile(backend="eager")
    # float32, and dynamo's graph may order sums otherwise.
    torch.testing.assert_close(model(input_ids=IDS, use_cache=False).logits, expected, rtol=1e-5, atol=1e-6)


def test_an_optimiser_step_lowers_the_loss():
    model = rewritten("gpt2", "rw+lr+pa").train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        optimiser.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


# What a step costs


def test_training_steps_are_measured_and_change_nothing(monkeypatch):
    x = torch.randn(2, 5, D)
    plain = CASES["plain"].make()
    models = {"baseline": plain, "laurel": rewrite(plain, (x,), variant="rw+lr", rank=4)}
    before = {name: {key: value.clone() for key, value in model.state_dict().items()} for name, model in models.items()}

    def refuse(model):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", refuse)
    result = profile_training(models, (x,), {}, seconds=0)
    assert [(row.name, row.mode, row.step.verdict == "baseline") for row in result.rows] == [
        ("baseline", "eager", True),
        ("laurel", "eager", False),
    ]
    assert result.notes == ("compiled training could not be measured: RuntimeError: no compiler here",)
    baseline, laurel = result.rows
    assert laurel.parameters - baseline.parameters == 2 * (2 + 2 * 4 * D)
    assert laurel.saved_bytes > baseline.saved_bytes
    for name, model in models.items():
        assert all(torch.equal(value, before[name][key]) for key, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())


def test_bytes_kept_for_backward():
    """A linear layer keeps its input, a ReLU its output; weights are not counted."""
    net = nn.Sequential(nn.Linear(D, 3 * D), nn.ReLU(), nn.Linear(3 * D, D))
    result = profile_training({"net": net}, (torch.randn(7, D),), {}, seconds=0)
    kept = 4 * 7 * (D + 3 * D)  # the input, and the ReLU's output, which the second layer reads
    loss = 4 * 7 * D  # the output, of whose square the mean is taken
    assert result.rows[0].saved_bytes == kept + loss


@pytest.fixture
def one_process(tmp_path):
    """A process group of one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("engine", ["DistributedDataParallel", "FSDPModule"])
def test_a_model_whose_parameters_an_engine_knows_is_refused(engine, one_process):
    """DDP averages the gradients of the parameters that it found: each process would train a LAuReL of its own."""
    model = CASES["plain"].make()
    wrapped = nn.parallel.DistributedDataParallel(model) if engine == "DistributedDataParallel" else fully_shard(model)
    with pytest.raises(ConfigError, match=rf"The model is a {engine}, .* Rewrite the model first, and wrap or shard the result"):
        rewrite(wrapped, (torch.randn(2, 5, D),), rank=4)


def test_a_rewritten_model_in_data_parallel_sends_all_gradients(one_process):
    x = torch.randn(2, 5, D)
    model = nn.parallel.DistributedDataParallel(away_from_start(rewrite(CASES["plain"].make(), (x,), rank=4)))
    sent = []

    def send(state, bucket):
        sent.extend(bucket.parameters())
        return default_hooks.allreduce_hook(None, bucket)

    model.register_comm_hook(None, send)
    model(x).square().mean().backward()
    assert {id(p) for p in sent} == {id(p) for p in model.parameters()}
