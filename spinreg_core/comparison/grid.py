"""The members of a comparison: variations over one base configuration, each a run of its own.

Decides: the members' names, which family of alpha a grid walks, what two members make in common, and when a member is
done. Leaves out: running them (`flows.compare`), comparing them (`compare.py`). Imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from spinreg_core.benchmarks.registry import is_measured
from spinreg_core.config import RunConfig, variant_fields
from spinreg_core.config.resolve import differences, merge, validate
from spinreg_core.errors import BadInput, ConfigChanged, Damaged, SpinregError
from spinreg_core.runs.head import (
    ROUND_STAGES,
    check_config,
    complete_round,
    enter_stage,
    has_begun,
    pending_advance,
    read_config,
    read_head,
    require_head,
    stage_object,
)
from spinreg_core.runs.objects import fingerprint
from spinreg_core.runs.plans import STAGE_PLANS
from spinreg_core.store.base import Store

BASE = (0, "base")
ALPHAS, HISTORIES = (1.0, 0.5, 0.0), (1, "all")


@dataclass(frozen=True)
class Member:
    """One run of a comparison, and the round it goes to."""

    config: RunConfig
    target: int

    @property
    def run(self) -> str:
        return self.config.run

    @property
    def parameters(self) -> dict[str, Any]:
        """Of the flow `spin`, all of them: neither a stored configuration nor a deployment's own parameters add any."""
        return self.config.model_dump(mode="json") | {"config": None, "rounds": None, "until_round": self.target}

    @cached_property
    def makes(self) -> dict[tuple[int, str], str]:
        """What the run makes, by round and stage; equal for two members where they make the same object.

        The names are not those in the store, where the base and the rows have ids that are known later.
        """
        rows = self.config.model_dump(mode="json", include={"dataset", "data", "model", "seed"})
        base = fingerprint("base", {"model": self.config.model, "quantize": self.config.training.lora_quantize})
        head: dict[str, Any] = {"run": "", "rounds": [], "base": base, "data": fingerprint("data", rows)}
        found = {BASE: base}
        for number, stage in [(0, "evaluate"), *itertools.product(range(1, self.target + 1), ROUND_STAGES)]:
            found[number, stage] = STAGE_PLANS[stage](self.config, head, number).object_id
            enter_stage(head, number, stage, found[number, stage])
        return found


def members_of(
    name: str,
    base: dict[str, Any],
    *,
    alpha: Sequence[float] | None = None,
    beta_0: Sequence[float] | None = None,
    history: Sequence[int | str] | None = None,
    seeds: Sequence[int] | None = None,
    variations: Mapping[str, dict[str, Any]] | None = None,
) -> list[Member]:
    """The runs of a comparison, in the order in which they are started.

    base: what is said of all, nested as in a configuration file, with `until_round`.
    alpha: weights of the previous policy in the reference, at the base's total beta. Default 1, 0.5, 0.
    beta_0: instead of alpha: weights of the KL to the base, added to beta_prev, the base's `objective.beta`; the total
        is beta_prev + beta_0 and alpha = beta_prev / total (docs/concepts.md).
    history: how many iterates the opponent averages. Default 1 and "all".
    seeds: default the base's.
    variations: instead of alpha and history: fields that a variation differs in, by its name.

    Every variation is run with every seed. Raises BadInput for fewer than two variations and seeds together, for a
    value named twice, for two variations that are the same, and for a member that is no configuration, naming it.
    """
    whole = validate(base | {"run": name})
    if whole.until_round is None or whole.until_round < 1:
        raise BadInput("until_round", repr(whole.until_round), "a round of at least 1 up to which all members go")
    if variations is not None and (alpha, beta_0, history) != (None, None, None):
        raise BadInput("variations", "a grid (alpha, beta_0 or history) besides", "either of the two")
    if variations is None:
        variations = _grid(whole, alpha, beta_0, history)
    seeds = [whole.seed] if seeds is None else seeds
    if len(set(seeds)) < len(seeds):
        raise BadInput("seeds", repr(list(seeds)), "every seed once")
    if len(variations) * len(seeds) < 2:
        raise BadInput("members", f"{len(variations)} variations of {len(seeds)} seeds", "at least two to compare")
    found = []
    for (label, fields), seed in itertools.product(variations.items(), seeds):
        if not isinstance(fields, dict):
            raise BadInput(f"variation {label!r}", repr(fields), "fields by name, nested as in a configuration")
        if fixed := sorted({"run", "store", "seed", "rounds", "until_round", "model", "dataset"} & fields.keys()):
            raise BadInput(f"variation {label!r}", ", ".join(fixed), "fields in which members of one comparison differ")
        values = merge(base, merge(fields, {"run": f"{name}-{label}-s{seed}", "seed": seed}))
        try:
            config = validate(values)
        except BadInput as error:
            raise BadInput.from_message(f"member {values['run']!r}: {error}") from None
        found.append(Member(config, whole.until_round))
    for one, other in itertools.combinations(found, 2):
        if one.config.seed == other.config.seed and variant_fields(one.config) == variant_fields(other.config):
            raise BadInput("variations", f"{one.run} and {other.run}, which are the same", "members that differ")
    for other in found[1:]:
        if told := differences(_rows_of(found[0].config), _rows_of(other.config)):
            raise BadInput(
                "variations", f"{found[0].run} and {other.run}, which differ in what their held-out rows are "
                f"({'; '.join(told)})", "the same rows for all: members are compared row by row",
            )  # fmt: skip
    return found


