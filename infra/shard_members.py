"""What may be inside a shard: samples one after another, plain files under plain names.

Nothing that leads elsewhere (paths, links, devices), nothing that runs when it is loaded (pickles),
no sample in two places. Readers never extract to a disk.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator

from infra.errors import UserError

EXTENSIONS = ("jpeg", "jpg", "json", "png", "txt", "webp")
_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE)
_KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")


class BadMember(UserError):
    """A tar holds what no shard may hold; it is not read any further."""


class Inventory:
    """What was seen of one tar, in its order."""

    def __init__(self) -> None:
        self.keys: set[str] = set()
        self._key = ""
        self._extensions: set[str] = set()

    def problem_with(self, member: tarfile.TarInfo) -> str | None:
        """Why the next member may not be there; None when it may."""
        key, _, extension = member.name.partition(".")
        # isreg() is true of sparse files, which may claim any size.
        is_plain = member.type in _PLAIN and not member.issparse()
        if not is_plain or not _KEY.fullmatch(key):
            self.keys.add(key)
            return f"member {member.name[:200]!r} is not a plain sample file"
        if extension not in EXTENSIONS:
            return f"member {member.name[:200]!r} is none of {', '.join(EXTENSIONS)}"
        if key != self._key:
            if key in self.keys:
                return f"sample {key!r} is in two places"
            self.keys.add(key)
            self._key, self._extensions = key, set()
        if extension in self._extensions:
            return f"member {member.name!r} is there twice"
        self._extensions.add(extension)
        return None


def samples_of(tar: tarfile.TarFile, origin: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and members (extension -> bytes) of each sample, in order; ``origin`` names the tar.

    Raises ``BadMember`` at the first member that may not be there.
    """
    inventory = Inventory()
    key, members = "", dict[str, bytes]()
    for member in tar:
        if (problem := inventory.problem_with(member)) is not None:
            raise BadMember(f"{origin}: {problem}; it was not written by atelier: curate it again")
        stem, _, extension = member.name.partition(".")
        if stem != key and members:
            yield key, members
            members = {}
        key = stem
        file = tar.extractfile(member)
        members[extension] = b"" if file is None else file.read()
    if members:
        yield key, members
