"""Promises of docs/security.md about the whole source, and the page's references to tests."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/security.md"
FILES = sorted(path for package in ("spinreg_core", "tasks", "flows") for path in (ROOT / package).rglob("*.py"))
# Modules and functions that turn bytes or text into running code.
UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
RUNNERS = {
    "torch.load", "np.load", "numpy.load", "pd.read_pickle", "pandas.read_pickle", "yaml.load", "yaml.unsafe_load",
    "yaml.full_load", "eval", "exec", "compile", "os.system", "os.popen", "torch.jit.load", "torch.hub.load",
}  # fmt: skip
LOADERS = {"from_pretrained", "from_config"}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def dangers(text: str) -> Iterator[str]:
    """Names of what a source imports or calls that could run what it reads."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in UNPICKLERS)
        elif isinstance(node, ast.ImportFrom):
            if str(node.module).split(".")[0] in UNPICKLERS:
                yield str(node.module)
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from sorted(names & RUNNERS)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in RUNNERS:
                yield called
            for keyword in node.keywords:
                if keyword.arg in ("shell", "allow_pickle", "trust_remote_code") and (
                    not isinstance(keyword.value, ast.Constant) or keyword.value.value is not False
                ):
                    yield f"{called}({keyword.arg}=...)"


def calls(path: Path) -> Iterator[ast.Call]:
    """Every call in a file."""
    return (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_source_reading_input_never_runs_it(path: Path) -> None:
    found = {(name(path), danger) for danger in dangers(path.read_text()) if danger != "yaml.load"}
    assert not found


def test_yaml_loaders_everywhere_are_subclasses_of_the_safe_one() -> None:
    found = [(path, call) for path in FILES for call in calls(path) if ast.unparse(call.func) == "yaml.load"]
    assert found
    for path, call in found:
        module = importlib.import_module(name(path).removesuffix(".py").replace("/", "."))
        assert issubclass(getattr(module, ast.unparse(call.args[1])), yaml.SafeLoader), name(path)


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from pickle import loads", "import torch\ntorch.load('x')", "from torch import load",
        "np.load(f, allow_pickle=True)", "eval('1')", "subprocess.run('x', shell=True)", "f(trust_remote_code=given)",
        "yaml.load(x)", "import cloudpickle.compat",
    ],
)  # fmt: skip
def test_danger_search_given_a_danger_finds_it(text: str) -> None:
    assert list(dangers(text))


def loader_calls() -> list[tuple[Path, ast.Call]]:
    """Every call that loads a configuration, tokenizer or model."""
    return [(path, call) for path in FILES for call in calls(path)
            if isinstance(call.func, ast.Attribute) and call.func.attr in LOADERS]  # fmt: skip


def keywords(call: ast.Call) -> dict[str | None, str]:
    return {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}


def test_loaders_of_models_never_trust_remote_code() -> None:
    found = loader_calls()
    assert len(found) >= 8
    for path, call in found:
        assert keywords(call).get("trust_remote_code") == "False", f"{name(path)}, line {call.lineno}"


def test_loaders_of_weights_accept_safetensors_only() -> None:
    models = [(path, call) for path, call in loader_calls()
              if ast.unparse(call.func) == "AutoModelForCausalLM.from_pretrained"]  # fmt: skip
    assert models
    for path, call in models:
        given = keywords(call)
        assert given.get("use_safetensors") == "True" or "gguf_file" in given, f"{name(path)}, line {call.lineno}"
    engines = [(path, call) for path in FILES for call in calls(path) if ast.unparse(call.func) in ("LLM", "vllm.LLM")]
    assert engines
    for path, call in engines:
        assert keywords(call).get("load_format") == "'safetensors'", f"{name(path)}, line {call.lineno}"


def test_configuration_has_no_field_for_pickles_or_code() -> None:
    from spinreg_core.config import RunConfig

    said = str(RunConfig.model_json_schema()).lower()
    assert "model" in said
    assert not [word for word in ("trust", "remote_code", "pickle", "unsafe") if word in said]


def test_pickled_objects_are_exchanged_by_ranks_only() -> None:
    """torch pickles them; the ranks are processes of one job that started each other."""
    users = [name(path) for path in FILES if re.search(r"\w+_object(_list)?\(", path.read_text()) and
             re.search(r"dist\.\w*_object", path.read_text())]  # fmt: skip
    assert users == ["spinreg_core/runtime/distributed.py"]


def test_prefect_server_by_default_listens_on_loopback(tmp_path: Path) -> None:
    code = "from prefect.settings import get_current_settings as s; print(s().server.api.host)"
    env = {"PATH": "/usr/bin:/bin", "PREFECT_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "127.0.0.1"


def test_only_compose_leaves_loopback_and_asks_for_a_password() -> None:
    """The compose file listens between its containers and publishes on loopback only (tests/docker)."""
    places = [path for folder in ("deployments", "docs", "docker", "scripts") for path in (ROOT / folder).rglob("*")]
    texts = {path: path.read_text() for path in [*places, ROOT / "README.md", ROOT / "prefect.yaml", ROOT / "Makefile"]
             if path.suffix in (".yaml", ".md", ".json", ".sh", "") and path.is_file()}  # fmt: skip
    assert [name(path) for path, text in texts.items() if "0.0.0.0" in text] == ["docker/compose.yaml"]
    services = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]
    open_to_containers = [one for one, service in services.items() if "0.0.0.0" in str(service.get("command"))]
    assert sorted(open_to_containers) == ["seaweedfs", "server"]
    assert "PREFECT_SERVER_API_AUTH_STRING" in services["server"]["environment"]
    assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= services["seaweedfs"]["environment"].keys()


def test_every_statement_of_the_page_names_a_test_that_exists() -> None:
    text = PAGE.read_text()
    statements, evidence = text.split("## Evidence")
    notes = {number: re.findall(r"`(tests/[\w/.]+)::(\w+)`", tests)
             for number, tests in re.findall(r"^\[\^(\d+)\]: (.+(?:\n  .+)*)", evidence, re.MULTILINE)}  # fmt: skip
    bullets = re.findall(r"^- (.+(?:\n  .+)*)", statements.split("## Not promised")[0], re.MULTILINE)
    assert len(bullets) > 20
    used = [number for bullet in bullets for number in re.findall(r"\[\^(\d+)\]", bullet) or [bullet]]
    assert sorted(used) == sorted(notes), "every statement has a note of its own"
    for tests in notes.values():
        assert tests
        for file, test in tests:
            assert f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"
