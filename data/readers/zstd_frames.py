"""Read a zstd file to its end.

The streams of python-zstandard, which fsspec opens, end in silence after the first frame of a file that was joined out
of several, and in the middle of a frame that was cut off.
"""

import io
from typing import Any, BinaryIO

import zstandard

CHUNK_BYTES = 1 << 17
MAX_WINDOW_BYTES = 1 << 31
"""Largest window that the format's reference program can be asked to write (`zstd --ultra --long=31`)."""
ZSTD_MAGICS = (b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18")
"""First bytes of a frame, and of the skippable frame with which pzstd begins a file."""


class ZstdFrames(io.RawIOBase):
    """A binary stream of the content of all frames of a zstd file.

    Reading raises EOFError where the last frame is cut off, and zstandard.ZstdError where a frame is damaged.
    """

    def __init__(self, file: BinaryIO):
        self.file = file
        self.frame: Any = None
        self.content = memoryview(b"")

    def readable(self) -> bool:
        """Return True: the stream can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer with the next bytes; return their number, 0 at the end."""
        while not self.content:
            beginning = self.frame.unused_data if self.frame and self.frame.eof else b""
            chunk = beginning or self.file.read(CHUNK_BYTES)
            if not chunk:
                if self.frame and not self.frame.eof:
                    raise EOFError("the last zstd frame is cut off")
                return 0
            if self.frame is None or self.frame.eof:
                self.frame = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompressobj()
            self.content = memoryview(self.frame.decompress(chunk))
        size = min(len(buffer), len(self.content))
        buffer[:size], self.content = self.content[:size], self.content[size:]
        return size
