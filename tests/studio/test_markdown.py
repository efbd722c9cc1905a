"""What a model wrote becomes HTML that shows it and can do nothing."""

import html
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgemma.studio import markdown
from dgemma.studio.markdown import code_styles, plain_to_html, to_html

HARMLESS = markdown._TEXT | markdown._MATH


class Reader(HTMLParser):
    """The elements of a page with their attributes, and the text between."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def check_harmless(page):
    """Nothing in the page runs, loads, is styled, or leads where it should not."""
    for tag, attributes in Reader(page).elements:
        assert tag in HARMLESS
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in ("style", "src", "srcset", "id", "name", "srcdoc",
                                                              "xlink:href", "formaction", "action", "data")
            if name == "href":
                assert value.lower().startswith(("http://", "https://", "mailto:"))
                assert attributes["rel"] == "noopener noreferrer nofollow" and attributes["target"] == "_blank"
            if name == "class":
                assert all(word.startswith("hl-") or word in set().union(*markdown._CLASSES.values())
                           for word in value.split())


ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg onload=alert(1)><animate onbegin=alert(1) attributeName=x dur=1s></svg>",
    "<style>body{background:url(//evil)}</style>",
    "<div style='position:fixed;inset:0'>over everything</div>",
    "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
    "<a href='javascript:alert(1)'>x</a>",
    "<a href=' jAvAsCrIpT&colon;alert(1)'>x</a>",
    "<a href='data:text/html,<script>alert(1)</script>'>x</a>",
    "<a href='vbscript:x'>x</a><a href='/v1/models'>x</a><a href='//evil'>x</a>",
    "<form action=//evil><input type=password name=p><button formaction=//evil>x</button></form>",
    "<input type=image src=//evil>",
    "<span class='fixed-top q-dialog nicegui-error-popup'>x</span>",
    "<base href=//evil><meta http-equiv=refresh content='0;url=//evil'><link rel=stylesheet href=//evil>",
    "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)></style></mglyph></table></mtext></math>",
    "<math><annotation-xml encoding='text/html'><script>alert(1)</script></annotation-xml></math>",
    "<math><maction actiontype='statusline#http://evil' xlink:href='javascript:alert(1)'>x</maction></math>",
    "<math href='javascript:alert(1)'><mi href='javascript:alert(1)'>x</mi></math>",
    "<noscript><p title='</noscript><img src=x onerror=alert(1)>'></noscript>",
    "<!--><script>alert(1)</script-->",
    "<template><script>alert(1)</script></template><object data=//evil></object><embed src=//evil>",
    "<details open ontoggle=alert(1)>", "<video><source onerror=alert(1)></video>",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_html_of_an_answer_is_text(attack):
    page = to_html(f"before {attack} after")
    check_harmless(page)
    assert html.unescape(attack) in Reader(page).text


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_second_wall_holds_alone(attack):
    check_harmless(markdown._clean(attack))


@pytest.mark.parametrize("source", [
    "[x](javascript:alert(1))", "[x](JaVaScRiPt:alert(1))", "[x](data:text/html;base64,PHNjcmlwdD4=)",
    "[x](java\tscript:alert(1))", "<javascript:alert(1)>", "[x]: javascript:alert(1)\n\n[x]",
    "[x](//evil/path)", "[x](/v1/chat/completions)", "![x](javascript:alert(1))", "![x](http://evil/p.png)",
    "![x](data:image/svg+xml;base64,PHN2Zz4=)", "[x](http://a\" onmouseover=\"alert(1))",
    "```html\" onload=\"alert(1)\nx\n```", "```<img src=x onerror=alert(1)>\nx\n```",
    "```html\n<script>alert(1)</script>\n```", "    <script>alert(1)</script>", "`<script>alert(1)</script>`",
    "| <script>alert(1)</script> |\n|---|\n| <img src=x onerror=alert(1)> |",
])
def test_markdown_of_an_answer_is_harmless(source):
    check_harmless(to_html(source))


@pytest.mark.parametrize("formula", [
    r"\text{<script>alert(1)</script>}", r"\href{javascript:alert(1)}{x}", r"\style{color:red}{x}",
    r"\class{q-dialog}{x}", r"\unicode{x3c}script", r"</math><script>alert(1)</script>", r"\color{red'onload='x'}{y}",
    r"\begin{x}", r"\frac", "{" * 300, r"\left(" * 300, "x" * 5000, "", r"\\", r"\sqrt[", "_" * 50, r"\def\x{\x}\x",
])
def test_formulas_are_harmless_and_never_an_error(formula):
    for source in (f"${formula}$", f"$$\n{formula}\n$$", rf"\({formula}\)", f"\\[{formula}\\]"):
        check_harmless(to_html(source))


@given(st.text(alphabet=st.sampled_from(list("<>&\"'`$\\[](){}!|#*_-=:/\n abcscriptonload"))))
@settings(max_examples=150, deadline=None)
def test_any_text_is_harmless(source):
    check_harmless(to_html(source))


def test_what_a_user_wrote_stands_as_it_is():
    page = plain_to_html("# <b>2 * 3 * 4</b>\nsecond line")
    check_harmless(page)
    assert page == "<p># &lt;b&gt;2 * 3 * 4&lt;/b&gt;<br>second line</p>"


def test_tables_lists_and_code_are_shown():
    page = to_html("| a | b |\n|---|---|\n| 1 | 2 |\n\n- [x] done\n\n```python\nif x < 1:\n    pass\n```")
    tags = [tag for tag, _ in Reader(page).elements]
    assert {"table", "th", "td", "li", "input", "pre"} <= set(tags)
    assert 'class="hl-k">if' in page and "if x < 1:\n    pass\n" in Reader(page).text
    assert 'class="code-copy"' in page and ">python<" in page


@pytest.mark.parametrize("source", ["$x^2$", r"\(x^2\)", "$$x^2$$", "\\[\nx^2\n\\]"])
def test_formulas_become_mathml(source):
    assert "<msup><mi>x</mi><mn>2</mn></msup>" in to_html(f"Here: {source}" if "\n" not in source else source)


def test_lines_stay_lines():
    assert "<br>" in to_html("534678912\n672195348")


def test_prices_are_no_formulas():
    assert "<math" not in to_html("It costs $5 today and $6 tomorrow.")


def test_a_formula_that_cannot_be_read_is_shown_as_it_was_written():
    assert r"\frac" in Reader(to_html(r"$\frac$")).text


def test_code_in_a_language_nobody_knows_is_still_code():
    assert "x &lt; y" in to_html("```nonsense\nx < y\n```")


def test_half_an_answer_is_shown_as_far_as_it_goes():
    for source in ("```python\nprint(1", "**bold", "| a | b |\n|--", "$x^", "[link](http://", "<div"):
        check_harmless(to_html(source))


def test_light_and_dark_pages_have_styles_of_their_own():
    assert ".code pre .hl-k" in code_styles() and ".body--dark .code pre .hl-k" in code_styles()
