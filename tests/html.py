"""Reading the pages that the project writes, strictly."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from html.parser import HTMLParser

from distily.html.sorting import SCRIPT, SOURCE

_VOID = {"meta", "br", "hr", "img", "link", "input"}


@dataclass
class Parsed:
    """tags: all that were opened, in order; attributes: all values of each attribute; texts: by their tag."""

    tags: list[str] = field(default_factory=list)
    attributes: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    texts: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found, self.open = Parsed(), list[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.tags.append(tag)
        for name, value in attrs:
            self.found.attributes[name].append(value or "")
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        self.found.texts[self.open[-1] if self.open else ""].append(data)


def parsed(html: str) -> Parsed:
    """The parts of an HTML text; every tag must be closed, in order."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    assert not reader.open, f"never closed: {reader.open}"
    return reader.found


def page(html: str) -> Parsed:
    """`parsed`, of a whole page that is on its own: no script but the one that sorts tables, nothing loaded
    from elsewhere.
    """
    sorts = 'class="sortable"' in html
    assert html.count("<script>") == html.count(SCRIPT) == html.count(SOURCE) == sorts
    html = html.replace(f"<script>{SCRIPT}</script>", "")
    found = parsed(html)
    assert html.startswith("<!doctype html>")
    assert found.tags.count("h1") == 1
    assert not {"script", "link", "img", "iframe", "base"} & set(found.tags)
    assert not any(name.startswith("on") or name in {"src", "href"} for name in found.attributes)
    assert "url(" not in html
    assert "@import" not in html
    return found
