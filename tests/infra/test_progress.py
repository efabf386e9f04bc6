from __future__ import annotations

import io

import pytest

from infra.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.delenv("ATELIER_QUIET", raising=False)
    return now


def test_a_log_gets_a_line_every_few_seconds_and_one_at_the_end(clock: list[float]) -> None:
    out = io.StringIO()
    with progress("fetch", 2000, "images", out=out) as bar:
        clock[0] += 4.0
        bar.update(done=812)
        bar.advance(0)
        clock[0] += 1.0
        bar.advance(188)
        clock[0] += 5.0
        bar.update(done=2000)
    assert out.getvalue().splitlines() == [
        "fetch: 1000/2000 images, 200/s, 5 s left",
        "fetch: 2000/2000 images, 200/s, 0.0 s left",
        "fetch: 2000/2000 images, 200/s, done in 10 s",
    ]


def test_an_unknown_total_has_no_time_left_until_it_is_known(clock: list[float]) -> None:
    out = io.StringIO()
    with progress("scan", None, "files", out=out) as bar:
        clock[0] += 6.0
        bar.advance(3)
        clock[0] += 6.0
        bar.update(done=6, total=1000)
    assert out.getvalue().splitlines()[:2] == [
        "scan: 3 files, 0.5/s",
        "scan: 6/1000 files, 0.5/s, 33 min 8 s left",
    ]


def test_a_failure_is_not_called_done(clock: list[float]) -> None:
    out = io.StringIO()

    def train() -> None:
        with progress("train", 10, "steps", out=out) as bar:
            clock[0] += 1.0
            bar.advance(1)
            raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        train()
    assert out.getvalue() == "train: 1/10 steps, 1/s, stopped after 1.0 s\n"


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATELIER_QUIET", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    with progress("fetch", 4, "images", out=out) as bar:
        bar.advance(1)
        bar.update(done=4, total=4)
    assert "4/4" in out.getvalue()
    assert "images/s" in out.getvalue()


def test_quiet_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATELIER_QUIET", "1")
    out = Terminal()
    with progress("fetch", 4, "images", out=out) as bar:
        bar.update(done=3)
    assert out.getvalue() == ""
