"""The package's Jinja templates: pages (HTML) and the model card (Markdown).

Decides: that text in pages is escaped, that a name which is not given is an error, and where the templates lie. Leaves
out: what they say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2


def template(name: str, **filters: Callable[..., Any]) -> jinja2.Template:
    """The template `<name>` of this package: `*.html.jinja` escapes, `*.md.jinja` cuts the lines of its own tags."""
    import jinja2

    page = name.endswith(".html.jinja")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("spinreg_core.reports"), undefined=jinja2.StrictUndefined,
        autoescape=page, trim_blocks=not page, lstrip_blocks=not page,
    )  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}  # metrics and variants have an order
    environment.filters |= filters
    return environment.get_template(name)
