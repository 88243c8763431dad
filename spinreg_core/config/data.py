"""The group `data` of the configuration tree: which rows are used, how they are read, and how they are split.

Decides: what that group can say by itself. Leaves out: the other groups (`groups.py`), what groups must agree on
(`run.py`, to be imported instead).
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from spinreg_core.config.groups import Group, PositiveFloat

# Arguments of apply_chat_template that are not the user's.
TEMPLATE_OWN = frozenset(
    {
        "conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
        "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    }
)  # fmt: skip


class DataConfig(Group):
    """Which rows are used, how they are read, and how they are split."""

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
        description="Further data sets to train on, each with the number of its rows for one row of `dataset` (ratio), "
        "e.g. {org/math: 0.5}. As many rows are taken as these shares allow, none twice.",
    )
    max_records: int | None = Field(
        None,
        ge=1,
        description="Read so many records from the beginning of the split of each, as a stream: of a hub data set no "
        "more is downloaded (records). Unset: all.",
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
        description="Which assistant turns of a conversation are trained on: the last, the first (as the SPIN "
        "recipe does), or every one (each becomes a row whose prompt is all that precedes it).",
    )
    max_prompt_tokens: int = Field(512, ge=8, description="Rows with a longer prompt are bad rows (tokens).")
    template_arguments: dict[str, Any] = Field(
        {},
        description="What the chat template is given besides the messages, e.g. enable_thinking: false, or tools; the "
        "same for prompts and answers, in every stage.",
    )
    long_prompts: Literal["refuse", "drop_oldest"] = Field(
        "refuse",
        description="A conversation with a longer prompt is a bad row (refuse), or loses its oldest turns until it "
        "fits; system messages and the turn that is answered stay (drop_oldest).",
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
        description="Regular expressions (Python's): a row whose prompt or answer one of them is found in is left out.",
    )
    evaluation_sets: list[str] = Field(
        [],
        description="Data sets that the model will be judged by: rows that share words in a row with one of their "
        "prompts are listed and left out of training.",
    )
    contamination_words: int = Field(
        13, ge=5, description="How many words in a row count as shared; a shorter prompt counts as a whole (words)."
    )
    prompts_per_round: int | None = Field(
        32, ge=1, description="Prompts answered in one round (rows). Unset: all training rows."
    )
    round_prompts: Literal["fresh", "same"] = Field(
        "fresh",
        description="fresh: each round takes the next prompts of one seeded permutation, starting over when it is "
        "used up; same: every round takes the same ones (SPIN's recipe).",
    )
    max_bad_share: float = Field(
        0.02, ge=0, le=1, description="Largest share of bad rows before the run ends (0..1 of the rows)."
    )

    @field_validator("template_arguments")
    @classmethod
    def _arguments_free(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(set(value) & TEMPLATE_OWN):
            raise ValueError(
                f"found {', '.join(taken)}; expected other names: spinreg itself says these to the template"
            )
        return value

    @field_validator("drop_patterns")
    @classmethod
    def _patterns_compile(cls, value: list[str]) -> list[str]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return value

    @model_validator(mode="after")
    def _columns_and_lengths(self) -> DataConfig:
        named = self.prompt_column is not None or self.response_column is not None
        if named and (self.prompt_column is None or self.response_column is None):
            raise ValueError("name both prompt_column and response_column, or neither")
        if named and self.format not in ("auto", "prompt_response"):
            raise ValueError(f"prompt_column/response_column need format prompt_response, found {self.format!r}")
        if self.max_records is not None and re.search(r"[\[+(]", self.split):
            raise ValueError(f"max_records reads from the beginning of a whole split, found split {self.split!r}")
        if self.max_length <= self.max_prompt_tokens:
            raise ValueError(
                f"max_length ({self.max_length}) must exceed max_prompt_tokens ({self.max_prompt_tokens}), "
                "or the longest prompt leaves no room for an answer"
            )
        return self
