"""What a model wrote, as HTML that can do nothing: Markdown with tables, highlighted code and formulas.

Works on: text. Knows nothing of: pages, NiceGUI.

Two walls. HTML in the text is text (markdown-it's ``html`` is off), so that everything is our own renderer's; and what
that makes goes through nh3, which lets pass the elements, attributes, classes and addresses listed here and nothing
else. A picture becomes a link to it: one that loads by itself would tell somebody else that, and when, it was read.
The page shows the result through DOMPurify once more (`ui.html` with ``sanitize=True``), under a
Content-Security-Policy that lets no script of ours be added to.
"""

from __future__ import annotations

import functools
import html
import re
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import nh3
from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mdit_py_plugins.tasklists import tasklists_plugin
from mdit_py_plugins.texmath import texmath_plugin
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

LONGEST_CODE = 100_000  # characters that are highlighted; Pygments takes a second for about a million
LONGEST_FORMULA = 4_000

_MATH = {"math", "mrow", "mi", "mn", "mo", "ms", "mtext", "mspace", "msup", "msub", "msubsup", "mfrac", "msqrt",
         "mroot", "mover", "munder", "munderover", "mtable", "mtr", "mtd", "mlabeledtr", "mmultiscripts",
         "mprescripts", "none", "mpadded", "mphantom", "mstyle", "menclose", "mfenced"}
_MATH_ATTRIBUTES = {"mathvariant", "stretchy", "fence", "form", "separator", "lspace", "rspace", "minsize", "maxsize",
                    "largeop", "movablelimits", "accent", "accentunder", "linethickness", "columnalign", "rowspacing",
                    "columnspacing", "columnlines", "rowlines", "displaystyle", "scriptlevel", "width", "height",
                    "depth", "notation", "open", "close"}
_TEXT = {"p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "strong", "em", "s", "blockquote", "ul", "ol", "li", "a",
         "code", "pre", "span", "div", "table", "thead", "tbody", "tr", "th", "td", "input"}
_ATTRIBUTES: dict[str, set[str]] = {
    "a": {"href", "title"}, "ol": {"start"}, "th": {"align"}, "td": {"align"},
    "input": {"type", "checked", "disabled"}, "math": {"display"}, "span": {"role", "tabindex"},
    **{tag: _MATH_ATTRIBUTES | ({"display"} if tag == "math" else set()) for tag in _MATH}}
_CLASSES = {"div": {"code", "code-head", "formula"}, "span": {"code-language", "code-copy", "picture"},
            "ul": {"contains-task-list"}, "li": {"task-list-item"}, "a": {"picture"}, "math": {"formula-error"},
            "code": {"formula-error"}}
_STYLES = {"dark": "github-dark", "light": "xcode"}


def to_html(text: str, sources: Mapping[int, tuple[str, str]] | None = None) -> str:
    """The text as harmless HTML. ``sources``: title and address of what it cites as [number], which become links."""
    # As if the text ended in definitions of these links: Markdown knows then what is code and what a citation.
    cited = {str(number): {"title": f"[{number}] {title}", "href": address}
             for number, (title, address) in (sources or {}).items()}
    return _clean(_renderer().render(text, {"references": cited}))


def code_to_html(code: str, language: str) -> str:
    """Code as harmless HTML, highlighted."""
    fence = "`" * (3 + max((len(run) for run in re.findall("`+", code)), default=0))
    return to_html(f"{fence}{language}\n{code}\n{fence}")


def plain_to_html(text: str) -> str:
    """The text as it stands, in paragraphs: what a user wrote is not taken for Markdown."""
    return "<p>" + html.escape(text).replace("\n", "<br>") + "</p>"


def code_styles() -> str:
    """The style sheet of highlighted code, for the light page and (under ``body--dark``) the dark one."""
    light, dark = (HtmlFormatter(style=_STYLES[name], classprefix="hl-") for name in ("light", "dark"))
    return "\n".join([*_rules(light, ".code pre"), *_rules(dark, ".body--dark .code pre")])


def _rules(formatter: HtmlFormatter, scope: str) -> list[str]:
    return [line for line in formatter.get_style_defs(scope).splitlines() if line.startswith(f"{scope} .")]


