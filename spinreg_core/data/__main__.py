"""`python -m spinreg_core.data inspect`: look at a data set without Prefect; the same as `spinreg data inspect`.

Decides: nothing. Leaves out: what is shown (`inspect.py`).
"""

from __future__ import annotations

import argparse
import json
import sys

from spinreg_core.config.resolve import assignments, merge, resolve
from spinreg_core.data.inspect import inspect
from spinreg_core.errors import EXIT_BAD_INPUT, BadInput


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m spinreg_core.data", description=__doc__)
    commands = parser.add_subparsers(dest="action", required=True)
    look = commands.add_parser("inspect", help="counts, lengths, rendered examples and rejected rows")
    look.add_argument(
        "dataset", nargs="?", help="hub id, file or folder, or builtin:demo (default: the configuration's)"
    )
    look.add_argument("--config", help="run configuration file (YAML or JSON; path or URI)")
    look.add_argument("--model", help="base model, for its template and tokens")
    look.add_argument("-p", "--param", action="append", default=[], metavar="GROUP.FIELD=VALUE", help="any other field")
    look.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(argv)
    named = {name: value for name in ("dataset", "model") if (value := getattr(given, name)) is not None}
    try:
        text, document = inspect(resolve(merge(named, assignments(given.param)), given.config))
    except BadInput as error:
        print(f"spinreg: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print(json.dumps(document, indent=1) if given.json else text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
