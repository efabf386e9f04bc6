"""Width and height from the first bytes of an image, read by hand: no codec sees them.

A picture that EXIF turns has its sides as they are stored. What the pixels are in truth is asked
again once the image is fetched.
"""

from __future__ import annotations

import struct

HEAD_BYTES = 1 << 16  # what comes before the frame header of nearly every JPEG
_FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_RESTARTS = frozenset(range(0xD0, 0xD8)) | {0x01}

Size = tuple[int, int]


def size_of(head: bytes) -> Size | None:
    """Width and height, px, of a JPEG, PNG or WebP; None when ``head`` does not tell."""
    try:
        if head.startswith(b"\xff\xd8"):
            return _of_jpeg(head)
        if head.startswith(b"\x89PNG\r\n\x1a\n") and head[12:16] == b"IHDR":
            width, height = struct.unpack_from(">II", head, 16)
            return width, height
        if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
            return _of_webp(head)
    except (struct.error, IndexError):
        return None
    return None


def _of_jpeg(head: bytes) -> Size | None:
    at = 2
    while head[at] == 0xFF:
        marker = head[at + 1]
        if marker in _FRAME_HEADERS:
            height, width = struct.unpack_from(">HH", head, at + 5)
            return width, height
        if marker == 0xFF:
            at += 1
        elif marker in _RESTARTS:
            at += 2
        else:
            at += 2 + struct.unpack_from(">H", head, at + 2)[0]
    return None


def _of_webp(head: bytes) -> Size | None:
    kind = head[12:16]
    if kind == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", head, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L" and head[20] == 0x2F:
        (bits,) = struct.unpack_from("<I", head, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X":
        width, height = head[24:27], head[27:30]
        if len(height) == 3:
            return int.from_bytes(width, "little") + 1, int.from_bytes(height, "little") + 1
    return None
