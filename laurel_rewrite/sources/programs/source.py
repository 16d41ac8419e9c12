"""An exported program as a file of PyTorch: one class for each distinct module, with the names of the original's modules and parameters."""

from __future__ import annotations

import ast
import keyword
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from laurel_rewrite.errors import CaptureError
from laurel_rewrite.files.checked import shown
from laurel_rewrite.graph.capture import quiet
from laurel_rewrite.private import PYTREE_IMPORT, class_written, pytree
from laurel_rewrite.sources.programs.leaves import constructor
from laurel_rewrite.sources.programs.statements import Lines, reads_statistics

_HEAD = '''"""{title}

Written from an exported program: one class for each distinct module, and the names of the original's modules and parameters.
"""

{imports}
'''
_IMPORTS = {
    "math.": "import math", "operator.": "import operator", "torch.": "import torch", "F.": "import torch.nn.functional as F", "nn.": "from torch import nn",
    "pytree.": PYTREE_IMPORT,
}  # fmt: skip
_CALL = re.compile(r"@\d+$")


def source_of(program: torch.export.ExportedProgram, title: str) -> str:
    """The text of a module with `build_model()`, whose weights are zeros, and `example_inputs()`.

    Raises:
        CaptureError: the graph has what is not written as source.
    """
    return _Writer(program).text(title)


