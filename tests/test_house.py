"""The house: packages import those above them alone, and no module imports itself by way of others."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import networkx as nx

REPOSITORY = Path(__file__).parent.parent
ORDER = (
    "errors", "stages", "graph", "files", "text", "sources", "detection", "operators", "plan", "verification", "passes", "targets", "lowering", "backends",
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
