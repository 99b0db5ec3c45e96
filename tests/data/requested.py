"""What is asked of an S3 server, as the client sends it."""

import contextlib
from collections.abc import Iterator
from typing import Any

import fsspec


@contextlib.contextmanager
def ranges(url: str) -> Iterator[list[range]]:
    """Yields a list that grows by the bytes of each request for a part of an object."""
    filesystem, _ = fsspec.core.url_to_fs(url)
    filesystem.connect()
    asked: list[range] = []

    def note(request: Any, **_: Any) -> None:
        first, last = request.headers["Range"].decode().removeprefix("bytes=").split("-")
        asked.append(range(int(first), int(last) + 1))

    events = filesystem.s3.meta.events
    events.register("before-send.s3.GetObject", note)
    yield asked
    events.unregister("before-send.s3.GetObject", note)
