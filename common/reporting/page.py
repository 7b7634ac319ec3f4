"""The page of a report: one self-contained HTML file, no script, no external file.

Everything that comes from outside is escaped here; the functions take plain text unless a
parameter is named ``markup``.
"""

import html
import math
from collections.abc import Sequence
from typing import Any

KINDS = {
    "proved": "holds for every input of the stated domain; lipllm verify re-proves the certificate",
    "measured": "observed on the stated text; another text can give another value",
    "estimate": "computed, but no guarantee in either direction",
}

_CSS = """
:root { color-scheme: light dark;
  --ground:#fbfbfa; --surface:#ffffff; --ink:#1b1f24; --muted:#626b76; --grid:#dfe2e6;
  --proved:#1f5fc4; --naive:#9dbdf0; --measured:#d9640f; --neutral:#8b939e; --second:#1b8a6b;
  --third:#8a4fbe; --tint:#f2f4f7 }
@media (prefers-color-scheme: dark) { :root {
  --ground:#14171b; --surface:#1b1f25; --ink:#e6e9ed; --muted:#9aa4b0; --grid:#353c45;
  --proved:#6ea2f2; --naive:#3b5f99; --measured:#f0924d; --neutral:#7c8793; --second:#4cc09c;
  --third:#bd92e6; --tint:#22272e } }
* { box-sizing:border-box }
body { margin:0; background:var(--ground); color:var(--ink);
  font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif }
main { max-width:1080px; margin:0 auto; padding:44px 28px 72px }
h1 { font-size:27px; line-height:1.25; margin:0; letter-spacing:-.015em }
h2 { font-size:18px; margin:52px 0 4px; letter-spacing:-.01em }
p { margin:6px 0; max-width:74ch } .lead, .note, figcaption, .foot { color:var(--muted) }
.lead { font-size:16px; margin-top:8px }
.cards { display:grid; grid-template-columns:repeat(auto-fit,minmax(188px,1fr)); gap:14px;
  margin:28px 0 10px }
.card { background:var(--surface); border:1px solid var(--grid); border-radius:10px;
  padding:15px 17px 14px; display:flex; flex-direction:column }
.card .name { font-size:13px; color:var(--muted) }
.card .value { font-size:29px; font-weight:600; letter-spacing:-.02em; line-height:1.3;
  font-variant-numeric:tabular-nums; white-space:nowrap }
.card .value small { font-size:14px; font-weight:400; color:var(--muted); letter-spacing:0 }
.card .detail { font-size:13px; color:var(--muted); margin-top:2px }
.kind { font-size:11px; font-weight:600; letter-spacing:.03em; white-space:nowrap }
.kind::before { content:""; display:inline-block; width:7px; height:7px; border-radius:50%;
  background:currentColor; margin-right:5px }
.kind.proved { color:var(--proved) } .kind.measured { color:var(--measured) }
.kind.estimate { color:var(--neutral) }
.card .kind { margin-top:auto; padding-top:9px }
.figures { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr));
  gap:18px; margin-top:16px }
figure { margin:0; background:var(--surface); border:1px solid var(--grid); border-radius:10px;
  padding:15px 18px 14px; min-width:0 }
figure svg { display:block; width:100%; height:auto; font-family:inherit }
figcaption { font-size:13px; line-height:1.5; margin-top:9px } figcaption b { font-weight:600;
  color:var(--ink) }
.key { display:flex; flex-wrap:wrap; gap:2px 16px; font-size:13px; margin-bottom:6px }
.key i { display:inline-block; width:18px; border-top:3px solid currentColor; margin-right:6px;
  vertical-align:middle } .key i.dash { border-top-style:dashed }
.scroll { overflow-x:auto; margin-top:16px }
table { border-collapse:collapse; width:100%; font-size:14px; font-variant-numeric:tabular-nums }
th { text-align:left; font-weight:500; color:var(--muted); font-size:13px;
  border-bottom:1px solid var(--grid); padding:5px 14px 5px 0; vertical-align:bottom }
td { border-bottom:1px solid var(--grid); padding:6px 14px 6px 0; vertical-align:top }
td.n, th.n { text-align:right } tr.best td { font-weight:600 }
code, pre { font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;
  font-size:12.5px } code { overflow-wrap:anywhere }
pre { background:var(--tint); border-radius:8px; padding:11px 13px; margin:6px 0 0;
  white-space:pre-wrap; overflow-wrap:anywhere; max-height:24em; overflow-y:auto }
.sample { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,360px),1fr));
  gap:8px 18px; margin-top:18px } .sample h3 { font-size:13px; font-weight:500; margin:0;
  color:var(--muted) } .prompt { color:var(--muted) }
.missing { border:1px dashed var(--grid); border-radius:10px; padding:11px 16px; margin-top:14px;
  color:var(--muted); font-size:14px }
dl { display:grid; grid-template-columns:max-content 1fr; gap:5px 22px; margin:14px 0 0;
  font-size:14px } dt { color:var(--muted) } dd { margin:0; min-width:0 }
details { margin-top:14px } summary { cursor:pointer; color:var(--muted); font-size:14px }
sup { line-height:0 }
.foot { max-width:none; font-size:13px; margin-top:52px; border-top:1px solid var(--grid);
  padding-top:14px }
@media (max-width:560px) { main { padding:28px 16px 48px } dl { grid-template-columns:1fr; gap:0 }
  dd { margin-bottom:8px } }
@media print { body { background:#fff } figure, .card { break-inside:avoid } }
"""


