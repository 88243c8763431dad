"""Measure the house: files outside packages, import cycles, untyped documents, product lines, patches in tests.

    python scripts/house.py [FOLDER]

Prints one table. FOLDER is a checkout to measure (default: this one), so that two commits can be compared. Product
lines are those of flows, tasks and spinreg_core without blank lines, comments and docstrings.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Iterable, Mapping
from pathlib import Path

PRODUCT = ("spinreg_core", "tasks", "flows")


def module(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def imports(tree: ast.AST, modules: Iterable[str]) -> set[str]:
    """Return the product's modules that a file imports anywhere, except under TYPE_CHECKING."""
    known, found = set(modules), set()
    typing_only = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else str(node.module) for name in names]
        found |= {name for name in names if name in known}
    return found


def cycles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components of more than one node (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            members = []
            while not members or members[-1] != node:
                members.append(stack.pop())
            if len(members) > 1:
                found.append(sorted(members))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def package(name: str) -> str:
    """Return the package of a module: `spinreg_core.store.s3` -> `spinreg_core.store`."""
    return ".".join(name.split(".")[:2]) if name.startswith("spinreg_core.") else name.split(".")[0]


def takes_untyped_documents(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Check if an annotation of a parameter or of the result contains `dict[str, Any]`."""
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    annotations = [argument.annotation for argument in every if argument is not None] + [function.returns]
    return any("dict[str, Any]" in ast.unparse(annotation) for annotation in annotations if annotation is not None)


def product_lines(text: str) -> int:
    tree = ast.parse(text)
    documented: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                documented |= set(range(first.lineno, int(first.end_lineno or first.lineno) + 1))
    code: set[int] = set()
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skipped:
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - documented)


def measure(root: Path) -> dict[str, int]:
    files = [path for top in PRODUCT for path in sorted((root / top).rglob("*.py"))]
    texts = {module(path, root): path.read_text() for path in files}
    trees = {name: ast.parse(text) for name, text in texts.items()}
    graph = {name: imports(tree, trees) - {name} for name, tree in trees.items()}
    rooms: dict[str, set[str]] = {}
    for name, others in graph.items():
        rooms.setdefault(package(name), set()).update({package(o) for o in others} - {package(name)})
    functions = [
        node for tree in trees.values() for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]  # fmt: skip
    core = [f for name, tree in trees.items() if name.startswith("spinreg_core") for f in ast.walk(tree)
            if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef)]  # fmt: skip
    tests = [path.read_text() for path in (root / "tests").rglob("*.py")]
    comments = sum(
        token.type == tokenize.COMMENT
        for text in texts.values()
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
    )
    return {
        "files of spinreg_core outside packages": len(list((root / "spinreg_core").glob("*.py"))),
        "package cycles": len(cycles(rooms)),
        "file cycles": len(cycles(graph)),
        "functions": len(functions),
        "functions with dict[str, Any], spinreg_core": sum(map(takes_untyped_documents, core)),
        "functions with dict[str, Any], all": sum(map(takes_untyped_documents, functions)),
        "product lines": sum(map(product_lines, texts.values())),
        "comments": comments,
        "test lines": sum(len(text.splitlines()) for text in tests),
        "monkeypatch.setattr": sum(text.count("monkeypatch.setattr") for text in tests),
    }


def main() -> None:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1]
    for name, count in measure(root).items():
        print(f"{count:7,}  {name}")


if __name__ == "__main__":
    main()
