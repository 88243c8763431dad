"""Is Prefect's server there? Asked before anything else, where its address was given."""

from __future__ import annotations

from spinreg_core.errors import BadInput
from spinreg_core.store import redacted


def require_server() -> None:
    """Raise BadInput where PREFECT_API_URL (or Prefect's profile in use) names no server that answers.

    Without an address Prefect starts a server of its own.
    """
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    if not url:
        return
    try:
        with get_client(sync_client=True) as client:
            client.api_version()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, RuntimeError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, httpx.HTTPStatusError):
            why = f"it answers HTTP {error.response.status_code}"
        raise BadInput("PREFECT_API_URL", f"{redacted(url)}, which cannot be used ({why})",
                       "the API of a running Prefect server (it ends in /api; PREFECT_API_AUTH_STRING where the server "
                       "asks for one), or none: spinreg run then starts a server of its own") from None  # fmt: skip
