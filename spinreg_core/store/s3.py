"""A store in an S3 bucket, through s3fs.

Decides: which requests are tried again and for how long, how files are cut into parts, what a conditional write means
whose acknowledgement was lost. Leaves out: what a store promises (`base.py`), other data on S3 (`remote_files.py`).

Endpoint and credentials come from the environment or the AWS chain, never from a URL. Every request, every part of a
file, is tried again by itself, after pauses that grow and are drawn at random, until nothing has been achieved for
PATIENCE_SECONDS; the retries of botocore and s3fs are off, so that nothing multiplies.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

from spinreg_core.errors import BadInput, Conflict, StoreFailed, StoreRefused, redacted
from spinreg_core.store import documents
from spinreg_core.store.base import PART_BYTES, Listed, os_errors_as_store_refused, valid_key
from spinreg_core.store.transfers import track_transfer

T = TypeVar("T")
COMMITS_MARKER = "commits.json"  # in a bucket that holds files only (`split.py`)
PATIENCE_SECONDS = 300.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 15.0  # seconds, of which a random share is waited
_ATTEMPT_SECONDS = 180.0  # one request; a part of 16 MiB needs 100 kB/s
_CHECK_SECONDS = 15.0  # for who asks whether the store is there at all
_PARTS_AT_ONCE = 8
_MOST_PARTS = 10_000  # of one upload, by S3's rules: a file of more than 156 GiB goes in larger parts
# Codes of refusals that pass, besides all of status 429 and 5xx. The last two lines: bytes changed on their way.
_PASSING = {
    "SlowDown", "RequestTimeout", "RequestTimeoutException", "Throttling", "ThrottlingException", "TooManyRequests",
    "RequestLimitExceeded", "PriorRequestNotComplete", "OperationAborted", "ConditionalRequestConflict",
    "InternalError", "BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "IncompleteBody",
    "MalformedXML", "InvalidPart", "InvalidPartOrder",
}  # fmt: skip
# Errors of botocore before any request, which another try meets as well.
_NEVER = {"NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "ProfileNotFound", "NoRegionError"}
# What is amiss where the store refuses us, besides permissions.
_CLOCK, _CREDENTIALS = "this machine's clock within minutes of the server's", "credentials that are still valid"
_AMISS = {
    "RequestTimeTooSkewed": _CLOCK, "RequestExpired": _CLOCK, "ExpiredToken": _CREDENTIALS,
    "ExpiredTokenException": _CREDENTIALS, "TokenRefreshRequired": _CREDENTIALS, "InvalidToken": _CREDENTIALS,
}  # fmt: skip


class S3Store:
    """A bucket. Needs a server that honours If-None-Match and If-Match (`require_conditional_writes`)."""

    def __init__(self, url: str) -> None:
        import s3fs

        self.bucket, _, prefix = url.removeprefix("s3://").partition("/")
        self.prefix = prefix.strip("/")
        if not self.bucket or redacted(url) != url:
            raise BadInput(
                "store", repr(redacted(url)), "s3://bucket/prefix, with credentials in the environment, not in the URL"
            )
        self.url = f"s3://{self.bucket}/{self.prefix}".rstrip("/")
        self._fs: Any = s3fs.S3FileSystem(
            use_listings_cache=False,  # another writer's keys must be seen
            config_kwargs={
                "retries": {"total_max_attempts": 1, "mode": "standard"},
                "connect_timeout": 20,
                "read_timeout": 60,
                "max_pool_connections": 2 * _PARTS_AT_ONCE,
                # The checksum that is sent along, whatever the environment says of checksums, tells whether a body
                # arrived whole: on http as on https, where no client hashes it for the signature besides.
                "request_checksum_calculation": "when_supported",
                "s3": {"payload_signing_enabled": False},
            },
        )
        self._fs.retries = 1

    def check(self) -> None:
        self.check_bucket()
        marker = self.read(COMMITS_MARKER)
        if marker is not None:
            folder = documents.parse(self, COMMITS_MARKER, marker)["commits"]
            raise BadInput("store", f"{self.url}, whose commits lie in {folder}",
                           "SPINREG_COMMITS to say so (docs/reliability.md)")  # fmt: skip

    def check_bucket(self) -> None:
        first = {"Prefix": f"{self.prefix}/" if self.prefix else "", "MaxKeys": 1}
        try:
            # A listing, because the answer to a HEAD says in no word what is wrong.
            self._run(
                lambda: self._call("list_objects_v2", **first), f"asking for bucket {self.bucket!r}", _CHECK_SECONDS
            )
        except Exception as error:  # botocore has an error family of its own, and a ValueError for wrong addresses
            if not isinstance(error, StoreFailed | OSError | ValueError) and _family(error) != "botocore":
                raise
            within = f"a bucket {self.bucket!r} within reach (AWS_ENDPOINT_URL, AWS credentials)"
            raise BadInput(
                "store", f"{self.url}, which cannot be used: {_said(error)}",
                _AMISS.get(_refusal(error)[1] or "", within),
            ) from None  # fmt: skip

    def read(self, key: str) -> bytes | None:
        found = self.read_tagged(key)
        return None if found is None else found[0]

    def read_tagged(self, key: str) -> tuple[bytes, str] | None:
        try:
            return self._run(lambda: self._get(self._key(key)), f"reading {self.uri(key)}")
        except FileNotFoundError:
            return None

    def create(self, key: str, data: bytes) -> str:
        return self._put_if(key, data, IfNoneMatch="*")

    def replace(self, key: str, data: bytes, tag: str) -> str:
        return self._put_if(key, data, IfMatch=tag)

    def _put_if(self, key: str, data: bytes, **condition: str) -> str:
        try:
            return self._run(lambda: self._put(self._key(key), data, **condition), f"writing {self.uri(key)}")
        except OSError as error:
            if _refusal(error)[1] not in ("PreconditionFailed", "NoSuchKey"):
                raise
        # A lost acknowledgement looks like a lost race: our own bytes there mean that we won.
        found = self.read_tagged(key)
        if found is not None and found[0] == data:
            return found[1]
        raise Conflict(f"{self.uri(key)} was written by another writer")

    def write(self, key: str, data: bytes) -> None:
        self._run(lambda: self._put(self._key(key), data), f"writing {self.uri(key)}")

    def upload(self, path: Path, key: str) -> None:
        size = path.stat().st_size
        part = max(PART_BYTES, -(-size // _MOST_PARTS))
        with track_transfer(f"storing {path.name} in {self.url}") as moved:
            if size <= part:
                self._run(lambda: self._put(self._key(key), path.read_bytes()), f"storing {self.uri(key)}")
                return
            self._sync(lambda: self._upload(path, self._key(key), size, part, moved))

    def download(self, key: str, path: Path) -> None:
        with (
            track_transfer(f"fetching {self.uri(key)}") as moved,
            os_errors_as_store_refused(f"fetching {self.uri(key)} to {path}"),
        ):
            size = self.size(key)
            if size is None:
                raise FileNotFoundError(self.uri(key))
            with open(path, "wb") as file:
                file.truncate(size)
                self._sync(lambda: self._download(self._key(key), file.fileno(), size, moved))

    def delete(self, key: str) -> None:
        self._run(lambda: self._call("delete_object", Key=self._key(key)), f"deleting {self.uri(key)}")

    def size(self, key: str) -> int | None:
        try:
            reply = self._run(lambda: self._call("head_object", Key=self._key(key)), f"asking for {self.uri(key)}")
        except FileNotFoundError:
            return None
        return int(reply["ContentLength"])

    def list(self, prefix: str) -> list[str]:
        return [entry.key for entry in self.entries(prefix)]

    def entries(self, prefix: str) -> Sequence[Listed]:
        return sorted(
            Listed(self._relative(entry["Key"]), entry["Size"], (now - entry["LastModified"]).total_seconds())
            for entry, now in self._objects(self._key(prefix.rstrip("/")) + "/") if not entry["Key"].endswith("/")
        )  # fmt: skip

    def described(self, start: str) -> dict[str, tuple[int, str]]:
        """Size and ETag of all whose whole keys start so, whatever they are named."""
        return {entry["Key"]: (entry["Size"], entry["ETag"]) for entry, _ in self._objects(start)}

    def _objects(self, start: str) -> Iterator[tuple[Any, datetime]]:
        """Entries of a listing, each with the server's time."""
        following = {"ContinuationToken": "NextContinuationToken"}
        for page, now in self._pages("list_objects_v2", f"listing s3://{self.bucket}/{start}", following, Prefix=start):
            for entry in page.get("Contents", ()):
                yield entry, now

    def unfinished(self) -> Sequence[Listed]:
        pages = self._pages("list_multipart_uploads", f"listing the unfinished uploads of {self.url}",
                            {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"},
                            Prefix=f"{self.prefix}/" if self.prefix else "")  # fmt: skip
        return sorted(
            Listed(f"{self._relative(entry['Key'])}?{entry['UploadId']}", 0, (now - entry["Initiated"]).total_seconds())
            for page, now in pages for entry in page.get("Uploads", ())
        )  # fmt: skip

    def abort_unfinished(self, name: str) -> None:
        key, _, upload = name.rpartition("?")
        with contextlib.suppress(FileNotFoundError):
            self._run(lambda: self._call("abort_multipart_upload", Key=self._key(key), UploadId=upload),
                      f"ending the upload of {self.uri(key)}")  # fmt: skip

    def _pages(
        self, method: str, what: str, following: dict[str, str], **arguments: Any
    ) -> Iterator[tuple[Any, datetime]]:
        """Pages of a listing, each with the server's time; `following`: arguments that come out of the page before."""
        more: dict[str, Any] = {}
        while True:
            page = self._run(lambda more=more: self._call(method, **arguments, **more), what)  # type: ignore[misc]
            said = page.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
            yield page, parsedate_to_datetime(said) if said else datetime.now(UTC)
            more = {ours: page[theirs] for ours, theirs in following.items() if page.get(theirs)}
            if not page.get("IsTruncated") or not more:
                return

    def _relative(self, full: str) -> str:
        return full[len(self.prefix) + 1 :] if self.prefix else full

    def local_path(self, key: str) -> Path | None:
        return None

    def uri(self, key: str) -> str:
        return f"s3://{self.bucket}/{self._key(key)}"

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{valid_key(key)}" if self.prefix else valid_key(key)

    # --- requests -----------------------------------------------------------------------------------

    def _sync(self, work: Callable[[], Awaitable[T]]) -> T:
        from fsspec.asyn import sync

        found: T = sync(self._fs.loop, work)
        return found

    def _run(self, attempt: Callable[[], Awaitable[T]], what: str, patience: float | None = None) -> T:
        return self._sync(lambda: with_retries(attempt, what, patience))

    async def _call(self, method: str, **arguments: Any) -> Any:
        return await self._fs._call_s3(method, Bucket=self.bucket, **arguments)

    async def _get(self, key: str, **arguments: Any) -> tuple[bytes, str]:
        reply = await self._call("get_object", Key=key, **arguments)
        async with reply["Body"] as body:
            return await body.read(), reply["ETag"]

    async def _put(self, key: str, data: bytes, **condition: str) -> str:
        reply = await self._call("put_object", Key=key, Body=data, **condition)
        return str(reply["ETag"])

    async def _upload(self, path: Path, key: str, size: int, part: int, moved: Callable[[int], None]) -> None:
        where = f"s3://{self.bucket}/{key}"
        begun = await with_retries(lambda: self._call("create_multipart_upload", Key=key), f"storing {where}")
        upload = {"Key": key, "UploadId": begun["UploadId"]}
        numbers = iter(range(1, -(-size // part) + 1))
        tags: dict[int, str] = {}

        async def send() -> None:
            for number in numbers:  # shared: each takes the next part
                data = await asyncio.to_thread(_read_at, path, (number - 1) * part, part)
                reply = await with_retries(
                    lambda number=number, data=data: self._call(  # type: ignore[misc]
                        "upload_part", PartNumber=number, Body=data, **upload
                    ),
                    f"storing part {number} of {where}",
                )
                tags[number] = reply["ETag"]
                moved(len(data))

        parts: list[dict[str, Any]] = []

        async def complete() -> None:
            try:
                await self._call("complete_multipart_upload", MultipartUpload={"Parts": parts}, **upload)
                return
            except FileNotFoundError as error:  # no such upload: was the acknowledgement of an earlier try lost?
                missing = error
            # Outside of the handler, so that an error of this request is not read as that answer.
            if (await self._call("head_object", Key=key))["ContentLength"] != size:
                raise missing

        try:
            await _together(send)
            parts += [{"PartNumber": number, "ETag": tags[number]} for number in sorted(tags)]
            await with_retries(complete, f"storing {where}")
        except BaseException:
            try:
                await asyncio.wait_for(self._call("abort_multipart_upload", **upload), _CHECK_SECONDS)
            except Exception:  # what is left of it costs space until the bucket's own rule removes it
                print(f"an unfinished upload of {where} could not be removed", flush=True)
            raise

    async def _download(self, key: str, file: int, size: int, moved: Callable[[int], None]) -> None:
        where = f"s3://{self.bucket}/{key}"
        starts = iter(range(0, size, PART_BYTES))

        async def fetch() -> None:
            for start in starts:
                end = min(start + PART_BYTES, size)

                async def get(start: int = start, end: int = end) -> bytes:
                    data, _ = await self._get(key, Range=f"bytes={start}-{end - 1}")
                    if len(data) != end - start:
                        raise ConnectionError(f"{len(data)} bytes instead of {end - start}")
                    return data

                data = await with_retries(get, f"fetching {where}")
                await asyncio.to_thread(_write_at, file, data, start)
                moved(len(data))

        await _together(fetch)


async def _together(work: Callable[[], Awaitable[None]]) -> None:
    """Several at once; the first that fails ends the others."""
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(_PARTS_AT_ONCE):
                group.create_task(work())  # type: ignore[arg-type]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None


async def with_retries(attempt: Callable[[], Awaitable[T]], what: str, patience: float | None = None) -> T:
    """The result of `attempt`, tried again while its errors are such as pass, for `patience` seconds
    (PATIENCE_SECONDS). Raises StoreFailed after that, and at once what does not pass."""
    patience = PATIENCE_SECONDS if patience is None else patience
    end, pause = time.monotonic() + patience, _FIRST_PAUSE
    while True:
        try:
            left = max(end - time.monotonic(), _FIRST_PAUSE)
            return await asyncio.wait_for(attempt(), min(_ATTEMPT_SECONDS, left))
        except Exception as error:
            if _refused(error):
                expected = _AMISS.get(_refusal(error)[1] or "", "credentials that may do it")
                raise StoreRefused(f"{what}: found {_said(error)}; expected {expected}") from error
            if not passes(error):
                raise
            left = end - time.monotonic()
            if left <= 0:
                said = str(error) or type(error).__name__
                raise StoreFailed(f"{what}: the store did not do it for {patience:g} s: {said}") from error
        await asyncio.sleep(min(random.uniform(0, pause), left))  # so that the last attempt is at the end of its time
        pause = min(2 * pause, _LONGEST_PAUSE)


def _refused(error: BaseException) -> bool:
    return (
        isinstance(error, PermissionError)
        or _refusal(error)[1] in _AMISS
        or type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError")
    )


def _said(error: BaseException) -> str:
    """What the server said, or else the library."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return str(error) or type(error).__name__


def passes(error: BaseException) -> bool:
    """Whether a request that failed so may succeed by itself: the server is overloaded, restarting, or out of reach."""
    status, code = _refusal(error)
    if status is not None:
        return (status >= 500 and status != 501) or status == 429 or code in _PASSING  # 501: it never will
    if isinstance(error, FileNotFoundError | PermissionError):
        return False
    if _family(error) == "botocore":
        return type(error).__name__ not in _NEVER
    return _family(error) == "aiohttp" or isinstance(error, OSError | TimeoutError | EOFError)


def _family(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


def _refusal(error: BaseException) -> tuple[int | None, str | None]:
    """(HTTP status, error code) of the server's answer behind the OSError that s3fs made of it; (None, None) where
    there was none."""
    seen: BaseException | None = error
    while seen is not None:
        response = getattr(seen, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return (status or 0), str(response.get("Error", {}).get("Code"))
        seen = seen.__cause__ or seen.__context__
    return None, None


def _write_at(file: int, data: bytes, start: int) -> None:
    """All of it: a disk that is nearly full takes a part, and says why when it is given the rest."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(file, rest, start)
        rest, start = rest[written:], start + written


def _read_at(path: Path, start: int, count: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(count)
