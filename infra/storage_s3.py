"""S3 calls behind ``infra.storage``; boto3 is imported at the first one.

One client per process and environment: a forked child makes its own. Every request has time
limits and bounded retries, sent bytes carry their MD5, and plain HTTP stays on loopback.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import IO, TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from infra.config import PROJECT_ROOT, atelier_home
from infra.errors import UserError
from infra.storage_errors import (
    GuardedReader,
    ObjectMissing,
    StorageUnavailable,
    disk_full,
)

if TYPE_CHECKING:
    import pyarrow.fs
    from mypy_boto3_s3 import S3Client

DELETE_BATCH = 1_000
CLOCK_SECONDS = 2.0
CONNECT_TIMEOUT_SECONDS = 5
READ_TIMEOUT_SECONDS = 60
FULL_DISK_BYTES = 32 << 20
MISSING_CODES = ("NoSuchKey", "404", "NotFound")
DENIED_CODES = (
    "403",
    "AccessDenied",
    "AllAccessDisabled",
    "ExpiredToken",
    "Forbidden",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
)
FULL_WORDS = ("no space left", "disk quota", "file too large", "disk full")

_clients: dict[tuple[Any, ...], S3Client] = {}
_clients_lock = threading.Lock()


def _after_fork() -> None:
    global _clients_lock
    _clients_lock = threading.Lock()
    _clients.clear()


os.register_at_fork(after_in_child=_after_fork)


def endpoint_url() -> str | None:
    """The configured endpoint, or None for AWS's own; refuses plain HTTP off loopback."""
    url = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not url:
        return None
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(
            expected="AWS_ENDPOINT_URL_S3 like https://host:port",
            got=repr(url),
            remedy="correct it",
        )
    plain_allowed = os.environ.get("ATELIER_ALLOW_PLAIN_HTTP") == "1"
    if parts.scheme == "http" and not _is_loopback(parts.hostname) and not plain_allowed:
        raise UserError(
            f"S3 endpoint {url} is plain HTTP beyond this machine; use https, or set "
            "ATELIER_ALLOW_PLAIN_HTTP=1 inside a trusted network"
        )
    return url


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def _region() -> str:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"


def client() -> S3Client:
    """This process's client for the present environment; safe to share between threads."""
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE")
    url = endpoint_url()
    identity = (url, _region(), *(os.environ.get(name) for name in names))
    with _clients_lock:
        if identity not in _clients:
            _clients[identity] = _make_client(url)
        return _clients[identity]


def _make_client(url: str | None) -> S3Client:
    import boto3
    from botocore.config import Config

    config = Config(
        connect_timeout=CONNECT_TIMEOUT_SECONDS,
        read_timeout=READ_TIMEOUT_SECONDS,
        max_pool_connections=16,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        retries={"mode": "standard", "total_max_attempts": 3 if _on_this_machine(url) else 6},
        s3={"addressing_style": "path" if url else "auto"},
    )
    session = boto3.session.Session()
    return session.client("s3", endpoint_url=url, region_name=_region(), config=config)


def _on_this_machine(url: str | None) -> bool:
    return url is not None and _is_loopback(urlsplit(url).hostname or "")


@contextmanager
def errors(action: str, uri: str) -> Iterator[None]:
    """Turn botocore's and urllib3's errors into one line each."""
    from botocore import exceptions as boto
    from urllib3.exceptions import HTTPError

    try:
        yield
    except boto.ClientError as error:
        raise _refusal(action, uri, error.response) from error
    except (boto.EndpointConnectionError, boto.ConnectTimeoutError) as error:
        raise StorageUnavailable(_no_answer()) from error
    except (boto.NoCredentialsError, boto.PartialCredentialsError) as error:
        raise StorageUnavailable(
            f"cannot {action} {uri}: no S3 credentials; "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run `atelier up`"
        ) from error
    except (boto.HTTPClientError, boto.IncompleteReadError, boto.ReadTimeoutError) as error:
        raise _broken_off(action, uri) from error
    except (HTTPError, ConnectionError, TimeoutError) as error:
        raise _broken_off(action, uri) from error
    except boto.ParamValidationError as error:
        raise UserError(f"cannot {action} {uri}: {error}") from error
    except boto.BotoCoreError as error:
        raise StorageUnavailable(f"cannot {action} {uri}: {error}") from error


def _no_answer() -> str:
    url = endpoint_url()
    if url is None:
        return f"S3 in region {_region()} does not answer; check the network and AWS_REGION"
    remedy = "run `atelier up`" if _on_this_machine(url) else "check AWS_ENDPOINT_URL_S3"
    return f"S3 endpoint {url} does not answer; {remedy}"


def _broken_off(action: str, uri: str) -> StorageUnavailable:
    url = endpoint_url() or f"S3 in region {_region()}"
    return StorageUnavailable(
        f"cannot {action} {uri}: the connection to {url} broke off; try again, "
        "or run `atelier status`",
        broken_off=True,
    )


