"""Workers of a cluster run the driver's code: other code would make other results, unnoticed."""

from __future__ import annotations

import functools
import os
import socket

from infra.digests import code_digest
from infra.errors import UserError

VARIABLE = "ATELIER_CODE_SHA256"


def code_expected(*packages: str) -> dict[str, str]:
    """The variable that tells workers elsewhere what the driver's code of ``packages`` is."""
    return {VARIABLE: " ".join((*packages, code_digest(*packages)))}


def check_same_code() -> None:
    """Raise ``UserError`` in a worker whose code is not the driver's, where a driver told its."""
    told = os.environ.get(VARIABLE)
    if told is not None:
        _compare(told)


@functools.cache
def _compare(told: str) -> None:
    *packages, digest = told.split()
    if code_digest(*packages) != digest:
        raise UserError(
            expected=f"the driver's code of {', '.join(packages)} on every machine",
            got=f"other code on {socket.gethostname()}",
            remedy="install the same version there",
        )
