"""How each kind of personal data is told: forms, checksums, and what merely looks alike.

A detector yields the spans of a text that are of its kind. Characters an earlier detector has taken
are ``HIDDEN`` to it. The detector of phone numbers comes last, and is the widest.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

HIDDEN = "\x00"  # stands for a character that is spoken for; clean captions have none
GAP = r"[ .\-\u2013\u2014/()\u00a0\u2010\u2011\uff0d]"
Spans = Iterator[tuple[int, int]]


@dataclass(frozen=True)
class Detector:
    """``quick``: what every text with a finding matches, in Polars' dialect (no looking around)."""

    kind: str
    quick: str
    spans: Callable[[str], Spans]


# Secrets -----------------------------------------------------------------------------------------

_SECRET = re.compile(
    r"-----BEGIN[ A-Z]{0,40}PRIVATE KEY-----.*?(?:-----END[ A-Z]{0,40}PRIVATE KEY-----|$)"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"
    r"|\bgh[pousr]_[A-Za-z0-9]{20,255}|\bgithub_pat_\w{20,255}|\bglpat-[\w-]{20,64}"
    r"|\bsk-(?:proj|ant|or|svcacct)-[\w-]{20,255}|\bsk-[A-Za-z0-9]{32,64}\b"
    r"|\b[srp]k_(?:live|test)_[A-Za-z0-9]{16,255}"
    r"|\bxox[abeoprs]-[A-Za-z0-9-]{10,255}"
    r"|\bAIza[\w-]{35}|\bya29\.[\w-]{20,255}|\bSG\.[\w-]{16,64}\.[\w-]{16,64}"
    r"|\bhf_[A-Za-z0-9]{30,64}\b|\bnpm_[A-Za-z0-9]{36}\b"
    r"|\beyJ[\w-]{8,4096}\.eyJ[\w-]{8,4096}\.[\w-]{8,4096}"
)
_ASSIGNED = re.compile(
    r"(?i)\b(?:api[_ -]?key|access[_ -]?(?:key|token)|auth[_ -]?token|client[_ -]?secret"
    r"|secret(?:[_ -](?:access[_ -])?key)?|token|password|passwd|pwd)\b[\"']?\s?[:=]\s?[\"']?"
    r"(?P<value>[^\s\"'<>,;|]{6,255})"
)


def _secrets(text: str) -> Spans:
    for match in _SECRET.finditer(text):
        yield match.span()
    for match in _ASSIGNED.finditer(text):
        value = match["value"]
        if HIDDEN not in value and any(map(str.isdigit, value)) and any(map(str.isalpha, value)):
            yield match.span("value")


# E-mail addresses --------------------------------------------------------------------------------

_LABEL, _LOCAL = r"[^\W_](?:[\w-]{0,61}[^\W_])?", r"[\w.%+'\u2019-]{1,64}"
_EMAIL = re.compile(
    rf"(?:(?:https?|ftp|mailto):(?://)?)?{_LOCAL}[@\uff20](?:{_LABEL}\.){{1,8}}(?P<tld>xn--[\w-]{{2,59}}|[^\W\d_]{{2,24}})\b"
)
_DOT = r"\s?(?:\.|[\[({]\s?(?:dot|\.)\s?[\])}]|\sdot\s)\s?"
_SPELLED = re.compile(
    rf"(?i)\b[\w.%+-]{{1,64}}\s?[\[({{]\s?(?:at|@)\s?[\])}}]\s?{_LABEL}(?:{_DOT}{_LABEL}){{1,4}}"
    rf"|\b[\w.%+-]{{2,64}}\sat\s{_LABEL}\sdot\s(?:com|net|org|edu|gov|info|io|de|uk|fr)\b"
)
_NO_TLDS = frozenset(
    {"png", "jpg", "jpeg", "gif", "webp", "bmp", "svg", "tif", "tiff", "avif", "pdf"}
)


