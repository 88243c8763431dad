"""A store in an S3 bucket, through the client of s3fs.

Decides: the requests, the size of parts, and the result of a conditional write without a reply. Leaves out: the
contract of a store (`base.py`), retries (`retries.py`), and other data on S3 (`remote_files.py`).

Endpoint and credentials come from the environment or the AWS chain, never from a URL. Each request, and so each part of
a file, is retried separately. The retries of botocore are off: two layers would multiply.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from spinreg_core.errors import BadInput, Conflict, StoreFailed, redacted
from spinreg_core.store.base import (
    PART_BYTES,
    Listed,
    os_errors_as_store_refused,
    require_own_commits,
    stays_inside,
    valid_key,
)
from spinreg_core.store.retries import RetryTimes, innermost_text, library, remedy, response, with_retries
from spinreg_core.store.transfers import track_transfer

T = TypeVar("T")
PARTS_AT_ONCE = 8
_MOST_PARTS = 10_000  # of one upload, by S3's rules: a file of more than 156 GiB goes in larger parts


class RemoteFile(NamedTuple):
    """Size in bytes and ETag of an object."""

    size: int
    tag: str


def _require_endpoint(bucket: str) -> None:
    """Raise BadInput for an endpoint that ends with the bucket, which would look for a bucket in the bucket."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        path = urlsplit(os.environ.get(name, "")).path.rstrip("/")
        if path.endswith(f"/{bucket}"):
            raise BadInput(name, f"has the bucket {bucket!r} at its end",
                           "give the address of the server alone; the bucket stands in s3://BUCKET")  # fmt: skip


