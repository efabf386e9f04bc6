"""May this image be taken? Asked of robots.txt, TDM reservations and the answer's own headers.

The files of a site are fetched once, by whoever comes first, and remembered for a bounded time
in a bounded space. A site that cannot say is not taken from now: its rows fail and may be retried.
"""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from email.message import Message

from pipelines.config import OptOutConfig
from pipelines.connection import Failed
from pipelines.guard import Rejected, Target
from pipelines.robots import PathRules, parse_robots, parse_tdmrep

# Reads at most ``MAX_POLICY_BYTES`` of a site's file.
ReadPolicy = Callable[[Target], bytes]

MAX_POLICY_BYTES = 500 * 1024  # as much as RFC 9309 wants read
OPT_OUT_DIRECTIVES = frozenset({"noai", "noimageai", "noindex", "noimageindex", "noml", "none"})
ROBOTS_PATH, TDM_PATH = "/robots.txt", "/.well-known/tdmrep.json"
_VALUED_DIRECTIVES = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")
_AGENT = re.compile(r"\*|[a-z][a-z0-9_.-]*")
_REMEMBER_SECONDS = 24 * 3600.0  # the longest that RFC 9309 lets a robots.txt be kept
_REMEMBER_FAILURE_SECONDS = 60.0
_MAX_SITES = 20_000
_MAX_CHARS = 32_000_000


def is_opted_out(headers: Message, robots_token: str) -> bool:
    """Whether any X-Robots-Tag header forbids what we do, for all agents or for ours.

    A header is a comma-separated list; ``agent:`` before a directive holds for the rest of its
    header. ``unavailable_after`` carries a date that may itself hold commas and colons.
    """
    for header in headers.get_all("X-Robots-Tag", []):
        agent = "*"
        for item in str(header).lower().split(","):
            directive = item.strip()
            while ":" in directive and not directive.startswith(_VALUED_DIRECTIVES):
                name, _, rest = directive.partition(":")
                if not _AGENT.fullmatch(name.strip()):
                    break
                agent, directive = name.strip(), rest.strip()
            if directive in OPT_OUT_DIRECTIVES and agent in ("*", robots_token.lower()):
                return True
    return False


def is_reserved(headers: Message) -> bool:
    """Whether a ``tdm-reservation`` header keeps the rights to text and data mining."""
    return any(str(value).strip() == "1" for value in headers.get_all("tdm-reservation", []))


@dataclass(frozen=True)
class Policies:
    """What one site's files say."""

    robots: PathRules
    tdm: PathRules


Answer = Policies | Failed | Rejected


class Consent:
    """The opt-outs of all sites met by one process; safe to call from many threads."""

    def __init__(self, config: OptOutConfig, robots_token: str, read: ReadPolicy) -> None:
        self._config = config
        self._robots_token = robots_token
        self._read = read
        self._sites: OrderedDict[tuple[str, str], Future[Answer]] = OrderedDict()
        self._expires_at: dict[tuple[str, str], float] = {}
        self._num_chars = 0
        self._lock = threading.Lock()

    def check_site(self, target: Target) -> None:
        """Raise ``Rejected`` (``robots_txt``, ``tdm_reservation``) or ``Failed`` before a request.

        A site that could not be asked fails as its file did: ``timeout``, ``dns`` …; one that
        answers 429 or 5xx fails as ``robots_txt_unavailable``.
        """
        if not (self._config.robots_txt or self._config.tdm_reservation):
            return
        policies = self._policies(target)
        if not policies.robots.allow(target.request_path):
            raise Rejected("robots_txt", f"{target.place} disallows the path")
        if not policies.tdm.allow(target.request_path):
            raise Rejected("tdm_reservation", TDM_PATH)

    def check_headers(self, headers: Message) -> None:
        """Raise ``Rejected`` (``optout``, ``tdm_reservation``) before a body is read."""
        if self._config.x_robots_tag and is_opted_out(headers, self._robots_token):
            raise Rejected("optout", "X-Robots-Tag")
        if self._config.tdm_reservation and is_reserved(headers):
            raise Rejected("tdm_reservation", "header")

    def _policies(self, target: Target) -> Policies:
        """From memory, or by asking; one thread asks and the others wait for it."""
        key = (target.scheme, target.place)
        now = time.monotonic()
        with self._lock:
            known = self._sites.get(key)
            if known is not None and self._expires_at.get(key, now) < now:
                self._drop(key)
                known = None
            mine: Future[Answer] = Future()
            if known is None:
                self._sites[key] = mine
        if known is not None:
            return _policies_of(known.result())
        try:
            found: Answer = self._ask(target)
        except (Failed, Rejected) as error:
            found = error
        except BaseException as error:
            found = Failed("internal_error", type(error).__name__, retryable=True)
            raise
        finally:
            mine.set_result(found)
            self._remember(key, mine, found)
        return _policies_of(found)

    def _ask(self, target: Target) -> Policies:
        robots = tdm = PathRules()
        if self._config.robots_txt:
            text = self._read_robots(Target(target.scheme, target.host, target.port, ROBOTS_PATH))
            robots = parse_robots(text, self._robots_token)
        if self._config.tdm_reservation:
            text = self._read_tdm(Target(target.scheme, target.host, target.port, TDM_PATH))
            tdm = parse_tdmrep(text)
        return Policies(robots, tdm)

    def _read_robots(self, target: Target) -> bytes:
        try:
            return self._read(target)
        except Rejected as rejection:
            if rejection.reason == "redirect":  # RFC 9309: a file that cannot be had is no file
                return b""
            raise
        except Failed as failure:
            status = failure.cause.removeprefix("http_")
            if not status.isdigit():
                raise
            if status.startswith("5") or status == "429":
                raise Failed(
                    "robots_txt_unavailable", status, retryable=True, retry_now=False
                ) from (failure)
            return b""

    def _read_tdm(self, target: Target) -> bytes:
        """No answer but a 200 reserves anything: most sites have never heard of the file."""
        try:
            return self._read(target)
        except Rejected as rejection:
            if rejection.reason in ("redirect", "encoding"):
                return b""
            raise
        except Failed as failure:
            if failure.cause.startswith("http_"):
                return b""
            raise

    def _remember(self, key: tuple[str, str], site: Future[Answer], answer: Answer) -> None:
        is_answer = isinstance(answer, Policies)
        seconds = _REMEMBER_SECONDS if is_answer else _REMEMBER_FAILURE_SECONDS
        with self._lock:
            if self._sites.get(key) is not site:
                return
            self._expires_at[key] = time.monotonic() + seconds
            self._num_chars += _num_chars(answer)
            while len(self._expires_at) > _MAX_SITES or self._num_chars > _MAX_CHARS:
                self._drop(next(iter(self._expires_at)))

    def _drop(self, key: tuple[str, str]) -> None:
        site = self._sites.pop(key)
        del self._expires_at[key]
        self._num_chars -= _num_chars(site.result())


def _policies_of(answer: Answer) -> Policies:
    """Raise what was remembered as an exception of its own: threads must not share tracebacks."""
    if isinstance(answer, Failed):
        raise Failed(answer.cause, answer.detail, retryable=answer.retryable, retry_now=False)
    if isinstance(answer, Rejected):
        raise Rejected(answer.reason, answer.detail)
    return answer


def _num_chars(answer: Answer) -> int:
    if not isinstance(answer, Policies):
        return 0
    return answer.robots.num_chars + answer.tdm.num_chars
