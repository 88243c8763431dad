"""JSON files of a model folder.

Decides: that a file without a JSON object is bad input.
Leaves out: the meaning of the files (`source`, `chat_template`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spinreg_core.errors import BadInput


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object in a file, or an empty one if there is no file. Raises BadInput."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError, OSError) as error:
        raise BadInput(f"model file {path}", f"cannot be read ({error})", "a JSON object") from None
    if not isinstance(found, dict):
        raise BadInput(f"model file {path}", f"holds a {type(found).__name__}", "a JSON object")
    return found
