"""Fetch, resize and shard the same pictures from the same server: img2dataset on Spark, and us.

Both start Spark themselves and use every core; each runs in a fresh process, one after the other.
We also filter, ask robots.txt and TDM files, check addresses, decode strictly, look for copies,
digest everything and keep a ledger.
"""

from __future__ import annotations

import io
import json
import os
import socketserver
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.bench, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parent.parent.parent
NUM_IMAGES = int(os.environ.get("ATELIER_BENCH_IMAGES", "4000"))
NUM_PICTURES = 64
HOSTS = [f"127.0.0.{number}" for number in range(2, 10)]
THREADS = 32

OURS = """
import json, os, resource, sys, time
from infra.sessions import ClusterConfig, spark_session, stop_spark
from pipelines.config import CurationConfig
from pipelines.curate import curate

given = json.loads(sys.argv[1])
started_at = time.perf_counter()
sessions = []

def spark():
    if not sessions:
        sessions.append(spark_session("curation", ClusterConfig(), {}))
    return sessions[0]

result = curate("bench", CurationConfig.model_validate(given["config"]), given["store"], spark)
seconds = time.perf_counter() - started_at
for session in sessions:
    stop_spark(session)
print(json.dumps({"seconds": seconds, "images": result.counts["committed"]}))
"""

THEIRS = """
import json, os, sys, time, warnings
warnings.filterwarnings("ignore")

if __name__ == "__main__":
    from img2dataset import download

    given = json.loads(sys.argv[1])
    started_at = time.perf_counter()
    download(
        url_list=given["table"], input_format="parquet", url_col="URL", caption_col="TEXT",
        output_folder=given["out"], output_format="webdataset", processes_count=os.cpu_count(),
        thread_count=given["threads"], image_size=256, resize_mode="center_crop",
        resize_only_if_bigger=True, number_sample_per_shard=500, distributor="pyspark",
        compute_hash="sha256", enable_wandb=False,
    )
    seconds = time.perf_counter() - started_at
    import glob
    done = sum(json.load(open(path))["successes"] for path in glob.glob(given["out"] + "/*_stats.json"))
    print(json.dumps({"seconds": seconds, "images": done}))
"""  # noqa: E501


