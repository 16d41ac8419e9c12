"""What others promise nobody, by what it does: each thing of `laurel_rewrite/private.py`, as the package relies on it."""

from __future__ import annotations

import copy
import io
import pickle
import shutil
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from laurel_rewrite import private


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("passing", torch.ones(2), persistent=False)
        self.register_buffer("nothing", None)

    def forward(self, x):
        return self.norm(self.inner(x)) + x


# Graphs


def nodes(graph):
    return [node for node in graph.nodes if node.op == "call_function"]


def test_a_capture_writes_where_gradients_go_off_and_on():
    def call(x):
        with torch.no_grad():
            y = x + 1
        return x + y

    graph = make_fx(call, pre_dispatch=True)(torch.ones(2)).graph
    assert [node.args for node in nodes(graph) if node.target is private.SET_GRAD] == [(False,), (True,)]
    assert private.SET_GRAD.__name__ == "_set_grad_enabled"


def test_set_grad_enabled_puts_back_for_good():
    """The public class, made and let go: `preserved` puts a mode back so."""
    with torch.enable_grad():
        torch.set_grad_enabled(False)
        assert not torch.is_grad_enabled()


def test_inputs_that_the_compiler_made_of_weights_are_marked():
    marked = []

    def backend(module, inputs):
        holders = [node for node in module.graph.nodes if node.op == "placeholder"]
        marked.extend(private.STATIC_INPUT in (node.meta.get("tensor_dict") or {}) for node in holders)
        return module.forward

    torch.compiler.reset()
    torch.compile(nn.Linear(2, 2), backend=backend)(torch.ones(1, 2))
    torch.compiler.reset()
    assert sorted(marked) == [False, True, True]


def test_kinds_of_what_nodes_call():
    class Halves(nn.Module):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return x @ x

    graph = torch.export.export(Halves(), (torch.ones(2, 2),)).graph
    targets = [node.target for node in nodes(graph)]
    assert any(isinstance(target, private.HigherOrderOperator) for target in targets)
    assert isinstance(torch.ops.aten.add.Tensor, private.OpOverload)
    assert not isinstance(torch.ops.aten.add, private.OpOverload)  # a packet
    assert torch.ops.aten.add.Tensor.name() == "aten::add.Tensor"
    assert torch.ops.aten.relu.default.name() == "aten::relu"


def test_what_an_op_says_of_its_operands():
    schema = private.schema_of(torch.ops.aten.add.Tensor)
    assert [(a.name, a.default_value) for a in schema.arguments] == [("self", None), ("other", None), ("alpha", 1)]
    assert not schema.is_mutable
    assert private.schema_of(torch.ops.aten.add_.Tensor).is_mutable
    assert torch.ops.aten.add_.Tensor.overloadpacket.__name__ == "add_"


def test_a_node_gets_another_name_of_its_own():
    graph = torch.fx.Graph()
    first, second = graph.placeholder("a"), graph.placeholder("b")
    private.rename(first, "p_weight")
    private.rename(second, "p_weight")
    assert [first.name, second.name] == ["p_weight", "p_weight_1"]


def test_a_run_on_values_goes_on_where_a_value_is_read():
    def call(x):
        return x * 2 if bool(x.sum() > 0) else x

    graph = make_fx(call, tracing_mode="real", pre_dispatch=True, **private.ALLOWS_VALUES)(torch.ones(2)).graph
    assert "mul" in str(graph)
    with pytest.raises(RuntimeError):
        make_fx(call, tracing_mode="real", pre_dispatch=True)(torch.ones(2))


def test_modules_of_a_program_name_their_classes():
    whole = torch.export.unflatten(torch.export.export(Nested().eval(), (torch.ones(3, 2),)))
    assert private.class_written(whole.inner) == "torch.nn.modules.linear.Linear"
    assert private.class_written(nn.Linear(1, 1)) == ""


def test_nested_values_are_opened_in_the_order_of_an_export():
    class Sum(nn.Module):
        def forward(self, x, given):
            return {"b": x + given["z"][0], "a": given["y"] + 0}

    args = (torch.zeros(1), {"z": [torch.ones(1)], "y": torch.full((1,), 2.0)})
    program = torch.export.export(Sum(), args)
    graph = program.graph_module(*private.pytree.tree_leaves(args))
    space: dict = {}
    exec(private.PYTREE_IMPORT, space)
    for pytree in (private.pytree, space["pytree"]):
        leaves, spec = pytree.tree_flatten(program.module()(*args))
        assert [leaf.item() for leaf in leaves] == [value.item() for value in pytree.tree_leaves(graph)]
        assert pytree.tree_unflatten(leaves, spec)["a"].item() == 2
        assert pytree.tree_map_only(torch.Tensor, lambda t: t.item(), {"a": [leaves[1]], "b": "text"}) == {"a": [2.0], "b": "text"}
        assert pytree.tree_structure({"a": 1}) != pytree.tree_structure([1])