class S3Store:
    """A bucket. Needs a server that honours If-None-Match and If-Match (`require_conditional_writes`)."""

    def __init__(self, url: str, times: RetryTimes | None = None) -> None:
        import s3fs

        self.bucket, _, prefix = url.removeprefix("s3://").partition("/")
        self.prefix = prefix.strip("/")
        if not self.bucket or redacted(url) != url:
            raise BadInput(
                "store", repr(redacted(url)), "s3://bucket/prefix, with credentials in the environment, not in the URL"
            )
        self.url = f"s3://{self.bucket}/{self.prefix}".rstrip("/")
        if self.prefix and not stays_inside(self.prefix):
            # Servers list such keys under other names than those that were written, so that a listing is empty.
            plain = "/".join([self.bucket, *(part for part in self.prefix.split("/") if part not in ("", ".", ".."))])
            raise BadInput(
                "store", f"is {url!r}; its prefix has an empty part, '.' or '..'",
                f"write s3://{plain}; runs that lie there already move with "
                f"`aws s3 cp --recursive '{self.url}/' 's3://{plain}/'`",
            )  # fmt: skip
        _require_endpoint(self.bucket)
        self.times = times or RetryTimes()
        self._fs: Any = s3fs.S3FileSystem(
            use_listings_cache=False,  # a listing must show the keys of other writers
            config_kwargs={
                "retries": {"total_max_attempts": 1, "mode": "standard"},
                "connect_timeout": 20,
                "read_timeout": 60,
                "max_pool_connections": 2 * PARTS_AT_ONCE,
                # The server compares this checksum with the body, on http and https, whatever the environment says
                # about checksums. A second hash in the signature would cost time and protect nothing more.
                "request_checksum_calculation": "when_supported",
                "s3": {"payload_signing_enabled": False},
            },
        )

    def check(self) -> None:
        first = {"Prefix": f"{self.prefix}/" if self.prefix else "", "MaxKeys": 1}
        try:
            # List instead of HEAD: error responses to HEAD have no body.
            self._run(f"asking for bucket {self.bucket!r}", "list_objects_v2", patience=self.times.check, **first)
        except Exception as error:
            # botocore has an error family of its own, and a ValueError for wrong addresses.
            if not isinstance(error, StoreFailed | OSError | ValueError) and library(error) != "botocore":
                raise
            within = f"a bucket {self.bucket!r} within reach (AWS_ENDPOINT_URL, AWS credentials)"
            found = f"cannot be used: {innermost_text(error)}"
            raise BadInput(f"store {self.url}", found, remedy(error, within)) from None
        require_own_commits(self)

    def read(self, key: str) -> bytes | None:
        found = self.read_tagged(key)
        return None if found is None else found[0]

    def read_tagged(self, key: str) -> tuple[bytes, str] | None:
        try:
            return self._sync(lambda: self._get(f"reading {self.uri(key)}", self._key(key)))
        except FileNotFoundError:
            return None

    def create(self, key: str, data: bytes) -> str:
        return self._put_if(key, data, IfNoneMatch="*")

    def replace(self, key: str, data: bytes, tag: str) -> str:
        return self._put_if(key, data, IfMatch=tag)

    def _put_if(self, key: str, data: bytes, **condition: str) -> str:
        try:
            reply = self._run(f"writing {self.uri(key)}", "put_object", Key=self._key(key), Body=data, **condition)
            return str(reply["ETag"])
        except OSError as error:
            if response(error)[1] not in ("PreconditionFailed", "NoSuchKey"):
                raise
        # After a lost reply, the retry of a successful write looks like a lost race. Our own bytes mean that we won.
        found = self.read_tagged(key)
        if found is not None and found[0] == data:
            return found[1]
        raise Conflict(f"{self.uri(key)} was written by another writer")

    def write(self, key: str, data: bytes) -> None:
        self._run(f"writing {self.uri(key)}", "put_object", Key=self._key(key), Body=data)

    def upload(self, path: Path, key: str) -> None:
        size = path.stat().st_size
        part = max(PART_BYTES, -(-size // _MOST_PARTS))
        with track_transfer(f"storing {path.name} in {self.url}") as moved:
            if size <= part:
                self._run(f"storing {self.uri(key)}", "put_object", Key=self._key(key), Body=path.read_bytes())
            else:
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
        self._run(f"deleting {self.uri(key)}", "delete_object", Key=self._key(key))

    def size(self, key: str) -> int | None:
        try:
            return int(self._run(f"asking for {self.uri(key)}", "head_object", Key=self._key(key))["ContentLength"])
        except FileNotFoundError:
            return None

    def list(self, prefix: str) -> list[str]:
        return [entry.key for entry in self.entries(prefix)]

    def entries(self, prefix: str) -> Sequence[Listed]:
        return sorted(
            Listed(self._relative(entry["Key"]), entry["Size"], (now - entry["LastModified"]).total_seconds())
            for entry, now in self._objects(self._key(prefix.rstrip("/")) + "/") if not entry["Key"].endswith("/")
        )  # fmt: skip

    def find_files(self, start: str) -> dict[str, RemoteFile]:
        """Return all objects of the bucket by those of their whole keys that begin with `start`."""
        return {entry["Key"]: RemoteFile(entry["Size"], entry["ETag"]) for entry, _ in self._objects(start)}

    def _objects(self, start: str) -> Iterator[tuple[Any, datetime]]:
        """Yield the entries of a listing, each with the server's time."""
        following = {"ContinuationToken": "NextContinuationToken"}
        for page, now in self._pages(f"listing s3://{self.bucket}/{start}", "list_objects_v2", following, Prefix=start):
            for entry in page.get("Contents", ()):
                yield entry, now

    def unfinished(self) -> Sequence[Listed]:
        pages = self._pages(f"listing the unfinished uploads of {self.url}", "list_multipart_uploads",
                            {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"},
                            Prefix=f"{self.prefix}/" if self.prefix else "")  # fmt: skip
        return sorted(
            Listed(f"{self._relative(entry['Key'])}?{entry['UploadId']}", 0, (now - entry["Initiated"]).total_seconds())
            for page, now in pages for entry in page.get("Uploads", ())
        )  # fmt: skip

    def abort_unfinished(self, name: str) -> None:
        key, _, upload = name.rpartition("?")
        with contextlib.suppress(FileNotFoundError):
            action = f"ending the upload of {self.uri(key)}"
            self._run(action, "abort_multipart_upload", Key=self._key(key), UploadId=upload)

    def _pages(
        self, action: str, method: str, following: dict[str, str], **arguments: Any
    ) -> Iterator[tuple[Any, datetime]]:
        """Yield the pages of a listing, each with the server's time.

        `following` maps arguments of the next request to the fields of a page that hold their values.
        """
        more: dict[str, Any] = {}
        while True:
            page = self._run(action, method, **arguments, **more)
            date = page.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
            yield page, parsedate_to_datetime(date) if date else datetime.now(UTC)
            more = {argument: page[field] for argument, field in following.items() if page.get(field)}
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

    def _run(self, action: str, method: str, **arguments: Any) -> Any:
        return self._sync(lambda: self._request(action, method, **arguments))

    async def _request(self, action: str, method: str, patience: float | None = None, **arguments: Any) -> Any:
        return await with_retries(lambda: self.call(method, **arguments), action, self.times, patience)

    async def call(self, method: str, **arguments: Any) -> Any:
        """Send one request. Raises the OSError that s3fs makes of the server's error, with that as its cause."""
        from s3fs.errors import translate_boto_error

        # `S3FileSystem.call_s3` is for callers outside of its event loop, and retries.
        client = await self._fs.set_session()
        try:
            return await getattr(client, method)(Bucket=self.bucket, **arguments)
        except Exception as error:
            failure = translate_boto_error(error)
        raise failure

    async def _get(self, action: str, key: str, size: int | None = None, **arguments: Any) -> tuple[bytes, str]:
        """Return content and tag of a key, or of a range of `size` bytes. A body of another size is asked for again."""

        async def attempt() -> tuple[bytes, str]:
            reply = await self.call("get_object", Key=key, **arguments)
            async with reply["Body"] as body:
                data = await body.read()
            if size is not None and len(data) != size:
                raise ConnectionError(f"{len(data)} bytes instead of {size}")
            return data, reply["ETag"]

        return await with_retries(attempt, action, self.times)

    async def _upload(self, path: Path, key: str, size: int, part: int, moved: Callable[[int], None]) -> None:
        where = f"s3://{self.bucket}/{key}"
        begun = await self._request(f"storing {where}", "create_multipart_upload", Key=key)
        upload = {"Key": key, "UploadId": begun["UploadId"]}
        numbers = iter(range(1, -(-size // part) + 1))
        tags: dict[int, str] = {}

        async def send() -> None:
            for number in numbers:  # shared: each task takes the next part
                data = await asyncio.to_thread(read_at, path, (number - 1) * part, part)
                action = f"storing part {number} of {where}"
                reply = await self._request(action, "upload_part", PartNumber=number, Body=data, **upload)
                tags[number] = reply["ETag"]
                moved(len(data))

        parts: list[dict[str, Any]] = []

        async def complete() -> None:
            try:
                await self.call("complete_multipart_upload", MultipartUpload={"Parts": parts}, **upload)
                return
            except FileNotFoundError as error:  # no such upload: maybe an earlier attempt lost its reply
                missing = error
            # Outside of the handler: an error of this request must not get that one as its context.
            if (await self.call("head_object", Key=key))["ContentLength"] != size:
                raise missing

        try:
            await _together(send)
            parts += [{"PartNumber": number, "ETag": tags[number]} for number in sorted(tags)]
            await with_retries(complete, f"storing {where}", self.times)
        except BaseException:
            try:
                await asyncio.wait_for(self.call("abort_multipart_upload", **upload), self.times.check)
            except Exception:  # its parts cost space until the bucket's own rules or `spinreg gc` remove them
                print(f"an unfinished upload of {where} could not be removed", flush=True)
            raise

    async def _download(self, key: str, file: int, size: int, moved: Callable[[int], None]) -> None:
        where = f"s3://{self.bucket}/{key}"
        starts = iter(range(0, size, PART_BYTES))

        async def fetch() -> None:
            for start in starts:
                count = min(PART_BYTES, size - start)
                data, _ = await self._get(f"fetching {where}", key, count, Range=f"bytes={start}-{start + count - 1}")
                await asyncio.to_thread(write_at, file, data, start)
                moved(len(data))

        await _together(fetch)


async def _together(work: Callable[[], Awaitable[None]]) -> None:
    """Run several tasks of the same work. The first that fails ends the others."""
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(PARTS_AT_ONCE):
                group.create_task(work())  # type: ignore[arg-type]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None


def write_at(file: int, data: bytes, start: int) -> None:
    """Write all bytes to an open file. A nearly full disk takes some of them, and raises an error for the rest."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(file, rest, start)
        rest, start = rest[written:], start + written


def read_at(path: Path, start: int, count: int) -> bytes:
    """Read up to `count` bytes of a file."""
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(count)
