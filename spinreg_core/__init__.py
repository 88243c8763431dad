"""spinreg_core: regularised self-play alignment of language models, as a library.

The names below are its public face; everything else is internal and may change. Importing this package loads neither
Prefect nor torch: each name is imported when it is first used.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spinreg_core.api import Run, load_policy, read_run, run
    from spinreg_core.comparison.compare import compare
    from spinreg_core.config import RunConfig
    from spinreg_core.planning.plan import plan
    from spinreg_core.reports.export import export
    from spinreg_core.reports.run_report import report_data
    from spinreg_core.selfplay.loss import self_play_loss
    from spinreg_core.store.open import open_store

__all__ = [
    "Run",
    "RunConfig",
    "__version__",
    "compare",
    "export",
    "load_policy",
    "open_store",
    "plan",
    "read_run",
    "report_data",
    "run",
    "self_play_loss",
]

_PLACES = {
    "Run": "api.Run", "RunConfig": "config.RunConfig", "compare": "comparison.compare.compare",
    "export": "reports.export.export", "load_policy": "api.load_policy", "open_store": "store.open.open_store",
    "plan": "planning.plan.plan", "read_run": "api.read_run", "report_data": "reports.run_report.report_data",
    "run": "api.run", "self_play_loss": "selfplay.loss.self_play_loss",
}  # fmt: skip

try:
    __version__ = version("spinreg")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0+unknown"


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'spinreg_core' has no attribute {name!r}")
    module, _, attribute = _PLACES[name].rpartition(".")
    found = getattr(import_module(f"spinreg_core.{module}"), attribute)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
