"""Retries of requests to an S3 server.

Decides: which errors a retry may cure, for how long a request is retried, and the errors after that. Leaves out: the
requests (`s3.py`).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from spinreg_core.errors import StoreFailed, StoreRefused, problem_text

T = TypeVar("T")
# Error codes that a retry may cure, in addition to all of status 429 and 5xx. From BadDigest on, the body was damaged
# on its way.
_RETRYABLE = {
    "SlowDown", "RequestTimeout", "RequestTimeoutException", "Throttling", "ThrottlingException", "TooManyRequests",
    "RequestLimitExceeded", "PriorRequestNotComplete", "OperationAborted", "ConditionalRequestConflict",
    "InternalError", "BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "IncompleteBody",
    "MalformedXML", "InvalidPart", "InvalidPartOrder",
}  # fmt: skip
# Errors that botocore raises before it sends anything. Each retry would meet them again.
_BEFORE_SENDING = {
    "NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "ProfileNotFound", "NoRegionError",
}  # fmt: skip
# The remedy for refusals that are not about permissions.
_CLOCK, _CREDENTIALS = "set this machine's clock to the server's time", "credentials that are still valid"
_REMEDIES = {
    "RequestTimeTooSkewed": _CLOCK, "RequestExpired": _CLOCK, "ExpiredToken": _CREDENTIALS,
    "ExpiredTokenException": _CREDENTIALS, "TokenRefreshRequired": _CREDENTIALS, "InvalidToken": _CREDENTIALS,
}  # fmt: skip


@dataclass(frozen=True)
class RetryTimes:
    """Seconds of the retries of requests. A pause is a random share of a limit that doubles up to `longest_pause`."""

    patience: float = 300.0  # without success, after which a request has failed
    check: float = 15.0  # the same, for the first question: does the store exist?
    attempt: float = 180.0  # of one request: a part of 16 MiB needs 100 kB/s
    first_pause: float = 0.2
    longest_pause: float = 15.0


async def with_retries(
    attempt: Callable[[], Awaitable[T]], action: str, times: RetryTimes, patience: float | None = None
) -> T:
    """Return the result of `attempt`, retried for `patience` seconds (default: that of `times`).

    Raises StoreFailed after that time. Errors that a retry cannot cure are raised at once: StoreRefused for a server
    that does not allow the request, and others as they are.
    """
    patience = times.patience if patience is None else patience
    end, pause = time.monotonic() + patience, times.first_pause
    while True:
        try:
            left = max(end - time.monotonic(), times.first_pause)
            return await asyncio.wait_for(attempt(), min(times.attempt, left))
        except Exception as error:
            if _not_allowed(error):
                expected = remedy(error, "credentials that may do it")
                raise StoreRefused(problem_text(action, innermost_text(error), expected)) from error
            if not is_retryable(error):
                raise
            left = end - time.monotonic()
            if left <= 0:
                text = str(error) or type(error).__name__
                raise StoreFailed(f"{action}: the store kept failing for {patience:g} s: {text}") from error
        # Not longer than the time left, so that the last attempt comes at its end.
        await asyncio.sleep(min(random.uniform(0, pause), left))
        pause = min(2 * pause, times.longest_pause)


def is_retryable(error: BaseException) -> bool:
    """Return True for an error that a retry may cure: the server is overloaded, restarting, or out of reach."""
    status, code = response(error)
    if status is not None:
        return (status >= 500 and status != 501) or status == 429 or code in _RETRYABLE  # 501: not implemented
    if isinstance(error, FileNotFoundError | PermissionError):
        return False
    if library(error) == "botocore":
        return type(error).__name__ not in _BEFORE_SENDING
    return library(error) == "aiohttp" or isinstance(error, OSError | TimeoutError | EOFError)


def _not_allowed(error: BaseException) -> bool:
    return (
        isinstance(error, PermissionError)
        or response(error)[1] in _REMEDIES
        or type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError")
    )


def remedy(error: BaseException, otherwise: str) -> str:
    """Return the remedy for a refusal, or `otherwise` for one that is about permissions."""
    return _REMEDIES.get(response(error)[1] or "", otherwise)


def innermost_text(error: BaseException) -> str:
    """Return the text of the server's error, or else of the library's."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return str(error) or type(error).__name__


def library(error: BaseException) -> str:
    """Return the top-level package that an error comes from."""
    return type(error).__module__.partition(".")[0]


def response(error: BaseException) -> tuple[int | None, str | None]:
    """Return HTTP status and error code of the response behind an error, or (None, None) where there was none."""
    seen: BaseException | None = error
    while seen is not None:
        response = getattr(seen, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return (status or 0), str(response.get("Error", {}).get("Code"))
        seen = seen.__cause__ or seen.__context__
    return None, None
