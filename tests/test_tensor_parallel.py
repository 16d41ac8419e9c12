"""Connections in tensor parallel models: what the engines' table does not have. Values and gradients on two processes are its own."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from conftest import away_from_start, real
from torch import nn
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module
from toys import CASES, D

from laurel_rewrite import ConfigError, rewrite
from laurel_rewrite.training.tensor_parallel import ConnectionParallel, check_parallel, parallel_plan
from tools.engines.case import CLASSES
from tools.engines.ranks import Ranks
from tools.engines.table import EXACT, Engine, cell, engines

pytestmark = [pytest.mark.usefixtures("toys"), pytest.mark.engines]
X = torch.randn(2, 5, D)


def test_the_plan_has_every_connection_and_norms_that_are_plain_need_none():
    model = rewrite(CASES["plain"].make(), (X,), rank=4)
    plan = parallel_plan(model)
    assert {path: repr(style) for path, style in plan.items()} == dict.fromkeys(
        ("laurel_0", "laurel_1"), "ConnectionParallel(sequence_dim=1)"
    )
    check_parallel(model)


@pytest.mark.parametrize(
    ("dimension", "message"),
    [(2, "dimension 2 of the stream is that of its features"), (3, "from 0 to 2, for the stream has 3 dimensions, not 3"), (-2, "not -2")],
)
def test_a_dimension_that_is_no_sequence_is_refused(dimension, message):
    with pytest.raises(ConfigError, match=message):
        parallel_plan(rewrite(CASES["plain"].make(), (X,), rank=4), sequence_dim=dimension)


def test_channels_first_and_models_without_connections_are_refused():
    example = real("resnet18")
    with pytest.raises(ConfigError, match="has no connections to be parallel"):
        parallel_plan(example.model)
    with pytest.raises(ConfigError, match="dimension 1 of the stream is that of its features"):
        parallel_plan(rewrite(example.model, example.args, variant="rw+lr", rank=4))


def test_what_reads_the_stream_apart_needs_its_norms_parallel():
    example = real("llama")
    model = rewrite(example.model, example.args, example.kwargs, variant="toy-apart")
    assert len(parallel_plan(model)) == 6
    with pytest.raises(ConfigError, match="Leave the connections out of the plan"):
        parallel_plan(model, sequence_dim=None)


@pytest.fixture
def mesh(tmp_path):
    """A mesh of one process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_operators_that_make_tensors_of_their_own_are_refused(mesh):
    model = away_from_start(rewrite(CASES["plain"].make(), (X,), variant="toy-depth")).train()
    with pytest.raises(ConfigError, match="laurel_0: toy-depth makes tensors of its own beside the stream, random ones perhaps"):
        ConnectionParallel()._apply(model.laurel_0, mesh)
    with pytest.raises(ConfigError, match="is the style of connections, and Plain is none"):
        ConnectionParallel()._apply(model, mesh)


def test_a_copy_of_a_parallel_model_lies_on_the_same_devices(mesh):
    model = away_from_start(rewrite(CASES["plain"].make(), (X,), variant="rw+lr", rank=4)).eval()
    expected = model(X)
    parallelize_module(model, mesh, parallel_plan(model))
    twin = copy.deepcopy(model)
    assert twin.laurel_0.mix.device_mesh == mesh
    # float32, by DTensor's own products.
    torch.testing.assert_close(twin(X), expected, rtol=1e-5, atol=1e-6)


class Loop(nn.Module):
    """Sites that are turns of a loop, with norms beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(2))
        self.maps = nn.ModuleList(nn.Linear(D, D) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, linear in zip(self.norms, self.maps, strict=True):
            x = x + linear(norm(x))
        return x


def test_forgotten_turns_of_a_loop_are_found(mesh):
    model = rewrite(Loop(), (X,), rank=4)
    check_parallel(model)
    parallelize_module(model, mesh, {"norms.0": SequenceParallel(use_local_output=True)})
    with pytest.raises(ConfigError, match=r"laurel_0\.0: the norm norms\.0 beside it is parallel along the sequence"):
        check_parallel(model)
    parallelize_module(model, mesh, parallel_plan(model))
    check_parallel(model)


@pytest.fixture(scope="module")
def pool():
    with contextlib.closing(Ranks()) as ranks:
        yield ranks


@pytest.mark.parametrize("variant", ["toy-vector", "toy-echo", "toy-reader", "toy-scheduled", "toy-apart", "toy-ladder"])
def test_other_operators_along_the_sequence_and_in_pipelines(variant, pool, monkeypatch):
    """Buffers, branch inputs, reads apart."""
    monkeypatch.setitem(CLASSES, variant, variant)
    for name in ("sequence parallel", "pipeline by hand, 1F1B"):
        known = engines()[name]
        assert cell(Engine(name, known.what, known.run, 2, EXACT), variant, pool).startswith("works")
