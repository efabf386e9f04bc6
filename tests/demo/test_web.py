"""The world's web server: images by host, faults on cue, and nothing off loopback."""

from __future__ import annotations

import http.client
import io
import json
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
from PIL import Image

from demo.metadata import build_world
from demo.oracle import read_scene
from demo.web import PaintedServer, scene_from_json
from demo.world import WorldConfig


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PaintedServer]:
    folder = build_world(WorldConfig(num_rows=120), tmp_path_factory.mktemp("world"))
    painted = PaintedServer(folder)
    thread = threading.Thread(target=painted.serve_forever, daemon=True)
    thread.start()
    yield painted
    painted.shutdown()
    painted.server_close()


@contextmanager
def get(server: PaintedServer, host: str, path: str) -> Iterator[http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=5)
    with closing(connection):
        connection.request("GET", path, headers={"Host": host})
        with connection.getresponse() as answer:
            yield answer


def test_images_are_the_scenes_they_should_be(server: PaintedServer) -> None:
    config = server.world.config
    square = [
        (key, spec)
        for key, spec in server.world.images.items()
        if spec["width"] == spec["height"] >= 128 and not spec["noise"] and "watermark" not in spec
    ]
    for key, spec in square[:20]:
        host, _, path = key.partition("/")
        with get(server, host, "/" + path) as answer:
            image = Image.open(io.BytesIO(answer.read()))
        assert image.size == (spec["width"], spec["height"])
        scene = scene_from_json(spec["scene"])
        assert read_scene(image, config).background == scene.background


def test_the_same_path_on_another_host_is_missing(server: PaintedServer) -> None:
    path = next(iter(server.world.images)).partition("/")[2]
    with get(server, "elsewhere.example", "/" + path) as answer:
        assert answer.status == 404


@pytest.mark.parametrize(
    ("fault", "status"),
    [("404", 404), ("500", 500), ("html", 200), ("bomb", 200), ("nothing", 404)],
)
def test_faults_with_a_status(server: PaintedServer, fault: str, status: int) -> None:
    with get(server, "gallery.example", f"/fault/{fault}/1.png") as answer:
        assert answer.status == status


def test_short_body(server: PaintedServer) -> None:
    with (
        get(server, "gallery.example", "/fault/short-body/1.png") as answer,
        pytest.raises(http.client.IncompleteRead),
    ):
        answer.read()


def test_redirects(server: PaintedServer) -> None:
    with get(server, "gallery.example", "/fault/redirect-loop/1.png") as loop:
        assert loop.headers["Location"] == "/fault/redirect-loop/1.png"
    with get(server, "gallery.example", "/fault/redirect-internal/1.png") as inside:
        assert inside.headers["Location"] == "http://127.0.0.1/__canary"


def test_endless_and_slow_bodies_do_not_end(server: PaintedServer) -> None:
    with get(server, "gallery.example", "/fault/endless/1.png") as endless:
        assert len(endless.read(1 << 20)) == 1 << 20
    with get(server, "gallery.example", "/fault/slow-drip/1.png") as slow:
        assert slow.read(2) == b"xx"


def test_statistics_count_requests(server: PaintedServer) -> None:
    with get(server, "gallery.example", "/counted") as answer:
        answer.read()
    with get(server, "gallery.example", "/__stats") as answer:
        assert json.loads(answer.read())["/counted"] == 1
