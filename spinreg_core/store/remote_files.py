"""Reading other people's files on S3: data sets and base models named by an s3:// address.

Decides: how an address is listed and copied, and the one error a user meets. Leaves out: requests and which of them
are tried again (`s3.py`, whose patience these reads share: a store that is away for a while is no bad input).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spinreg_core.errors import BadInput, StoreFailed, StoreRefused
from spinreg_core.store.s3 import S3Store


def list_s3(url: str, field: str) -> dict[str, dict[str, Any]]:
    """Objects at or below an address: name relative to it ("" for the address itself) -> size and ETag.

    Endpoint and credentials come from the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...) or the AWS
    chain. Raises BadInput, naming the configuration field, for an address that is empty or may not be read, and
    StoreFailed for a server that does not answer for minutes.
    """
    bucket, remote = _split(url, field)
    try:
        found = bucket.described(remote)
    except (StoreRefused, OSError, ValueError) as error:  # ValueError: an address that is none
        raise BadInput(field, f"{url} cannot be read: {error}",
                       "a bucket within reach (AWS_ENDPOINT_URL, AWS credentials)") from None  # fmt: skip
    listed = {}
    for key, (size, tag) in found.items():
        name = key[len(remote) :].lstrip("/")
        if not (key == remote or not remote or key.startswith(f"{remote}/")) or (key.endswith("/") and not size):
            continue  # a neighbour whose name begins alike; a folder's placeholder
        if ".." in name.split("/"):
            raise BadInput(field, f"an object named {name!r} below {url}", "names that stay inside the folder")
        listed[name] = {"size": size, "tag": tag}
    if not listed:
        raise BadInput(field, f"nothing at {url}", "an object, or a prefix with objects below it")
    return listed


def fetch_s3(url: str, names: list[str], folder: Path, field: str) -> None:
    """Copy listed objects to `folder`/name (the address itself: to `folder`/its last part). Raises as `list_s3`."""
    bucket, remote = _split(url, field)
    for name in names:
        target = folder / (name or remote.rsplit("/", 1)[-1])
        target.parent.mkdir(parents=True, exist_ok=True)
        key = "/".join(part for part in (remote, name) if part)
        try:
            bucket.download(key, target)
        except FileNotFoundError:
            raise BadInput(field, f"{bucket.uri(key)}, which is gone", "files that stay while they are read") from None
        except StoreFailed as error:
            raise type(error)(f"{field}: {error}") from None


def _split(url: str, field: str) -> tuple[S3Store, str]:
    name, _, remote = url.removeprefix("s3://").partition("/")
    try:
        return S3Store(f"s3://{name}"), remote.strip("/")
    except BadInput as error:
        raise BadInput.from_message(f"{field}{str(error).removeprefix('store')}") from None