_NO_ROWS = {"prompts_per_round", "round_prompts", "max_bad_share"}  # of data: what is trained on when; what is an error


def _rows_of(config: RunConfig) -> dict[str, Any]:
    """What makes the data object of a seed what it is (`stages.prepare.data_key`), as configured."""
    data = config.data.model_dump(mode="json", exclude=_NO_ROWS)
    return {"data": data, "evaluation": {"final_answer": config.evaluation.final_answer}}


def _grid(
    base: RunConfig,
    alpha: Sequence[float] | None,
    beta_0: Sequence[float] | None,
    history: Sequence[int | str] | None,
) -> dict[str, dict[str, Any]]:
    """Variations by name: alpha or beta_0, times history."""
    if alpha is not None and beta_0 is not None:
        raise BadInput("beta_0", "alpha besides", "either of the two: they are different experiments")
    previous = base.objective.beta
    if beta_0 is not None and not all(0 <= b < math.inf for b in beta_0):
        raise BadInput("beta_0", repr(list(beta_0)), "weights of at least 0")
    if beta_0 is not None and not isinstance(previous, list):
        objectives = {f"beta0-{b:g}": {"beta": previous + b, "alpha": previous / (previous + b)} for b in beta_0}
    elif beta_0 is not None:
        raise BadInput("beta_0", f"objective.beta {previous}", "one number, which it is added to")
    else:
        objectives = {f"alpha-{a:g}": {"alpha": a} for a in (ALPHAS if alpha is None else alpha)}
    averaged = {f"h-{h}": {"history": h} for h in (HISTORIES if history is None else history)}
    for field, given, named in (
        ("beta_0" if beta_0 is not None else "alpha", alpha if beta_0 is None else beta_0, objectives),
        ("history", history, averaged),
    ):
        if given is not None and len(named) < len(given):
            raise BadInput(field, repr(list(given)), "every value once")
    return {
        f"{a}-{h}": {"objective": objective, "opponent": opponent}
        for (a, objective), (h, opponent) in itertools.product(objectives.items(), averaged.items())
    }


def reference_of(members: Sequence[Member], against: str | None) -> str:
    """The run that the others are compared with: the one named, else the first that is plain SPIN (alpha 1, history 1),
    else the first. Raises BadInput for one that is no member."""
    runs = [member.run for member in members]
    if against is not None:
        if against not in runs:
            raise BadInput("against", repr(against), f"one of {', '.join(runs)}")
        return against
    return next((m.run for m in members if m.config.objective.alpha == 1 and m.config.opponent.history == 1), runs[0])


