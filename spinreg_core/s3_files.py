"""Reading other people's files on S3: data sets and base models named by an s3:// address.

Decides: how an address is listed and copied, and the one error a user meets. Leaves out: the store (`store.py`),
which has promises to keep that these reads have not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spinreg_core.errors import BadInput


def list_s3(url: str, field: str) -> dict[str, dict[str, Any]]:
    """Objects at or below an address: name relative to it ("" for the address itself) -> size and ETag.

    Endpoint and credentials come from the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...) or the AWS
    chain. Raises BadInput, naming the configuration field, for an address that is empty or cannot be read.
    """
    remote = url.removeprefix("s3://").rstrip("/")
    try:
        found = _filesystem().find(remote, detail=True)
    except FileNotFoundError:
        found = {}
    except Exception as error:
        raise _refused(url, field, error) from None
    names = {key: key.removeprefix(remote).lstrip("/") for key in found}
    for name in names.values():
        if ".." in name.split("/"):
            raise BadInput(field, f"an object named {name!r} below {url}", "names that stay inside the folder")
    listed = {
        name: {"size": found[key]["size"], "tag": str(found[key].get("ETag"))}
        for key, name in names.items()
        if found[key]["size"] or not key.endswith("/")  # a folder's placeholder is no file
    }
    if not listed:
        raise BadInput(field, f"nothing at {url}", "an object, or a prefix with objects below it")
    return listed


def _refused(url: str, field: str, error: Exception) -> Exception:
    """What a reader is told, or an error of ours as it is."""
    ours = not isinstance(error, OSError) and not type(error).__module__.startswith(("botocore", "aiohttp"))
    if ours and not str(error).startswith("Invalid endpoint"):  # botocore and aiohttp have error families of their own
        return error
    return BadInput(field, f"{url} cannot be read: {error}",
                    "a bucket within reach (AWS_ENDPOINT_URL, AWS credentials)")  # fmt: skip


def fetch_s3(url: str, names: list[str], folder: Path, field: str) -> None:
    """Copy listed objects to `folder`/name (the address itself: to `folder`/its last part). Raises BadInput."""
    filesystem, remote = _filesystem(), url.removeprefix("s3://").rstrip("/")
    for name in names:
        target = folder / (name or remote.rsplit("/", 1)[-1])
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            filesystem.get_file(f"{remote}/{name}" if name else remote, str(target))
        except Exception as error:
            raise _refused(f"s3://{remote}/{name}".rstrip("/"), field, error) from None


def _filesystem() -> Any:
    import s3fs

    return s3fs.S3FileSystem(use_listings_cache=False)