def test_values_without_values_and_a_module_with_them():
    model = Nested().eval()
    with private.FakeTensorMode(allow_non_fake_inputs=True) as fake:
        state = {name: fake.from_tensor(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
        with private.reparametrized(model, state, tie_weights=True):
            assert model.inner.weight is state["inner.weight"]
            assert model(fake.from_tensor(torch.ones(5, 2))).shape == (5, 2)
    assert isinstance(model.inner.weight, nn.Parameter)
    assert type(model.kept) is torch.Tensor


def test_tied_weights_are_replaced_together():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    new = torch.ones(2, 2)
    with private.reparametrized(model, {"0.weight": new}, tie_weights=True):
        assert model[1].weight is new


def test_each_op_is_seen_and_no_op_outside_of_the_modes():
    class Seen(private.TorchDispatchMode):
        names: tuple[str, ...] = ()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names += (func.name(),)
            return func(*args, **(kwargs or {}))

    with Seen() as seen:
        F.linear(torch.ones(1, 2), torch.ones(2, 2))
        with private.without_modes():
            torch.ones(2) + 1
    assert "aten::mm" in seen.names or "aten::addmm" in seen.names
    assert "aten::add.Tensor" not in seen.names


# Memory


def test_memory_is_known_by_its_storage():
    base = torch.zeros(4)
    assert private.memory_id(base.untyped_storage()) == private.memory_id(base[1:].untyped_storage())
    assert private.memory_id(base.untyped_storage()) != private.memory_id(base.clone().untyped_storage())
    for device in ("meta", "cpu"):
        empty, other = (torch.empty(0 if device == "cpu" else 2, device=device) for _ in range(2))
        assert private.memory_id(empty.untyped_storage()) != private.memory_id(other.untyped_storage())


def test_a_sparse_tensor_whose_indices_come_twice_has_its_parts():
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 0]]), torch.tensor([1.0, 2.0]), (3,), check_invariants=True)
    indices, values = private.sparse_parts(sparse)
    assert indices.tolist() == [[0, 0]]
    values.mul_(2)  # its own memory
    assert sparse.to_dense().tolist() == [6.0, 0.0, 0.0]


# Autograd


class Within(torch.autograd.Function):
    """Asks during the backward pass."""

    @staticmethod
    def forward(ctx, x, ask):
        ctx.ask = ask
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.ask()
        return grad, None


def test_a_backward_pass_has_a_number_and_an_end():
    found, told = [], []

    def ask():
        found.append((private.backward_number(), private.backward_keeps_graph()))
        private.at_end_of_backward(lambda: told.append(len(found)))

    def passing():
        return Within.apply(Within.apply(torch.ones(1, requires_grad=True), ask), ask)

    out = passing()
    assert private.backward_number() == -1
    out.backward(retain_graph=True)
    out.backward()
    numbers, kept = zip(*found, strict=True)
    assert numbers[0] == numbers[1] != numbers[2] == numbers[3]
    assert -1 not in numbers
    assert kept == (True, True, False, False)
    assert told == [2, 2, 4, 4]  # at the end of each pass, not where it was asked for
    with pytest.raises(RuntimeError):
        private.at_end_of_backward(lambda: None)


def test_a_block_that_a_checkpoint_runs_has_hooks_for_saved_tensors():
    found = []

    def block(x):
        found.append((private.saved_tensors_hooks(False) is not None, private.backward_number() >= 0))
        return x.sin()

    x = torch.ones(2, requires_grad=True)
    block(x)
    checkpoint(block, x, use_reentrant=False).sum().backward()
    assert found[0] == (False, False)
    assert found[1] == (True, False)
    assert found[2] == (True, True)


# Compilers


def test_a_script_forgets_how_it_was_differentiated():
    @torch.jit.script
    def twice(x):
        return (x * 2).relu()

    class Scripted(nn.Module):
        def __init__(self):
            super().__init__()
            self.script = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))

        def forward(self, x):
            return self.script(x) + twice(x)

    model, x = Scripted(), torch.ones(2, requires_grad=True)

    def ops():
        with torch.jit.optimized_execution(False):
            return [node.target for node in nodes(make_fx(lambda v: model(v), tracing_mode="real", pre_dispatch=True)(x).graph)]

    before = ops()
    for _ in range(4):
        model(x).sum().backward()
    private.forget_compiled_scripts(model)
    assert ops() == before
    assert torch.ops.aten.detach.default not in before


def test_a_graph_without_hooks_is_not_taken_for_one_with_them():
    private.graphs_see_hooks()
    torch.compiler.reset()
    layer = nn.Linear(2, 2)
    fast = torch.compile(nn.Sequential(layer), backend="eager")
    x = torch.ones(1, 2)
    before = fast(x)
    layer.register_forward_hook(lambda module, args, out: out + 1)
    assert torch.equal(fast(x), before + 1)
    torch.compiler.reset()


def test_a_model_is_compiled_for_a_while():
    ran = []

    def backend(module, inputs):
        ran.append(module)
        return module.forward

    model = nn.Sequential(Nested()).eval()  # what is of PyTorch alone is not compiled
    torch.compiler.reset()
    with private.compiled_call(model, backend):
        model(torch.ones(2, 2))
        assert ran
    torch.compiler.reset()
    before = len(ran)
    model(torch.ones(2, 2))
    assert len(ran) == before