@functools.cache
def _renderer() -> MarkdownIt:
    made = MarkdownIt("commonmark", {"html": False, "breaks": True, "linkify": False, "highlight": _highlighted})
    made.enable(["table", "strikethrough"])
    made.use(dollarmath_plugin, renderer=_formula, allow_space=False, allow_digits=False, double_inline=True)
    made.use(texmath_plugin, delimiters="brackets")
    made.use(tasklists_plugin)
    for name, rule in {"fence": _fence, "code_block": _fence, "image": _image, "math_inline": _math,
                       "math_block": _math, "math_block_eqno": _math, "math_single": _math,
                       "math_inline_double": _math_block, "math_block_label": _math}.items():
        made.add_render_rule(name, rule)
    return made


def _fence(self: RendererHTML, tokens: Sequence[Token], index: int, *_: Any) -> str:
    token = tokens[index]
    language = token.info.split()[0] if token.info.strip() else ""
    head = (f'<span class="code-language">{html.escape(language)}</span>'
            '<span class="code-copy" role="button" tabindex="0">Copy</span>')
    return (f'<div class="code"><div class="code-head">{head}</div>'
            f"<pre><code>{_highlighted(token.content, language)}</code></pre></div>\n")


def _highlighted(code: str, language: str, *_: Any) -> str:
    if language and len(code) <= LONGEST_CODE:
        try:
            lexer = get_lexer_by_name(language, stripnl=False)
        except ClassNotFound:
            return html.escape(code)  # a language that nobody knows
        return highlight(code, lexer, HtmlFormatter(nowrap=True, classprefix="hl-"))
    return html.escape(code)


def _image(self: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: MutableMapping[str, Any]) -> str:
    token = tokens[index]
    address, label = str(token.attrs.get("src", "")), token.content or "picture"
    return f'<a class="picture" href="{html.escape(address)}">{html.escape(label)}</a>'


def _math(self: RendererHTML, tokens: Sequence[Token], index: int, *_: Any) -> str:
    block = tokens[index].type.startswith("math_block")
    return _formula(tokens[index].content, {"display_mode": block})


def _math_block(self: RendererHTML, tokens: Sequence[Token], index: int, *_: Any) -> str:
    return _formula(tokens[index].content, {"display_mode": True})


def _formula(source: str, options: dict[str, Any]) -> str:
    """A formula as MathML; what cannot be read stays as it was written."""
    block = bool(options.get("display_mode"))
    source = source.strip()
    made = None
    if len(source) <= LONGEST_FORMULA:
        try:
            made = convert(source, display="block" if block else "inline")
        except Exception:  # the converter knows no error of its own: IndexError, KeyError, RecursionError …
            made = None  # shown as written, below
    if made is None:
        made = f'<code class="formula-error">{html.escape(source)}</code>'
    return f'<div class="formula">{made}</div>\n' if block else made


def _clean(made: str) -> str:
    with_class = {tag: _ATTRIBUTES.get(tag, set()) | {"class"} for tag in ("span", "a", *_CLASSES)}
    return nh3.clean(
        made, tags=_TEXT | _MATH, clean_content_tags={"script", "style", "annotation", "annotation-xml"},
        attributes={**_ATTRIBUTES, **with_class},
        attribute_filter=_attribute, url_schemes={"http", "https", "mailto"}, strip_comments=True,
        link_rel="noopener noreferrer nofollow", set_tag_attribute_values={"a": {"target": "_blank"}})


def _attribute(tag: str, name: str, value: str) -> str | None:
    """The value that an attribute may have, None for none."""
    if name == "class":
        allowed = _CLASSES.get(tag, set())
        kept = [word for word in value.split() if word in allowed or (tag == "span" and word.startswith("hl-"))]
        return " ".join(kept) or None
    if tag == "input" and name == "type":
        return "checkbox"
    if tag == "span" and name == "role":
        return "button" if value == "button" else None
    if name == "href" and value.lstrip().startswith(("/", "#", "?", "\\")):
        return None  # an answer has no business with this server's own addresses
    return value
