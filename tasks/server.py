"""Is Prefect's server there? Asked before anything else, where its address was given."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from spinreg_core.errors import BadInput
from spinreg_core.store import redacted

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

_SECONDS = 15.0  # in which a server that is being restarted may come back
_ANSWER_SECONDS = 5.0


@contextlib.contextmanager
def asking_once(seconds: float) -> Iterator[SyncPrefectClient]:
    """A client that waits so long for each answer and asks for none a second time."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    with (
        temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
        get_client(sync_client=True, httpx_settings={"timeout": seconds}) as client,
    ):
        yield client


def require_server() -> None:
    """Raise BadInput where PREFECT_API_URL (or Prefect's profile in use) names no server that answers.

    Without an address Prefect starts a server of its own.
    """
    import httpx
    from prefect.settings import PREFECT_API_URL

    url, end = PREFECT_API_URL.value(), time.monotonic() + _SECONDS
    if not url:
        return
    while True:
        try:
            with asking_once(_ANSWER_SECONDS) as client:
                if isinstance(client.api_version(), str):
                    return
                why = "it answers what Prefect does not"
        except httpx.TransportError as error:
            why = str(error) or type(error).__name__
            if time.monotonic() < end:
                time.sleep(0.5)
                continue
        except httpx.HTTPStatusError as error:
            why = f"it answers HTTP {error.response.status_code}"
        except (ValueError, httpx.HTTPError):  # no JSON, a circle of redirects
            why = "it answers what Prefect does not"
        except (httpx.InvalidURL, RuntimeError):  # whose texts may repeat a password
            why = "it is no address of a server"
        except OSError as error:
            why = f"PREFECT_API_SSL_CERT_FILE and the like: {error.strerror}"
        raise BadInput("PREFECT_API_URL", f"{redacted(url)}, which cannot be used ({why})",
                       "the API of a running Prefect server (it ends in /api; PREFECT_API_AUTH_STRING where the server "
                       "asks for one), or none: spinreg run then starts a server of its own")  # fmt: skip
