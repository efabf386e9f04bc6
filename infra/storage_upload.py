"""Sending objects to S3: whole ones, large ones in parts, and what to do when a part is lost.

The server compares the MD5 that travels with all bytes. What it refuses because they changed on
their way is sent again, as is an upload in parts that it does not know any more: a part of it was
refused, or the parts were put together and the answer got lost.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from infra.storage_errors import StorageUnavailable, local_errors
from infra.storage_s3 import client, errors

PART_BYTES = 16 << 20
MAX_PARTS = 10_000
PART_THREADS = 4  # memory bound of an upload: (PART_THREADS + 1) * PART_BYTES
SEND_ATTEMPTS = 3
SEND_AGAIN_CODES = ("BadDigest", "XAmzContentSHA256Mismatch", "NoSuchUpload")

_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class UnfinishedUpload:
    """Parts on the server that became no object, and how long they lie there."""

    uri: str
    upload_id: str
    age: timedelta


def put(uri: str, bucket: str, key: str, data: bytes) -> None:
    """Write a whole object in one request."""

    def send() -> None:
        with errors("write", uri):
            client().put_object(Bucket=bucket, Key=key, Body=data, ContentMD5=md5_of(data))

    _sent(send)


def md5_of(data: bytes) -> str:
    """The digest that S3 compares, as its header wants it."""
    digest = hashlib.md5(data, usedforsecurity=False).digest()
    return base64.b64encode(digest).decode()


def _sent(send: Callable[[], _Answer]) -> _Answer:
    """Send, and again from the start when the server got other bytes, or forgot the upload: some
    do once they have refused a part of it."""
    for _ in range(SEND_ATTEMPTS - 1):
        try:
            return send()
        except StorageUnavailable as error:
            if _code_of(error.__cause__) not in SEND_AGAIN_CODES:
                raise
    return send()


def _code_of(error: BaseException | None) -> str:
    """S3's word for what is wrong; the empty text for errors of another kind."""
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def upload(uri: str, bucket: str, key: str, source: Path) -> tuple[int, str]:
    """Send a file, in parts when it is large; returns its bytes and the sha256 of what was sent."""
    with local_errors("read", str(source)), open(source, "rb") as file:
        num_bytes = os.fstat(file.fileno()).st_size
        part_bytes = max(PART_BYTES, -(-num_bytes // MAX_PARTS))
        if num_bytes <= part_bytes:
            data = file.read()
            put(uri, bucket, key, data)
            return len(data), hashlib.sha256(data).hexdigest()

        def send() -> tuple[int, str]:
            file.seek(0)
            return _Parts(uri, bucket, key).send(file, part_bytes)

        return _sent(send)


class _Parts:
    """An upload in parts, several at once; the object appears when the server has put them
    together, and when anything fails before that, they are dropped."""

    def __init__(self, uri: str, bucket: str, key: str) -> None:
        self._uri = uri
        self._bucket = bucket
        self._key = key
        with errors("write", uri):
            created = client().create_multipart_upload(Bucket=bucket, Key=key)
        self._upload_id = created["UploadId"]

    def send(self, file: IO[bytes], part_bytes: int) -> tuple[int, str]:
        """All of ``file``; returns its bytes and sha256."""
        digest = hashlib.sha256()
        num_bytes = 0
        parts: list[dict[str, Any]] = []
        try:
            with errors("write", self._uri), ThreadPoolExecutor(PART_THREADS) as pool:
                waiting: deque[Future[dict[str, Any]]] = deque()
                while data := file.read(part_bytes):
                    digest.update(data)
                    num_bytes += len(data)
                    number = len(parts) + len(waiting) + 1
                    waiting.append(pool.submit(self._send_part, number, data))
                    if len(waiting) >= PART_THREADS:
                        parts.append(waiting.popleft().result())
                parts.extend(future.result() for future in waiting)
                self._complete(parts)
        except BaseException:
            _abort(self._bucket, self._key, self._upload_id)
            raise
        return num_bytes, digest.hexdigest()

    def _send_part(self, number: int, data: bytes) -> dict[str, Any]:
        answer = client().upload_part(
            Bucket=self._bucket,
            Key=self._key,
            UploadId=self._upload_id,
            PartNumber=number,
            Body=data,
            ContentMD5=md5_of(data),
        )
        return {"ETag": answer["ETag"], "PartNumber": number}

    def _complete(self, parts: list[dict[str, Any]]) -> None:
        client().complete_multipart_upload(
            Bucket=self._bucket,
            Key=self._key,
            UploadId=self._upload_id,
            MultipartUpload={"Parts": cast(Any, parts)},
        )


def _abort(bucket: str, key: str, upload_id: str) -> None:
    """Drop the sent parts; when the server is gone, ``atelier clean`` or its own expiry does."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        client().abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload_id)
    except (BotoCoreError, ClientError):
        return


def takes_other_bytes(uri: str) -> bool:
    """Whether the server behind ``uri`` stores bytes whose MD5 is not the one sent with them."""
    from botocore.exceptions import ClientError

    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not uri.startswith("s3://"):
        return False
    with errors("write", uri):
        try:
            client().put_object(Bucket=bucket, Key=key, Body=b"sent", ContentMD5=md5_of(b"told"))
        except ClientError as error:
            if _code_of(error) not in SEND_AGAIN_CODES and _code_of(error) != "InvalidDigest":
                raise
            return False
    return True


def unfinished(uri: str, bucket: str, folder: str) -> Iterator[UnfinishedUpload]:
    """The uploads below ``folder`` that were begun and neither finished nor dropped.

    Ages are by the server's own clock. A server that keeps no list of them has none to tell.
    """
    from botocore.exceptions import ClientError

    prefix = f"{folder}/" if folder else ""
    pages = client().get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix)
    with errors("list uploads under", uri):
        try:
            for page in pages:
                told = page["ResponseMetadata"]["HTTPHeaders"].get("date")
                now = parsedate_to_datetime(told) if told else datetime.now(UTC)
                for each in page.get("Uploads", []):
                    address = f"s3://{bucket}/{each['Key']}"
                    age = max(timedelta(), now - each["Initiated"])
                    yield UnfinishedUpload(address, each["UploadId"], age)
        except ClientError as error:
            if _code_of(error) not in _NO_LIST:
                raise


_NO_LIST = ("NoSuchUpload", "NotImplemented")  # rclone's answer when there is none


def drop(uri: str, bucket: str, key: str, upload_id: str) -> None:
    """Drop an unfinished upload's parts; one that is gone is no error."""
    from botocore.exceptions import ClientError

    with errors("drop the upload of", uri):
        try:
            client().abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload_id)
        except ClientError as error:
            if _code_of(error) != "NoSuchUpload":
                raise
