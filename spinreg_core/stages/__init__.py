"""The stages, each a program of its own. This package is imported before any library that warns."""

from spinreg_core.runtime.quiet import quieten_libraries

quieten_libraries()