def replaced_reference(members: Sequence[Member], complete: Sequence[Member], lost: str) -> str:
    """The reference in place of one that did not come to its end: of the same variation another seed, else as where
    nobody named any."""
    (old,) = [member for member in members if member.run == lost]
    same = [m.run for m in complete if variant_fields(m.config) == variant_fields(old.config)]
    return same[0] if same else reference_of(complete, None)


def check_stored(store: Store, members: Sequence[Member]) -> None:
    """Raise ConfigChanged where a member's run has begun with another configuration."""
    for member in members:
        with contextlib.suppress(Damaged):  # which is the end of that member alone
            _check_config(store, member, read_head(store, member.run))


def _check_config(store: Store, member: Member, head: dict[str, Any] | None) -> None:
    stored = read_config(store, member.run) if head is not None and has_begun(head) else None
    if stored is not None:
        check_config(stored, member.config)


def waits_for(member: Member, store: Store, running: Sequence[tuple[Member, dict[str, Any] | None]]) -> Member | None:
    """A running member that is about to make something `member` needs too, which it had better find there; or None.
    running: each with its head, None where it has none yet."""
    own: dict[str, Any] | None = None
    for other, head in running:
        common = [place for place, made in member.makes.items() if other.makes.get(place) == made]
        missing = [place for place in common if not _is_made(store, other, head, place)]
        if missing:
            own = own or read_head(store, member.run)
            if not all(_is_made(store, member, own, place) for place in missing):
                return other
    return None


def _is_made(store: Store, member: Member, head: dict[str, Any] | None, place: tuple[int, str]) -> bool:
    """An evaluation counts when the iterate's benchmarks are measured too."""
    if head is None or place == BASE:
        return head is not None and head.get("base") is not None
    return stage_object(head, *place) is not None and (
        place[1] != "evaluate" or _is_measured(store, member, head, place[0], unknown=True)
    )


def _is_measured(store: Store, member: Member, head: dict[str, Any], number: int, *, unknown: bool) -> bool:
    """`unknown`: the answer where it cannot be told on this machine (which has not the include path, say); that of the
    member can."""
    try:
        return is_measured(store, member.config, head, number)
    except (BadInput, Damaged):
        return unknown


def rounds_open(store: Store, member: Member) -> str | None:
    """None where a member can be compared: it has all its rounds, or its conditions (`until`), as they are now, ended
    it. Else why not: also where its run is damaged or has another configuration."""
    try:
        head = read_head(store, member.run)
        if head is None:
            return "nothing of it is in the store"
        _check_config(store, member, head)
    except (Damaged, ConfigChanged) as error:
        return str(error)
    if head.get("repair") is not None:
        return "a repair of it is not finished"
    done = complete_round(head)
    if done >= member.target:
        return None
    last = head["advances"][-1] if head["advances"] else {"to": 0}
    if last["to"] >= member.target and last.get("ended_by") == member.config.until.model_dump(mode="json"):
        return None
    return f"round {done} of {member.target} is complete"


def open_reason(store: Store, member: Member) -> str | None:
    """What is left to do for a member; None where nothing is. Where this machine cannot tell whether everything is
    measured, that is left: the member's flow run finds what there is."""
    reason = rounds_open(store, member)
    if reason is not None:
        return reason
    head = require_head(store, member.run)
    if pending_advance(head) is not None:
        return "its advance is not finished"
    missing = [n for n in range(complete_round(head) + 1) if not _is_measured(store, member, head, n, unknown=False)]
    return f"round {missing[0]} is not measured in full, as far as can be told here" if missing else None


def require_two(found: Sequence[Member], failures: Mapping[str, str]) -> None:
    """Raise SpinregError where fewer than two members came to their end, saying what became of the others."""
    if len(found) < 2:
        what = "".join(f"\n  - {run}: {why}" for run, why in failures.items())
        raise SpinregError(f"{len(found)} members came to their end, which leaves nothing to compare:{what}")