class _Writer:
    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self.program = program
        try:
            with quiet():
                self.root: Any = torch.export.unflatten(program)
        except Exception as error:  # whatever PyTorch raises of a graph that has no module tree
            raise CaptureError(f"The graph has no tree of modules: {type(error).__name__}: {str(error)[:300]}") from error
        self.classes: dict[str, str] = {}  # text of a class without its name -> its name
        self.names: set[str] = set()
        self.parameters: list[str] = []  # of the model's forward
        self.calls: dict[int, str] = {}  # what makes each module

    def text(self, title: str) -> str:
        root = self._class("", self.root)
        inputs = self._example_inputs()
        parts = [f"class {name}(nn.Module):\n{body}" for body, name in self.classes.items()]
        parts += [f"def build_model():\n    return {root}\n", f"def example_inputs():\n    return {inputs}\n"]
        text = "\n\n".join(parts)
        used = [line for word, line in _IMPORTS.items() if re.search(rf"(?<![\w.]){re.escape(word)}", text)]
        text = _HEAD.format(title=title.replace("\\", "/").replace('"', "'"), imports="\n".join(used)) + "\n\n" + text
        _check_plain(ast.parse(text))
        return text

    # Modules

    def _made(self, path: str, module: Any) -> str:
        """The expression that makes a module."""
        if id(module) not in self.calls:
            self.calls[id(module)] = self._call(path, module)
        return self.calls[id(module)]

    def _call(self, path: str, module: Any) -> str:
        kind = class_written(module)
        if getattr(module, "graph", None) is not None and len(module.graph.nodes) and (call := constructor(kind, module)):
            return call
        if not _is_container(module):
            return self._sequential(path, module) or self._class(path, module)
        children = {name: self._made(f"{path}.{name}".lstrip("."), child) for name, child in self._children(path, module)}
        if [*children] == [str(n) for n in range(len(children))]:
            made = [*children.values()]
            if len(made) > 1 and len(set(made)) == 1:
                return f"nn.ModuleList([{made[0]} for _ in range({len(made)})])"
            return f"nn.ModuleList([{', '.join(made)}])"
        return "nn.ModuleDict({" + ", ".join(f"{name!r}: {call}" for name, call in children.items()) + "})"

    def _sequential(self, path: str, module: Any) -> str:
        """The call that makes a Sequential, where the module is one that calls its children one after another; else ""."""
        if not class_written(module).endswith("container.Sequential"):
            return ""
        before, *nodes, output = module.graph.nodes
        for node in nodes:
            if node.op != "call_module" or node.args != (before,) or node.kwargs:
                return ""
            before = node
        if output.args[0] is not before or [node.target for node in nodes] != [*module._modules]:
            return ""
        return f"nn.Sequential({', '.join(self._made(f'{path}.{name}', child) for name, child in self._children(path, module))})"

    def _children(self, path: str, module: Any) -> Iterator[tuple[str, Any]]:
        """Those of a module; one that is called several times is one, with the code of its calls."""
        for name in dict.fromkeys(_CALL.sub("", name) for name in module._modules):
            calls = [child for key, child in module._modules.items() if _CALL.sub("", key) == name]
            if isinstance(calls[0], torch.fx.GraphModule):  # a region
                continue
            run = [child for child in calls if len(getattr(child, "graph", ()) and child.graph.nodes)] or calls[:1]
            if len({self._made(f"{path}.{name}".lstrip("."), child) for child in run}) > 1:
                raise CaptureError(
                    f"{path}.{name}".lstrip(".") + ": the module is called several times, and does not do the same each time."
                )
            yield name, run[0]

    def _class(self, path: str, module: Any) -> str:
        """The call of the class of a module."""
        made = {name: self._made(f"{path}.{name}".lstrip("."), child) for name, child in self._children(path, module)}
        begin = ["    def __init__(self):", "        super().__init__()"]
        for name, parameter in module._parameters.items():
            if parameter is not None:
                begin.append(f"        self.{_named(name)} = nn.Parameter({_zeros(parameter)}{_gradient(parameter)})")
        begin += [
            f"        self.register_buffer({_named(name)!r}, {_zeros(buffer)})"
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        begin += [
            f"        self.{name} = {call}" if _is_name(name) else f"        self.add_module({name!r}, {call})"
            for name, call in made.items()
        ]
        if path == "":
            begin += [f"        {line}" for line in self._ties()]
        graph = getattr(module, "graph", None)
        body = "\n".join(begin) + "\n"
        if graph is not None and len(graph.nodes):
            body += "\n" + self._forward(path, module)
        if body not in self.classes:
            self.classes[body] = self._class_name((class_written(module) or path or "Model").rpartition(".")[2])
        return f"{self.classes[body]}()"

    def _class_name(self, wanted: str) -> str:
        name = re.sub(r"\W", "", wanted.title() if wanted.islower() else wanted)
        name = name if name.isidentifier() and not keyword.iskeyword(name) else f"Module{name}"
        number, found = 1, name
        while found in self.names:
            number += 1
            found = f"{name}_{number}"
        self.names.add(found)
        return found

    def _ties(self) -> Iterator[str]:
        """Parameters that modules share."""
        first: dict[int, str] = {}
        for name, parameter in self.root.named_parameters(remove_duplicate=False):
            if _CALL.search(name.split(".")[0]) or "@" in name:
                continue
            if id(parameter) in first:
                yield f"self{_access(self.root, name)} = self{_access(self.root, first[id(parameter)])}"
            first.setdefault(id(parameter), name)

    # Forwards

    def _forward(self, path: str, module: Any) -> str:
        if (node := next(reads_statistics(module.graph), None)) is not None:
            raise CaptureError(f"{path}: {node.name} reads statistics of a normalisation, which are not written as source")
        lines = Lines(module, lambda target: _access(module, target))
        inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
        if path:
            signature, unpacked = list[str](), list[str]()
        else:
            signature, unpacked = self._inputs(lines, inputs)
        try:
            out = lines.add(module.graph)
            given = self._outputs(lines, out) if not path else lines.value(tuple(out) if isinstance(out, list) else out)
        except CaptureError as error:
            raise CaptureError(f"{path or 'The model'}: {error}.") from error
        if path:
            signature = [lines.name(node) for node in inputs]
        body = [*unpacked, *lines.lines, f"return {given}"]
        return f"    def forward({', '.join(['self', *signature])}):\n" + "".join(f"        {line}\n" for line in body)

    def _inputs(self, lines: Lines, nodes: list[Any]) -> tuple[list[str], list[str]]:
        """The parameters of the model's forward, and the lines that take what is nested in them apart."""
        by_name = {node.name: node for node in nodes}
        leaves = [
            spec.arg for spec in self.program.graph_signature.input_specs if spec.kind is torch.export.graph_signature.InputKind.USER_INPUT
        ]
        spec = self.program.call_spec.in_spec
        if spec is None:
            raise CaptureError("The program does not say how it is called.")
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        signature, unpacked = [], []
        for place, (key, value) in enumerate([*((None, value) for value in args), *kwargs.items()]):
            if isinstance(value, torch.export.graph_signature.ConstantArgument):
                signature.append(f"{_named(key or value.name or f'input_{place}')}={lines.value(value.value)}")
                continue
            node = by_name.get(getattr(value, "name", None))
            if node is not None:
                if key is not None and key not in lines.taken:
                    lines.names[node] = _named(key)
                    lines.taken.add(key)
                signature.append(lines.name(node) if key is None or lines.name(node) == key else _named(key))
                continue
            name = _named(key or f"input_{place}")
            inner = [by_name.get(getattr(leaf, "name", None)) for leaf in pytree.tree_leaves(value)]
            signature.append(name)
            unpacked.append(f"{', '.join(lines.name(n) if n is not None else '_' for n in inner)}, = pytree.tree_leaves({name})")
        self.parameters = [part.partition("=")[0] for part in signature]
        if len(kwargs) and any("=" in part for part in signature):
            signature.insert(len(args), "*")
        return signature, unpacked

    def _outputs(self, lines: Lines, out: Any) -> str:
        """What the model returns, in the structure in which it did; a library's own class becomes a dictionary."""
        leaves = [lines.value(leaf) for leaf in (out if isinstance(out, list | tuple) else [out])]
        spec = self.program.call_spec.out_spec
        if spec is None:
            return ", ".join(leaves)
        try:
            return _structure(pytree.tree_unflatten(leaves, spec))
        except CaptureError:
            raise
        except Exception as error:  # a class of a library that does not hold names
            raise CaptureError(f"what it returns is not written as source: {type(error).__name__}: {str(error)[:200]}") from error

    def _example_inputs(self) -> str:
        """Inputs like those of the export, by the names of the forward's parameters."""
        examples = self.program.example_inputs
        if examples is None:
            raise CaptureError("The program has no example inputs.")
        args, kwargs = examples
        values = dict(zip(self.parameters, [*args, *kwargs.values()], strict=True))
        return _structure({name: pytree.tree_map(_example, value) for name, value in values.items()})


def _structure(value: Any) -> str:
    """A tree whose leaves are expressions, as an expression."""
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_structure(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_structure, value))}{',' * (len(value) == 1)})"
    if isinstance(value, list):
        return f"[{', '.join(map(_structure, value))}]"
    raise CaptureError(f"{type(value).__name__} is not written as source")


