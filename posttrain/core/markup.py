"""Text into HTML, safely: everything that reaches the report goes through `esc`.

A value is redacted, lone surrogates and control characters become U+FFFD, and the five characters with a meaning in HTML
are escaped. The page forbids itself every request by its own content-security policy.
"""

from __future__ import annotations

import html
import re
from typing import Any

from posttrain.config.redact import redact
from posttrain.core.events import jsonable

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff]")

STYLE = """
:root{--ink:#1b1f24;--soft:#667085;--line:#d0d5dd;--card:#fff;--page:#f6f7f9;--one:#0072b2;--two:#d55e00;--band:#0072b233;
--bad:#c1121f}
@media(prefers-color-scheme:dark){:root{--ink:#e6e8eb;--soft:#98a2b3;--line:#3a4250;--card:#1c2128;--page:#14181d;--one:#56b4e9;
--two:#f0883e;--band:#56b4e933;--bad:#ff6b6b}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);font:14px/1.5 system-ui,sans-serif}
main{max-width:1180px;margin:0 auto;padding:24px}h1{font-size:24px;margin:0}h2{font-size:18px;margin:32px 0 8px}h3{font-size:14px;
margin:16px 0 4px}
section,details{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 16px;margin:8px 0}
summary{cursor:pointer;font-weight:600}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:3px 12px 3px 0;text-align:left;vertical-align:top;unicode-bidi:isolate;overflow-wrap:anywhere}th{color:var(--soft);
font-weight:600;border-bottom:1px solid var(--line);white-space:nowrap}
pre,code,.mono{font:12px/1.45 ui-monospace,monospace}pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:4px 0;
unicode-bidi:isolate}
.grid{display:flex;flex-wrap:wrap;gap:12px}.soft{color:var(--soft)}.wide{overflow-x:auto}svg{max-width:100%;height:auto}
svg text{fill:var(--ink);font:11px system-ui,sans-serif}
svg .soft{fill:var(--soft)}.axis{stroke:var(--line);fill:none}.curve{stroke:var(--one);fill:none;stroke-width:1.5}
.band{fill:var(--band);stroke:none}.bad{stroke:var(--bad);fill:var(--bad)}
.one{fill:var(--one);stroke:var(--one)}.two{fill:var(--two);stroke:var(--two)}.old{fill:var(--soft);stroke:var(--soft)}
.half{fill-opacity:.45}.box{fill:var(--card);stroke:var(--line)}.edge{stroke:var(--soft);fill:none}
"""


def clean(value: Any) -> str:
    """Redacted text without lone surrogates or control characters."""
    return _CONTROL.sub("\ufffd", jsonable(redact(str(value))))


def esc(value: Any) -> str:
    """`clean(value)` for use inside an element or a quoted attribute."""
    return html.escape(clean(value), quote=True)


def table(header: list[str], rows: list[list[Any]]) -> str:
    """HTML table; empty text if there are no rows. Cells are escaped, new lines kept."""
    if not rows:
        return ""
    head = "".join(f"<th>{esc(h)}</th>" for h in header)
    body = "".join("<tr>" + "".join(f"<td>{_cell(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<div class=wide><table><tr>{head}</tr>{body}</table></div>"


def _cell(value: Any) -> str:
    text = esc("" if value is None else value)
    return f"<pre>{text}</pre>" if "\n" in text else text


def section(title: str, body: str) -> str:
    """A titled part of the page; empty if there is no body."""
    return f"<h2>{esc(title)}</h2>\n{body}\n" if body else ""


def folded(title: str, body: str) -> str:
    """A part that opens on a click."""
    return f"<details><summary>{esc(title)}</summary>{body}</details>\n" if body else ""


def page(title: str, body: str) -> str:
    """The whole document."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width"><title>{esc(title)}</title><style>{STYLE}</style></head>\n'
        f"<body><main>\n{body}</main></body></html>\n"
    )