def _emails(text: str) -> Spans:
    for match in _EMAIL.finditer(text):
        if match["tld"].lower() not in _NO_TLDS:  # icon@2x.png
            yield match.span()
    for match in _SPELLED.finditer(text):
        yield match.span()


# Numbers with checksums --------------------------------------------------------------------------

_IBAN_HEAD = re.compile(r"(?<![A-Za-z0-9])([A-Za-z]{2})\d\d(?=[ -]?[A-Za-z0-9])")
_IBAN_CHARS = {  # characters per country, of the SWIFT registry
    country: int(length)
    for country, length in re.findall(
        r"([A-Z]{2})(\d\d)",
        "AD24AE23AL28AT20AZ28BA20BE16BG22BH22BI27BR29BY28CH21CR22CY28CZ24DE22DJ27DK18DO28EE20EG29"
        "ES24FI18FK18FO18FR27GB22GE22GI23GL18GR27GT28HN28HR21HU28IE22IL23IQ23IS26IT27JO30KW30KZ20"
        "LB28LC32LI21LT20LU20LV21LY25MC27MD24ME22MK19MN20MR27MT31MU30NI28NL18NO15OM23PK24PL28PS29"
        "PT25QA29RO24RS22RU33SA24SC31SD18SE24SI19SK24SM27SO23ST25SV28TL23TN24TR26UA29VA22VG24XK20"
        "YE30",
    )
}


def _ibans(text: str) -> Spans:
    for match in _IBAN_HEAD.finditer(text):
        wanted = _IBAN_CHARS.get(match[1].upper())
        if wanted is None:
            continue
        end, chars = match.start(), ""
        while end < len(text) and len(chars) < wanted:
            if text[end].isascii() and text[end].isalnum():
                chars += text[end].upper()
            elif text[end] not in " -" or text[end - 1] in " -":
                break
            end += 1
        is_whole = len(chars) == wanted and not text[end : end + 1].isalnum()
        if is_whole and int("".join(str(int(c, 36)) for c in chars[4:] + chars[:4])) % 97 == 1:
            yield match.start(), end


_CARD_RUN = re.compile(r"(?<![\w.,$€£#+])\d(?:[ .\-]?\d){13,30}(?![\w])")
_CARD_GROUPS = {(4, 4, 4, 4), (4, 6, 5), (4, 6, 4), (4, 4, 4, 4, 3), (6, 13), (4, 4, 4, 2)}
_CARD_BRANDS = (  # issuer prefixes and lengths
    (re.compile(r"4"), (16, 19)),
    (re.compile(r"5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720"), (16,)),
    (re.compile(r"3[47]"), (15,)),
    (re.compile(r"6011|64[4-9]|65"), (16, 19)),
    (re.compile(r"35(?:2[89]|[3-8])"), (16, 19)),
    (re.compile(r"30[0-5]|3[689]"), (14, 16, 19)),
    (re.compile(r"62"), (16, 17, 18, 19)),
    (re.compile(r"50|5[6-9]|6[0-9]"), (16, 18, 19)),
)


def passes_luhn(digits: str) -> bool:
    """Whether the last of ``digits`` is the check digit of ISO/IEC 7812-1."""
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + sum(doubled)) % 10 == 0


def _cards(text: str) -> Spans:
    for run in _CARD_RUN.finditer(text):
        groups = list(re.finditer(r"\d+", run[0]))
        first = 0
        while first < len(groups):
            last = _card_end(groups[first:])
            if last is None:
                first += 1
                continue
            last += first
            yield run.start() + groups[first].start(), run.start() + groups[last].end()
            first = last + 1


def _card_end(groups: list[re.Match[str]]) -> int | None:
    """The index of the last group of a card that begins with the first one."""
    for last in range(min(len(groups), 5)):
        sizes = tuple(len(group[0]) for group in groups[: last + 1])
        digits = "".join(group[0] for group in groups[: last + 1])
        if (last == 0 or sizes in _CARD_GROUPS) and any(
            len(digits) in lengths and brand.match(digits) for brand, lengths in _CARD_BRANDS
        ):
            return last if passes_luhn(digits) else None
    return None


