"""Having a dataset to oneself, for whoever removes files.

They take the exclusive lease and then see that no driver is at work; every driver, once it has its
own lease, sees that nobody has the exclusive one. Of the two, one always notices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from infra import storage
from infra.lease import Lease, refuse_if_held


def exclusive_lease_uri(dataset_root: str) -> str:
    """The lease of whoever removes files."""
    return storage.join(dataset_root, "work", "exclusive-lease.json")


def refuse_while_removing(dataset_root: str) -> None:
    """For drivers, once they have their lease: ``LeaseHeld`` while somebody else removes files."""
    refuse_if_held(exclusive_lease_uri(dataset_root), also_by_this_process=False)


@contextmanager
def nobody_else(dataset_root: str, owner: str) -> Iterator[Lease]:
    """The exclusive lease, with no driver at work under the root; ``LeaseHeld`` names one that is.

    Leases that the dead left held are taken for the time, so that who was only frozen notices; a
    takedown's own is left to the takedown, which takes it when it goes on.
    """
    with ExitStack() as stack:
        lease = stack.enter_context(Lease(exclusive_lease_uri(dataset_root), owner))
        for info in list(storage.list_objects(dataset_root)):
            is_left = info.uri.endswith("/lease.json") and refuse_if_held(info.uri)
            if is_left and "/takedown-" not in info.uri:
                stack.enter_context(Lease(info.uri, owner))
        yield lease
