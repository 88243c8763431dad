"""The Prefect flows. Importing this package sets environment variables that Prefect reads when it is imported."""

import os

# The embedded server (no PREFECT_API_URL) migrates a fresh database at its first start. On a busy machine this takes
# longer than Prefect's 20 s, which would end the run before it began.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "300")
# On a machine without network the embedded server would print an error about the telemetry that it cannot send.
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