# Identity numbers --------------------------------------------------------------------------------

_PRODUCT = re.compile(
    r"(?i)(?:\b(?:sku|ref(?:erence)?|items?|art(?:icle|ikel)?|models?|modell|parts?|isbn|issn|ean|upc"
    r"|gtin|asin|oem|oe|products?|prod|orders?|serial|s/n|p/n|pn|mpn|cat(?:alog(?:ue)?)?|codes?|lot"
    r"|stock|id|patent|type|typ|style|barcode|doi|casting|cas)\b|#)"
    r"[\s.:#]*(?:\b(?:no|nr|num|number|code|id)\b)?[\s.:#-]*$"
)
_CONTEXT_CHARS = 24
_SSN = re.compile(
    r"(?<![\w.,-])(?!000|666|9\d\d[- ][0-4])\d{3}([- ])(?!00)\d{2}\1(?!0000)\d{4}(?![\w-])"
)
_SSN_NAMED = re.compile(
    r"(?i)\b(?:ssn|social security(?: number| no)?)\b[\s.:#-]{0,4}(\d{3}[ -]?\d{2}[ -]?\d{4})\b"
)
_NINO = re.compile(
    r"\b(?!BG|GB|NK|KN|TN|NT|ZZ)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?\d\d ?\d\d ?\d\d ?[A-D]\b",
    re.I,
)
_CPF = re.compile(r"(?<![\w.])\d{3}\.\d{3}\.\d{3}-\d{2}(?![\w-])")
_RESIDENT = re.compile(
    r"(?<!\w)[1-9]\d{5}(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx](?!\w)"
)


def _national_ids(text: str) -> Spans:
    for match in _SSN_NAMED.finditer(text):
        yield match.span(1)
    for pattern in (_SSN, _NINO):
        for match in pattern.finditer(text):
            if not _names_a_product(text, match.start()):
                yield match.span()
    for match in _CPF.finditer(text):
        if _is_cpf([int(c) for c in match[0] if c.isdigit()]):
            yield match.span()
    for match in _RESIDENT.finditer(text):
        weighted = sum(int(c) * 2 ** (17 - i) for i, c in enumerate(match[0][:17]))
        if "10X98765432"[weighted % 11] == match[0][17].upper():
            yield match.span()


def _is_cpf(digits: list[int]) -> bool:
    """Whether the last two digits check the first nine (Brazil's Receita Federal)."""
    for known in (9, 10):
        weighted = sum(d * (known + 1 - i) for i, d in enumerate(digits[:known]))
        if weighted * 10 % 11 % 10 != digits[known]:
            return False
    return len(set(digits)) > 1


def _names_a_product(text: str, start: int) -> bool:
    return _PRODUCT.search(text[max(start - _CONTEXT_CHARS, 0) : start]) is not None


# IP addresses ------------------------------------------------------------------------------------

_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")
_VERSION = re.compile(
    r"(?i)\b(?:v|ver|version|firmware|fw|build|release|android|ios|os|kernel|update|rev|section"
    r"|chapter|fig(?:ure)?|table|part)\.?\s*$"
)
_SMALL_OCTET = 20  # below, all four are a version's or a section's rather than an address's


def _ip_addresses(text: str) -> Spans:
    for match in _IPV4.finditer(text):
        octets = [int(part) for part in match[0].split(".")]
        before = text[max(match.start() - _CONTEXT_CHARS, 0) : match.start()]
        is_named = re.search(r"(?i)\bip\b[^\d]*$", before) is not None
        is_small = max(octets) < _SMALL_OCTET or _VERSION.search(before) is not None
        if max(octets) <= 255 and (is_named or not is_small):
            yield match.span()
    for match in _IPV6.finditer(text):
        if sum(map(bool, match[0].split(":"))) < 3:
            continue
        try:
            ipaddress.IPv6Address(match[0])
        except ValueError:
            continue
        yield match.span()


