"""Texts of strangers, quoted for the place where they are shown: a terminal, Markdown, XML, HTML; secrets taken out.

Names, paths, records, answers and messages are data. None may move the cursor, change a colour, reorder a line, end a
cell of a table, or carry a token of the user into a file.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from typing import IO, Any, ClassVar

SECRET = "holds a password, a key or a token, which would be written into records and reports"
HIDDEN = "***"
"""What stands in place of a secret."""
REPLACED = 0xFFFD
INVISIBLE = (
    *range(0x80, 0xA0),  # control characters of eight bits: 0x9b begins a sequence as ESC [ does
    0xAD, 0x61C, 0x180E, *range(0x200B, 0x2010), *range(0x2028, 0x202F), *range(0x2060, 0x2070),
    0xFEFF, *range(0xFFF9, 0xFFFC), 0xFFFE, 0xFFFF, *range(0xD800, 0xE000), *range(0xE0000, 0xE0080),
)  # fmt: skip
"""Characters without a glyph: those that control, reorder, join or separate, and halves of surrogate pairs."""
LINES: Mapping[int, int] = {
    **{code: 0x2400 + code for code in range(0x20) if code not in (0x09, 0x0A)},
    0x7F: 0x2421,
    **dict.fromkeys(INVISIBLE, REPLACED),
}
"""Glyphs for the characters that a terminal obeys or hides, one column each; line breaks and tabs stay."""
ONE_LINE: Mapping[int, int] = {**LINES, 0x09: 0x20, 0x0A: 0x240A}

SECRET_NAME = re.compile(
    r"(?i)((^|(api|access|auth|hf|hub|bearer|session|refresh|security|login|github|gitlab|wandb)_)token|secret|"
    r"passw(or)?d|passphrase|credentials?|api_?key|access_?key(_id)?|private_?key|secret_?key)$"
)
"""The end of a key or variable whose value is a secret; a bos_token is none."""
SECRET_VARIABLE = re.compile(
    r"(?i)(token(?!i[sz]|s)|secret|passw|passphrase|credential|api_?key|access_?key|private_?key|_key$|_pat$|_dsn$|_auth$)"
)
"""The name of a variable of the environment whose value is a secret."""
NO_SECRET = ("", "true", "false", "null", "none")
SHORTEST = 8
"""Characters of the shortest value of a variable that is taken for a secret: shorter ones occur by chance."""
IN_TEXT = (
    (r"(?<=://)[^\s/]*@", f"{HIDDEN}@"),
    (r"(?<![\w./-])[\w.+-]+:[^\s/@:'\"]+@(?=[\w-]+(\.[\w-]+)+)", f"{HIDDEN}@"),
    (
        r"(?i)(?<=[?&])((?:[\w-]*(?:token|secret|signature|passw(?:or)?d|api_?key|credential)|sig|key)=)[^&\s'\"]+",
        rf"\1{HIDDEN}",
    ),
    (r"\b(hf|gh[opsur]|glpat|xox[a-z]|github_pat|wandb_v\d)[_-][A-Za-z0-9_-]{16,}", HIDDEN),
    (r"\bsk-[A-Za-z0-9_-]{16,}|\b(AKIA|ASIA)[A-Z0-9]{12,}|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+", HIDDEN),
    (r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(-----END|$)", HIDDEN),
)  # fmt: skip
"""Secrets that are known by their form: user information of a URL, signed queries, tokens of services."""
MARKDOWN = str.maketrans({"\\": "\\\\", "`": "\\`", "*": "\\*", "<": "&lt;", "&": "&amp;"})


def lines(text: str) -> str:
    """Return a text of several lines for the terminal."""
    return redacted(text).replace("\r\n", "\n").translate(LINES)


def one_line(text: str) -> str:
    """Return a text for one line of the terminal, or one cell of a table there."""
    return redacted(text).replace("\r\n", "\n").translate(ONE_LINE)


def markdown(text: str) -> str:
    """Return a text for one line of Markdown, in which it is neither markup nor HTML nor a link."""
    flat = " ".join(redacted(text).split()).translate(ONE_LINE).translate(MARKDOWN)
    return flat.replace("](", "\\](").replace("][", "\\][").replace("~~", "\\~\\~")


def cell(text: str) -> str:
    """Return a text for one cell of a table in Markdown."""
    return markdown(text).replace("|", "\\|")


def document(text: str) -> str:
    """Return a text for a document that keeps its lines and cannot hold control characters, such as XML or HTML."""
    return lines(text)


def redacted(text: str) -> str:
    """Return a text without the secrets of the environment, and without those that their form gives away."""
    if len(text) >= SHORTEST:  # tables have thousands of texts that are too short to hold one
        for secret in _known_secrets():
            text = text.replace(secret, HIDDEN)
    if any(mark in text for mark in ("@", "_", "-", "=", "AKIA", "ASIA", "eyJ")):
        for pattern, instead in IN_TEXT:
            text = re.sub(pattern, instead, text)  # compiled when the first text needs it: help and lists need none
    return text


def is_secret(key: str, value: str) -> bool:
    """Return True when a setting would write a secret into every record of a run."""
    if value.lower() in NO_SECRET:
        return False
    return SECRET_NAME.search(key.rpartition(".")[2]) is not None or redacted(value) != value


class _Known:
    """The secrets of the environment, as it was when a text was last quoted."""

    environment: ClassVar[Mapping[Any, Any] | None] = None
    secrets: ClassVar[tuple[str, ...]] = ()


def _known_secrets() -> tuple[str, ...]:
    """Return the secrets in the environment; it is searched again when it has changed."""
    now = getattr(os.environ, "_data", None)  # decoding every variable for every text takes an eighth of a short run
    if now is None or now != _Known.environment:
        _Known.environment, _Known.secrets = dict(now or {}), tuple(_secrets())
    return _Known.secrets


def _secrets() -> Iterator[str]:
    """Yield the secrets in the environment, by the names of its variables, and the passwords of its URLs."""
    for name, value in os.environ.items():
        if len(value) < SHORTEST:
            continue
        if _names_secret(name):
            if not value.startswith(("/", "~", "./")) or not os.path.exists(os.path.expanduser(value)):
                yield value
        elif "://" in value and "@" in value:
            yield from _passwords(value)


@cache
def _names_secret(name: str) -> bool:
    return SECRET_VARIABLE.search(name) is not None and not name.upper().endswith(("_PATH", "_FILE", "_DIR", "_SOCK"))


@cache
def _passwords(url: str) -> tuple[str, ...]:
    from urllib.parse import unquote

    found = re.findall(r"://([^\s/@:]*):?([^\s/@]*)@", url)
    raw = [part for parts in found for part in parts if len(part) >= SHORTEST]
    return tuple(dict.fromkeys([*raw, *map(unquote, raw)]))


class Quoted:
    """A stream on which every text is data; our console, which quotes for itself, writes to the stream below."""

    def __init__(self, stream: IO[str]) -> None:
        self.below = stream

    def write(self, text: str) -> int:
        """Write a text, quoted; return its length."""
        self.below.write(lines(text))
        return len(text)

    def writelines(self, texts: Any) -> None:
        """Write texts, quoted."""
        for text in texts:
            self.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.below, name)


@contextlib.contextmanager
def quoted_streams() -> Iterator[None]:
    """Quote everything that is printed, by libraries and tracebacks too."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Quoted(before[0]), Quoted(before[1])
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