# Modules


def test_what_is_registered_lies_in_dictionaries():
    model = Nested()
    assert [*model._modules] == ["inner", "norm"]
    assert [*model.inner._parameters] == ["weight", "bias"]
    assert [*model._buffers] == ["kept", "passing", "nothing"]
    model._modules["inner"] = None  # children() leaves such out
    assert [*model._modules] == ["inner", "norm"]
    model._buffers["kept"] = torch.zeros(2)
    assert model.kept.sum() == 0
    assert private.saved_buffers(model) == ["kept", "nothing"]
    assert {name for name in model.state_dict() if "." not in name} == {"kept"}


@pytest.mark.parametrize("move", [lambda m: m.to(torch.float64), lambda m: m.to_empty(device="cpu"), lambda m: m.half()])
def test_all_that_moves_a_module_goes_through_one_method(move):
    class Told(nn.Linear):
        told = 0

        def _apply(self, fn, recurse=True):
            self.told += 1
            return super()._apply(fn, recurse)

    inner = Told(2, 2, device="meta" if move(nn.Linear(1, 1)).weight.dtype == torch.float32 else "cpu")
    move(nn.Sequential(inner))
    assert inner.told == 1


def test_hooks_are_seen_and_taken_off():
    for register in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
        layer = nn.Linear(2, 2)
        assert not private.has_hooks(layer)
        getattr(layer, f"register_{register}")(lambda *_: None)
        assert private.has_hooks(layer)
    layer, called = nn.Linear(2, 2), []

    def after(module, args, out):
        called.append("after")

    def before(module, args, kwargs):
        called.append("before")

    layer.register_forward_hook(after, always_call=True)
    layer.register_forward_pre_hook(before, with_kwargs=True)
    stays = layer.register_forward_hook(lambda *_: called.append("stays"))
    twin = copy.deepcopy(layer)
    twin(torch.ones(1, 2))
    assert sorted(called) == ["after", "before", "stays"]
    assert private.hooks_of_calls(layer)[0] is after
    private.forget_hooks(twin, lambda hook: hook in (after, before))
    called.clear()
    twin(torch.ones(1, 2))
    assert called == ["stays"]
    stays.remove()
    layer(torch.ones(1, 2))
    assert "stays" not in called[1:]


def test_a_parametrised_module_pickles():
    from laurel_rewrite.files.pickling import MODULE

    layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    buffer = io.BytesIO()
    MODULE.Pickler(buffer).dump(layer)
    again = pickle.loads(buffer.getvalue())
    assert type(private.state_without_old_hooks(layer)["_load_state_dict_pre_hooks"]) is OrderedDict
    assert type(layer._load_state_dict_pre_hooks) is OrderedDict
    assert torch.equal(again.weight, layer.weight)
    again.parametrizations.weight.original1.data.mul_(2)  # it computes, and does not remember
    assert torch.allclose(again(torch.ones(1, 2)), F.linear(torch.ones(1, 2), again.weight, again.bias))
    again.load_state_dict(layer.state_dict())


def test_values_of_enumerations_are_known_by_their_names():
    for value in (torch._C._SDPBackend.MATH, torch.Tag.core):
        assert private.is_enumeration(value)
        assert private.enumeration_member(type(value).__qualname__, value.name) == value
    assert not private.is_enumeration(3)
    assert not private.is_enumeration(torch.float32)


# Wrappers


def test_wrappers_name_what_they_wrap():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    layer = nn.Linear(2, 2)
    assert dict(torch.compile(layer).named_children()) == {private.OPTIMIZED: layer}
    assert {path for path, module in checkpoint_wrapper(layer).named_modules() if module is layer} <= private.WRAPPERS


def test_what_fsdp1_flattened(tmp_path):
    from torch.distributed.fsdp import FullyShardedDataParallel

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        layer = nn.Linear(3, 2)
        unit = FullyShardedDataParallel(layer, use_orig_params=True, device_id=torch.device("cpu"))
        assert dict(unit.named_children()) == {private.FSDP_WRAPPED: layer}
        assert not private.fsdp_ran(unit)
        unit(torch.ones(1, 3))
        assert private.fsdp_ran(unit)
        assert [(p is q, [*shape]) for (p, shape), q in zip(private.flattened_by_fsdp(unit), layer.parameters(), strict=True)] == [
            (True, [2, 3]),
            (True, [2]),
        ]
        one = FullyShardedDataParallel(nn.Linear(3, 2), use_orig_params=False, device_id=torch.device("cpu"))
        assert private.flattened_by_fsdp(one) is None
        assert private.flattened_by_fsdp(FullyShardedDataParallel(nn.ReLU(), device_id=torch.device("cpu"))) == []
    finally:
        torch.distributed.destroy_process_group()


def test_what_compiles_for_the_compiler():
    names = private.compilers()
    assert all(isinstance(name, str) for name in names)
    if (found := next(filter(None, map(shutil.which, names)), None)) is not None:  # the one that a compiled model is built with
        from torch._inductor.cpp_builder import get_cpp_compiler

        assert shutil.which(get_cpp_compiler()) == found
