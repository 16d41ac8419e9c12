"""The house: packages import those above them alone, and no module imports itself by way of others."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import networkx as nx

REPOSITORY = Path(__file__).parent.parent
ORDER = (
    "errors", "stages", "command_line", "private", "graph", "files", "text", "sources", "detection", "operators", "plan", "verification", "passes", "targets", "lowering", "backends",
    "exporting", "training", "testing", "profiling", "report", "lab", "app", "integrations", "__main__",
)  # fmt: skip
"""From the ground up. What is only imported for annotations counts for circles alone."""


def modules() -> dict[str, Path]:
    """Every module by its name inside the package."""
    paths = {path: path.relative_to(REPOSITORY / "laurel_rewrite") for path in (REPOSITORY / "laurel_rewrite").rglob("*.py")}
    paths |= {path: path.relative_to(REPOSITORY) for path in (REPOSITORY / "passes").rglob("*.py")}
    return {".".join(inside.with_suffix("").parts).removesuffix(".__init__"): path for path, inside in paths.items()}


def imports(nodes: Callable[[ast.AST], Iterator[ast.AST]]) -> nx.DiGraph:
    """Which module imports which, in functions too."""
    found = modules()
    graph = nx.DiGraph()
    for name, path in found.items():
        for node in nodes(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "laurel_rewrite":
                inside = str(node.module).removeprefix("laurel_rewrite").lstrip(".")
                for alias in node.names:
                    target = f"{inside}.{alias.name}".lstrip(".")
                    graph.add_edge(name, target if target in found else inside)
    return graph


def run_time(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING`."""
    stack = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        yield node
        stack += ast.iter_child_nodes(node)


def test_no_module_imports_itself_by_way_of_others():
    assert len(modules()) > 100
    assert not list(nx.simple_cycles(imports(ast.walk)))


def test_packages_import_those_below_them_alone():
    wrong = [
        f"{one} imports {other}"
        for one, other in imports(run_time).edges
        if other and one != "__init__" and ORDER.index(one.partition(".")[0]) < ORDER.index(other.partition(".")[0])
    ]
    assert not wrong


def test_no_function_is_longer_than_a_screen_and_no_file_than_a_room():
    long = []
    for path in [*modules().values(), *(REPOSITORY / "tests").glob("*.py"), *(REPOSITORY / "tools").rglob("*.py")]:
        text = path.read_text()
        if text.count("\n") > 450:
            long.append(f"{path.name} has {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 80:
                long.append(f"{path.name}: {node.name} has {(node.end_lineno or 0) - node.lineno + 1} lines")
    assert not long


FOREIGN = ("torch", "torchvision", "onnx", "onnxscript", "onnx_ir", "onnxruntime", "onnx2torch", "transformers", "timm", "accelerate", "lightning", "torchtitan", "peft")  # fmt: skip
EVERYWHERE = {"_modules", "_parameters", "_buffers", "_apply"}
"""Of nn.Module, whose meaning `tests/test_private.py` holds."""
PYTHONS = {"_fields", "_getframe", "_lru_cache_wrapper"}
"""Documented, or as old as what they belong to."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def defined(tree: ast.AST) -> Iterator[str]:
    """Names that a module gives to something: functions, classes, variables, attributes of its own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def private_of_others(tree: ast.AST, ours: set[str]) -> Iterator[str]:
    """Names that others keep to themselves: imported, reached by a dot, or asked for by their text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            for full in (f"{module}.{alias.name}".lstrip(".") for alias in node.names):
                if full.partition(".")[0] in FOREIGN and any(map(is_private, full.split("."))):
                    yield full
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            whole = ast.unparse(node)
            if node.attr not in ours | EVERYWHERE | PYTHONS or whole.startswith("torch."):
                yield whole
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
            asked = node.args[1]
            if isinstance(asked, ast.Constant) and is_private(str(asked.value)) and asked.value not in ours | EVERYWHERE:
                yield str(asked.value)


def strings(tree: ast.AST) -> set[str]:
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def test_what_others_keep_to_themselves_is_used_in_one_module():
    trees = {name: ast.parse(path.read_text()) for name, path in modules().items()}
    found = {name: [*private_of_others(tree, {*filter(is_private, defined(tree))})] for name, tree in trees.items()}
    assert len(set(found.pop("private"))) > 20
    names = {text for text in strings(trees.pop("private")) if is_private(text) and text.isidentifier()}
    for name, tree in trees.items():
        found[name] += names.intersection(strings(tree))
    assert not {name: uses for name, uses in found.items() if uses}
