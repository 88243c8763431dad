"""The groups of the configuration: fields with their ranges, units and defaults.

Decides: checks within one group. Leaves out: checks across groups, and which fields of an existing run may change.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# A time to wait for something. Longer waits overflow the operating system's clock and raise in the waiting thread.
Time = Annotated[float, Field(le=10_000_000, allow_inf_nan=False)]
# Fields that only count while LoRA, or averaging, is on.
LORA_FIELDS = ("lora_alpha", "lora_targets", "lora_quantize")
AVERAGE_FIELDS = ("average_weight", "average_as")


class Group(BaseModel):
    """Base of all configuration groups: frozen, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch(cls, value: object) -> object:
        # No field is a boolean, and pydantic would accept one as the number 0 or 1.
        if isinstance(value, bool):
            raise ValueError(
                "a number, text, list or mapping, not a truth value (YAML reads on, off, yes and no as truth values; "
                "quotes make them text)"
            )
        return value


class OpponentConfig(Group):
    """The opponent, a mixture of iterates that answers against the human: q_t = sum_k w_k pi_{t-k}."""

    source: Literal["replay", "regenerate"] = Field(
        "replay",
        description="replay: pairs of earlier rounds are used again with their own prompts (no extra generation); "
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
        "iterate and the base, instead of from the iterate (0..1). 1 is the geometric opponent.",
    )
    geometric_alpha: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Weight of the iterate in that mixture; the base has the rest. Unset: objective.alpha.",
    )
    replay_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="With source regenerate: share of an earlier iterate's answers that are not generated again; as "
        "many pairs of that iterate are taken from earlier rounds, with their own prompts (0..1).",
    )
    max_pairs: int | None = Field(
        None,
        ge=1,
        description="Largest number of pairs in a round of source replay, divided among the iterates by their weights. "
        "Unset, round t of history all trains on t times the pairs of round 1.",
    )
    truncated: Literal["keep", "drop", "clip_real"] = Field(
        "clip_real",
        description="Generated answers cut off by the length limit: keep the pair, drop it, or clip a longer real "
        "answer to the same number of tokens (without its end-of-turn). Where the human answer stops before the limit "
        "and the generated one does not, the policy learns to stop under every choice except drop.",
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
            raise ValueError(
                f"replay_share is {self.replay_share} but source is replay, which replays everything; set source to "
                "regenerate, or replay_share to 0"
            )
        if self.max_pairs is not None and self.source == "regenerate":
            raise ValueError(
                f"max_pairs is {self.max_pairs} but source is regenerate; max_pairs limits replay only, so set "
                "data.prompts_per_round instead"
            )
        return self


class ObjectiveConfig(Group):
    """The self-play loss l(beta [r(x,y) - r(x,y')]) of arXiv 2404.04291."""

    alpha: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Weight of the previous iterate in the geometric-mixture reference: 1 is plain SPIN, 0 is DPO "
        "against the base model.",
    )
    reference: Literal["previous", "iterate"] = Field(
        "previous",
        description="Policy that is mixed with the base to form the reference: previous uses the previous policy for "
        "all pairs, iterate the policy that sampled each pair (replayed pairs then keep their scores).",
    )
    beta: PositiveFloat | Annotated[list[PositiveFloat], Field(min_length=1)] = Field(
        0.1,
        description="Total scale of the log-ratios (1/nat). A list gives rounds 1, 2, ...; its last entry holds from "
        "there on.",
    )
    link: Literal["logistic", "hinge", "squared"] = Field(
        "logistic", description="logistic -log sigmoid(beta m), hinge max(0, 1 - beta m), squared (m - 1/(2 beta))^2."
    )
    guard: float = Field(
        1.0,
        ge=1,
        allow_inf_nan=False,
        description="Weight of a human answer's reward in the margin while the reward is at most 0 (DPO-Positive with "
        "lambda = guard - 1). It keeps human answers from becoming less likely. 1 is off.",
    )


