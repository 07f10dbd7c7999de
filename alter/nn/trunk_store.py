"""The trunk's states on disk: memory-mapped, shared by runs and processes, bounded, checked at every read."""

from __future__ import annotations

import contextlib
import mmap
import os
import uuid
import warnings
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

SEGMENT_BYTES = 2**28  # what is evicted at a time
KEY_BYTES = 16
_RECORD = np.dtype([("key", f"V{KEY_BYTES}"), ("offset", "<u8"), ("rows", "<u4"), ("checksum", "<u4")])


class TrunkStore:
    """Tensors [rows, width] by key, in segments: a data file and an index file each.

    Every process appends to segments of its own and reads those of all, so that no lock is needed, on a network file
    system either. An index record is written after its data; a record that is cut off, or whose data do not have its
    checksum, counts as absent, so that its example is computed again.

    Args:
        folder: of this store; its parent holds the stores of other backbones and cuts, which share the bound.
        width: of the tensors.
        dtype: of the tensors, float32 or bfloat16.
        max_bytes: of all stores in the parent folder together; processes that begin a segment at the same moment may each
            exceed it by that segment.
        evict: whether segments that this process has not used make room, longest unused first; otherwise, and when all
            are in use, nothing more is stored.
    """

    def __init__(self, folder: Path, width: int, dtype: torch.dtype, max_bytes: int, evict: bool = True) -> None:
        self.folder = folder
        self.width = width
        self.dtype = dtype
        self.max_bytes = max_bytes
        self.evict = evict
        self.full = False
        self._segment_bytes = min(SEGMENT_BYTES, max_bytes // 8)
        self.row_bytes = width * dtype.itemsize
        self._places: dict[bytes, tuple[_Segment, int, int, int]] = {}  # key: segment, offset, rows, checksum
        self._own: _Segment | None = None
        self._used: set[Path] = set()
        self._damaged = 0
        folder.mkdir(parents=True, exist_ok=True)
        for index in sorted(folder.glob("*.index"), key=_written):  # what was computed again comes later, and counts
            self._open(index)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def get(self, key: bytes) -> Tensor | None:
        """Returns the tensor of a key, a view of the mapped file, or None where it is absent or damaged."""
        if key not in self._places:
            return None
        segment, offset, rows, checksum = self._places[key]
        data = segment.read(offset, rows * self.row_bytes)
        if data is None or zlib.crc32(data) != checksum:
            self._forget(key, segment)
            return None
        self._use(segment)
        return torch.frombuffer(data, dtype=self.dtype).view(rows, self.width)

    def put(self, key: bytes, states: Tensor) -> None:
        """Adds a tensor, unless it is there or the store is full."""
        if self.full or key in self._places:
            return
        data = states.detach().to("cpu", self.dtype).contiguous().view(torch.uint8).numpy().tobytes()
        if self._own is None or self._own.size + len(data) > self._segment_bytes:
            self._own = self._start_segment()
        if self.full or self._own is None:
            return
        record = (self._own.size, len(states), zlib.crc32(data))
        try:
            self._own.append(data, np.array([(key, *record)], dtype=_RECORD).tobytes())
        except OSError as error:  # a full disk
            self._stop(f"{error.strerror}; free some space there")
            return
        self._places[key] = (self._own, *record)

    def close(self) -> None:
        """Closes the files."""
        for segment in {id(place[0]): place[0] for place in self._places.values()}.values():
            segment.close()
        self._places.clear()
        self._own = None

    # -- segments ---------------------------------------------------------------------------------------------------

    def _open(self, index: Path) -> None:
        try:
            content = index.read_bytes()
        except FileNotFoundError:  # evicted by another process just now
            return
        segment = _Segment(index.with_suffix(".data"))
        whole = len(content) - len(content) % _RECORD.itemsize  # the last record may be cut off
        for key, offset, rows, checksum in np.frombuffer(content[:whole], dtype=_RECORD).tolist():
            self._places[key] = (segment, offset, rows, checksum)

    def _start_segment(self) -> _Segment | None:
        """Makes room for one more segment and begins it."""
        stored = _stored_segments(self.folder.parent)
        total = sum(size for _, size in stored)
        for path, size in stored:
            if total + self._segment_bytes <= self.max_bytes:
                break
            if self.evict and path not in self._used and self._remove(path):
                total -= size
        if total + self._segment_bytes > self.max_bytes:
            self._stop(f"all {self.max_bytes / 2**30:.3g} GB are in use; raise trunk_cache.max_gb")
            return None
        path = self.folder / f"{uuid.uuid4().hex}.data"
        try:
            path.touch()
            self._used.add(path)
            return _Segment(path)
        except OSError as error:
            self._stop(f"{error.strerror}; free some space there")
            return None

    def _remove(self, path: Path) -> bool:
        """Removes a segment; returns False where it is another user's."""
        try:
            path.with_suffix(".index").unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        except PermissionError:
            return False
        self._places = {key: place for key, place in self._places.items() if place[0].path != path}
        return True

    def _use(self, segment: _Segment) -> None:
        if segment.path not in self._used:
            self._used.add(segment.path)
            with contextlib.suppress(OSError):  # another process may have evicted it, another user may own it
                os.utime(segment.path)

    def _forget(self, key: bytes, segment: _Segment) -> None:
        del self._places[key]
        self._damaged += 1
        if self._damaged == 1:
            warnings.warn(
                f"{segment.path}: damaged or missing entries of the trunk cache are computed again.", stacklevel=2
            )

    def _stop(self, reason: str) -> None:
        self.full = True
        warnings.warn(
            f"{self.folder}: the trunk cache takes no more ({reason}); training goes on, computing what is not stored.",
            stacklevel=2,
        )


class _Segment:
    """One data file and its index, mapped as far as they have grown."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0  # as far as this process has written it
        self._map: mmap.mmap | None = None
        self._writing: tuple[BinaryIO, BinaryIO] | None = None

    def read(self, offset: int, length: int) -> memoryview | None:
        """The bytes, or None where the file ends before or is gone. Opened when first read: there may be many."""
        if self._map is None or len(self._map) < offset + length:
            try:
                with self.path.open("rb") as file:
                    size = os.fstat(file.fileno()).st_size
                    if size < offset + length:
                        return None
                    self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)  # torch wants it writable
            except FileNotFoundError:
                return None
        return memoryview(self._map)[offset : offset + length]

    def append(self, data: bytes, record: bytes) -> None:
        """Writes the data, then their record."""
        if self._writing is None:
            self._writing = (self.path.open("ab", buffering=0), self.path.with_suffix(".index").open("ab", buffering=0))
        for file, content in zip(self._writing, (data, record), strict=True):
            if file.write(content) != len(content):
                raise OSError(28, "No space left on device")
        self.size += len(data)

    def close(self) -> None:
        """Closes the files; tensors that view the map keep it."""
        for file in self._writing or ():
            file.close()
        self._writing = None


def _written(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:  # another process evicts too
        return 0


def _stored_segments(root: Path) -> list[tuple[Path, int]]:
    """All stores' data files with their sizes, longest unused first."""
    found = []
    for path in root.glob("*/*.data"):
        try:
            status = path.stat()
        except FileNotFoundError:  # another process evicts too
            continue
        found.append((status.st_mtime, path, status.st_size))
    return [(path, size) for _, path, size in sorted(found)]
