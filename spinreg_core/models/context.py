"""The longest sequence that a model processes, prompt and answer together."""

from __future__ import annotations

from typing import Any


def context_of(config: Any) -> tuple[int | None, str]:
    """Return the most tokens of a sequence (None: no limit), and the reason as messages give it.

    config: the transformers configuration of the model, with or without a nested text configuration.

    LongRoPE and dynamic NTK scaling choose the rotary factors of a whole forward pass by its longest position. Beyond
    the length of pretraining, a sequence would depend on the others of its pass, and an answer on its own later tokens.
    """
    text = config.get_text_config()
    window = getattr(text, "max_position_embeddings", None)
    scaling = getattr(text, "rope_parameters", None) or {}
    for one in (scaling, *(part for part in scaling.values() if isinstance(part, dict))):
        if one.get("rope_type") in ("longrope", "dynamic"):
            trained = one.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            if trained and (window is None or trained < window):
                return int(trained), (
                    f"the length that the model was pretrained with (original_max_position_embeddings); beyond it, "
                    f"{one['rope_type']} scaling makes sequences depend on each other"
                )
    return window, "the model's context (max_position_embeddings)"
