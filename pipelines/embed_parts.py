"""What a task has of a shard's embeddings so far, stored now and then: a killed one goes on there.

A part holds whole batches, and the parts of a shard follow one another from its start. The batches
after them are therefore the ones that an undisturbed task makes, and so is every bit: how a product
is rounded may depend on what shares its batch. Parts go when the shard is done.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from infra import storage
from infra.digests import sha256_bytes

Embeddings = npt.NDArray[np.float16]
PARTS = "parts"
STEM_CHARS = 32  # of a shard's sha256, in the names of what belongs to it
# <first sample>-<batch size>-<the bytes' sha256>
_NAME = re.compile(r"(\d{8,})-(\d+)-([0-9a-f]{64})\.npz")


@dataclass
class Part:
    """Of the samples ``first … end - 1`` of a shard: the keys of those that were embedded, in
    order, their embeddings (rows, dim), and why the others were not."""

    first: int = 0
    end: int = 0
    keys: list[str] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)
    images: list[Embeddings] = field(default_factory=list)
    texts: list[Embeddings] = field(default_factory=list)

    def add(self, later: Part) -> None:
        """Take in the part that follows."""
        self.end = later.end
        self.keys += later.keys
        self.errors |= later.errors
        self.images += later.images
        self.texts += later.texts


def store_part(folder: str, part: Part, batch_size: int) -> None:
    """Store a part of a shard whose parts lie in ``folder``."""
    known = json.dumps({"end": part.end, "keys": part.keys, "errors": part.errors})
    buffer = io.BytesIO()
    np.savez(
        buffer,
        known=np.frombuffer(known.encode(), np.uint8),
        images=np.concatenate(part.images),
        texts=np.concatenate(part.texts),
    )
    data = buffer.getvalue()
    name = f"{part.first:08d}-{batch_size}-{sha256_bytes(data)}.npz"
    storage.write_bytes(storage.join(folder, name), data)


def stored_parts(folder: str, batch_size: int) -> Part:
    """All that is stored from the shard's start on, as one part; empty when nothing is.

    Parts of other batches, parts with other bytes than were written, and what follows these, count
    as not there.
    """
    uris: dict[int, list[str]] = {}
    for info in storage.list_objects(folder):
        named = _NAME.fullmatch(info.uri.rpartition("/")[2])
        if named is not None and int(named[2]) == batch_size:
            uris.setdefault(int(named[1]), []).append(info.uri)
    found = Part()
    while (later := _first_whole(found.end, sorted(uris.get(found.end, ())))) is not None:
        found.add(later)
    return found


def _first_whole(first: int, uris: list[str]) -> Part | None:
    for uri in uris:
        data = b""
        with suppress(storage.ObjectMissing):  # a task that is not dead yet ended the shard
            data = storage.read_bytes(uri)
        if f"-{sha256_bytes(data)}.npz" not in uri:
            continue
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            known = json.loads(arrays["known"].tobytes())
            images, texts = arrays["images"], arrays["texts"]
        return Part(first, known["end"], known["keys"], known["errors"], [images], [texts])
    return None


def forget_parts(folder: str, finished: Iterable[str]) -> None:
    """Remove what is left in ``<folder>/parts/<shard>/`` of shards that are finished, given by
    their sha256: a task may have been killed between its marker and that."""
    stems = {sha256[:STEM_CHARS] for sha256 in finished}
    for info in storage.list_objects(storage.join(folder, PARTS)):
        if info.uri.split("/")[-2] in stems:
            storage.delete(info.uri)