# Phone numbers -----------------------------------------------------------------------------------

_DAY, _YEAR = r"(?:0?[1-9]|[12]\d|3[01])", r"(?:1[4-9]|20)\d\d"
_LOOKALIKES = re.compile(
    rf"(?<![\d./-]){_DAY}[./-]{_DAY}[./-](?:{_YEAR}|\d\d)(?![./-]?\d)"
    rf"|(?<![\d./-]){_YEAR}([./-])(?:0?[1-9]|1[0-2])\1{_DAY}(?![./-]?\d)"
    r"|(?<![\d:])\d{1,2}:\d\d(?::\d\d)?(?![\d:])"
    rf"|(?<![\d./-]){_YEAR}\s?[-\u2013\u2014/]\s?{_YEAR}(?![./-]?\d)"
    r"|(?<![\w.+])-?\d{1,3}\.\d{4,}(?![\d.])"
    r"|(?i:\bisbn(?:[- ]?1[03])?\b[\s:#-]{0,3}[\dX][\dX -]{8,20})"
    r"|(?<!\d)97[89][- ]?(?:\d[- ]?){9}[\dX](?!\d)"
    r"|[$€£¥₹]\s?\d[\d.,]*"
)
_END = r"(?![\w\x00])(?![.,/-]\d)"
_START = r"(?<![\w.,/+\x00-])(?<!\w[-#_])"
_INTERNATIONAL = re.compile(rf"(?<![\w+])\+\s?\(?\d(?:{GAP}{{0,3}}\d){{6,14}}(?!\d)")
_WITH_ZEROS = re.compile(rf"{_START}00 ?[1-9](?:{GAP}{{0,3}}\d){{7,13}}{_END}")


@dataclass(frozen=True)
class _Plan:
    """How a country groups its numbers, which have so many digits."""

    pattern: re.Pattern[str]
    fewest: int
    most: int


def _plan(pattern: str, fewest: int, most: int) -> _Plan:
    return _Plan(re.compile(f"{_START}{pattern}{_END}"), fewest, most)


_PLANS = (
    # North America: 3-3-4 of its numbering plan.
    _plan(
        r"(?:1[ .\-]{1,2})?(?:\([2-9]\d\d\)[ .\-]{0,2}|[2-9]\d\d[ .\-/])"
        r"[2-9]\d\d[ .\-\u2013]\d{4}",
        10,
        11,
    ),
    # A trunk 0: 020 7946 0958, 01 23 45 67 89, 0171-1234567, (030) 123456.
    _plan(
        r"(?:\(0[1-9]\d{0,4}\)[ .\-]{0,2}\d{2,8}|0[1-9]\d{0,4})(?:[ .\-\u2013/]{1,3}\d{2,8}){1,5}",
        9,
        12,
    ),
    _plan(r"\(0[1-9]\d{0,4}\)[ .\-]{0,2}\d{4,8}", 8, 12),
    # Mobile numbers in one piece: Britain, France, Germany.
    _plan(r"(?:07\d{9}|0[67]\d{8}|01[567]\d{8,9})", 10, 12),
    # An area in brackets: (11) 91234-5678, 8 (495) 123-45-67.
    _plan(
        rf"(?:[78][ -]?)?\((?!{_YEAR}\))\d{{2,5}}\)[ .\-]{{0,2}}\d{{2,5}}"
        r"(?:[ .\-\u2013]\d{2,5}){1,3}",
        9,
        12,
    ),
    # Russia, China and Spain, by their usual groups.
    _plan(r"8[ -]9\d\d[ -]\d{3}[ -]\d\d[ -]?\d\d", 11, 11),
    _plan(r"1[3-9]\d([ -])\d{4}\1\d{4}", 11, 11),
    _plan(r"[679]\d\d \d\d \d\d \d\d", 9, 9),
)
_NUMBER = re.compile(rf"\+?\(?\d(?:{GAP}{{0,3}}\d){{6,}}")
_NAMED = re.compile(
    r"(?i)(?:\b(?:tel|telefon|telefono|teléfono|téléphone|telephone|phone|fone|mobile|mob|cell|call"
    r"|fax|whats ?app|hotline|contact|sms|viber|handy|ph|tlf|movil|móvil)\b|[☎✆📞📱])"
    r"[\s.:#()\u2013-]{0,6}(?:(?:us|me|now|today|at|no|number|nr|on)\b[\s.:#-]{0,4}){0,3}$"
)
_NAMED_NUMBER = re.compile(rf"\+?\(?\d(?:{GAP}{{0,3}}\d){{6,14}}(?![\w\x00])")
_NAME_CHARS = 48


