"""What goes wrong with storage is told in one line, and never leaves half an object."""

from __future__ import annotations

import os
import random
import resource
import secrets
import signal
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from infra import storage, storage_s3, storage_upload
from infra.digests import sha256_bytes
from infra.errors import UserError
from infra.storage import DigestMismatch, StorageUnavailable

if TYPE_CHECKING:
    from tests.conftest import S3Server

OLD = b"old" * 100_000


def one_line(error: BaseException, secret: str = "\0") -> str:
    text = str(error)
    assert "\n" not in text
    assert secret not in text
    return text


def test_a_server_that_is_down_is_named_with_the_remedy(own_s3_server: S3Server) -> None:
    uri = f"{own_s3_server.store_uri}/x"
    storage.write_bytes(uri, b"x")
    own_s3_server.kill()
    started_at = time.monotonic()
    with pytest.raises(StorageUnavailable) as caught:
        storage.read_bytes(uri)
    assert one_line(caught.value) == (
        f"S3 endpoint {own_s3_server.endpoint} does not answer; run `atelier up`"
    )
    assert time.monotonic() - started_at < 5
    own_s3_server.start()
    assert storage.read_bytes(uri) == b"x"


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_a_denied_key_is_told_without_telling_it(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, variable: str, tmp_path: Path
) -> None:
    uri = f"{s3_server.store_uri}/x"
    wrong = secrets.token_hex(10).upper()
    monkeypatch.setenv(variable, wrong)
    calls: list[Callable[[], object]] = [
        lambda: storage.read_bytes(uri),
        lambda: storage.write_bytes(uri, b"x"),
        lambda: storage.exists(uri),
        lambda: list(storage.list_objects(uri)),
        lambda: storage.delete_prefix(uri),
    ]
    for call in calls:
        with pytest.raises(StorageUnavailable, match="access denied") as caught:
            call()
        one_line(caught.value, wrong if variable == "AWS_SECRET_ACCESS_KEY" else "\0")


def test_without_credentials_the_variables_are_named(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(StorageUnavailable, match="no S3 credentials; set AWS_ACCESS_KEY_ID"):
        storage.read_bytes(f"{s3_server.store_uri}/x")


def test_a_missing_bucket_is_named(s3_server: S3Server) -> None:
    with pytest.raises(StorageUnavailable, match="no bucket 'nobody'"):
        storage.write_bytes("s3://nobody/x", b"x")


def test_plain_http_stays_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://storage.example:9000")
    with pytest.raises(UserError, match="plain HTTP beyond this machine"):
        storage.read_bytes("s3://bucket/x")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "storage.example:9000")
    with pytest.raises(UserError, match="https://host:port"):
        storage.read_bytes("s3://bucket/x")


def test_a_large_file_travels_in_parts(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(storage_upload, "PART_BYTES", 100_000)
    data = os.urandom(1_234_567)
    (tmp_path / "big").write_bytes(data)
    uri = f"{s3_server.store_uri}/parts/big"
    assert storage.upload(tmp_path / "big", uri).sha256 == sha256_bytes(data)
    assert storage.download(uri, tmp_path / "back").sha256 == sha256_bytes(data)


def test_a_server_killed_in_an_upload_keeps_the_old_object(
    own_s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(storage_upload, "PART_BYTES", 1 << 20)
    uri = f"{own_s3_server.store_uri}/x"
    storage.write_bytes(uri, OLD)
    with open(tmp_path / "big", "wb") as file:
        file.truncate(400 << 20)
    bucket = own_s3_server.folder / "atelier"

    def kill_when_under_way() -> None:
        while not any(path.stat().st_size for path in bucket.glob(".rclone_temp_*")):
            time.sleep(0.002)
        own_s3_server.kill()

    killer = threading.Thread(target=kill_when_under_way)
    killer.start()
    with pytest.raises(StorageUnavailable) as caught:
        storage.upload(tmp_path / "big", uri)
    killer.join()
    one_line(caught.value)
    own_s3_server.start()
    assert storage.read_bytes(uri) == OLD
    assert [info.num_bytes for info in storage.list_objects(own_s3_server.store_uri)] == [len(OLD)]
    assert not list(bucket.glob(".rclone_temp_*"))


def test_a_failed_upload_aborts_its_parts(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(storage_upload, "PART_BYTES", 100_000)
    (tmp_path / "big").write_bytes(bytes(1_000_000))
    read = storage_upload.md5_of

    def break_late(data: bytes) -> str:
        if threading.active_count() > 3:
            raise RuntimeError("bug")
        return read(data)

    monkeypatch.setattr(storage_upload, "md5_of", break_late)
    with pytest.raises(RuntimeError, match="bug"):
        storage.upload(tmp_path / "big", f"{s3_server.store_uri}/aborted/x")
    assert not storage.exists(f"{s3_server.store_uri}/aborted/x")
    uploads = storage_s3.client().list_multipart_uploads(Bucket="atelier").get("Uploads", [])
    assert not [each for each in uploads if each["Key"].startswith("aborted/")]


def _limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))


def test_a_full_disk_behind_the_server_is_told(
    own_s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"{own_s3_server.store_uri}/x"
    storage.write_bytes(uri, OLD)
    own_s3_server.kill()
    own_s3_server.start(limit=_limit_file_size)
    with pytest.raises(StorageUnavailable, match="its disk may be full") as caught:
        storage.write_bytes(uri, bytes(3 << 20))
    one_line(caught.value, own_s3_server.secret_access_key)
    assert storage.read_bytes(uri) == OLD
    monkeypatch.setattr(storage_s3, "FULL_DISK_BYTES", 1 << 60)
    with pytest.raises(StorageUnavailable, match="the disk is full; free some space"):
        storage.write_bytes(uri, bytes(3 << 20))


def test_a_full_disk_here_is_told_and_cleaned(tmp_path: Path) -> None:
    code = """
import resource, sys
from infra import storage
from infra.errors import UserError
uri = sys.argv[1]
storage.write_bytes(uri, b"old")
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    storage.write_bytes(uri, bytes(200_000))
except UserError as error:
    print(type(error).__name__, error)
"""
    uri = storage.file_uri(tmp_path / "x")
    done = subprocess.run([sys.executable, "-c", code, uri], capture_output=True, text=True)
    assert done.stdout == f"StorageUnavailable cannot write {uri}: the disk is full; " + (
        "free some space\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert storage.read_bytes(uri) == b"old"


def test_a_folder_without_permission_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    folder = Path("/sys") if os.geteuid() == 0 else tmp_path  # root may write anywhere else
    with pytest.raises(StorageUnavailable, match="check its owner and mode"):
        storage.write_bytes(storage.file_uri(folder / "x"), b"x")


def test_a_path_through_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"")
    with pytest.raises(UserError, match="f/x"):
        storage.write_bytes(storage.file_uri(tmp_path / "f" / "x"), b"x")


WRITER = """
import sys
from infra import storage, storage_upload
storage_upload.PART_BYTES = 100_000
uri, path = sys.argv[1:]
storage.exists(uri)  # the client is made, however busy the machine is
print("ready", flush=True)
while True:
    for letter in (b"a", b"b"):
        data = letter * (200_000 if letter == b"a" else 350_000)
        with open(path, "wb") as file:
            file.write(data)
        storage.upload(path, uri)
        storage.write_bytes(uri, data)
"""


def test_a_writer_killed_at_any_moment_leaves_a_whole_object(
    store_uri: str, tmp_path: Path
) -> None:
    """The old bytes or the new ones, never a mixture, and nothing else in the folder."""
    whole = {sha256_bytes(b"a" * 200_000), sha256_bytes(b"b" * 350_000)}
    chance = random.Random(0)
    seen = set()
    uri = storage.join(store_uri, "k/x")
    for _ in range(8):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, uri, str(tmp_path / "source")], stdout=subprocess.PIPE
        )
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(chance.uniform(0.2, 0.6))
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        if storage.exists(uri):
            seen.add(sha256_bytes(storage.read_bytes(uri)))
        assert [info.uri for info in storage.list_objects(store_uri)] in ([uri], [])
    assert seen
    assert seen <= whole


