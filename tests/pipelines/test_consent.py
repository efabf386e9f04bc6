"""What sites say about machines, asked over a real connection: once, bounded, and obeyed."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from typing import Any

import pytest

import pipelines.consent
from pipelines.connection import Failed
from pipelines.fetch import Fetcher
from pipelines.guard import Rejected
from pipelines.hosts import system_lookup

URL = "http://evil.example"
BODY = b"\xff\xd8\xffimage"
NO_ROBOTS = {"robots_txt": False}
NO_TDM = {"tdm_reservation": False}


def paths(evil_web: Any) -> Counter[str]:
    return Counter(request.split(" ")[1] for request in evil_web.requests)


def answer_all(evil_web: Any, http_response: Any, robots: bytes, status: str = "200 x") -> None:
    evil_web.route("/robots.txt", http_response(robots, status=status))
    evil_web.route("/.well-known/tdmrep.json", http_response(b"", status="404 x"))
    evil_web.route("/a.jpg", http_response(BODY))
    evil_web.route("/no/a.jpg", http_response(BODY))


def test_robots_txt_is_asked_once_and_obeyed(evil_web: Any, http_response: Any) -> None:
    answer_all(evil_web, http_response, b"User-agent: atelier\nDisallow: /no/\n")
    fetcher = evil_web.fetcher(opt_outs={}, num_threads=8)
    threads = [threading.Thread(target=fetcher.fetch, args=(f"{URL}/a.jpg",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with pytest.raises(Rejected) as caught:
        fetcher.fetch(f"{URL}/no/a.jpg")
    assert caught.value.reason == "robots_txt"
    assert paths(evil_web) == {"/robots.txt": 1, "/.well-known/tdmrep.json": 1, "/a.jpg": 8}


@pytest.mark.parametrize("status", ["404 x", "403 x", "401 x", "410 x", "400 x"])
def test_a_site_without_robots_txt_allows_all(
    evil_web: Any, http_response: Any, status: str
) -> None:
    answer_all(evil_web, http_response, b"User-agent: *\nDisallow: /", status)
    assert evil_web.fetcher(opt_outs={}).fetch(f"{URL}/a.jpg") == BODY


@pytest.mark.parametrize("status", ["500 x", "503 x", "429 x"])
def test_a_site_that_cannot_say_is_not_taken_from_for_now(
    evil_web: Any, http_response: Any, status: str
) -> None:
    answer_all(evil_web, http_response, b"", status)
    fetcher = evil_web.fetcher(opt_outs={}, retries=1)
    for _ in range(3):
        with pytest.raises(Failed) as caught:
            fetcher.fetch(f"{URL}/a.jpg")
        assert (caught.value.cause, caught.value.retryable) == ("robots_txt_unavailable", True)
    assert paths(evil_web) == {"/robots.txt": 2}


def test_a_failure_is_forgotten_after_a_while(
    evil_web: Any, http_response: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipelines.consent, "_REMEMBER_FAILURE_SECONDS", 0.05)
    answer_all(evil_web, http_response, b"", "500 x")
    fetcher = evil_web.fetcher(opt_outs={})
    with pytest.raises(Failed):
        fetcher.fetch(f"{URL}/a.jpg")
    answer_all(evil_web, http_response, b"")
    time.sleep(0.1)
    assert fetcher.fetch(f"{URL}/a.jpg") == BODY


def test_a_dripping_robots_txt_costs_one_deadline_for_all_rows(
    evil_web: Any, http_response: Any
) -> None:
    answer_all(evil_web, http_response, b"")
    evil_web.forever("/robots.txt", b"HTTP/1.1 200 OK\r\n\r\n", b"#", 0.05)
    fetcher = evil_web.fetcher(opt_outs={}, total_deadline_seconds=0.5, retries=2)
    started_at = time.monotonic()
    for _ in range(20):
        with pytest.raises(Failed) as caught:
            fetcher.fetch(f"{URL}/a.jpg")
        assert (caught.value.cause, caught.value.retryable) == ("timeout", True)
    assert time.monotonic() - started_at < 1.5


def test_an_endless_robots_txt_is_read_as_far_as_it_counts(
    evil_web: Any, http_response: Any
) -> None:
    answer_all(evil_web, http_response, b"")
    head = b"HTTP/1.1 200 OK\r\n\r\nUser-agent: *\nDisallow: /no/\n"
    evil_web.forever("/robots.txt", head, b"# endless\n" * 5000)
    fetcher = evil_web.fetcher(opt_outs={}, total_deadline_seconds=10)
    assert fetcher.fetch(f"{URL}/a.jpg") == BODY
    with pytest.raises(Rejected):
        fetcher.fetch(f"{URL}/no/a.jpg")


def test_robots_txt_that_leads_inside_is_not_followed(
    evil_web: Any, http_response: Any, canary: Any
) -> None:
    answer_all(evil_web, http_response, b"")
    location = f"Location: http://127.0.0.1:{canary.port}/robots.txt"
    evil_web.route("/robots.txt", http_response(b"", location, status="302 x"))
    fetcher = evil_web.fetcher(system_lookup, opt_outs={}, allowed_ports=[80, canary.port])
    assert fetcher.fetch(f"{URL}/a.jpg") == BODY


def test_five_redirects_of_robots_txt_are_followed(evil_web: Any, http_response: Any) -> None:
    answer_all(evil_web, http_response, b"")
    for hop in range(5):
        path = "/robots.txt" if hop == 0 else f"/r{hop}"
        evil_web.route(path, http_response(b"", f"Location: /r{hop + 1}", status="301 x"))
    evil_web.route("/r5", http_response(b"User-agent: *\nDisallow: /no/"))
    fetcher: Fetcher = evil_web.fetcher(opt_outs={}, max_redirects=0)
    assert fetcher.fetch(f"{URL}/a.jpg") == BODY
    with pytest.raises(Rejected, match="robots_txt"):
        fetcher.fetch(f"{URL}/no/a.jpg")


def test_every_hop_of_an_image_asks_its_own_site(evil_web: Any, http_response: Any) -> None:
    answer_all(evil_web, http_response, b"User-agent: *\nDisallow: /no/")
    evil_web.route("/out", http_response(b"", "Location: /no/a.jpg", status="302 x"))
    with pytest.raises(Rejected) as caught:
        evil_web.fetcher(opt_outs={}).fetch(f"{URL}/out")
    assert caught.value.reason == "robots_txt"
    assert paths(evil_web)["/no/a.jpg"] == 0


def test_tdm_reservations_by_file_and_by_header(evil_web: Any, http_response: Any) -> None:
    answer_all(evil_web, http_response, b"")
    reserved = json.dumps([{"location": "/no/*", "tdm-reservation": 1}]).encode()
    evil_web.route("/.well-known/tdmrep.json", http_response(reserved))
    evil_web.route("/head", http_response(BODY, "tdm-reservation: 1"))
    evil_web.route("/free", http_response(BODY, "TDM-Reservation: 0"))
    fetcher = evil_web.fetcher(opt_outs={})
    for path in ("/no/a.jpg", "/head"):
        with pytest.raises(Rejected) as caught:
            fetcher.fetch(URL + path)
        assert caught.value.reason == "tdm_reservation"
    assert paths(evil_web)["/no/a.jpg"] == 0
    assert fetcher.fetch(f"{URL}/free") == fetcher.fetch(f"{URL}/a.jpg") == BODY


def test_each_opt_out_can_be_switched_off(evil_web: Any, http_response: Any) -> None:
    answer_all(evil_web, http_response, b"User-agent: *\nDisallow: /")
    evil_web.route("/x", http_response(BODY, "X-Robots-Tag: noai"))
    evil_web.route("/t", http_response(BODY, "tdm-reservation: 1"))
    assert evil_web.fetcher(opt_outs=NO_ROBOTS).fetch(f"{URL}/a.jpg") == BODY
    assert paths(evil_web)["/robots.txt"] == 0
    off = {"x_robots_tag": False, **NO_ROBOTS}
    assert evil_web.fetcher(opt_outs=off).fetch(f"{URL}/x") == BODY
    assert evil_web.fetcher(opt_outs=NO_TDM | NO_ROBOTS).fetch(f"{URL}/t") == BODY


def test_sites_are_remembered_in_bounded_space(
    evil_web: Any, http_response: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipelines.consent, "_MAX_SITES", 3)
    answer_all(evil_web, http_response, b"")
    place = f"127.0.0.1:{evil_web.port}"
    hosts = {f"h{number}.example:80": place for number in range(5)}
    fetcher = evil_web.fetcher(opt_outs={}, connect_to=hosts)
    for number in (0, 1, 2, 3, 4, 4, 3, 0):
        assert fetcher.fetch(f"http://h{number}.example/a.jpg") == BODY
    assert paths(evil_web)["/robots.txt"] == 6
