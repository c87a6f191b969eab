"""Open a row's video: from its file, a shard, or kept frames; keep its frame index for next time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vidtrain.data.decode import open_video
from vidtrain.data.manifest import Row
from vidtrain.types import VideoReader

if TYPE_CHECKING:
    from vidtrain.data.cache import FrameCache
    from vidtrain.data.indices import IndexStore
    from vidtrain.data.readers.index import FrameIndex
    from vidtrain.data.shards import Shards


class Sources:
    """What stands between a row and its reader.

    Args:
        decoder: see `vidtrain.data.decode.open_video`.
        indices: of the videos' frames, kept from run to run.
        cache: of decoded frames.
        shards: where rows with a `place` lie.
    """

    def __init__(
        self,
        decoder: str = "auto",
        indices: IndexStore | None = None,
        cache: FrameCache | None = None,
        shards: Shards | None = None,
    ) -> None:
        self.decoder, self.indices, self.cache, self.shards = decoder, indices, cache, shards

    def uncached(self) -> Sources:
        """Give the same without a cache of frames."""
        return Sources(self.decoder, self.indices, None, self.shards)

    @contextmanager
    def open(self, name: str, row: Row) -> Iterator[VideoReader]:
        """Open a row's video.

        Args:
            name: its file, or what messages call it where it lies in a shard.
            row: the row.

        Raises:
            DecodeError: naming it, and why it cannot be read.
        """
        key, facts = self.identity(name, row)
        known: FrameIndex | None = None

        def opener() -> VideoReader:
            nonlocal known
            if self.indices is not None and facts is not None:
                known = self.indices.get(key, *facts)
            source: Path | bytes = Path(name)
            if row.place is not None and self.shards is not None:
                source = self.shards.read(row.place)
            return open_video(source, self.decoder, name=name, index=known)

        reader = self.cache.open(key, facts, opener) if self.cache is not None else opener()
        with reader:
            yield reader
            index = getattr(reader, "index", None)
            if self.indices is not None and facts is not None and index is not None and not known:
                self.indices.put(key, *facts, index)

    def identity(self, name: str, row: Row) -> tuple[str, tuple[int, int] | None]:
        """Give what names a video for good, and two numbers by which a change of it is seen."""
        if self.indices is None and self.cache is None:
            return name, None
        if row.place is not None and self.shards is not None:
            return f"{name}@{self.shards.version}", (row.place.size, row.place.offset)
        from vidtrain.data.cache import facts_of

        return name, facts_of(name)
