"""HTML pages as a browser's parser sees them, and text that must stay text in them."""

from __future__ import annotations

from html.parser import HTMLParser

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)"> {{ 7*7 }} <!-- & \u2028 "quote"'


class Reader(HTMLParser):
    """Tags, attributes and visible text of a page, as a browser's parser splits them."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self._in: str | None = None
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in = tag if tag in ("script", "style") else None

    def handle_endtag(self, tag: str) -> None:
        self._in = None

    def handle_data(self, data: str) -> None:
        (self.scripts if self._in == "script" else self.text).append(data)
