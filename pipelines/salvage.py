"""What is left of a torn tar, and whether what was read from it can be right."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Mapping
from typing import Any

from pipelines.config import ResizeConfig
from pipelines.connection import Failed
from pipelines.decoder import Decoder
from pipelines.guard import Rejected
from pipelines.images import Bounds, StoredImage

_BLOCK = tarfile.BLOCKSIZE
_IMAGES = ("jpg", "png", "webp")
_MAX_PIXELS = 8192 * 8192
Members = dict[str, bytes]


def salvaged(data: bytes) -> dict[str, Members]:
    """Key -> members that are there in whole, wherever the tar is damaged.

    A header that does not add up is skipped block by block until one does. What the members hold
    is not proven by that.
    """
    found: dict[str, Members] = {}
    position = 0
    while position + _BLOCK <= len(data):
        try:
            info = tarfile.TarInfo.frombuf(
                data[position : position + _BLOCK], "utf-8", "surrogateescape"
            )
        except tarfile.HeaderError:
            position += _BLOCK
            continue
        position += _BLOCK
        end = position + info.size
        if not info.isreg() or end > len(data):
            continue
        key, _, extension = info.name.partition(".")
        found.setdefault(key, {})[extension] = data[position:end]
        position = -(-end // _BLOCK) * _BLOCK
    return found


def is_whole(members: Mapping[str, bytes]) -> bool:
    """Whether an image and both texts are there."""
    return image_name(members) is not None and {"json", "txt"} <= members.keys()


def image_name(members: Mapping[str, bytes]) -> str | None:
    """The image's extension."""
    return next((name for name in _IMAGES if name in members), None)


def texts_agree(row: Mapping[str, Any], members: Mapping[str, bytes]) -> bool:
    """Whether the texts agree with the ledger's row and with one another."""
    try:
        known = json.loads(members["json"])
        if any(known[name] != row[name] for name in ("sample_id", "url", "sha256")):
            return False
        return bool(known["caption"].encode() == members["txt"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


class Plausible:
    """Whether members agree with the ledger's row and with one another, and the image decodes.

    A changed byte inside the image may go unseen.
    """

    def __init__(self) -> None:
        small = ResizeConfig(image_size_px=8, crop="none")
        self._decoder = Decoder([small], Bounds(_MAX_PIXELS))

    def __call__(self, row: Mapping[str, Any], members: Mapping[str, bytes]) -> bool:
        if not texts_agree(row, members):
            return False
        known = json.loads(members["json"])
        try:
            (found,) = self._decoder.store(members[str(image_name(members))])
        except (Rejected, Failed):
            return False
        if not isinstance(found, StoredImage):
            return False
        size = (known.get("width_px"), known.get("height_px"))
        return (found.original_width_px, found.original_height_px) == size

    def close(self) -> None:
        """End the child that decodes."""
        self._decoder.close()