def test_a_truncated_or_flipped_object_is_never_taken_for_whole(
    own_s3_server: S3Server, tmp_path: Path
) -> None:
    data = os.urandom(500_000)
    uri = f"{own_s3_server.store_uri}/x"
    sha256 = storage.write_bytes(uri, data).sha256
    stored = own_s3_server.folder / "atelier" / "x"
    for damaged in (data[:-1], data[:250_000] + b"\0" + data[250_001:], b""):
        stored.write_bytes(damaged)
        with pytest.raises((DigestMismatch, StorageUnavailable)) as caught:
            storage.download(uri, tmp_path / "out", sha256=sha256)
        one_line(caught.value)
        assert not (tmp_path / "out").exists()


def test_a_forked_child_makes_its_own_client(s3_server: S3Server) -> None:
    uri = f"{s3_server.store_uri}/fork/x"
    storage.write_bytes(uri, b"x")
    before = storage_s3.client()
    child = os.fork()
    if child == 0:
        fine = storage_s3.client() is not before and storage.read_bytes(uri) == b"x"
        os._exit(0 if fine else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class Script(socketserver.ThreadingTCPServer):
    """An S3 server that answers each connection's requests from a list of raw replies."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, replies: list[bytes]) -> None:
        self.replies = replies
        self.num_requests = 0
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(socketserver.StreamRequestHandler):
    server: Script

    def handle(self) -> None:
        while (line := self.rfile.readline()) not in (b"\r\n", b""):
            del line
        index = min(self.server.num_requests, len(self.server.replies) - 1)
        self.server.num_requests += 1
        self.wfile.write(self.server.replies[index])


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    server = Script([])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "A" * 20)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "B" * 40)
    yield server
    server.shutdown()
    server.server_close()


def reply(status: str, body: bytes, announced: int | None = None) -> bytes:
    length = len(body) if announced is None else announced
    head = f"HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    return head.encode() + body


SLOW_DOWN = reply("503 Slow Down", b"<Error><Code>SlowDown</Code><Message>x</Message></Error>")
CUT = reply("200 OK", b"whole bo", announced=10)
WHOLE = reply("200 OK", b"whole body")


def test_a_body_cut_short_is_read_again(script: Script, tmp_path: Path) -> None:
    script.replies = [CUT, WHOLE]
    assert storage.read_bytes("s3://bucket/x") == b"whole body"
    script.num_requests = 0
    stored = storage.download("s3://bucket/x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"whole body"
    assert stored.sha256 == sha256_bytes(b"whole body")


def test_a_body_that_stays_cut_is_an_error_and_no_file(script: Script, tmp_path: Path) -> None:
    script.replies = [CUT]
    with pytest.raises(StorageUnavailable, match="broke off"):
        storage.download("s3://bucket/x", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
    assert script.num_requests == storage.READ_ATTEMPTS


def test_a_busy_server_is_asked_again_within_bounds(script: Script) -> None:
    script.replies = [SLOW_DOWN, SLOW_DOWN, WHOLE]
    assert storage.read_bytes("s3://bucket/x") == b"whole body"
    script.replies, script.num_requests = [SLOW_DOWN], 0
    with pytest.raises(StorageUnavailable, match="SlowDown"):
        storage.read_bytes("s3://bucket/x")
    assert script.num_requests == 3
