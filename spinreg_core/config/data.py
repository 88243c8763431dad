"""The group `data` of the configuration: the rows, how they are read, and how they are split."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from spinreg_core.config.groups import Group, PositiveFloat

# Arguments of apply_chat_template that spinreg sets.
TEMPLATE_OWN = frozenset(
    {
        "conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
        "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    }
)  # fmt: skip


class DataConfig(Group):
    """The rows, how they are read, and how they are split."""

    format: Literal["auto", "messages", "conversations", "instruction", "prompt_response"] = Field(
        "auto",
        description="Layout of a row: `messages` (role/content), `conversations` (ShareGPT from/value), "
        "`instruction` (instruction/input/output), `prompt_response`; `auto` looks at the columns.",
    )
    prompt_column: str | None = Field(
        None, description="Column holding the prompt text; only with format prompt_response."
    )
    response_column: str | None = Field(
        None, description="Column holding the human answer; only with format prompt_response."
    )
    subset: str | None = Field(None, description="Configuration name of a hub data set.")
    split: str = Field("train", description="Split to read, in the notation of `datasets`, e.g. train[:50000].")
    mixed_datasets: dict[str, PositiveFloat] = Field(
        {},
        description="Further data sets to train on, each with its number of rows for one row of `dataset` (ratio), "
        "e.g. {org/math: 0.5}. As many rows are taken as these shares allow, none twice.",
    )
    max_records: int | None = Field(
        None,
        ge=1,
        description="Read this many records from the beginning of each data set's split, as a stream, and download no "
        "more of a hub data set (records). Unset: all.",
    )
    heldout_dataset: str | None = Field(
        None,
        description="Data set of the held-out rows (same formats). Unset: heldout_rows are set aside "
        "from the data set itself. The bundled demo data brings its own held-out file.",
    )
    heldout_split: str = Field("train", description="Split of heldout_dataset to read.")
    heldout_rows: int = Field(60, ge=1, description="Held-out rows used for evaluation (rows).")
    turns: Literal["last", "first", "all"] = Field(
        "last",
        description="Assistant turns of a conversation to train on: the last, the first (as the SPIN recipe does), or "
        "all (each becomes a row with everything before it as the prompt).",
    )
    max_prompt_tokens: int = Field(512, ge=8, description="Rows with a longer prompt are bad rows (tokens).")
    template_arguments: dict[str, Any] = Field(
        {},
        description="Further arguments of the chat template, e.g. enable_thinking: false, or tools; the same for "
        "prompts and answers, in every stage.",
    )
    long_prompts: Literal["refuse", "drop_oldest"] = Field(
        "refuse",
        description="A conversation with a longer prompt is a bad row (refuse), or loses its oldest turns until it "
        "fits, but never its system messages and the turn that is answered (drop_oldest).",
    )
    max_length: int = Field(
        1024, ge=16, description="Prompt plus answer; longer human answers are cut and count as truncated (tokens)."
    )
    min_answer_characters: int = Field(
        0, ge=0, description="Rows with a shorter human answer are left out of training (characters)."
    )
    max_answer_characters: int | None = Field(
        None, ge=1, description="Rows with a longer one are left out (characters). Unset: none."
    )
    drop_patterns: list[str] = Field(
        [],
        description="Regular expressions (Python's): a row is left out if one of them matches in its prompt or answer.",
    )
    evaluation_sets: list[str] = Field(
        [],
        description="Data sets for judging the model: training rows that share a run of words with one of their "
        "prompts are listed and left out.",
    )
    contamination_words: int = Field(
        13, ge=5, description="Length of a shared run of words; a shorter prompt counts as a whole (words)."
    )
    prompts_per_round: int | None = Field(
        32, ge=1, description="Prompts answered in one round (rows). Unset: all training rows."
    )
    round_prompts: Literal["fresh", "same"] = Field(
        "fresh",
        description="fresh: each round takes the next prompts of one seeded permutation, which starts over at its end; "
        "same: every round takes the same prompts (SPIN's recipe).",
    )
    max_bad_share: float = Field(
        0.02, ge=0, le=1, description="Largest share of bad rows; with more the run ends (0..1 of the rows)."
    )

    @field_validator("template_arguments")
    @classmethod
    def _arguments_free(cls, value: dict[str, object]) -> dict[str, object]:
        if taken := sorted(set(value) & TEMPLATE_OWN):
            raise ValueError(f"found {', '.join(taken)}, which spinreg sets; expected other names")
        return value

    @field_validator("drop_patterns")
    @classmethod
    def _patterns_compile(cls, value: list[str]) -> list[str]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"regular expressions; {pattern!r} is not one: {error}") from None
        return value

    @model_validator(mode="after")
    def _columns_and_lengths(self) -> DataConfig:
        named = self.prompt_column is not None or self.response_column is not None
        if named and (self.prompt_column is None or self.response_column is None):
            raise ValueError("prompt_column and response_column belong together; set both or neither")
        if named and self.format not in ("auto", "prompt_response"):
            raise ValueError(
                f"prompt_column and response_column need format prompt_response, but format is {self.format}; set it "
                "to auto"
            )
        if self.max_records is not None and re.search(r"[\[+(]", self.split):
            raise ValueError(f"max_records needs a whole split, but split is {self.split!r}; set only one of them")
        if self.max_length <= self.max_prompt_tokens:
            raise ValueError(
                f"max_length ({self.max_length}) must exceed max_prompt_tokens ({self.max_prompt_tokens}): the longest "
                "prompt leaves no room for an answer"
            )
        return self
