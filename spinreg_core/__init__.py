"""spinreg_core: the library behind spinreg. Never imports Prefect; importing it loads nothing heavy."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("spinreg")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0+unknown"