def _refusal(action: str, uri: str, response: Any) -> UserError:
    error = response.get("Error", {})
    code, message = str(error.get("Code", "")), str(error.get("Message", ""))
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code in MISSING_CODES:
        return ObjectMissing(uri)
    if code == "NoSuchBucket":
        bucket = uri.removeprefix("s3://").partition("/")[0]
        return StorageUnavailable(
            f"cannot {action} {uri}: no bucket {bucket!r} at {endpoint_url() or 'S3'}; "
            "create it, or correct the address"
        )
    if any(words in message.lower() for words in FULL_WORDS):
        return disk_full(action, uri)
    if code in DENIED_CODES or status in (401, 403):
        return StorageUnavailable(
            f"cannot {action} {uri}: access denied ({code}); check AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY and what that key may do"
        )
    if status >= 500 and _on_this_machine(endpoint_url()):
        return _local_server_failed(action, uri, code)
    return StorageUnavailable(f"cannot {action} {uri}: {code} {message} (HTTP {status}); try again")


def _local_server_failed(action: str, uri: str, code: str) -> StorageUnavailable:
    """rclone does not say why it failed; a full disk is the likely cause and can be looked up."""
    home = atelier_home()
    disk = home if home.exists() else PROJECT_ROOT
    num_free_bytes = shutil.disk_usage(disk).free
    if num_free_bytes < FULL_DISK_BYTES:
        return disk_full(action, uri)
    return StorageUnavailable(
        f"cannot {action} {uri}: the local S3 server failed ({code}); its disk may be full "
        f"({num_free_bytes >> 20} MiB free under {disk}), and {home / 'services' / 's3.log'} "
        "says more"
    )


@contextmanager
def open_stream(uri: str, bucket: str, key: str) -> Iterator[IO[bytes]]:
    """The body of an object; a body shorter than announced raises on the last read."""
    with errors("read", uri):
        body = client().get_object(Bucket=bucket, Key=key)["Body"]
    try:
        yield cast("IO[bytes]", GuardedReader(body, lambda: errors("read", uri)))
    finally:
        body.close()


def head(uri: str, bucket: str, key: str) -> int:
    """The object's size in bytes."""
    with errors("look at", uri):
        return client().head_object(Bucket=bucket, Key=key)["ContentLength"]


def fingerprint(uri: str, bucket: str, key: str) -> str | None:
    """The object's entity tag, size and time of its last change; None of a change just now.

    Times are whole seconds, and not every server's tags are digests.
    """
    with errors("look at", uri):
        found = client().head_object(Bucket=bucket, Key=key)
    told = found["ResponseMetadata"]["HTTPHeaders"].get("date")
    if told is None:
        return None
    age = parsedate_to_datetime(told) - found["LastModified"]
    if age.total_seconds() < CLOCK_SECONDS:
        return None
    return f"{found['ETag']} {found['ContentLength']} {found['LastModified'].timestamp()}"


def list_keys(uri: str, bucket: str, folder: str) -> Iterator[tuple[str, int]]:
    """(key, bytes) of every object below ``folder``, page by page."""
    pages = (
        client()
        .get_paginator("list_objects_v2")
        .paginate(Bucket=bucket, Prefix=f"{folder}/" if folder else "")
    )
    with errors("list", uri):
        iterator = iter(pages)
    while True:
        with errors("list", uri):
            page = next(iterator, None)
        if page is None:
            return
        for entry in page.get("Contents", []):
            if not entry["Key"].endswith("/"):
                yield entry["Key"], entry["Size"]


def delete_keys(uri: str, bucket: str, keys: Iterable[str]) -> int:
    """Remove objects in batches; returns how many."""
    wanted = list(keys)
    for start in range(0, len(wanted), DELETE_BATCH):
        batch = [{"Key": key} for key in wanted[start : start + DELETE_BATCH]]
        with errors("delete", uri):
            response = client().delete_objects(
                Bucket=bucket, Delete={"Objects": cast(Any, batch), "Quiet": True}
            )
        failed = [e for e in response.get("Errors", []) if e.get("Code") not in MISSING_CODES]
        if failed:
            raise _refusal("delete", f"s3://{bucket}/{failed[0].get('Key')}", {"Error": failed[0]})
    return len(wanted)


def arrow_filesystem() -> pyarrow.fs.S3FileSystem:
    """pyarrow's own client with the same endpoint, region, keys and time limits."""
    from pyarrow.fs import S3FileSystem

    options: dict[str, Any] = {}
    url = endpoint_url()
    if url is not None:
        parts = urlsplit(url)
        options |= {"scheme": parts.scheme, "endpoint_override": parts.netloc}
        # pyarrow has no argument for it; its default trailer is refused by servers other than AWS.
        os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        options |= {
            "access_key": os.environ["AWS_ACCESS_KEY_ID"],
            "secret_key": os.environ.get("AWS_SECRET_ACCESS_KEY", ""),
            "session_token": os.environ.get("AWS_SESSION_TOKEN"),
        }
    return S3FileSystem(
        region=_region(),
        connect_timeout=CONNECT_TIMEOUT_SECONDS,
        request_timeout=READ_TIMEOUT_SECONDS,
        **options,
    )
