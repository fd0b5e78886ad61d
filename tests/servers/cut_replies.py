"""Every request of a storage with its replies cut at one byte after the other: which answers were wrong?

An HTTP client notices a body that is too short, but takes headers that end too early for all there are: then a list
looks empty and a number is half a number.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from configs.errors import NotFound, Unavailable
from configs.settings import StorageSettings
from subspace_store import Storage, open_storage
from tests.servers.cutting_proxy import HALF, CuttingProxy, running

CONTENT = b"0123456789" * 5
STREAM_BYTES = 9 * 2**20
"""More than one part."""


class OneByteProxy(CuttingProxy):
    """Cuts every reply after `at` bytes; `longest` is the longest so far."""

    at = 1
    longest = 0

    def fate(self, conditional: bool) -> str:
        return HALF

    def cut_at(self, size: int) -> int:
        self.longest = max(self.longest, size)
        return min(self.at, size)


def wrong_answers(place: StorageSettings, step: int) -> Iterator[str]:
    """What was answered that is neither right nor `Unavailable`, and after how many bytes the reply was cut.

    Args:
        step: Bytes between two cuts.
    """
    direct = open_storage(place)
    direct.write("object", CONTENT)
    for number in range(3):
        direct.write(f"list/{number}", b"")
    with running(OneByteProxy(str(place.endpoint_url), seed=0)) as proxy:
        cut = open_storage(place.model_copy(update={"endpoint_url": proxy.endpoint_url}))
        for name, (ask, right) in _requests(direct, cut).items():
            proxy.longest = proxy.at = 1
            while proxy.at <= proxy.longest:
                try:
                    answer = ask()
                except Unavailable:
                    pass
                except Exception as error:
                    yield f"{name}, {proxy.at} bytes: {error!r}"
                else:
                    if answer not in right:
                        yield f"{name}, {proxy.at} bytes: {answer!r}"
                proxy.at += step


def _requests(direct: Storage, cut: Storage) -> dict[str, tuple[Callable[[], object], tuple[object, ...]]]:
    """A request through the proxy, and the answers that are right. Nothing was acknowledged that is not there."""
    numbers = itertools.count()

    def absent() -> object:
        try:
            return cut.read("absent")
        except NotFound:
            return "not found"

    def write() -> object:
        key, content = f"written/{next(numbers)}", CONTENT
        cut.write(key, content)
        return direct.read(key)

    def create() -> object:
        key = f"created/{next(numbers)}"
        cut.create(key, CONTENT)  # False: a retry met what an earlier try had created
        return direct.read(key)

    def stream() -> object:
        key = f"streamed/{next(numbers)}"
        with cut.stream(key, len(CONTENT)) as out:
            out.append(bytes(STREAM_BYTES))
            out.finish(CONTENT)
        content = direct.read(key)
        return content[: len(CONTENT)], len(content) - len(CONTENT)

    return {
        "read": (lambda: cut.read("object"), (CONTENT,)),
        "view": (lambda: bytes(cut.view("object", 5, 10)), (CONTENT[5:15],)),
        "absent": (absent, ("not found",)),
        "keys": (lambda: cut.keys("list/"), (["list/0", "list/1", "list/2"],)),
        "write": (write, (CONTENT,)),
        "create": (create, (CONTENT,)),
        "second create": (lambda: cut.create("object", b"second"), (False,)),
        "delete": (lambda: cut.delete("absent"), (None,)),
        "stream": (stream, ((CONTENT, STREAM_BYTES),)),
    }
