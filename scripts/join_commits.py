"""Copy the commits of a store of spinreg 0.1.0 from their folder into the bucket that holds its files.

    python scripts/join_commits.py BUCKET FOLDER

spinreg 0.1.0 could keep commits (heads, configurations, manifests, parts) in a folder that SPINREG_COMMITS named, and
files in a bucket. BUCKET is that store: s3://bucket/prefix, or a folder that its files were copied to. FOLDER is the
folder that SPINREG_COMMITS named, or the store's own folder below it. End all runs of the store first.

Nothing is overwritten: a key that exists with other content ends the script. The bucket's `commits.json`, which keeps
spinreg from using the store, is removed last, so that an interrupted copy can be started again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from spinreg_core.errors import BadInput, SpinregError
from spinreg_core.store import documents
from spinreg_core.store.base import COMMITS_MARKER, Store
from spinreg_core.store.folder import FolderStore
from spinreg_core.store.probe import require_conditional_writes
from spinreg_core.store.s3 import S3Store

# Other names in the folder belong to other stores: prefixes of the same bucket.
COMMITTED = ("comparisons", "objects", "runs", "verdicts")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bucket", metavar="BUCKET")
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    given = parser.parse_args(arguments)
    try:
        # Not `open_store`, which refuses to start while SPINREG_COMMITS is set.
        store = (
            S3Store(given.bucket) if given.bucket.startswith("s3://") else FolderStore(Path(given.bucket).absolute())
        )
        print(join_commits(store, given.folder.absolute()))
    except SpinregError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


class Marker(documents.Document):
    """The document by which 0.1.0 knew that the commits of a bucket lie in a folder."""

    commits: str
    id: str | None = None


def join_commits(store: Store, folder: Path) -> str:
    """Copy all commits into the store, and return one line about it.

    Raises BadInput for a folder that does not belong to the store, and for a server without conditional writes;
    Conflict for a key that the store holds with other content.
    """
    marker = documents.read(store, COMMITS_MARKER, Marker)
    if marker is None:
        return f"{store.url} holds no {COMMITS_MARKER}: its commits are in it already, and nothing was copied"
    below = folder / store.url.removeprefix("s3://")
    commits = FolderStore(below if store.url.startswith("s3://") and below.is_dir() else folder)
    keys = [key for name in COMMITTED for key in commits.list(f"{name}/")]
    own = documents.read(commits, COMMITS_MARKER, Marker)
    # Early markers carry no id, and their folders no marker: such a folder must at least hold commits.
    if own is None or own.id != marker.id if marker.id is not None else not keys:
        expected = f"name the folder with its commits, which was {marker.commits} (is its file system mounted?)"
        raise BadInput(str(commits.root), f"does not hold the commits of {store.url}", expected)
    require_conditional_writes(store)
    for key in keys:
        data = commits.read(key)
        assert data is not None
        store.create(key, data)
    store.delete(COMMITS_MARKER)
    return f"{len(keys)} keys of {commits.root} are now in {store.url}, which no longer needs that folder"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
