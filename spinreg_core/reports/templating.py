"""The package's Jinja templates: pages (HTML) and the model card (Markdown).

Decides: text in pages is escaped, and a name that is not given is an error. Leaves out: the text of the templates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2


def template(name: str, **filters: Callable[..., Any]) -> jinja2.Template:
    """Return a template of this package. `*.html.jinja` escapes; `*.md.jinja` drops the lines of its own tags."""
    import jinja2

    page = name.endswith(".html.jinja")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("spinreg_core.reports"), undefined=jinja2.StrictUndefined,
        autoescape=page, trim_blocks=not page, lstrip_blocks=not page,
    )  # fmt: skip
    # Jinja sorts keys by default, but metrics and variants have an order.
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    environment.filters |= filters
    return environment.get_template(name)
