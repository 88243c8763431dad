"""Stores that are missing, refuse or are full.

S3 is a real server. A few lines answer as AWS does for expired tokens, full disks and ignored conditions, which the
real server cannot produce.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import threading
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import botocore.auth
import botocore.session
from s3fs import S3FileSystem

from spinreg_core.errors import BadInput, StoreFailed, StoreRefused
from spinreg_core.store.folder import FolderStore
from spinreg_core.store.open import open_store
from spinreg_core.store.probe import require_conditional_writes
from spinreg_core.store.remote_files import list_s3
from spinreg_core.store.retries import RetryTimes
from spinreg_core.store.s3 import S3Store
from tests.bad_input.cases import Case, Place, table
from tests.support.servers import free_ports
from tests.support.unprivileged import as_nobody

CASES: list[Case] = []
case = table(CASES, "start")


def at(place: Place, bucket: str = "spinreg") -> str:
    """Return the address of a store on the real server, and set its credentials."""
    server = place.server()
    S3FileSystem.clear_instance_cache()  # one is kept whatever the credentials are
    for name, value in server.env.items():
        place.patch.setenv(name, value)
    return f"s3://{bucket}/runs"


@contextlib.contextmanager
def answering(place: Place, status: int, code: str, text: str) -> Iterator[None]:
    """Run a server that gives every request the same response: an error, or with status 200 success and an ETag."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = f"<Error><Code>{code}</Code><Message>{text}</Message></Error>" if status != 200 else text
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", '"e"')
            self.end_headers()
            self.wfile.write(body.encode())

        do_PUT = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        S3FileSystem.clear_instance_cache()
        place.patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            place.patch.setenv(name, "anything")
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        S3FileSystem.clear_instance_cache()


def denied(place: Place, action: str) -> str:
    """Return the address of a bucket with a policy that denies an action to all users."""
    server = place.server()
    client = botocore.session.get_session().create_client(
        "s3", endpoint_url=server.endpoint, region_name="us-east-1",
        aws_access_key_id=server.env["AWS_ACCESS_KEY_ID"], aws_secret_access_key=server.env["AWS_SECRET_ACCESS_KEY"],
    )  # fmt: skip
    bucket = f"no-{action.lower()}"
    client.create_bucket(Bucket=bucket)
    what = [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"]
    denial = {"Effect": "Deny", "Principal": "*", "Action": [f"s3:{action}"], "Resource": what}
    client.put_bucket_policy(Bucket=bucket, Policy=json.dumps({"Version": "2012-10-17", "Statement": [denial]}))
    return at(place, bucket)


def skewed(place: Place) -> None:
    """Set the clock that signs requests an hour back."""
    real: Callable[..., datetime.datetime] = botocore.auth.get_current_datetime
    place.patch.setattr(
        botocore.auth, "get_current_datetime", lambda *a, **n: real(*a, **n) - datetime.timedelta(hours=1)
    )


def full(place: Place) -> FolderStore:
    """Return a store that writes its next file to a full disk."""
    store = FolderStore(place.folder / "store")
    store.create("runs/demo/head.json", b"{}")
    place.patch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=0))
    (place.folder / f"store/runs/demo/.tmp-{uuid.UUID(int=0).hex}").symlink_to("/dev/full")
    return store


@case("a bucket that does not exist")
def _(place: Place) -> object:
    return open_store(at(place, "nowhere")).check()


@case("an address without a bucket")
def _(place: Place) -> object:
    return open_store("s3://")


@case("a bucket whose name cannot be one")
def _(place: Place) -> object:
    return open_store(at(place, "Not_A_Bucket!")).check()


@case("a password in the address")
def _(place: Place) -> object:
    return open_store("s3://key:secret@spinreg/runs")


@case("an unknown access key")
def _(place: Place) -> object:
    url = at(place)
    place.patch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    return open_store(url).check()


@case("a wrong secret key")
def _(place: Place) -> object:
    url = at(place)
    place.patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    return open_store(url).check()


@case("no credentials at all")
def _(place: Place) -> object:
    url = at(place)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        place.patch.delenv(name)
    place.patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    place.patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(place.folder / "none"))
    return open_store(url).check()


@case("a profile that does not exist")
def _(place: Place) -> object:
    url = at(place)
    place.patch.setenv("AWS_PROFILE", "nobody")
    return open_store(url).check()


@case("a clock that is an hour behind")
def _(place: Place) -> object:
    url = at(place)
    skewed(place)
    return open_store(url).check()


@case("credentials that expired")
def _(place: Place) -> object:
    with answering(place, 400, "ExpiredToken", "The provided token has expired."):
        return open_store("s3://spinreg/runs").check()


@case("a server that does not respond")
def _(place: Place) -> object:
    url = at(place)
    place.patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
    return S3Store(url, RetryTimes(check=6.0)).check()


