from __future__ import annotations

import pickle

import pytest

from infra.errors import UserError
from infra.storage import DigestMismatch, ObjectMissing, StorageUnavailable


def test_a_message_of_parts_is_one_line() -> None:
    error = UserError(expected="a\nnumber", got="'x'", remedy="write 1")
    assert str(error) == "expected a number; got 'x'; write 1"


@pytest.mark.parametrize(
    "error",
    [
        UserError(expected="a", got="b"),
        ObjectMissing("s3://b/k"),
        DigestMismatch("s3://b/k", expected_sha256="1", got_sha256="2"),
        StorageUnavailable("down", broken_off=True),
    ],
)
def test_errors_travel_between_processes(error: UserError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
