"""The digest of what there is to learn from a version, wherever its samples lie."""

import contextlib
import re

from pipeline import storage
from pipeline.data.manifest.engine import Engine
from pipeline.data.manifest.manifest import Manifest
from pipeline.data.manifest.schema import State
from pipeline.digest import digest_of_parts
from pipeline.errors import StorageError

_DIGEST = re.compile(rb"[0-9a-f]{32}")


def content(manifest: Manifest, split: str | None) -> str:
    """Returns the digest of the live samples of a split, or of all: of lines sorted by key."""
    of_split = "" if split is None else "AND split = $1"
    with Engine() as engine:
        manifest.register(
            engine, "samples", ("key", "split", "state", "digest", "texts_fingerprint")
        )
        batches = engine.batches(
            "SELECT concat_ws(chr(9), key, split, digest, "
            "texts_fingerprint, chr(10)) AS line "
            f"FROM samples WHERE state = '{State.LIVE}' {of_split} ORDER BY key",
            [] if split is None else [split],
        )
        return digest_of_parts("".join(batch["line"].to_pylist()).encode() for batch in batches)


def kept_content(manifest: Manifest, split: str | None, folder: str) -> str:
    """Returns `content`, which is found out once for a version and kept in its folder."""
    location = storage.join(folder, "content" if split is None else f"content-{split}")
    with contextlib.suppress(StorageError):
        kept = storage.read_bytes(location)
        if _DIGEST.fullmatch(kept):
            return kept.decode()
    found = content(manifest, split)
    with contextlib.suppress(StorageError):  # it may be that nothing can be written there
        storage.write_bytes(location, found.encode())
    return found
