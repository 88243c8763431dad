"""The groups for benchmarks, the judge, early stopping and trackers.

All of them may change between starts of a run, because they change no policy.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from spinreg_core.config.groups import Group, NonNegativeFloat, PositiveFloat, Time

PositiveCount = Annotated[int, Field(ge=1)]
# The six tasks of the Open LLM Leaderboard (its first version) with their numbers of few-shot examples.
LEADERBOARD = {
    "arc_challenge": 25, "hellaswag": 10, "mmlu": 5, "truthfulqa_mc2": 0, "winogrande": 5, "gsm8k": 5,
}  # fmt: skip


class BenchmarksConfig(Group):
    """Benchmark tasks, MT-Bench and win rates of the base and of iterates. May change between starts of a run."""

    rounds: Literal["all"] | list[Annotated[int, Field(ge=0)]] = Field(
        "all", description="Iterates to measure: all, or a list of rounds (0 is the base)."
    )
    tasks: list[Annotated[str, Field(min_length=1)]] = Field(
        [],
        description="Tasks of EleutherAI's lm-eval (extra `eval`), by name. `leaderboard` stands for the six of the "
        "Open LLM Leaderboard with their few-shot examples: arc_challenge 25, hellaswag 10, mmlu 5, truthfulqa_mc2 0, "
        "winogrande 5, gsm8k 5.",
    )
    fewshot: dict[str, Annotated[int, Field(ge=0)]] = Field(
        {},
        description="Few-shot examples before each question, by task; they replace the number of the task or of the "
        "Leaderboard (examples).",
    )
    limit: PositiveCount | dict[str, PositiveCount] | None = Field(
        None,
        description="Use only the first questions: their number per task (for a group: per subtask), or by task "
        "(questions). Unset: all.",
    )
    include_path: str | None = Field(
        None,
        min_length=1,
        description="Folder with task files of lm-eval (YAML): tasks of your own, or data on this machine.",
    )
    backend: Literal["auto", "hf", "vllm"] = Field(
        "auto", description="Backend of lm-eval; auto is vllm on GPUs where it is installed, else hf."
    )
    batch_size: int = Field(8, ge=1, description="Sequences that the hf backend scores together (sequences).")
    questions_as: Literal["plain", "chat"] = Field(
        "plain",
        description="Form of lm-eval's questions: plain text, as on the Leaderboard, or in the model's chat template.",
    )
    mt_bench: str | None = Field(
        None,
        min_length=1,
        description="Questions of MT-Bench: `hub`, or a file like FastChat's question.jsonl. A judge grades the "
        "answers.",
    )
    mt_bench_references: str | None = Field(
        None,
        min_length=1,
        description="Reference answers to the questions of MT-Bench on maths, reasoning and coding: a file like "
        "FastChat's reference_answer/gpt-4.jsonl. `hub` includes them.",
    )
    mt_bench_max_tokens: int = Field(1024, ge=1, description="Longest answer in each of the two turns (tokens).")
    win_rate: list[Literal["base", "previous", "human"]] = Field(
        [], description="Answers that a judge compares the iterate's held-out samples with, in both orders."
    )
    win_rate_prompts: PositiveCount | None = Field(
        None, description="Judge only this many held-out prompts, the first ones (prompts). Unset: all."
    )

    def lm_eval_tasks(self) -> list[str]:
        """Return the names of `tasks`, with `leaderboard` replaced by its six."""
        return [name for task in self.tasks for name in (LEADERBOARD if task == "leaderboard" else [task])]

    @model_validator(mode="after")
    def _usable(self) -> BenchmarksConfig:
        tasks = self.lm_eval_tasks()
        for name, values in (("tasks", tasks), ("win_rate", self.win_rate)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} lists an entry twice: {', '.join(values)}")
        for name, by_task in (("fewshot", self.fewshot), ("limit", self.limit)):
            strange = sorted(set(by_task) - set(tasks)) if isinstance(by_task, dict) else []
            if strange:
                raise ValueError(
                    f"{name} names {', '.join(strange)}, which tasks does not ({', '.join(tasks) or 'it is empty'})"
                )
        if self.mt_bench_references is not None and self.mt_bench is None:
            raise ValueError("mt_bench_references needs mt_bench, the questions they answer; set mt_bench")
        return self


class JudgeConfig(Group):
    """The model behind an OpenAI-compatible endpoint that grades and compares answers."""

    base_url: str | None = Field(
        None,
        pattern=r"^https?://[^\s\x40]+$",  # "@" is written \x40: messages cut out what looks like a password
        description="Address of the endpoint, e.g. https://api.openai.com/v1 or http://127.0.0.1:8000/v1, without "
        "credentials.",
    )
    model: str | None = Field(None, min_length=1, description="The judge's name at that endpoint.")
    key_variable: str = Field(
        "OPENAI_API_KEY",
        pattern="^[A-Z_][A-Z0-9_]*$",  # refuses most keys, should one be put here
        description="Environment variable that holds the key, in capitals; the key is never stored.",
    )
    prompts: str | None = Field(
        None,
        min_length=1,
        description="File with the judge's prompts (YAML, or FastChat's judge_prompts.jsonl) to use instead of "
        "spinreg's. Its hash is part of the result.",
    )
    temperature: NonNegativeFloat = Field(0.0, description="Sampling temperature of the judge; 0 is greedy.")
    max_tokens: int = Field(2048, ge=1, description="Longest verdict, including its explanation (tokens).")
    at_once: int = Field(8, ge=1, description="Requests sent at the same time (requests).")
    timeout_seconds: Time = Field(120.0, gt=0, description="Silence after which a request is sent again (seconds).")
    patience_seconds: Time = Field(
        600.0,
        gt=0,
        description="Longest wait for rate limits and errors of the endpoint to pass; then the stage fails, and "
        "resumes later from the verdicts it has (seconds).",
    )
    tries: int = Field(
        3, ge=1, description="Answers of the judge to search for a verdict before it counts as malformed (answers)."
    )
    parsing: Literal["strict", "fastchat"] = Field(
        "strict",
        description="How a verdict is found: `strict` leaves out the judge's thoughts, and an answer with several "
        "different verdicts or a quoted one is malformed; `fastchat` takes the first, as FastChat does. Runs of "
        "spinreg 0.1.0 keep `fastchat`.",
    )
    max_requests: PositiveCount | None = Field(
        None,
        description="Most requests of one benchmark (one iterate's MT-Bench, say), over all its attempts; requests "
        "that the endpoint refuses do not count (requests). Unset: no limit.",
    )
    max_cost: PositiveFloat | None = Field(
        None, description="Highest cost of one benchmark, in the currency of the prices. Unset: no limit."
    )
    price_prompt: NonNegativeFloat = Field(0.0, description="Price of a million prompt tokens.")
    price_answer: NonNegativeFloat = Field(0.0, description="Price of a million tokens of the judge's answers.")

    @model_validator(mode="after")
    def _costs_something(self) -> JudgeConfig:
        if self.max_cost is not None and not self.price_prompt and not self.price_answer:
            raise ValueError(
                f"max_cost is {self.max_cost:g} but price_prompt and price_answer are 0; set what tokens cost"
            )
        return self


class UntilConfig(Group):
    """Early stopping: conditions that end a run before its target round. May change between starts of a run."""

    metric: str | None = Field(
        None,
        min_length=1,
        description="Metric that must improve: a held-out one (heldout_nll, reward_accuracy, exact_match), or a "
        "benchmark's, as NAME/METRIC (gsm8k/exact_match).",
    )
    rounds_without_gain: PositiveCount | None = Field(
        None,
        description="The run ends after this many rounds in a row without a new best value of that metric (rounds).",
    )
    kl_base_above: PositiveFloat | None = Field(
        None, description="The run ends when the KL to the base exceeds this (nats/answer)."
    )

    @model_validator(mode="after")
    def _both(self) -> UntilConfig:
        if (self.metric is None) != (self.rounds_without_gain is None):
            raise ValueError("metric and rounds_without_gain belong together; set both or neither")
        return self


class TrackingConfig(Group):
    """Trackers that show the run in addition to Prefect and the report. May change between starts of a run."""

    to: list[Literal["tensorboard", "mlflow", "wandb"]] = Field(
        [],
        description="Trackers that get all metrics after every round (extras of these names). They take servers and "
        "keys from their own environment variables (MLFLOW_TRACKING_URI, WANDB_API_KEY, ...).",
    )
    project: str = Field(
        "spinreg", min_length=1, description="MLflow experiment or Weights & Biases project of the run."
    )
    folder: str = Field(
        "spinreg-tensorboard",
        min_length=1,
        description="Local folder for TensorBoard (its --logdir), with a folder in it for each run.",
    )

    @model_validator(mode="after")
    def _usable(self) -> TrackingConfig:
        if len(set(self.to)) < len(self.to):
            raise ValueError(f"tracking.to lists an entry twice: {', '.join(self.to)}")
        if "://" in self.folder:
            raise ValueError(
                f"tracking.folder is {self.folder}, which is an address; give a local folder of the machine that runs "
                "the flow"
            )
        return self