def page(title: str, lead: str, markup: str, foot: str) -> str:
    """Return the whole document.

    Args:
        title: Heading and window title.
        lead: One or two sentences below it.
        markup: The sections, as HTML.
        foot: Last line.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>\n{markup}\n'
        f'<p class="foot">{escape(foot)}</p>\n</main>\n</body>\n</html>\n'
    )


def palette() -> str:
    """Return the rules that define the page's colours, light and dark."""
    return _CSS[: _CSS.index("* { box-sizing")].strip()


def escape(text: Any) -> str:
    """Return text that is safe inside HTML and attributes; other control characters are shown."""
    shown = "".join(
        character if character.isprintable() or character in "\n\t" else "\N{REPLACEMENT CHARACTER}"
        for character in str(text)
    )
    return html.escape(shown, quote=True)


def number(value: float | None, digits: int = 3) -> str:
    """Return a number as HTML with ``digits`` significant digits; a dash where there is none."""
    if value is None:
        return "&ndash;"
    if not math.isfinite(value):
        return "overflow"
    if value == 0:
        return "0"
    if value == round(value) and abs(value) < 1e6:
        return f"{value:,.0f}"
    exponent = math.floor(math.log10(abs(value)))
    if -4 < exponent < 6:
        decimals = max(0, digits - 1 - exponent)
        text = f"{value:,.{decimals}f}"
        return text.rstrip("0").rstrip(".") if "." in text and decimals > digits else text
    # Rounding may carry into the next power of ten.
    mantissa, _, power = f"{value:.{max(0, digits - 1)}e}".partition("e")
    return f"{mantissa}&nbsp;&times;&nbsp;10<sup>{int(power)}</sup>"


def percent(value: float | None) -> str:
    """Return a share as HTML in per cent."""
    return "&ndash;" if value is None else f"{100 * value:.3g}&nbsp;%"


def kind(name: str) -> str:
    """Return the badge of ``proved``, ``measured`` or ``estimate``."""
    return f'<span class="kind {name}" title="{escape(KINDS[name])}">{name}</span>'


def card(name: str, value_markup: str, unit: str, detail_markup: str, kind_name: str) -> str:
    """Return a headline figure."""
    small = f" <small>{escape(unit)}</small>" if unit else ""
    return (
        f'<div class="card"><span class="name">{escape(name)}</span>'
        f'<span class="value">{value_markup}{small}</span>'
        f'<span class="detail">{detail_markup}</span>{kind(kind_name)}</div>'
    )


def figure(markup: str, caption_markup: str) -> str:
    """Return a chart with its caption, which says what is proved, measured or estimated."""
    return f"<figure>{markup}<figcaption>{caption_markup}</figcaption></figure>"


def figures(*items: str) -> str:
    """Return figures side by side where there is room."""
    return f'<div class="figures">{"".join(items)}</div>'


def section(title: str, lead: str, *parts: str) -> str:
    """Return a titled section."""
    return f'<h2>{escape(title)}</h2>\n<p class="note">{escape(lead)}</p>\n' + "\n".join(parts)


def missing(what: str) -> str:
    """Return the note that takes the place of a part without input."""
    return f'<div class="missing">{escape(what)}</div>'


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int = 1) -> str:
    """Return a table; all but the first ``text_columns`` columns are aligned as numbers.

    Args:
        heads: Column headings, plain text.
        rows: Cells as HTML.
        text_columns: Number of leading columns with text.
    """
    css = ["" if index < text_columns else ' class="n"' for index in range(len(heads))]
    head = "".join(f"<th{c}>{escape(text)}</th>" for text, c in zip(heads, css, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{c}>{cell}</td>" for cell, c in zip(row, css, strict=True)) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def details(title: str, markup: str) -> str:
    """Return a part that is folded away under its title."""
    return f"<details><summary>{escape(title)}</summary>{markup}</details>"


def definitions(pairs: Sequence[tuple[str, str]]) -> str:
    """Return a list of names (plain text) and values (HTML)."""
    items = "".join(f"<dt>{escape(name)}</dt><dd>{value}</dd>" for name, value in pairs)
    return f"<dl>{items}</dl>"


def code(text: str) -> str:
    """Return literal text."""
    return f"<code>{escape(text)}</code>"
