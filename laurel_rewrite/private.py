"""What others promise nobody, and this package uses all the same: of PyTorch, transformers, Accelerate, torchtitan and onnx2torch.

A new release of theirs may change these without a word. Each has here what it is for, and what would show if it changed; `tests/test_private.py` and
`test_private_libraries.py` try what is relied on, and `test_house.py` that no other module reaches for such names. Beside them stand, everywhere, the three dictionaries of
`nn.Module`, `_modules`, `_parameters` and `_buffers`, which hold what a module registered, by name and in order, and `nn.Module._apply`, which a
connection overrides: through it goes all that moves a module, `to_empty` too.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize
from torch.nn.utils.stateless import _reparametrize_module as reparametrized
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as without_modes

__all__ = [
    "ALLOWS_VALUES",
    "FSDP_WRAPPED",
    "HF_INITIALIZED",
    "OPTIMIZED",
    "PYTREE_IMPORT",
    "SET_GRAD",
    "STATIC_INPUT",
    "WRAPPERS",
    "FakeTensorMode",
    "HigherOrderOperator",
    "OpOverload",
    "TorchDispatchMode",
    "at_end_of_backward",
    "attention_of",
    "backward_keeps_graph",
    "backward_number",
    "built_from",
    "class_written",
    "compiled_call",
    "compilers",
    "enumeration_member",
    "flattened_by_fsdp",
    "forget_compiled_scripts",
    "forget_hooks",
    "forget_training_spec",
    "fsdp_ran",
    "graphs_see_hooks",
    "has_hooks",
    "hooks_of_calls",
    "is_enumeration",
    "known_converters",
    "known_model_converters",
    "memory_id",
    "models_of_configurations",
    "name_or_path",
    "own_accelerator_state",
    "parametrise_again",
    "pytree",
    "rename",
    "reparametrized",
    "saved_buffers",
    "saved_tensors_hooks",
    "schema_of",
    "sparse_parts",
    "state_without_old_hooks",
    "without_modes",
]

# Graphs

SET_GRAD: Callable[[bool], None] = torch._C._set_grad_enabled
"""The function that a capture above autograd (`make_fx(..., pre_dispatch=True)`) writes where gradients go on or off. It is read by its
name, `_set_grad_enabled`, and written where regions are put in place of their calls. Under another name, sums under `no_grad` would count as trained."""

STATIC_INPUT = "_dynamo_static_input_type"
"""Key in `meta["tensor_dict"]` of an input that TorchDynamo made of a parameter or buffer. Without it, a back end of `torch.compile` would take weights for
data, and find streams that begin in them."""

PYTREE_IMPORT = "from torch.utils import _pytree as pytree"
"""The same `pytree` as here, in source that is written from an exported program: no public module opens nested
inputs in the order of `torch.export`. Written models that have such inputs would not import."""

ALLOWS_VALUES: dict[str, Any] = {"_error_on_data_dependent_ops": False}
"""Option of `make_fx`: a run on concrete values goes on where the model reads a value of a tensor. Else the run is refused."""

# `OpOverload`, `HigherOrderOperator`: the classes of what a node calls, an op of ATen (`torch.ops.aten.add.Tensor`) and one that calls graphs (autocast,
# checkpoints, control flow). Else ops were taken for plain functions, and regions stayed closed: their sums would be missing in `sites`.

# `FakeTensorMode`: tensors with shapes and no values. It is for captures of what does not run here (a model on the meta device), and for shapes of graphs that
# have none. `reparametrized`: a module whose parameters and buffers are others for a while; `torch.func.functional_call` is that for one call alone, and an
# export calls the module itself. Without either, models on the meta device could not be captured.

# `pytree`: PyTorch's own order in nested inputs and outputs, the one `torch.export` and `torch.compile` open them in. Another order would mix up inputs.

# `TorchDispatchMode`: sees each op that runs, below autograd, for counts of operations and for reads of what an add in place would have changed.
# `without_modes`: leaves all such modes for a while, so that what selective checkpoints record is the model's alone.


def schema_of(op: OpOverload) -> Any:
    """What an op says of its operands: `arguments`, each with `name` and `default_value`, and `is_mutable`, where it writes into one. Without the second,
    adds in place would be taken for adds that make a value of their own; without the first, operands are given the names of others."""
    return op._schema


def rename(node: fx.Node, name: str) -> None:
    """Give a node another name, which its graph makes its own where it is taken. Weights could not be told from data in a graph of one run."""
    node._rename(name)


def class_written(module: Any) -> str:
    """The full name of the class that a module of `torch.export.unflatten` stands for, "" where it is none; source has the class's own name by it, and
    modules of `torch.nn` their constructors. Else every module is written op by op."""
    return getattr(module, "_ty", None) or ""


# Memory


def memory_id(storage: Any) -> int:
    """The same for two storages that are one memory, and for others not, while both are held. `data_ptr()` is 0 for all that are empty or without values.
    Else tied tensors would be copied, and put back, twice."""
    return int(storage._cdata)


def sparse_parts(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Indices and values of a sparse tensor (COO) as they lie in memory; `indices()` refuses one with indices that come twice. Else a model with such a
    tensor is not put back after a run."""
    return tensor._indices(), tensor._values()


