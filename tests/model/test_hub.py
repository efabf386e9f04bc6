"""A model by its name: fetched from a hub's server on loopback, without pickles and only once."""

import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch

from model.errors import ModelError
from model.hub import model_folder
from model.text_to_image import TextToImage

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves one folder as `someone/painter`, by the hub's own paths and headers."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder = folder
        self.served: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(self.path.split("?")[0])
        files = sorted(p for p in self.server.folder.rglob("*") if p.is_file())
        names = [p.relative_to(self.server.folder).as_posix() for p in files]
        prefix = f"/someone/painter/resolve/{COMMIT}/"
        if path.startswith("/api/models/someone/painter/revision/"):
            siblings = [{"rfilename": name} for name in names]
            answer = {"id": "someone/painter", "sha": COMMIT, "siblings": siblings}
            self.send(json.dumps(answer).encode(), "application/json")
        elif path.startswith("/api/models/someone/painter/tree/"):
            entries = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": "0" * 40}
                for name, file in zip(names, files, strict=True)
            ]
            self.send(json.dumps(entries).encode(), "application/json")
        elif path.removeprefix(prefix) in names:
            self.server.served.append(f"{self.command} {path.removeprefix(prefix)}")
            self.send((self.server.folder / path.removeprefix(prefix)).read_bytes(), "binary")
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def send(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(painter: TextToImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    constants = pytest.importorskip("huggingface_hub.constants")
    painter.save_pretrained(tmp_path / "painter")
    (tmp_path / "painter" / "unet.bin").write_bytes(b"a pickle")
    (tmp_path / "painter" / "pipeline.py").write_text("raise SystemExit")
    server = Hub(tmp_path / "painter")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    yield server
    server.shutdown()
    server.server_close()


def test_a_model_by_its_name(hub: Hub, painter: TextToImage) -> None:
    loaded = TextToImage.from_pretrained("someone/painter@main")
    assert torch.equal(
        loaded.generate_tokens(["a star"], steps=2), painter.generate_tokens(["a star"], steps=2)
    )
    served = {name.split(" ")[1] for name in hub.served}
    assert "transformer/diffusion_pytorch_model.safetensors" in served
    assert not served & {"unet.bin", "pipeline.py"}
    hub.served.clear()
    assert model_folder("someone/painter@main").name == COMMIT
    assert not [name for name in hub.served if name.startswith("GET")]


def test_a_name_the_hub_does_not_know(hub: Hub) -> None:
    with pytest.raises(ModelError, match="is no folder here, and as the name of a model") as error:
        TextToImage.from_pretrained("someone/else")
    assert "\n" not in str(error.value)
    assert "check the name, the network and the access" in str(error.value)


def test_a_hub_that_does_not_answer(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.shutdown()
    hub.server_close()
    with pytest.raises(ModelError, match="it was not given") as error:
        TextToImage.from_pretrained("someone/other")
    assert "\n" not in str(error.value)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelError, match="it needs the package huggingface_hub"):
        model_folder("someone/painter")


def test_paths_never_ask_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "painter").mkdir(parents=True)
    for source in ("runs/painter", "./a/b", "/a/b", "../a/b", "a/b/c", "painter", Path("a/b")):
        assert model_folder(source) == Path(source)
