"""The groups of the configuration tree: what a user can set, its range, its unit, its default.

Decides: what one group can say by itself (the group `data`: `data.py`).
Leaves out: what groups must agree on, which fields of an existing run may change (`run.py`, to be imported instead).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# Of something that is waited for: what is longer than the operating system's clocks can count is an error in a thread.
Time = Annotated[float, Field(le=10_000_000, allow_inf_nan=False)]
# What is read of LoRA, and of averages, where they are on.
LORA_FIELDS = ("lora_alpha", "lora_targets", "lora_quantize")
AVERAGE_FIELDS = ("average_weight", "average_as")


class Group(BaseModel):
    """Base of all configuration groups: frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch(cls, value: object) -> object:
        if isinstance(value, bool):  # no field is one, and pydantic would take it for 0 or 1
            raise ValueError("a value of the field's kind, which a truth value is not")
        return value


class OpponentConfig(Group):
    """Whose answers play against the human ones: q_t = sum_k w_k pi_{t-k}."""

    source: Literal["replay", "regenerate"] = Field(
        "replay",
        description="replay: pairs of earlier rounds come back with their own prompts (no extra generation); "
        "regenerate: earlier iterates answer this round's prompts.",
    )
    history: Annotated[int, Field(ge=1)] | Literal["all"] = Field(
        "all", description="How many iterates the opponent averages, newest first; `all` is fictitious play."
    )
    weighting: Literal["uniform", "recency"] | list[NonNegativeFloat] = Field(
        "uniform",
        description="Weights of the iterates: uniform, recency (w_k proportional to decay^k), or a list, newest first.",
    )
    decay: float = Field(0.5, gt=0, le=1, description="Ratio of neighbouring weights with weighting recency.")
    geometric_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the answers that are sampled, token by token, from the geometric mixture of the drawn "
        "iterate with the base, instead of from the iterate itself (0..1). 1 is the geometric opponent.",
    )
    geometric_alpha: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Weight of the iterate in that mixture, the base has the rest. Unset: objective.alpha.",
    )
    replay_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="With source regenerate: share of the answers drawn from an earlier iterate that are not generated "
        "anew; as many pairs of that iterate come back from earlier rounds, with their own prompts (0..1).",
    )
    truncated: Literal["keep", "drop", "clip_real"] = Field(
        "clip_real",
        description="Generated answers cut off by the length limit: keep the pair, drop it, or clip a real answer that "
        "is longer to the same number of tokens (without its end-of-turn). Where people stop before the limit and the "
        "policy does not, stopping is learnt whatever is set here, drop excepted.",
    )

    @field_validator("weighting")
    @classmethod
    def _weights_usable(cls, value: object) -> object:
        if isinstance(value, list) and (not value or value[0] <= 0):
            raise ValueError("a list of weights, newest first, the first of them positive")
        return value

    @model_validator(mode="after")
    def _replays_what_could_be_regenerated(self) -> OpponentConfig:
        if self.replay_share and self.source == "replay":
            raise ValueError(f"replay_share ({self.replay_share}) needs source regenerate: source replay is all replay")
        return self


class ObjectiveConfig(Group):
    """The self-play loss l(beta [r(x,y) - r(x,y')]), arXiv 2404.04291."""

    alpha: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Weight of the previous iterate in the geometric-mixture reference: 1 is plain SPIN, 0 is DPO "
        "against the base model.",
    )
    beta: PositiveFloat | Annotated[list[PositiveFloat], Field(min_length=1)] = Field(
        0.1,
        description="Total scale of the log-ratios (1/nat). A list gives rounds 1, 2, ...; its last entry goes on.",
    )
    link: Literal["logistic", "hinge", "squared"] = Field(
        "logistic", description="logistic -log sigmoid(beta m), hinge max(0, 1 - beta m), squared (m - 1/(2 beta))^2."
    )


class GenerationConfig(Group):
    """How a policy answers prompts."""

    engine: Literal["auto", "hf", "vllm"] = Field(
        "auto", description="auto takes vllm where it is installed, else hf (transformers)."
    )
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto",
        description="Number format a policy is sampled in. auto is that of training.precision (mixed and bf16: "
        "bfloat16, fp32: float32), so that what is sampled is what is scored: bfloat16 rounds the small steps of an "
        "fp32 round away.",
    )
    temperature: PositiveFloat = Field(1.0, description="1 samples the iterate itself; anything else another policy.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus mass; 1 is off.")
    top_k: int = Field(0, ge=0, description="Most likely tokens kept; 0 is off (tokens).")
    max_new_tokens: int = Field(80, ge=1, description="Longest generated answer, end-of-turn included (tokens).")
    answers_per_prompt: int = Field(
        1, ge=1, description="Answers to each prompt of a round; each makes a pair with the human one (answers)."
    )
    shard_size: int = Field(
        32,
        ge=1,
        description="Answers sampled and committed together: what a kill can cost (answers).",
    )
    tensor_parallel: int = Field(
        1, ge=1, description="GPUs that hold one copy of the policy together (vllm); each such group is one engine."
    )