class GenerationConfig(Group):
    """How a policy answers prompts."""

    engine: Literal["auto", "hf", "vllm"] = Field(
        "auto", description="auto uses vllm where it is installed, else hf (transformers)."
    )
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto",
        description="Number format a policy is sampled in. auto is that of training.precision (mixed and bf16: "
        "bfloat16, fp32: float32), so that the sampled policy is the scored one: bfloat16 rounds away the small steps "
        "of an fp32 round.",
    )
    temperature: PositiveFloat = Field(1.0, description="Sampling temperature; 1 samples from the iterate unchanged.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus mass; 1 is off.")
    top_k: int = Field(0, ge=0, description="Most likely tokens kept; 0 is off (tokens).")
    max_new_tokens: int = Field(80, ge=1, description="Longest generated answer, end-of-turn included (tokens).")
    answers_per_prompt: int = Field(
        1, ge=1, description="Answers to each prompt of a round; each is paired with the human one (answers)."
    )
    shard_size: int = Field(
        32,
        ge=1,
        description="Answers sampled and committed together; a kill costs at most these (answers).",
    )
    tensor_parallel: int = Field(
        1, ge=1, description="GPUs that share one copy of the policy (vllm); each such group is one engine."
    )


class TrainingConfig(Group):
    """One round of training on cached scores."""

    learning_rate: PositiveFloat | Annotated[list[PositiveFloat], Field(min_length=1)] = Field(
        5e-6, description="Peak learning rate. A list gives rounds 1, 2, ...; its last entry holds from there on."
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
        description="Training stops after this many steps in a row without a finite loss and gradient; fewer are "
        "skipped, counted and reported (steps).",
    )
    precision: Literal["mixed", "bf16", "fp32"] = Field(
        "fp32",
        description="mixed: bf16 compute with fp32 master weights, right for GPUs; bf16: everything bf16; fp32: "
        "fastest on CPUs without bf16 matrix units.",
    )
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none",
        description="Activations that the backward pass computes again instead of keeping: none; all except matrix "
        "products and attention (selective); whole layers (full: the least memory, a third more work).",
    )
    checkpoint_every_steps: int | None = Field(
        50,
        ge=1,
        description="Steps between checkpoints in the store, from which a killed round resumes (optimiser steps). "
        "Unset: only by time.",
    )
    checkpoint_every_minutes: PositiveFloat | None = Field(
        15.0, description="Time between checkpoints; the first of both counts (minutes). Unset: only by steps."
    )
    checkpoints_kept: int = Field(
        2, ge=1, description="Newest checkpoints kept while a round is trained; older ones are deleted (checkpoints)."
    )
    save_dtype: Literal["master", "bfloat16", "float32"] = Field(
        "master", description="Number format of the published policy; master is that of the master weights."
    )
    average: Literal["ema", "liti", "slerp"] | None = Field(
        None,
        description="Average every round's policy with earlier ones, weight by weight: ema with the average before it, "
        "liti with the base, slerp along the arc between the two as seen from the base. Unset: no averages.",
    )
    average_weight: float = Field(
        0.5, ge=0, le=1, description="Share of the newly trained policy in its average (0..1)."
    )
    average_as: Annotated[list[Literal["opponent", "reference", "start"]], Field(min_length=1)] = Field(
        ["opponent", "reference", "start"],
        description="Roles in which later rounds use the averages instead of the trained policies: the opponent that "
        "answers, the previous policy of the reference, the policy that training starts from.",
    )
    lora_rank: int | None = Field(
        None,
        ge=1,
        description="Rank of a LoRA adapter (float32) that is trained on the frozen base model; it needs a learning "
        "rate of 1e-4 or more. Unset: every weight is trained.",
    )
    lora_alpha: PositiveFloat = Field(
        16.0, description="LoRA's scale: the adapter adds lora_alpha / lora_rank times B A. Not the objective's alpha."
    )
    lora_targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = Field(
        "all-linear",
        description="Matrices with an adapter: those of all transformer layers, or a list of names such as q_proj.",
    )
    lora_quantize: Literal["4bit", "8bit"] | None = Field(
        None,
        description="Keep the base in this many bits while an adapter is trained (bitsandbytes, one process). The "
        "rounded model is then the run's base.",
    )

    @property
    def rounds_adapter(self) -> bool:
        """True if bfloat16 rounds the trained adapter otherwise than the merged policy that is scored.

        bf16(W) x + bf16(BA) x is trained, and bf16(W + BA) x is scored.
        """
        return self.lora_rank is not None and self.precision != "fp32"

    @model_validator(mode="after")
    def _switches(self) -> TrainingConfig:
        for switch, fields in (("lora_rank", LORA_FIELDS), ("average", AVERAGE_FIELDS)):
            changed = [name for name in fields if getattr(self, name) != type(self).model_fields[name].default]
            if changed and getattr(self, switch) is None:
                raise ValueError(f"{', '.join(changed)} needs {switch}, which is not set; set {switch}")
        if self.average is not None and self.lora_rank is not None:
            raise ValueError("average cannot be combined with lora_rank: the next round starts from a base with an "
                             "adapter, which an average of merged weights is not; leave out one of them")  # fmt: skip
        if self.lora_rank is not None and self.save_dtype == "bfloat16":
            raise ValueError("save_dtype bfloat16 cannot be combined with lora_rank: it rounds away a small adapter, "
                             "and the next round would not start from its reference; use master")  # fmt: skip
        return self


