"""How often a judge prefers one run's answers to another's: `spinreg win-rate RUN OTHER`.

Decides: which answers of two runs are held against each other: the held-out samples of the same iterate. Leaves out:
the pairs and their metrics (`win_rate.py`), asking the judge (`judge.py`).
"""

from __future__ import annotations

from typing import Any

from spinreg_core.benchmarks.judge import paid_text, require_judge
from spinreg_core.benchmarks.judge_prompts import load_prompts
from spinreg_core.benchmarks.win_rate import PROMPT, judge_pairs, pair_settings, pairs_of
from spinreg_core.config import RunConfig
from spinreg_core.errors import BadInput
from spinreg_core.evaluation.formatting import format_estimate
from spinreg_core.runs.head import require_head, stage_object
from spinreg_core.runs.objects import fingerprint, versions
from spinreg_core.runs.plans import policy_object
from spinreg_core.store.base import Store


def win_rate_of_runs(
    store: Store, config: RunConfig, run: str, other: str, number: int | None = None
) -> tuple[str, dict[str, Any]]:
    """Have the answers of two runs of a store judged. Returns a text and the same as JSON.

    config: judge, `benchmarks.win_rate_prompts`, seed and resamples of the bootstrap. number: which iterate of both;
    None for the last that both have evaluated.

    Raises BadInput for runs that have no such iterate, other held-out rows or the same policy; and as `judge_pairs`.
    """
    require_judge(config.judge)
    prompts, heads = load_prompts(config.judge, [PROMPT]), [require_head(store, name) for name in (run, other)]
    if heads[0].get("data") != heads[1].get("data"):
        raise BadInput(f"run {other!r}", f"held-out rows of other data than {run!r} has",
                       "a run of the same data set, model and seed")  # fmt: skip
    evaluated = [{e["round"] for e in head["rounds"] if stage_object(head, e["round"], "evaluate")} for head in heads]
    both = sorted(evaluated[0] & evaluated[1])
    number = max(both, default=0) if number is None else number
    if number not in both:
        raise BadInput(
            "--round", number, f"a round that both runs have evaluated ({', '.join(map(str, both)) or 'none'})"
        )
    policies = [policy_object(head, number) for head in heads]
    if policies[0] == policies[1]:
        raise BadInput(f"round {number}", f"the same policy in {run!r} and {other!r}", "a round in which they differ")
    evaluations = [str(stage_object(head, number, "evaluate")) for head in heads]
    pairs = pairs_of(store, str(heads[0]["data"]), *evaluations)[: config.benchmarks.win_rate_prompts]
    settings = pair_settings(config, pairs)
    fingerprints = {
        "policies": policies, "evaluations": evaluations, "data": heads[0]["data"], "prompts": prompts.sha256
    }  # fmt: skip
    payer = fingerprint("win-rate-of-runs", {"settings": settings, "fingerprints": fingerprints})
    metrics, _, cost = judge_pairs(store, config, pairs, prompts, payer=payer)
    document = {
        "run": run, "other": other, "round": number, "metrics": metrics, "settings": settings,
        "fingerprints": fingerprints, "versions": versions(), "cost": cost,
    }  # fmt: skip
    return _text(document), document


def _text(document: dict[str, Any]) -> str:
    settings = document["settings"]
    lines = [
        f"{document['run']} against {document['other']}, round {document['round']}, {settings['prompts']} prompts, "
        f"judged by {settings['judge']['model']} in both orders; 95 % intervals over prompts"
    ]
    for name, found in document["metrics"].items():
        lines.append(f"{name}: {format_estimate(found)} {found['unit']}, n {found['n']}")
    return "\n".join([*lines, paid_text(document["cost"])])
