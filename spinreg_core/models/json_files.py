"""The JSON files of a model folder, read in one way.

Decides: that a file which is no JSON object is bad input. Leaves out: what the files say (`source.py`,
`chat_template.py`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spinreg_core.errors import BadInput


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one where there is no file. Raises BadInput."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError, OSError) as error:
        raise BadInput("model", f"{path}, which cannot be read ({error})", "a JSON object") from None
    if not isinstance(found, dict):
        raise BadInput("model", f"{path} with a {type(found).__name__} in it", "a JSON object")
    return found
