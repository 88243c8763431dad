"""Rules of the house that a reader would have to check by hand otherwise."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from setuptools import find_packages

import spinreg_core
from scripts import house

ROOT = Path(__file__).parents[1]
PACKAGES = ("spinreg_core", "tasks", "flows")  # each may import itself and what stands before it
HEAVY = ("torch", "transformers", "vllm", "datasets")
LONGEST = 400  # lines; a longer file is doing two things
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
LIBRARY = [path for path in FILES if path.is_relative_to(ROOT / "spinreg_core")]

# What each room of spinreg_core may import besides itself and EVERYBODY. Rooms stand below those that import them, so
# that the table cannot hold a cycle: a room may only name rooms above its own line.
EVERYBODY = ("errors", "formatting")
ROOMS = {
    "errors": "",
    "formatting": "",
    "input_limits": "",
    "selfplay": "",
    "store": "input_limits",
    "config": "input_limits",
    "runs": "config selfplay store",
    "maintenance": "runs config store",
    "runtime": "runs config store",
    "models": "runtime config store input_limits",
    "data": "models config store input_limits",
    "logprobs": "models runtime",
    "evaluation": "logprobs models config selfplay",
    "generation": "data models runs runtime selfplay config store",
    "training": "logprobs models runs runtime selfplay config store",
    "benchmarks": "evaluation generation models runs runtime config store input_limits",
    "planning": "generation data models runtime selfplay config store",
    "reports": "benchmarks evaluation runs selfplay config store",
    "comparison": "reports benchmarks evaluation runs selfplay config store",
    "stages": "planning benchmarks training generation evaluation logprobs data models runtime maintenance runs config "
    "selfplay store input_limits",
    "api": "comparison reports planning benchmarks evaluation models maintenance runtime runs config selfplay store",
}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(path: Path) -> set[str]:
    """Absolute names of the modules a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}: relative import"
            found.add(str(node.module))
    return found


def test_there_is_something_to_check() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(PACKAGES)
    assert len(FILES) > 40


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_point_one_way(path: Path) -> None:
    own = PACKAGES.index(path.relative_to(ROOT).parts[0])
    tops = {module.split(".")[0] for module in imported(path)}
    assert not tops & {*PACKAGES[own + 1 :], "tests", "scripts", "perf"}


def room(path: Path) -> str:
    """The package of spinreg_core that a file lies in, or the name of a file that lies in none."""
    return path.relative_to(ROOT / "spinreg_core").parts[0].removesuffix(".py")


def project_imports(path: Path) -> list[tuple[int, str]]:
    """(line, room) of every import from spinreg_core, anywhere in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        parts = [name.split(".") for name in names]
        found += [(node.lineno, part[1]) for part in parts if part[0] == "spinreg_core" and part[1:]]
    return found


def test_the_table_of_rooms_has_no_cycle_and_names_every_room() -> None:
    above: set[str] = set()
    for own, others in ROOMS.items():
        assert set(others.split()) <= above, own
        above.add(own)
    assert {room(path) for path in LIBRARY} - {"__init__"} == set(ROOMS)


@pytest.mark.parametrize("path", [path for path in LIBRARY if room(path) != "__init__"],
                         ids=name)  # fmt: skip
def test_a_room_imports_only_rooms_below_it(path: Path) -> None:
    allowed = {room(path), *EVERYBODY, *ROOMS[room(path)].split(), "__version__"}
    wrong = [f"{name(path)}:{line}: {room(path)} imports {other}" for line, other in project_imports(path)
             if other not in allowed]  # fmt: skip
    assert not wrong, "\n".join(wrong)


def test_no_file_is_part_of_an_import_cycle() -> None:
    trees = {house.module(path, ROOT): ast.parse(path.read_text()) for path in FILES}
    graph = {module: house.imports(tree, trees) - {module} for module, tree in trees.items()}
    assert house.cycles(graph) == []
    assert house.cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]], "the check can fail"


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_the_library_never_imports_prefect(path: Path) -> None:
    assert not [module for module in imported(path) if module.split(".")[0].startswith("prefect")]
    assert not re.search(r"(import_module|__import__)\(\s*[\"']prefect", path.read_text())


def loaded_by(statement: str) -> set[str]:
    """Top-level packages in sys.modules after a statement in a fresh interpreter."""
    code = f"{statement}\nimport sys\nprint(*sorted({{module.split('.')[0] for module in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["flows.spin", "flows.cli"])
def test_loading_the_flow_is_light(module: str) -> None:
    loaded = loaded_by(f"import {module}")
    assert "spinreg_core" in loaded
    assert not loaded & set(HEAVY)


def test_the_check_of_light_loading_can_fail() -> None:
    assert "datasets" in loaded_by("import datasets")


def test_importing_the_library_loads_neither_prefect_nor_anything_heavy() -> None:
    assert not loaded_by("import spinreg_core, spinreg_core.config, spinreg_core.runs.objects") & {*HEAVY, "prefect"}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_file_is_longer_than_one_thing(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST


@pytest.mark.parametrize("path", FILES, ids=name)
def test_every_module_has_a_docstring(path: Path) -> None:
    text = path.read_text()
    if text.strip():
        assert ast.get_docstring(ast.parse(text)), "no docstring"
    else:
        assert path.name == "__init__.py"


def test_every_package_is_shipped_and_nothing_else() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = find_packages(str(ROOT), **project["tool"]["setuptools"]["packages"]["find"])
    assert set(found) == {name(path.parent).replace("/", ".") for path in FILES}


def test_all_places_name_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert spinreg_core.__version__ == project["version"]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text().replace("[", "").replace("]", "")


def test_the_licence_is_the_one_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "LICENSE").read_text()
    assert project["license"] == "Apache-2.0"
    assert "Apache License\n                           Version 2.0" in text
    assert "The spinreg authors" in text
    assert "[name of copyright owner]" not in text


def test_decisions_are_numbered_and_complete() -> None:
    pages = sorted((ROOT / "docs/decisions").glob("*.md"))
    assert [int(page.name[:4]) for page in pages] == list(range(1, len(pages) + 1))
    for page in pages:
        text = page.read_text()
        assert text.startswith(f"# {int(page.name[:4])}. ")
        assert all(f"**{part}.**" in text for part in ("Context", "Decision", "Consequence")), page.name
