"""Tars as they go by: every member, or an error that says where it went wrong."""

from __future__ import annotations

import io
import tarfile

import pytest

from infra.tar_stream import BadTar, Member, TarWalker, find_header

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def tar_of(members: dict[str, bytes], form: int = tarfile.USTAR_FORMAT, mtime: float = 0) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), mtime
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def walked(data: bytes, piece: int = 1 << 20, wanted: int = 1 << 20) -> list[Member]:
    walker = TarWalker(lambda _: wanted)
    found = [
        member for at in range(0, len(data), piece) for member in walker.feed(data[at : at + piece])
    ]
    walker.finish()
    return found


MEMBERS = {"a.jpg": b"x" * 1300, "a.json": b"{}", "b.jpg": b"", "b.json": b"y" * 512}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("piece", [1, 7, 512, 513, 1 << 20])
def test_members_come_whatever_the_pieces(form: int, piece: int) -> None:
    data = tar_of(MEMBERS, form, mtime=1.5)  # a fraction of a second makes an extended header
    found = walked(data, piece)
    assert {each.info.name: each.head for each in found} == MEMBERS
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        there = [(each.offset, each.offset_data) for each in tar]
    assert [(each.start, each.offset) for each in found] == there
    assert [each.head for each in walked(data, piece, wanted=3)] == [
        value[:3] for value in MEMBERS.values()
    ]


def test_a_tar_cut_anywhere_is_told() -> None:
    data = tar_of(MEMBERS)
    walker = TarWalker(lambda _: 0)
    list(walker.feed(data))
    for keep in range(0, int(walker.end or 0) + 512, 256):
        with pytest.raises(BadTar, match=f"cut at byte {keep}"):
            walked(data[:keep])


def test_a_damaged_header_is_told_and_not_the_end() -> None:
    data = bytearray(tar_of(MEMBERS))
    second = 512 + 1536
    data[second + 3] ^= 1
    with pytest.raises(BadTar, match=f"no header at byte {second}"):
        walked(bytes(data))


def test_bytes_behind_the_end_are_told() -> None:
    with pytest.raises(BadTar, match="behind its end"):
        walked(tar_of(MEMBERS) + tar_of({"hidden.jpg": b"x"}))


@pytest.mark.parametrize("name", ["path", "size", "linkpath", "GNU.sparse.size"])
def test_an_extended_header_may_not_make_another_member(name: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.jpg")
        info.pax_headers = {name: "7"}
        info.size = 7
        tar.addfile(info, io.BytesIO(b"x" * 7))
    with pytest.raises(BadTar, match=f"extended header at byte 512 that says '{name}'"):
        walked(buffer.getvalue())


@pytest.mark.parametrize(
    "records", [b"9 mtime=1", b"0 mtime=1\n", b"x mtime=1\n", b"\0" * 20, b"9" * 9000]
)
def test_an_extended_header_that_is_none_is_told(records: bytes) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, len(records)
    data = info.tobuf(tarfile.USTAR_FORMAT) + records.ljust(512, b"\0") + bytes(1024)
    if records == b"9 mtime=1":  # complete but for its line feed: harmless
        assert walked(data) == []
        return
    with pytest.raises(BadTar, match="extended header"):
        walked(data)


def test_a_header_is_found_in_the_middle() -> None:
    data = tar_of({"a.jpg": b"ustar" * 999, "a.json": b"{}"})
    assert find_header(data) == 0
    assert find_header(data[512:]) == -(-999 * 5 // 512) * 512
    assert find_header(bytes(4096)) is None
