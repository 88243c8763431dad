"""What docs/security.md promises of the source as a whole, and that each of its sentences names a test there is."""

from __future__ import annotations

import ast
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
# YAML's safe loader, made to notice a key that is given twice (asserted below).
YAML = {"spinreg_core/resolve.py": "yaml.load(text, _Loader)",
        "spinreg_core/benchmarks/lm_eval.py": "yaml.load(path.read_bytes(), _TaskFile)"}  # fmt: skip
ALLOWED = {(file, "yaml.load") for file in YAML}
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


@pytest.mark.parametrize("path", FILES, ids=name)
def test_nothing_that_is_read_can_run(path: Path) -> None:
    assert {(name(path), danger) for danger in dangers(path.read_text())} <= ALLOWED


def test_the_loaders_of_yaml_are_its_safe_one() -> None:
    from spinreg_core.benchmarks import lm_eval
    from spinreg_core.config import resolve

    assert issubclass(resolve._Loader, yaml.SafeLoader)
    assert issubclass(lm_eval._TaskFile, yaml.SafeLoader)
    for file, call in YAML.items():
        calls = [ast.unparse(node) for node in ast.walk(ast.parse((ROOT / file).read_text()))
                 if isinstance(node, ast.Call) and ast.unparse(node.func) == "yaml.load"]  # fmt: skip
        assert calls == [call]


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from pickle import loads", "import torch\ntorch.load('x')", "from torch import load",
        "np.load(f, allow_pickle=True)", "eval('1')", "subprocess.run('x', shell=True)", "f(trust_remote_code=given)",
        "yaml.load(x)", "import cloudpickle.compat",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_is_for(text: str) -> None:
    assert list(dangers(text))


def test_every_model_and_tokenizer_is_loaded_without_its_code() -> None:
    calls = [
        (name(path), node)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOADERS
    ]
    assert len(calls) >= 8
    for where, call in calls:
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert given.get("trust_remote_code") == "False", f"{where}, line {call.lineno}"


def test_weights_are_asked_for_as_safetensors() -> None:
    assert "use_safetensors=True" in (ROOT / "spinreg_core/logprobs.py").read_text()
    assert 'load_format="safetensors"' in (ROOT / "spinreg_core/engines/vllm.py").read_text()


def test_no_field_allows_pickles_or_code() -> None:
    from spinreg_core.config import RunConfig

    said = str(RunConfig.model_json_schema()).lower()
    assert "model" in said
    assert not [word for word in ("trust", "remote_code", "pickle", "unsafe") if word in said]


def test_ranks_are_the_only_ones_that_exchange_objects() -> None:
    """torch pickles them. They are processes of one job, started by one another."""
    users = [name(path) for path in FILES if re.search(r"\w+_object(_list)?\(", path.read_text()) and
             re.search(r"dist\.\w*_object", path.read_text())]  # fmt: skip
    assert users == ["spinreg_core/ranks.py"]


def test_prefect_serves_loopback_unless_told_otherwise(tmp_path: Path) -> None:
    code = "from prefect.settings import get_current_settings as s; print(s().server.api.host)"
    env = {"PATH": "/usr/bin:/bin", "PREFECT_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "127.0.0.1"


def test_only_the_compose_file_leaves_loopback_and_it_asks_for_a_password() -> None:
    """Between its containers, that is: it publishes loopback alone (tests/docker/test_compose.py)."""
    places = [path for folder in ("deployments", "docs", "docker", "scripts") for path in (ROOT / folder).rglob("*")]
    texts = {path: path.read_text() for path in [*places, ROOT / "README.md", ROOT / "prefect.yaml", ROOT / "Makefile"]
             if path.suffix in (".yaml", ".md", ".json", ".sh", "") and path.is_file()}  # fmt: skip
    assert [name(path) for path, text in texts.items() if "0.0.0.0" in text] == ["docker/compose.yaml"]
    services = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]
    open_to_containers = [one for one, service in services.items() if "0.0.0.0" in str(service.get("command"))]
    assert sorted(open_to_containers) == ["seaweedfs", "server"]
    assert "PREFECT_SERVER_API_AUTH_STRING" in services["server"]["environment"]
    assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= services["seaweedfs"]["environment"].keys()


def test_every_sentence_of_the_page_names_a_test_that_exists() -> None:
    bullets = re.findall(r"^- (.+(?:\n  .+)*)", PAGE.read_text().split("## Not promised")[0], re.MULTILINE)
    assert len(bullets) > 20
    for bullet in bullets:
        named = re.findall(r"`(tests/[\w/.]+)::(\w+)`", bullet)
        assert named, bullet
        for file, test in named:
            assert f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"