class EvaluationConfig(Group):
    """Held-out metrics of the base and of every iterate."""

    bootstrap: int = Field(
        1000, ge=100, description="Resamples behind the intervals of benchmarks and of the length bias."
    )
    final_answer: Literal["auto", "gsm8k", "none"] = Field(
        "auto",
        description="Exact match of final answers: gsm8k compares the numbers after `####`; auto does so "
        "where rows have it.",
    )
    shown_samples: int = Field(8, ge=0, description="Side-by-side sample answers in the report (prompts).")
    alarm_real_drop: NonNegativeFloat = Field(
        0.0,
        description="Largest drop of the log-probability of held-out human answers in one round without an alarm in "
        "the report, where there are enough rows to tell (nats/token).",
    )


class ResourcesConfig(Group):
    """Hardware, parallelism and time limits of stages. May change between starts of a run."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto uses a GPU where there is one.")
    processes: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Processes (ranks) per node that train, score and evaluate together, with the weights spread over "
        "them: auto is one per GPU, and one on a CPU.",
    )
    nodes: int = Field(1, ge=1, description="Machines that work together; the others run `spinreg join`.")
    rendezvous: str | None = Field(
        None,
        pattern=r"^\S+:[1-9]\d{0,4}$",
        description="Address at which the machines meet: HOST:PORT of the one that runs the flow. Needed for "
        "several nodes.",
    )
    shard_over: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Ranks that share one copy of the weights (FSDP); further ranks hold further copies (HSDP). auto: "
        "the ranks of a node.",
    )
    collective_timeout_seconds: Time = Field(
        600.0,
        gt=0,
        description="Silence of a rank after which the job ends and names it: in a collective, or while it transfers "
        "files and no byte moves (seconds).",
    )
    tokens_per_pass: int = Field(
        2048,
        ge=1,
        description="Tokens in one pass through the model in training, scoring and evaluation, packed without padding "
        "and with shared prompts counted once; gradients are accumulated. Fewer take less memory. A longer pair gets a "
        "pass of its own.",
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="torch.compile of the transformer layers in training, scoring and evaluation, and of the hf "
        "engine's decoding step; auto: on GPUs. The first pass takes a minute longer.",
    )
    kv_cache_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Size of the hf engine's key-value cache, which limits how many answers it decodes together, "
        "counted at their full length with their prompts. auto is 8192 on CPUs, and on a GPU half of its free memory; "
        "it is halved where memory does not suffice (tokens).",
    )
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="Share of a GPU that vLLM may take (0..1).")
    cpu_kv_cache_gib: PositiveFloat = Field(1.0, description="vLLM's KV cache on CPU (GiB).")
    retries: int = Field(2, ge=0, le=20, description="Retries of a failed stage, with growing delays.")
    retry_delay_seconds: Time = Field(10.0, ge=0, description="Delay before the first retry, doubled each time (s).")
    deadline_minutes: Time | None = Field(
        None, gt=0, description="A stage that still runs after this time is ended and counts as failed (minutes)."
    )
    stop_seconds: Time = Field(
        20.0,
        gt=0,
        description="Time for a stage that is stopped (cancelled, or preempted by SIGTERM) to finish its step and "
        "commit a checkpoint, before it is killed. Prefect kills a cancelled run after 30 s (seconds).",
    )
    lease_seconds: Time = Field(
        30.0, ge=2, description="Silence after which another process may take over a run (seconds)."
    )


class KeepConfig(Group):
    """Objects that `spinreg gc` keeps in addition to those that later rounds read. May change between starts."""

    policies: Annotated[int, Field(ge=1)] | Literal["all"] = Field(
        "all",
        description="Newest iterates with policies that are kept, as are the averages that end with them. Older "
        "weights are removed; reports of their training stay, and so does the base.",
    )
    generations: Literal["all", "needed"] = Field(
        "all",
        description="Generated answers: all of them, or only those that later rounds read. Pairs and evaluations stay, "
        "and hold copies of the answers they used.",
    )