class TrainingConfig(Group):
    """One round of training on cached scores."""

    learning_rate: PositiveFloat | Annotated[list[PositiveFloat], Field(min_length=1)] = Field(
        5e-6, description="Peak learning rate. A list gives rounds 1, 2, ...; its last entry goes on."
    )
    optimizer: Literal["adamw", "rmsprop"] = Field("rmsprop", description="torch.optim.AdamW or torch.optim.RMSprop.")
    weight_decay: NonNegativeFloat = Field(0.0, description="Decoupled (AdamW) or L2 (RMSprop) weight decay.")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="Decay after warm-up, to zero.")
    warmup: float = Field(0.1, ge=0, le=1, description="Share of a round's steps spent warming up (0..1).")
    epochs: int = Field(1, ge=1, description="Passes over the round's pairs (epochs).")
    batch_size: int = Field(8, ge=1, description="Pairs per optimiser step.")
    max_grad_norm: PositiveFloat | None = Field(1.0, description="Gradient clipping threshold (l2 norm); unset: none.")
    max_nonfinite_steps: int = Field(
        3,
        ge=1,
        description="Steps in a row with a loss or gradient that is not finite after which training stops; fewer are "
        "skipped, counted and reported (steps).",
    )
    precision: Literal["mixed", "bf16", "fp32"] = Field(
        "fp32",
        description="mixed: bf16 compute with fp32 master weights, right for GPUs; bf16: everything bf16; fp32: "
        "fastest on CPUs without bf16 matrix units.",
    )
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none",
        description="What the backward pass computes again instead of keeping it: nothing; all but matrix products and "
        "attention (selective); whole layers (full, the least memory, a third more work).",
    )
    checkpoint_every_steps: int | None = Field(
        50,
        ge=1,
        description="Steps between checkpoints in the store that a killed round goes on from (optimiser steps). Unset: "
        "only by time.",
    )
    checkpoint_every_minutes: PositiveFloat | None = Field(
        15.0, description="The same by time, whichever comes first (minutes). Unset: only by steps."
    )
    checkpoints_kept: int = Field(
        2, ge=1, description="Newest checkpoints of a round that are kept while it is trained; older ones are deleted."
    )
    save_dtype: Literal["master", "bfloat16", "float32"] = Field(
        "master", description="Number format of the published policy; master is that of the master weights."
    )
    average: Literal["ema", "liti", "slerp"] | None = Field(
        None,
        description="Average every round's policy with earlier ones, weight by weight: ema with the average before it, "
        "liti with the base, slerp along the arc between both as seen from the base. Unset: no averages.",
    )
    average_weight: float = Field(
        0.5, ge=0, le=1, description="Share of the newly trained policy in its average (0..1)."
    )
    average_as: Annotated[list[Literal["opponent", "reference", "start"]], Field(min_length=1)] = Field(
        ["opponent", "reference", "start"],
        description="What the averages stand for in later rounds, in place of the trained policies: whose answers are "
        "the opponent's, the previous policy of the reference, the policy that training starts from.",
    )
    lora_rank: int | None = Field(
        None,
        ge=1,
        description="Rank of a LoRA adapter (float32) that is trained while the base model stays; it needs a learning "
        "rate of 1e-4 or more. Unset: every weight is trained.",
    )
    lora_alpha: PositiveFloat = Field(
        16.0, description="LoRA's scale: the adapter adds lora_alpha / lora_rank times B A. Not the objective's alpha."
    )
    lora_targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = Field(
        "all-linear",
        description="Matrices that get an adapter: those of all transformer layers, or a list of names such as q_proj.",
    )
    lora_quantize: Literal["4bit", "8bit"] | None = Field(
        None,
        description="Keep the base in so many bits while an adapter is trained (bitsandbytes, one process). The run's "
        "base model is then the rounded one.",
    )

    @model_validator(mode="after")
    def _lora_is_on(self) -> TrainingConfig:
        set_here = sorted(self.model_fields_set & set(LORA_FIELDS))
        if self.lora_rank is None and any(
            getattr(self, name) != type(self).model_fields[name].default for name in set_here
        ):
            raise ValueError(f"{', '.join(set_here)} without lora_rank, which switches LoRA on")
        if self.average is not None and self.lora_rank is not None:
            raise ValueError("average with lora_rank: an average of merged weights is no base plus adapter, from which "
                             "the next round could start; leave one of them out")  # fmt: skip
        if self.average is None and self.model_fields_set & set(AVERAGE_FIELDS):
            changed = sorted(name for name in AVERAGE_FIELDS
                             if getattr(self, name) != type(self).model_fields[name].default)  # fmt: skip
            if changed:
                raise ValueError(f"{', '.join(changed)} without average, which switches averages on")
        if self.lora_rank is not None and self.save_dtype == "bfloat16":
            raise ValueError("save_dtype bfloat16 with lora_rank: rounding hides what a small adapter adds, and the "
                             "next round would not start from its reference; leave save_dtype at master")  # fmt: skip
        return self


