"""The model card of an exported policy. tests/e2e/test_smoke.py covers the other exported files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spinreg_core.benchmarks.registry import record_measured
from spinreg_core.benchmarks.results import write_part
from spinreg_core.config import RunConfig
from spinreg_core.evaluation.intervals import wilson
from spinreg_core.reports.export import how_measured, model_card
from spinreg_core.runs.job import Job
from spinreg_core.runs.lease import hold_lease
from spinreg_core.runs.objects import fingerprint, publish
from spinreg_core.store.open import open_store
from tests.support.reported_runs import make_run

JUDGE = {"endpoint": "host/v1", "model": "a|b", "temperature": 0.0, "max_tokens": 9, "tries": 1}


def part(kind: str, name: str, **settings: Any) -> dict[str, Any]:
    return {
        "kind": kind, "name": name, "primary": "share", "better": "higher", "metrics": {"share": wilson(7, 10)},
        "settings": settings, "fingerprints": {"prompts": "0123456789abcdef"},
    }  # fmt: skip


def test_model_card_shows_metrics_and_settings(tmp_path: Path) -> None:
    store = make_run(open_store(str(tmp_path / "store")), tmp_path, [2.0, 1.9])
    config = RunConfig(run="demo")
    parts = [part("lm-eval", "gsm8k", fewshot=5, limit=200, questions_as="plain"),
             part("win-rate", "human", judge=JUDGE, limit=None)]  # fmt: skip
    with hold_lease(store, config, "test") as session:
        for one in parts:
            key = {"name": one["name"]}
            job = Job(one["kind"], fingerprint(one["kind"], key), key, store.url, "w", 1, {}, config, tmp_path)
            write_part(tmp_path / one["kind"], one, [])
            publish(store, job, tmp_path / one["kind"], metrics={})
            record_measured(session, 1, {f"{one['kind']} {one['name']}": job.object_id})
    card = model_card(store, "demo", 1)
    assert "| held-out NLL \\* ↓ (nats/token, n 64) |" in card
    assert "by a KL term to the base (alpha) and by an opponent averaged over earlier iterates (history)" in " ".join(
        card.split()
    )
    assert "On held-out rows of the same data" in card
    assert "\\\\*" not in card
    assert "| lm-eval | gsm8k | share | 0.70 [0.40, 0.89] | 10 | 5 examples; the first 200 questions |" in card
    assert (
        "| win-rate | human | share | 0.70 [0.40, 0.89] | 10 | judge `a\\|b` at `host/v1`, temperature 0.0; prompts "
        "`0123456789ab`; against the human answers |"
    ) in card


def test_model_card_names_method_and_data(tmp_path: Path) -> None:
    config = RunConfig.model_validate(
        {"run": "demo", "objective": {"alpha": 1}, "opponent": {"history": 1}, "training": {"average": "ema"},
         "data": {"mixed_datasets": {"org/math": 0.5}, "heldout_dataset": "org/held"}}
    )  # fmt: skip
    card = model_card(make_run(open_store(str(tmp_path / "store")), tmp_path, [2.0, 1.9], config=config), "demo", 1)
    text = " ".join(card.split())
    assert "without regularisation. No preference labels" in text
    assert "2404.04291" not in text, "that is the paper of the remedies"
    assert "mixed with `org/math` (0.5 rows for one)" in text
    assert "averaged over rounds (ema, weight 0.5" in text
    assert "On held-out rows of `org/held`" in text


def test_how_measured_names_chat_and_judge() -> None:
    chat = part("lm-eval", "mmlu", fewshot=None, limit=None, questions_as="chat")
    assert how_measured(chat) == "as a chat"
    mt_bench = part("mt-bench", "mt-bench", judge=JUDGE | {"model": "m"})
    assert how_measured(mt_bench) == "judge `m` at `host/v1`, temperature 0.0; prompts `0123456789ab`"