# Autograd

backward_number: Callable[[], int] = torch._C._current_graph_task_id
"""The number of the backward pass that this thread runs in, -1 where it runs in none. A stream knows by it that a checkpointed block runs again."""

backward_keeps_graph: Callable[[], bool] = torch._C._autograd._get_current_graph_task_keep_graph
"""Whether the backward pass that runs has `retain_graph=True`: what a stream keeps for blocks that run again is given away after it otherwise."""

saved_tensors_hooks: Callable[[bool], Any] = torch._C._autograd._top_saved_tensors_default_hooks
"""The hooks for saved tensors that are in force (with False: those that a user set), None where there are none: checkpoints are such hooks. If this stayed
None, blocks that run again would find no state, and raise; if it never were None, each forward would keep its states."""


def at_end_of_backward(call: Callable[[], None]) -> None:
    """Call this when the backward pass that runs has ended; RuntimeError outside of one. Else the states of a pass stay, and the next one finds them."""
    torch.autograd.Variable._execution_engine.queue_callback(call)


# Compilers


def forget_compiled_scripts(model: nn.Module) -> None:
    """Let TorchScript forget what it compiled of all that was scripted in this process, and of the scripted modules of a model, and compile that again when
    it runs next. Else a graph of one run has a detach in it that no code of the model's has, and its sums lie behind one."""
    unit: Any = torch.jit._state._python_cu  # torch's stub has no results
    scripts = [*unit.get_functions()]
    for module in (m for m in model.modules() if isinstance(m, torch.jit.ScriptModule)):
        scripts += [module._c._get_method(name) for name in module._c._method_names()]
    for script in scripts:
        script._debug_flush_compilation_cache()


def compilers() -> list[str]:
    """What TorchInductor compiles C++ with, of which it takes the first that is there. It imports the compiler. Else `doctor` would look for another one."""
    import torch._inductor.config as config

    names = config.cpp.cxx
    return [name for name in (names if isinstance(names, tuple | list) else [names]) if name]


def graphs_see_hooks() -> None:
    """Let TorchDynamo look whether a module has hooks before it takes a graph for it. It imports the compiler. Else the graph of a block without hooks would
    be taken for one with them, and an operator's values not arrive where they are read."""
    torch._dynamo.config.skip_nnmodule_hook_guards = False


@contextlib.contextmanager
def compiled_call(model: nn.Module, backend: Any) -> Iterator[None]:
    """A model that is compiled when it is called, for a while: `nn.Module.compile` has no way back. If it kept its graphs elsewhere, a model would stay
    compiled after a proof."""
    before = model._compiled_call_impl
    model.compile(backend=backend)
    try:
        yield
    finally:
        model._compiled_call_impl = before


# Modules


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of a module calls hooks of its own beside its forward. Else a fused sum would leave them out."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def hooks_of_calls(module: nn.Module) -> list[Any]:
    """The hooks after a module's forward. Else a stage of a pipeline that was cut before the norm behind its last block is not refused."""
    return [*module._forward_hooks.values()]


def forget_hooks(module: nn.Module, ours: Callable[[Any], bool]) -> None:
    """Take hooks before and after forward off a module, whoever has their handles; a copy of a module, and one that was unpickled, has hooks and no handles.
    Else `remove` would leave connections' hooks behind."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if ours(hook)]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def saved_buffers(module: nn.Module) -> list[str]:
    """Names of the buffers of a module itself that its `state_dict` has, those without a value too. Else a file's names would be refused or not missed."""
    return [name for name in module._buffers if name not in module._non_persistent_buffers_set]


