"""The terminal, for tables and progress whose cells come from data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment
from rich.text import Text

from distily.text import printable


class SafeConsole(Console):
    """rich's console, on which no text is markup, and none reaches the terminal that would steer it.

    rich itself lets escape sequences through, and takes `[red]` in the name of a file for a colour.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        # Before it is laid out, so that columns are as wide as what stands in them.
        return super().render_str(printable(text, keep="\n\t"), **options)

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment(printable(segment.text, keep="\n"), segment.style)