@case("an endpoint that is not an address")
def _(place: Place) -> object:
    url = at(place)
    place.patch.setenv("AWS_ENDPOINT_URL", "localhost:8333")
    return open_store(url).check()


@case("a server that is not S3")
def _(place: Place) -> object:
    with answering(place, 200, "", "<!DOCTYPE html><html><p>It works!</html>"):
        return S3Store("s3://spinreg/runs", RetryTimes(check=6.0)).check()


@case("a bucket that may not be listed")
def _(place: Place) -> object:
    return open_store(denied(place, "ListBucket")).check()


@case("a bucket that may only be read")
def _(place: Place) -> object:
    store = open_store(denied(place, "PutObject"))
    store.check()
    return require_conditional_writes(store)


@case("a server that ignores If-None-Match")
def _(place: Place) -> object:
    with answering(place, 200, "", ""):
        return require_conditional_writes(open_store("s3://spinreg/runs"))


@case("a server without conditional writes")
def _(place: Place) -> object:
    with answering(place, 501, "NotImplemented", "A header you provided implies functionality that is not implemented"):
        return require_conditional_writes(open_store("s3://spinreg/runs"))


@case("SPINREG_COMMITS, which spinreg 0.1.0 read")
def _(place: Place) -> object:
    place.patch.setenv("SPINREG_COMMITS", "/shared/commits")
    return open_store("s3://spinreg/runs")


@case("a bucket of spinreg 0.1.0 with its commits in a folder")
def _(place: Place) -> object:
    bucket = place.folder / "bucket"
    place.write("bucket/commits.json", '{"schema": 1, "commits": "/shared/commits/bucket"}')
    return open_store(str(bucket)).check()


@case("a data set in a bucket that does not exist", BadInput, "prepare")
def _(place: Place) -> object:
    return list_s3(at(place, "nowhere") + "/rows.jsonl", "dataset")


@case("a data set at an empty address", BadInput, "prepare")
def _(place: Place) -> object:
    return list_s3(at(place) + "/rows.jsonl", "dataset")


@case("a model in a bucket that may not be read", BadInput, "prepare")
def _(place: Place) -> object:
    url = at(place)
    place.patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    return list_s3(url + "/model", "model")


@case("a file in the way of the folder")
def _(place: Place) -> object:
    return open_store(place.write("store", "a file")).check()


@case("a folder that may only be read")
def _(place: Place) -> object:
    with as_nobody() as place.folder:
        return open_store(str(place.folder / "store")).check()


@case("a key that leaves the store")
def _(place: Place) -> object:
    return FolderStore(place.folder).read("runs/../../secrets")


# The store was usable at the start of the run.
@case("a token that expired during the run", StoreRefused, "use")
def _(place: Place) -> object:
    with answering(place, 400, "ExpiredToken", "The provided token has expired."):
        return open_store("s3://spinreg/runs").read("runs/demo/head.json")


@case("a permission to read that was withdrawn during the run", StoreRefused, "use")
def _(place: Place) -> object:
    return open_store(denied(place, "GetObject")).read("runs/demo/head.json")


@case("a clock that went wrong during the run", StoreRefused, "use")
def _(place: Place) -> object:
    store = open_store(at(place))
    skewed(place)
    return store.write("runs/demo/report.html", b"page")


@case("a server whose disk is full", StoreFailed, "use")
def _(place: Place) -> object:
    with answering(place, 507, "XMinioStorageFull", "Storage backend has reached its minimum free drive threshold."):
        return S3Store("s3://spinreg/runs", RetryTimes(patience=6.0)).write("runs/demo/report.html", b"page")


@case("a folder on a full disk", StoreRefused, "use")
def _(place: Place) -> object:
    return full(place).write("runs/demo/head.json", b"{ }")


@case("a folder that became read-only", StoreRefused, "use")
def _(place: Place) -> object:
    with as_nobody() as place.folder:
        return FolderStore(place.folder).write("runs/demo/head.json", b"{}")


@case("a folder where a file should be", StoreRefused, "use")
def _(place: Place) -> object:
    (place.folder / "store/runs/demo/head.json").mkdir(parents=True)
    return FolderStore(place.folder / "store").read("runs/demo/head.json")


@case("a copy of a file that does not fit on this machine", StoreRefused, "use")
def _(place: Place) -> object:
    store = FolderStore(place.folder / "store")
    store.write("objects/a/weights", b"w")
    return store.download("objects/a/weights", Path("/dev/full"))


@case("a folder of the store without permission to list", StoreRefused, "use")
def _(place: Place) -> object:
    with as_nobody(lambda folder: (folder / "runs/one").mkdir(parents=True, mode=0)) as place.folder:
        return FolderStore(place.folder).list("runs/")


@case("a link in the store that leads nowhere", StoreRefused, "use")
def _(place: Place) -> object:
    (place.folder / "store/runs").mkdir(parents=True)
    (place.folder / "store/runs/one").symlink_to(place.folder / "not-mounted/one")
    return FolderStore(place.folder / "store").list("runs/")