def _phones(text: str) -> Spans:
    if _NUMBER.search(text) is None:
        return
    text = _LOOKALIKES.sub(lambda match: HIDDEN * len(match[0]), text)
    for number in _NUMBER.finditer(text):
        start, end = number.span()
        if _NAMED.search(text[max(start - _NAME_CHARS, 0) : start]):
            named = _NAMED_NUMBER.match(text, start)
            if named is not None:
                yield named.span()
        # The patterns look at what is around a match; of it, no more than this is needed.
        yield from _unnamed_phones(text, max(start - 1, 0), end + 2)


def _unnamed_phones(text: str, start: int, end: int) -> Spans:
    for match in _INTERNATIONAL.finditer(text, start, end):
        digits = _digits(match[0])
        is_grouped = len(match[0]) > len(digits) + 1
        if _is_country(digits) and (8 if is_grouped else 10) <= len(digits) <= 15:
            yield match.span()
    for match in _WITH_ZEROS.finditer(text, start, end):
        digits = _digits(match[0])
        is_grouped = len(match[0]) > len(digits)
        if _is_country(digits[2:]) and (10 if is_grouped else 12) <= len(digits) <= 16:
            yield match.span()
    for plan in _PLANS:
        for match in plan.pattern.finditer(text, start, end):
            is_as_long = plan.fewest <= len(_digits(match[0])) <= plan.most
            if is_as_long and not _names_a_product(text, match.start()):
                yield match.span()


def _digits(text: str) -> str:
    return "".join(filter(str.isdigit, text))


def _is_country(digits: str) -> bool:
    """Whether a country calling code of ITU-T E.164 begins ``digits``: all but 0, 28, 83, 89."""
    return digits[0] != "0" and digits[:2] not in ("28", "83", "89")


# In the order in which they are asked.
_SEVEN_DIGITS = rf"\d(?:{GAP}{{0,3}}\d){{6}}"
DETECTORS = (
    Detector(
        "secret",
        r"AKIA|ASIA|gh[pousr]_|github_pat_|glpat-|sk-|[srp]k_(?:live|test)_|xox[abeoprs]-|AIza"
        r"|ya29\.|SG\.|hf_|npm_|eyJ|PRIVATE KEY|(?i:passw|pwd|api.?key|access.?key|token|secret)",
        _secrets,
    ),
    Detector(
        "email",
        r"[@\uff20]|(?i:[\[({]\s?at\s?[\])}]|\sdot\s(?:com|net|org|edu|gov|info|io|de|uk|fr)\b)",
        _emails,
    ),
    Detector("iban", r"[A-Za-z]{2}\d\d[ -]?[A-Za-z0-9]{4}", _ibans),
    Detector("card", r"\d(?:[ .\-]?\d){13}", _cards),
    Detector("ip_address", r"\d\.\d{1,3}\.\d{1,3}\.\d|(?:[0-9A-Fa-f]{0,4}:){2}", _ip_addresses),
    Detector(
        "national_id",
        r"\d{3}[- ]?\d{2}[- ]?\d{4}|\d{3}\.\d{3}\.\d{3}-"
        r"|(?i:[A-Z]{2} ?\d\d ?\d\d ?\d\d ?[A-D]\b)|\d{17}",
        _national_ids,
    ),
    Detector("phone", _SEVEN_DIGITS, _phones),
)
