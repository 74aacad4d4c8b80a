"""Reads an HTML report as a browser would, far enough to tell what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "wbr"}
LOADING = {"script", "link", "img", "iframe", "object", "embed", "audio", "video", "source", "form", "base", "image"}
"""Elements that run something or load something."""


@dataclass
class Page:
    """What stands in a page."""

    tags: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    text: str = ""
    styles: str = ""

    def all(self, tag: str, **attributes: str) -> list[dict[str, str]]:
        """The attributes of every such element."""
        wanted = {(name.rstrip("_").replace("_", "-"), value) for name, value in attributes.items()}
        return [found for name, found in self.tags if name == tag and wanted <= found.items()]

    @property
    def words(self) -> str:
        """Its text with every run of white space as one space."""
        return " ".join(self.text.split())


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.page = Page()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"an attribute of <{tag}> is given twice: {names}"
        self.page.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            self.page.styles += data
        else:
            self.page.text += data


def read_page(text: str) -> Page:
    """The page in ``text``, after checking that it is well formed, whole in itself and harmless."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert not reader.open, f"not closed: {reader.open}"
    page = reader.page
    _check_links(page)
    _check_harmless(page)
    return page


def _check_links(page: Page) -> None:
    ids = [found["id"] for _, found in page.tags if "id" in found]
    assert len(ids) == len(set(ids)), "an id is given twice"
    targets = [found["href"] for _, found in page.tags if "href" in found]
    assert all(target.startswith("#") for target in targets), f"it leads out of the page: {targets}"
    assert {target[1:] for target in targets} <= set(ids), "a link leads nowhere"


def _check_harmless(page: Page) -> None:
    assert not {tag for tag, _ in page.tags} & LOADING
    assert not [name for _, found in page.tags for name in found if name.startswith("on") or name in ("src", "srcset")]
    assert "url(" not in page.styles
    assert "@import" not in page.styles
    (policy,) = page.all("meta", http_equiv="Content-Security-Policy")
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"
