"""Reads a report page as a browser would, without running its scripts."""

import html.parser
import json

EVIL = "</script><img src=x onerror=alert(1)><!--<script>"
ROWS = [{"panel": "p", "x": "attn", "y": 0, "value": 0.25, "cell": "L0-attn"}]


class Reader(html.parser.HTMLParser):
    """The headings, texts, JSON scripts and addresses of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.scripts, self.addresses, self.texts = [], [], [], []
        self._script = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "script":
            self._script = dict(attributes).get("type")
        self.addresses += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        if tag == "script":
            self._script = None

    def handle_data(self, data):
        if self._script == "application/json":
            self.scripts.append(json.loads(data))
        elif not any(tag == "script" for tag, _ in self.tags[-1:]):
            self.texts.append(data)


def read(path) -> Reader:
    return Reader(path.read_text())


def values(spec):
    """The rows of a specification, list by list."""
    if isinstance(spec, dict):
        if isinstance(spec.get("data"), dict) and "values" in spec["data"]:
            yield spec["data"]["values"]
        for part in spec.values():
            yield from values(part)
    elif isinstance(spec, list):
        for part in spec:
            yield from values(part)
