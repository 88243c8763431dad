"""Known library warnings that are of no use to a user of spinreg.

Decides: the warnings that stage processes hide. `SPINREG_VERBOSE=1` (`spinreg run --verbose`) shows them.
Leaves out: all other output of libraries, which users see.
"""

from __future__ import annotations

import logging
import os
import warnings

VERBOSE = "SPINREG_VERBOSE"


def quieten_libraries() -> None:
    """Filter the known warnings in this process and in those that it starts. Call it before torch is imported."""
    if os.environ.get(VERBOSE, "0") not in ("", "0"):
        return
    # On CPUs, torch's C++ code warns that memory is bound to a NUMA node.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # Before vLLM configures its logging, it warns that Triton has no CPU backend.
    logging.getLogger("vllm").setLevel(logging.ERROR)
    # vLLM inspects every object of every module, including functions that torch will remove.
    warnings.filterwarnings("ignore", "`torch.distributed.reduce_op` is deprecated", FutureWarning)