def _serve() -> None:
    """Pictures by number, each with bytes of its own; no robots.txt."""
    pictures = _pictures()

    def answer(path: str) -> bytes:
        number = path.removeprefix("/").removesuffix(".jpg")
        if not number.isdigit():
            return b"HTTP/1.1 404 x\r\nContent-Length: 0\r\n\r\n"
        note = number.encode()
        comment = b"\xff\xfe" + (len(note) + 2).to_bytes(2, "big") + note
        picture = pictures[int(number) % NUM_PICTURES]
        body = picture[:2] + comment + picture[2:]
        head = f"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: {len(body)}\r\n\r\n"
        return head.encode() + body

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            pending = b""
            try:
                while True:
                    while b"\r\n\r\n" not in pending:
                        received = self.request.recv(65536)
                        if not received:
                            return
                        pending += received
                    head, _, pending = pending.partition(b"\r\n\r\n")
                    self.request.sendall(answer(head.split(b" ")[1].decode()))
                    if b"connection: close" in head.lower():
                        return
            except OSError:
                return

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        request_queue_size = 512

    server = Server(("0.0.0.0", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


def _pictures() -> list[bytes]:
    import numpy as np
    from PIL import Image

    found = []
    for seed in range(NUM_PICTURES):
        rng = np.random.default_rng(seed)
        tiles = rng.integers(0, 255, (48, 48, 3), dtype=np.uint8)
        image = Image.fromarray(tiles).resize((560, 512), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=85)
        found.append(buffer.getvalue())
    return found


@pytest.fixture
def port() -> Iterator[int]:
    process = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield int(process.stdout.readline())
    process.terminate()
    process.wait()
    process.stdout.close()


def _run(code: str, given: dict[str, Any], folder: Path) -> dict[str, float]:
    script = folder / "run.py"
    script.write_text(code)
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "ATELIER_HOME": str(folder / "home"),
        "PYTHONDONTWRITEBYTECODE": "", "NO_ALBUMENTATIONS_UPDATE": "1",
        "PYSPARK_PYTHON": sys.executable,
    }  # fmt: skip
    out, log = folder / "out.json", folder / "log"
    with out.open("w", encoding="utf-8") as answer, log.open("w", encoding="utf-8") as errors:
        process = psutil.Popen(
            [sys.executable, str(script), json.dumps(given)],
            cwd=folder, env=environment, stdout=answer, stderr=errors,
        )  # fmt: skip
        peak = _peak_worker_mb(process)
    assert process.returncode == 0, log.read_text(encoding="utf-8")[-3000:]
    found: dict[str, float] = json.loads(out.read_text(encoding="utf-8").splitlines()[-1])
    return {**found, "worker_mb": peak}


def _peak_worker_mb(process: psutil.Popen) -> float:
    """Wait for it; the most memory of any of Spark's Python workers with its children, MB.

    Pages that a worker shares with its parent count in each.
    """
    peak = 0
    while process.poll() is None:
        for each in process.children(recursive=True):
            with suppress(psutil.Error):
                if "pyspark" in " ".join(each.cmdline()) and each.name().startswith("python"):
                    family = [each, *each.children(recursive=True)]
                    if not _is_daemon(each):
                        peak = max(peak, sum(one.memory_info().rss for one in family))
        time.sleep(0.25)
    return peak / 1e6


def _is_daemon(process: psutil.Process) -> bool:
    """Spark forks its workers, whose command line is their parent's, from a process of its own."""
    parent = process.parent()
    return parent is None or parent.name().startswith("java")


def test_fetch_to_shards_against_img2dataset_on_spark(port: int, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from infra.java import find_java

    os.environ.setdefault("JAVA_HOME", str(find_java().home))
    table = tmp_path / "rows.parquet"
    urls = [f"http://{HOSTS[n % len(HOSTS)]}:{port}/{n}.jpg" for n in range(NUM_IMAGES)]
    texts = [f"picture number {n}" for n in range(NUM_IMAGES)]
    pq.write_table(
        pa.table({"URL": urls, "TEXT": texts, "WIDTH": [560.0] * NUM_IMAGES,
                  "HEIGHT": [512.0] * NUM_IMAGES}), table,
    )  # fmt: skip
    places = {f"{host}:{port}": f"{host}:{port}" for host in HOSTS}
    config = {
        "metadata": [str(table)],
        "fetch": {"allowed_ports": [port], "connect_to": places, "num_threads": THREADS},
        "resize": {"image_size_px": 256},
    }
    results = {}
    for name, code in (("img2dataset", THEIRS), ("ours", OURS)):
        folder = tmp_path / name
        folder.mkdir()
        given = {
            "config": config, "store": (folder / "store").as_uri(), "table": str(table),
            "out": str(folder / "out"), "threads": THREADS,
        }  # fmt: skip
        started_at = time.perf_counter()
        results[name] = _run(code, given, folder)
        found = results[name]
        rate = found["images"] / found["seconds"]
        whole_seconds = time.perf_counter() - started_at
        print(
            f"\nbench  {name:<12} {found['images']:.0f} images in {found['seconds']:.1f} s, "
            f"{rate:.0f} images/s (with imports {whole_seconds:.1f} s), "
            f"a worker at most {found['worker_mb']:.0f} MB"
        )
        assert found["images"] == NUM_IMAGES
    ratio = results["img2dataset"]["seconds"] / results["ours"]["seconds"]
    print(f"\nbench  img2dataset on Spark / ours: {ratio:.2f}")


if __name__ == "__main__":
    _serve()
