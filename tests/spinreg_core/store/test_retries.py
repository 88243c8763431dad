"""Retries: the errors that are retried, the pauses, and the errors after them."""

from __future__ import annotations

import asyncio

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError

from spinreg_core.errors import StoreFailed, StoreRefused
from spinreg_core.store.retries import RetryTimes, is_retryable, with_retries

QUICK = RetryTimes(patience=0.2, first_pause=0.01)


def answered(status: int, code: str) -> ClientError:
    response = {"Error": {"Code": code, "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(response, "PutObject")  # type: ignore[arg-type]


def translated(status: int, code: str) -> OSError:
    """The error that s3fs makes of an answer."""
    error = OSError("no")
    error.__cause__ = answered(status, code)
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (answered(503, "SlowDown"), True),
        (answered(429, "TooManyRequests"), True),
        (translated(500, "InternalError"), True),
        (translated(400, "BadDigest"), True),
        (EndpointConnectionError(endpoint_url="http://s"), True),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (answered(501, "NotImplemented"), False),
        (translated(412, "PreconditionFailed"), False),
        (FileNotFoundError(), False),
        (PermissionError(), False),
        (NoCredentialsError(), False),
        (KeyError("ETag"), False),
    ],
    ids=repr,
)
def test_is_retryable_depends_on_status_and_code(error: Exception, expected: bool) -> None:
    assert is_retryable(error) is expected


class Attempts:
    """Raises each error once, then succeeds."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.made = list(errors), 0

    async def __call__(self) -> str:
        self.made += 1
        if self.made <= len(self.errors):
            raise self.errors[self.made - 1]
        return "done"


def test_with_retries_after_passing_errors_returns_the_result() -> None:
    attempts = Attempts(answered(503, "SlowDown"), ConnectionResetError())
    assert asyncio.run(with_retries(attempts, "writing s3://b/k", QUICK)) == "done"
    assert attempts.made == 3


def test_with_retries_without_success_fails_after_its_patience() -> None:
    attempts = Attempts(*[answered(503, "SlowDown")] * 1000)
    with pytest.raises(StoreFailed, match=r"^writing s3://b/k: the store kept failing for 0\.2 s: .*SlowDown"):
        asyncio.run(with_retries(attempts, "writing s3://b/k", QUICK))
    assert attempts.made > 2


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (PermissionError("Access Denied"), "expected credentials that may do it"),
        (translated(403, "RequestTimeTooSkewed"), "set this machine's clock to the server's time"),
        (translated(400, "ExpiredToken"), "expected credentials that are still valid"),
    ],
)
def test_with_retries_of_a_refusal_names_the_remedy_at_once(error: Exception, remedy: str) -> None:
    attempts = Attempts(error)
    with pytest.raises(StoreRefused, match=rf"^writing s3://b/k: found .*; {remedy}$"):
        asyncio.run(with_retries(attempts, "writing s3://b/k", QUICK))
    assert attempts.made == 1


def test_with_retries_raises_other_errors_as_they_are() -> None:
    attempts = Attempts(translated(412, "PreconditionFailed"))
    with pytest.raises(OSError, match="no"):
        asyncio.run(with_retries(attempts, "writing s3://b/k", QUICK))
    assert attempts.made == 1
