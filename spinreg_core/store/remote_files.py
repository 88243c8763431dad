"""Read users' files on S3: data sets and base models that an s3:// address names.

Decides: the listing and copying of an address, and the error messages. Leaves out: requests and their retries
(`s3.py`), which these reads share: a server that is away for a while is not bad input.
"""

from __future__ import annotations

from pathlib import Path

from spinreg_core.errors import BadInput, StoreFailed, StoreRefused
from spinreg_core.store.s3 import RemoteFile, RetryTimes, S3Store


def list_s3(url: str, field: str, times: RetryTimes | None = None) -> dict[str, RemoteFile]:
    """List objects at or below an address, by their names relative to it ("" for the address itself).

    Endpoint and credentials come from the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...) or the AWS chain.
    Raises BadInput, naming the configuration field, for an address that is empty or not readable, and StoreFailed for a
    server that does not respond within the retry window.
    """
    bucket, remote = _open_bucket(url, field, times)
    try:
        files = bucket.find_files(remote)
    except (StoreRefused, OSError, ValueError) as error:  # ValueError: the address is not valid
        found = f"names {url}, which cannot be read: {error}"
        raise BadInput(field, found, "a bucket within reach (AWS_ENDPOINT_URL, AWS credentials)") from None
    listed = {}
    for key, file in files.items():
        name = key[len(remote) :].lstrip("/")
        # Skip a neighbour with the same first letters, and the empty object that stands for a folder.
        if not (key == remote or not remote or key.startswith(f"{remote}/")) or (key.endswith("/") and not file.size):
            continue
        if ".." in name.split("/"):
            raise BadInput(field, f"names {url}, which holds an object {name!r}", "names that stay inside the folder")
        listed[name] = file
    if not listed:
        raise BadInput(field, f"names {url}, which holds no objects", "an object, or a prefix with objects below it")
    return listed


def fetch_s3(url: str, names: list[str], folder: Path, field: str, times: RetryTimes | None = None) -> None:
    """Copy listed objects to `folder`/name, and the address itself to `folder`/its last part. Raises as `list_s3`."""
    bucket, remote = _open_bucket(url, field, times)
    for name in names:
        target = folder / (name or remote.rsplit("/", 1)[-1])
        target.parent.mkdir(parents=True, exist_ok=True)
        key = "/".join(part for part in (remote, name) if part)
        try:
            bucket.download(key, target)
        except FileNotFoundError:
            found = f"names {bucket.uri(key)}, which was removed"
            raise BadInput(field, found, "files that stay while they are read") from None
        except StoreFailed as error:
            raise type(error)(f"{field}: {error}") from None


def _open_bucket(url: str, field: str, times: RetryTimes | None) -> tuple[S3Store, str]:
    name, _, remote = url.removeprefix("s3://").partition("/")
    try:
        return S3Store(f"s3://{name}", times), remote.strip("/")
    except BadInput as error:
        raise BadInput(field, error.found, error.expected) from None
