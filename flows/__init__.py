"""The Prefect flows. Importing this package sets what Prefect reads from the environment at its own import."""

import os

# The embedded server (no PREFECT_API_URL) migrates a fresh database at its first start, which takes longer
# than Prefect's 20 s on a busy machine and would end the run before it began.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "300")