def _example(value: Any) -> Any:
    """An expression that draws a tensor like one."""
    if not isinstance(value, torch.Tensor):
        return value
    shape = tuple(value.shape)
    if value.dtype is torch.bool:
        return f"torch.ones({shape}, dtype=torch.bool)"
    if value.is_floating_point():
        return f"torch.randn({shape}, dtype={value.dtype})"
    low, high = (int(value.min()), int(value.max()) + 1) if value.numel() else (0, 1)
    return f"torch.randint({low}, {high}, {shape}, dtype={value.dtype})"


def _is_name(text: str) -> bool:
    return text.isidentifier() and not keyword.iskeyword(text) and not text.startswith("__")


def _named(text: str) -> str:
    """A name that is written as it is; CaptureError where it is none in Python, for a file may say anything."""
    if not _is_name(text):
        raise CaptureError(f"{shown(text)} is no name in Python, and is not written as source.")
    return text


def _check_plain(tree: ast.Module) -> None:
    """Raise CaptureError where source has more than variables of its own and PyTorch: names came from a file that anybody may have made."""
    held = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    held |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)} | {"super", "range", "float"}
    held |= {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    held |= {
        alias.asname or alias.name.partition(".")[0]
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    for node in ast.walk(tree):
        name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
        foreign = isinstance(node, ast.Name) and name not in held
        inner = isinstance(node, ast.Import | ast.ImportFrom | ast.Lambda) and node not in tree.body
        if foreign or inner or (name.startswith("__") and name not in ("__init__", "__and__", "__or__")):
            raise CaptureError(f"The graph would be written as source that uses {shown(name or 'an import')}, which no graph does.")


def _is_container(module: Any) -> bool:
    """Whether a module only holds others: a list of them, or a dictionary."""
    graph = getattr(module, "graph", None)
    return not (module._parameters or module._buffers or (graph is not None and len(graph.nodes)))


def _access(module: Any, path: str) -> str:
    """What a path is below a module, in its code."""
    text = ""
    for part in (_CALL.sub("", part) for part in path.split(".")):
        inner = getattr(module, "_modules", {}).get(part)
        listed = part.isdecimal() and _is_container(module) and [*module._modules] == [str(n) for n in range(len(module._modules))]
        text += f"[{part}]" if listed else f".{part}" if _is_name(part) else f"._modules[{part!r}]"
        module = inner
    return text


def _zeros(tensor: torch.Tensor) -> str:
    dtype = "" if tensor.dtype is torch.float32 else f", dtype={tensor.dtype}"
    return f"torch.zeros({tuple(tensor.shape)}{dtype})"


def _gradient(parameter: nn.Parameter) -> str:
    return "" if parameter.requires_grad else ", requires_grad=False"
