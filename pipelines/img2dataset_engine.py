"""img2dataset as the engine of a fetch: its threads, decoder, resizer, encoder and hashes.

One partition is one shard to its ``Downloader``; a sample writer of ours takes what it makes. Its
own network step follows any URL to any address, so the function it opens URLs with is replaced by
our fetcher's, and only bodies whose format and header pass our checks reach its decoder. That
decoder runs in the Spark worker itself, and leaves pictures as they lie: no EXIF rotation, no
colour profiles, no 16 bits.

``Downloader`` prints what it did not foresee and forgets the row; such a row fails here with
``internal_error``.
"""

from __future__ import annotations

import email.message
import functools
import io
import json
import os
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from queue import Queue
from typing import Any

import pyarrow as pa

from pipelines.config import CurationConfig
from pipelines.guard import Rejected
from pipelines.images import Bounds, StoredImage, check_body
from pipelines.ledger import FAILED
from pipelines.outcomes import NotStored, not_stored
from pipelines.resize import crop_of

Outcome = StoredImage | NotStored
_RESIZE_MODES = {"square": "center_crop", "none": "keep_ratio"}
# What its resizer says of images it leaves out; all else it says is an exception of a decoder.
_REASONS = {
    "image too small": "image_too_small",
    "image area too large": "pixels",
    "aspect ratio too large": "image_aspect_ratio",
}
_WAITING_IMAGES = 64


def outcomes_by_img2dataset(
    todo: Sequence[int],
    config: CurationConfig,
    bounds: Bounds,
    fetch: Callable[[int], bytes],
    folder: Path,
) -> Iterator[tuple[int, Outcome]]:
    """How every row of ``todo`` ended, as they come; ``folder`` is for its files.

    A row is a number, which img2dataset gets for a URL; ``fetch`` has the row's body.
    """
    downloader_module = _modules()[0]
    downloader_module.urllib = _guarded(fetch, bounds)
    made = Queue[tuple[int, Outcome] | BaseException | None](_WAITING_IMAGES)
    stopped = threading.Event()

    def put(item: tuple[int, Outcome] | BaseException | None) -> None:
        if not stopped.is_set():
            made.put(item)

    def work() -> None:
        try:
            _download(todo, config, folder, put)
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=work, name="img2dataset", daemon=True)
    thread.start()
    missing = set(todo)
    try:
        while (item := made.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            missing.discard(item[0])
            yield item
        for number in sorted(missing):
            yield number, NotStored(FAILED, "internal_error", True, "img2dataset lost it")
    finally:
        stopped.set()
        while not made.empty():  # whoever waits for room goes on, and sees that all is over
            made.get_nowait()
        thread.join()


def _download(
    todo: Sequence[int],
    config: CurationConfig,
    folder: Path,
    put: Callable[[tuple[int, Outcome]], None],
) -> None:
    downloader_module, resizer_module = _modules()
    if not todo:
        return
    rows_path = folder / "img2dataset.arrow"
    table = pa.table({"url": [str(number) for number in todo]})
    with pa.OSFile(str(rows_path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as file:
        file.write_table(table)
    resize = config.resize
    resizer = resizer_module.Resizer(
        image_size=resize.image_size_px,
        resize_mode=_RESIZE_MODES[resize.crop],
        resize_only_if_bigger=True,
        encode_quality=resize.encode_quality,
        encode_format=resize.encode_format,
        min_image_size=resize.image_size_px if resize.if_smaller == "reject" else 0,
        max_image_area=config.fetch.max_pixels,
    )
    downloader = downloader_module.Downloader(
        sample_writer_class=functools.partial(_Writer, todo, config, put),
        resizer=resizer,
        thread_count=config.fetch.num_threads,
        save_caption=False,
        extract_exif=False,
        output_folder=str(folder),
        column_list=["url"],
        timeout=config.fetch.total_deadline_seconds,
        number_sample_per_shard=max(len(todo), 2),
        oom_shard_count=1,
        compute_hash="sha256",
        verify_hash_type=None,
        encode_format=resize.encode_format,
        retries=0,  # our fetcher tries again itself, by cause
        user_agent_token=None,
        disallowed_header_directives=None,  # and has asked for consent
    )
    downloader.download_shard((0, str(rows_path)))


class _Writer:
    """What ``Downloader`` takes for the writer of a shard."""

    def __init__(
        self,
        numbers: Sequence[int],
        config: CurationConfig,
        put: Callable[[tuple[int, Outcome]], None],
        *_: object,
    ) -> None:
        self._numbers = numbers
        self._config = config
        self._put = put

    def write(self, image: bytes | None, key: str, caption: object, meta: dict[str, Any]) -> None:
        outcome = _outcome(image, meta, self._config)
        self._put((self._numbers[int(key)], outcome))

    def close(self) -> None:
        pass


def _outcome(image: bytes | None, meta: dict[str, Any], config: CurationConfig) -> Outcome:
    message = meta["error_message"]
    if meta["status"] == "failed_to_download":
        return _told(message)
    if image is None:
        reason = _REASONS.get(message, "decode")
        return not_stored(Rejected(reason, "" if reason == message else str(message)))
    size = int(meta["original_width"]), int(meta["original_height"])
    crop = crop_of(*size, config.resize, None)
    return StoredImage(
        data=image,
        width_px=int(meta["width"]),
        height_px=int(meta["height"]),
        original_width_px=size[0],
        original_height_px=size[1],
        crop_left_px=crop.left_px,
        crop_top_px=crop.top_px,
        sha256=str(meta["sha256"]),
    )


# --- its network step, replaced ------------------------------------------------------------------


class _Ended(Exception):
    """Why there is no body. img2dataset keeps no more of it than its text, which tells all."""

    def __init__(self, error: Exception) -> None:
        super().__init__(json.dumps(asdict(not_stored(error))))


def _told(message: str) -> NotStored:
    try:
        return NotStored(**json.loads(message))
    except (ValueError, TypeError):
        return NotStored(FAILED, "internal_error", True, message[:80])


class _Body(io.BytesIO):
    """A response, as far as img2dataset looks at one."""

    headers = email.message.Message()


def _guarded(fetch: Callable[[int], bytes], bounds: Bounds) -> types.SimpleNamespace:
    """What img2dataset shall hold for ``urllib``."""

    def urlopen(request: _Request, timeout: float | None = None) -> _Body:
        try:
            body = fetch(request.number)
            check_body(body, bounds)
        except Exception as error:
            raise _Ended(error) from error
        return _Body(body)

    inside = types.SimpleNamespace(Request=_Request, urlopen=urlopen)
    return types.SimpleNamespace(request=inside)


class _Request:
    """The row in place of a URL, of which ``urllib``'s own class would refuse what we only name."""

    def __init__(self, url: str, data: None = None, headers: dict[str, str] | None = None) -> None:
        self.number = int(url)


@functools.cache
def _modules() -> tuple[Any, Any]:
    """Its modules ``downloader`` and ``resizer``; importing the package takes seconds."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else it asks the network for news
    if sys.version_info >= (3, 13):  # which has no imghdr; the way we call it needs none
        sys.modules.setdefault("imghdr", types.ModuleType("imghdr"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from img2dataset import downloader, resizer
    return downloader, resizer