class EvaluationConfig(Group):
    """Held-out metrics of the base and of every iterate."""

    bootstrap: int = Field(1000, ge=100, description="Resamples behind each 95 % interval.")
    final_answer: Literal["auto", "gsm8k", "none"] = Field(
        "auto",
        description="Exact match of final answers: gsm8k compares the numbers after `####`; auto where rows have it.",
    )
    shown_samples: int = Field(8, ge=0, description="Side-by-side sample answers in the report (prompts).")
    alarm_real_drop: NonNegativeFloat = Field(
        0.0,
        description="Drop of the log-probability of held-out human answers in one round beyond which the report raises "
        "an alarm, where the rows support it (nats/token).",
    )


class ResourcesConfig(Group):
    """Where and how long stages run. May change between starts of the same run."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes a GPU where there is one.")
    processes: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Processes (ranks) per node that train, score and evaluate together, the weights spread over them: "
        "auto is one per GPU, and one on a CPU.",
    )
    nodes: int = Field(1, ge=1, description="Machines that work together; the others run `spinreg join`.")
    rendezvous: str | None = Field(
        None,
        pattern=r"^\S+:[1-9]\d{0,4}$",
        description="Where the machines meet: HOST:PORT on the one that runs the flow. Needed for several nodes.",
    )
    shard_over: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Ranks that one copy of the weights is spread over (FSDP); beyond it copies are repeated (HSDP). "
        "auto: the ranks of a node.",
    )
    collective_timeout_seconds: Time = Field(
        600.0,
        gt=0,
        description="Silence of a rank after which the job ends and names it: in a collective, or where it stores or "
        "fetches files and no byte moves (seconds).",
    )
    tokens_per_pass: int = Field(
        2048,
        ge=1,
        description="Tokens that go through the model at once in training, scoring and evaluation, packed without "
        "padding and with shared prompts counted once; gradients are accumulated. Fewer take less memory. A pair "
        "longer than this goes alone.",
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="torch.compile of the transformer layers in training, scoring and evaluation, and of the hf "
        "engine's decoding step; auto: on GPUs. The first pass then takes a minute longer.",
    )
    kv_cache_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Tokens, prompts and answers at their longest, whose keys and values the hf engine keeps at once: "
        "what it decodes together. auto is 8192 on CPUs, and on a GPU what half of its free memory holds; where memory "
        "does not suffice it is halved (tokens).",
    )
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="Share of a GPU that vLLM may take (0..1).")
    cpu_kv_cache_gib: PositiveFloat = Field(1.0, description="vLLM's KV cache on CPU (GiB).")
    retries: int = Field(2, ge=0, le=20, description="Retries of a failed stage, with growing delays.")
    retry_delay_seconds: Time = Field(10.0, ge=0, description="Delay before the first retry, doubled each time (s).")
    deadline_minutes: Time | None = Field(
        None, gt=0, description="A stage still running after this long is ended and counts as failed (minutes)."
    )
    stop_seconds: Time = Field(
        20.0,
        gt=0,
        description="Time a stage has to finish its step and commit a checkpoint when it is stopped (cancelled, or "
        "preempted by SIGTERM), before it is killed. Prefect itself kills a cancelled run after 30 s (seconds).",
    )
    lease_seconds: Time = Field(
        30.0, ge=2, description="Silence after which another process may take over a run (seconds)."
    )


class KeepConfig(Group):
    """What `spinreg gc` leaves of a finished run besides what later rounds read. May change between starts of a run."""

    policies: Annotated[int, Field(ge=1)] | Literal["all"] = Field(
        "all",
        description="Newest iterates whose policies, and averages that end with them, are kept. Of older ones the "
        "weights go; what their training reported stays, and so does the base.",
    )
    generations: Literal["all", "needed"] = Field(
        "all",
        description="Generated answers: all of them, or only those that later rounds read. Pairs and evaluations hold "
        "a copy of what was used, and stay.",
    )