def state_without_old_hooks(module: nn.Module) -> dict[str, Any]:
    """What a parametrised module pickles, without the hooks that read checkpoints of older ways to parametrise, which are closures."""
    return {**module.__dict__, "_load_state_dict_pre_hooks": OrderedDict()}


def parametrise_again(module: nn.Module) -> None:
    """Give a bare module the class and properties of its `parametrizations`, which it has by what was pickled. Else models with weight_norm cannot be saved
    whole, and so no program exported of them."""
    inject: Callable[..., None] = parametrize._inject_new_class
    inject(module)
    for name in module.parametrizations:  # type: ignore[union-attr]  # a ModuleDict
        parametrize._inject_property(module, name)


def is_enumeration(thing: Any) -> bool:
    """Whether a thing is a value of an enumeration of C++ that lies in `torch._C` by its name (`_EngineType`), which does not pickle."""
    return getattr(torch._C, type(thing).__qualname__, None) is type(thing) and hasattr(type(thing), "__members__")


def enumeration_member(enumeration: str, name: str) -> Any:
    """The value of an enumeration of C++ by the names of both."""
    return getattr(getattr(torch._C, enumeration), name)


# Wrappers

FSDP_WRAPPED = "_fsdp_wrapped_module"
"""The child of FSDP1's wrapper that is the wrapped module."""

OPTIMIZED = "_orig_mod"
"""The child of what `torch.compile` makes of a module."""

WRAPPERS = frozenset({FSDP_WRAPPED, "_checkpoint_wrapped_module", OPTIMIZED})
"""Names that wrappers give what they wrap, the wrapper of checkpoints too. Else paths of sites, and of what they learned, would have these in them."""


def fsdp_ran(unit: Any) -> bool:
    """Whether FSDP1 knows which unit is outermost, which the first forward finds out. Else the first connection that is asked for what it learned makes its
    own unit the outermost, and training fails after that."""
    return unit._is_root is not None


def flattened_by_fsdp(unit: Any) -> list[tuple[Tensor, torch.Size]] | None:
    """The parameters that a unit of FSDP1 flattened, with the shapes they had; None where they are one parameter now. A unit without has none. Else all were
    vectors to `param_groups`."""
    flat = unit._flat_param
    if flat is None:
        return []
    return None if flat._params is None else [*zip(flat._params, flat._shapes, strict=True)]


# transformers

HF_INITIALIZED = "_is_hf_initialized"
"""Attribute of modules and parameters that `init_weights` of transformers leaves alone. Else `from_pretrained` undoes the start of connections."""


def attention_of(config: Any) -> Any:
    """The implementation of attention that a configuration chose, which its own text leaves out. Else a saved model comes back with another one."""
    return config._attn_implementation


def name_or_path(config: Any) -> str:
    """Where a configuration was read from, "" where it was made here. Else operators that were saved beside a model are not found."""
    return str(config._name_or_path or "")


def models_of_configurations(auto: Any) -> Any:
    """The mapping of an Auto class from configurations to models, with `register`; None where it has none. Else a configuration has no model, and a saved
    one is not found."""
    return getattr(auto, "_model_mapping", None)


def built_from(maker: Any, config: Any, **options: Any) -> Any:
    """A model with random weights, from an Auto class or, where its configuration names one, from the class of a model."""
    return (maker.from_config if hasattr(maker, "from_config") else maker._from_config)(config, **options)


# Engines


@contextlib.contextmanager
def own_accelerator_state() -> Iterator[None]:
    """Accelerate without the state that it keeps for a process, for a while; one that was there is put aside and comes back. Else the precision of one
    comparison would be that of the next."""
    from accelerate.state import AcceleratorState

    before = dict(AcceleratorState._shared_state)
    AcceleratorState._reset_state()
    try:
        yield
    finally:
        AcceleratorState._reset_state()
        AcceleratorState._shared_state.update(before)


def known_model_converters(converters: Any) -> MutableMapping[str, Any]:
    """torchtitan's registered model converters by name; to register one twice raises."""
    known: MutableMapping[str, Any] = converters._registry_model_converter_cls
    return known


def forget_training_spec(specs: Any, model: str) -> None:
    """Take out what was registered for a model in torchtitan, where to register it twice raises."""
    specs._extra_train_specs.pop(model, None)


def known_converters(registry: Any) -> dict[Any, Any]:
    """onnx2torch's converters by operator and version; those of ours come into a copy. Else it has to be asked one by one."""
    known: dict[Any, Any] = registry._CONVERTER_REGISTRY
    return known
