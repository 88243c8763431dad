"""The members of a comparison: variations of one base configuration, each a run of its own.

Decides: the members' names, the alphas of a grid, the objects that two members share, and when a member is finished.
Leaves out: running members (`flows`) and comparing them (`compare`). Imports nothing heavy.
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
from spinreg_core.runs.head import Head, Lease, check_config, read_config, read_head, require_head
from spinreg_core.runs.objects import fingerprint
from spinreg_core.runs.stages import STAGES, complete_round, stages_of
from spinreg_core.store.base import Store

BASE = (0, "base")
ALPHAS, HISTORIES = (1.0, 0.5, 0.0), (1, "all")


@dataclass(frozen=True)
class Member:
    """One run of a comparison, and its last round."""

    config: RunConfig
    target: int

    @property
    def run(self) -> str:
        return self.config.run

    @property
    def parameters(self) -> dict[str, Any]:
        """All parameters of the flow `spin`, so that no stored configuration or deployment adds any."""
        return self.config.model_dump(mode="json") | {"config": None, "rounds": None, "until_round": self.target}

    @cached_property
    def makes(self) -> dict[tuple[int, str], str]:
        """The objects of the run by round and stage; two members that share an object have the same name for it.

        The names differ from those in the store, because the ids of the base and the rows are not known yet.
        """
        rows = self.config.model_dump(mode="json", include={"dataset", "data", "model", "seed"})
        base = fingerprint("base", {"model": self.config.model, "quantize": self.config.training.lora_quantize})
        nobody = Lease(epoch=0, holder=None, beat=0)
        head = Head(run="", lease=nobody, advances=[], rounds=[], base=base, data=fingerprint("data", rows))
        found = {BASE: base}
        for number in range(self.target + 1):
            for stage in stages_of(number):
                found[number, stage] = STAGES[stage].plan(self.config, head, number).object_id
                head.enter(number, stage, found[number, stage])
        return found


def members_of(
    name: str,
    base: dict[str, Any],
    *,
    alpha: Sequence[float] | None = None,
    beta_0: Sequence[float] | None = None,
    history: Sequence[int | str] | None = None,
    reference: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    variations: Mapping[str, dict[str, Any]] | None = None,
) -> list[Member]:
    """Return the runs of a comparison in the order in which they are started, every variation with every seed.

    base: fields that all members share, nested as in a configuration file, with `until_round`.
    alpha: weights of the previous policy in the reference, at the base's total beta. Default 1, 0.5, 0.
    beta_0: instead of alpha: weights of the KL to the base, added to beta_prev, the base's `objective.beta`; the total
        is beta_prev + beta_0 and alpha = beta_prev / total (docs/concepts.md).
    history: numbers of iterates that the opponent averages. Default 1 and "all".
    reference: values of `objective.reference`, default the base's. With history 1 all are equal, so the first is used.
    seeds: default the base's.
    variations: instead of alpha, history and reference: the fields of each variation, by its name.

    Raises:
        BadInput: fewer than two members, a value named twice, two equal variations, or a member with a configuration
            that is not valid.
    """
    whole = validate(base | {"run": name})
    if whole.until_round is None or whole.until_round < 1:
        raise BadInput("until_round", repr(whole.until_round), "the last round of all members, at least 1")
    if variations is not None and (alpha, beta_0, history, reference) != (None,) * 4:
        raise BadInput("variations", "cannot be set with alpha, beta_0, history or reference",
                       "use variations or a grid")  # fmt: skip
    if variations is None:
        variations = _grid(whole, alpha, beta_0, history, reference)
    seeds = [whole.seed] if seeds is None else seeds
    if len(set(seeds)) < len(seeds):
        raise BadInput("seeds", f"{list(seeds)}, with a seed named twice", "every seed once")
    if len(variations) * len(seeds) < 2:
        raise BadInput("members", f"{len(variations)} x {len(seeds)} (variations x seeds)", "at least two")
    found = []
    for (label, fields), seed in itertools.product(variations.items(), seeds):
        if not isinstance(fields, dict):
            raise BadInput(f"variation {label!r}", repr(fields), "fields by name, nested as in a configuration file")
        if fixed := sorted({"run", "store", "seed", "rounds", "until_round", "model", "dataset"} & fields.keys()):
            raise BadInput(
                f"variation {label!r}", f"cannot set {', '.join(fixed)}", "set fields that may differ between members"
            )
        values = merge(base, merge(fields, {"run": f"{name}-{label}-s{seed}", "seed": seed}))
        try:
            config = validate(values)
        except BadInput as error:
            raise BadInput.from_message(f"member {values['run']!r}: {error}") from None
        found.append(Member(config, whole.until_round))
    for one, other in itertools.combinations(found, 2):
        if one.config.seed == other.config.seed and variant_fields(one.config) == variant_fields(other.config):
            raise BadInput("variations", f"{one.run} and {other.run}, which are equal", "members that differ")
    for other in found[1:]:
        if told := differences(_rows_of(found[0].config), _rows_of(other.config)):
            raise BadInput(
                "variations", f"{found[0].run} and {other.run}, with other held-out rows ({'; '.join(told)})",
                "the same held-out rows for all members, which are compared row by row",
            )  # fmt: skip
    return found


# Fields of `data` that do not change the rows: they say when a row is trained on, and how many may be bad.
_NO_ROWS = {"prompts_per_round", "round_prompts", "max_bad_share"}


def _rows_of(config: RunConfig) -> dict[str, Any]:
    """Return the configured fields that decide about the rows of a seed, as `stages.prepare.data_key` has them."""
    data = config.data.model_dump(mode="json", exclude=_NO_ROWS)
    return {"data": data, "evaluation": {"final_answer": config.evaluation.final_answer}}


def _grid(
    base: RunConfig,
    alpha: Sequence[float] | None,
    beta_0: Sequence[float] | None,
    history: Sequence[int | str] | None,
    reference: Sequence[str] | None,
) -> dict[str, dict[str, Any]]:
    """Return variations by name: alpha or beta_0, times history, times reference."""
    if alpha is not None and beta_0 is not None:
        raise BadInput("beta_0", "cannot be set with alpha", "use one of them, they are different experiments")
    previous = base.objective.beta
    if beta_0 is not None and not all(0 <= b < math.inf for b in beta_0):
        raise BadInput("beta_0", repr(list(beta_0)), "finite weights of at least 0")
    if beta_0 is not None and not isinstance(previous, list):
        objectives = {f"beta0-{b:g}": {"beta": previous + b, "alpha": previous / (previous + b)} for b in beta_0}
    elif beta_0 is not None:
        raise BadInput("beta_0", f"needs one number as objective.beta, not {previous}", "set a beta for all rounds")
    else:
        objectives = {f"alpha-{a:g}": {"alpha": a} for a in (ALPHAS if alpha is None else alpha)}
    averaged = {f"h-{h}": {"history": h} for h in (HISTORIES if history is None else history)}
    # With history 1 the previous policy samples every pair, so all references are equal.
    references = {"": {}} if reference is None else {f"-{name}": {"reference": name} for name in reference}
    first = dict(itertools.islice(references.items(), 1))
    for field, given, named in (
        ("beta_0" if beta_0 is not None else "alpha", alpha if beta_0 is None else beta_0, objectives),
        ("history", history, averaged),
        ("reference", reference, references),
    ):
        if given is not None and len(named) < len(given):
            raise BadInput(field, f"{list(given)}, with a value named twice", "every value once")
    return {
        f"{a}-{h}{r}": {"objective": objective | matched, "opponent": opponent}
        for (a, objective), (h, opponent) in itertools.product(objectives.items(), averaged.items())
        for r, matched in (first if opponent["history"] == 1 else references).items()
    }


def reference_of(members: Sequence[Member], against: str | None) -> str:
    """Return the run that the others are compared with: `against`, or the first plain SPIN (alpha 1, history 1), or the
    first.

    Raises BadInput if `against` is not a member.
    """
    runs = [member.run for member in members]
    if against is not None:
        if against not in runs:
            raise BadInput("against", repr(against), f"one of {', '.join(runs)}")
        return against
    return next((m.run for m in members if m.config.objective.alpha == 1 and m.config.opponent.history == 1), runs[0])


def replaced_reference(members: Sequence[Member], complete: Sequence[Member], lost: str) -> str:
    """Return the reference in place of one that did not finish: another seed of its variation, or the default one."""
    (old,) = [member for member in members if member.run == lost]
    same = [m.run for m in complete if variant_fields(m.config) == variant_fields(old.config)]
    return same[0] if same else reference_of(complete, None)


def check_stored(store: Store, members: Sequence[Member]) -> None:
    """Raise ConfigChanged if the run of a member has begun with another configuration."""
    for member in members:
        # A damaged run stops its own member only.
        with contextlib.suppress(Damaged):
            _check_config(store, member, read_head(store, member.run))


def _check_config(store: Store, member: Member, head: Head | None) -> None:
    stored = read_config(store, member.run) if head is not None and head.has_begun else None
    if stored is not None:
        check_config(stored, member.config)


def waits_for(member: Member, store: Store, running: Sequence[tuple[Member, Head | None]]) -> Member | None:
    """Return a running member that will make an object that `member` needs too, or None.

    `member` should wait for it instead of making the object a second time. running: members with their heads, None for
    one without a head yet.
    """
    own: Head | None = None
    for other, head in running:
        common = [place for place, made in member.makes.items() if other.makes.get(place) == made]
        missing = [place for place in common if not _is_made(store, other, head, place)]
        if missing:
            own = own or read_head(store, member.run)
            if not all(_is_made(store, member, own, place) for place in missing):
                return other
    return None


def _is_made(store: Store, member: Member, head: Head | None, place: tuple[int, str]) -> bool:
    """An evaluation counts once the benchmarks of its iterate are measured too."""
    if head is None or place == BASE:
        return head is not None and head.base is not None
    return head.stage(*place) is not None and (
        place[1] != "evaluate" or _is_measured(store, member, head, place[0], unknown=True)
    )


def _is_measured(store: Store, member: Member, head: Head, number: int, *, unknown: bool) -> bool:
    """unknown: the answer if this machine cannot tell, for example because it lacks the include path of the tasks."""
    try:
        return is_measured(store, member.config, head, number)
    except (BadInput, Damaged):
        return unknown


def rounds_open(store: Store, member: Member) -> str | None:
    """Return why a member cannot be compared yet, or None.

    It can be compared once it has all its rounds, or once its present early-stopping conditions (`until`) ended it. A
    damaged run and one with another configuration never can.
    """
    try:
        head = read_head(store, member.run)
        if head is None:
            return "the store has nothing of it"
        _check_config(store, member, head)
    except (Damaged, ConfigChanged) as error:
        return str(error)
    if head.repair is not None:
        return "its repair is not finished"
    done = complete_round(head)
    if done >= member.target:
        return None
    last = head.advances[-1] if head.advances else None
    until = member.config.until.model_dump(mode="json")
    if last is not None and last.to >= member.target and last.ended_by == until:
        return None
    return f"round {done} of {member.target} is complete"


def open_reason(store: Store, member: Member) -> str | None:
    """Return the remaining work of a member, or None.

    If this machine cannot tell whether everything is measured, that counts as work. The flow run of the member finds
    out.
    """
    reason = rounds_open(store, member)
    if reason is not None:
        return reason
    head = require_head(store, member.run)
    if head.pending_advance is not None:
        return "its advance is not finished"
    missing = [n for n in range(complete_round(head) + 1) if not _is_measured(store, member, head, n, unknown=False)]
    return f"round {missing[0]} is not measured in full, as far as this machine can tell" if missing else None


def require_two(found: Sequence[Member], failures: Mapping[str, str]) -> None:
    """Raise SpinregError, with the reasons, if fewer than two members finished."""
    if len(found) < 2:
        reasons = "".join(f"\n  - {run}: {why}" for run, why in failures.items())
        raise SpinregError(f"only {len(found)} members finished, but a comparison needs two:{reasons}")
