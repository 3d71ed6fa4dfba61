"""HTML pages from the package's templates, with one set of number formats."""

import json
import math
from functools import cache, partial

import jinja2

MARK = b"content=\"default-src 'none'; img-src data:"  # near the start of every page of ours and of no other page
MAX_TEXT_CHARS = 240  # of a file name or a metadata value, to limit the size of the page


def render(template: str, **context) -> str:
    """Render a template to HTML. template: its path inside the package, such as attribute/report.html.jinja."""
    return _environment().get_template(template).render(**context)


@cache
def _environment() -> jinja2.Environment:
    # Names, metadata and reasons come from untrusted files, so all text is escaped. Only charts are marked as safe,
    # because attrib.pages.charts escapes their text.
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("attrib", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {form.__name__: form for form in (text, counted, score, percent, points, worth)}
    environment.filters |= {"number": "{:,}".format, "pretty": partial(json.dumps, indent=1, ensure_ascii=False)}
    return environment


def text(value) -> str:
    """The value as text, cut to MAX_TEXT_CHARS."""
    whole = str(value)
    return whole if len(whole) <= MAX_TEXT_CHARS else whole[: MAX_TEXT_CHARS - 1] + "…"


def counted(count: int, singular: str, plural: str | None = None) -> str:
    """A number with its noun: "1 query", "2,000 queries"."""
    return f"{count:,} {singular if count == 1 else plural or f'{singular}s'}"


def score(value: float, sign: bool = False, digits: int = 3) -> str:
    """A number with fixed decimals; sign: also with a plus, for differences."""
    return format(value, f"{'+' if sign else ''}.{digits}f").replace("-", "\N{MINUS SIGN}")


def percent(part: float, whole: float) -> str:
    """part / whole in percent; 0% and 100% only if exact."""
    if not part or math.isclose(part, whole):
        return "100%" if part else "0%"
    return f"{part / whole:.1%}" if 0.001 <= part / whole < 0.9995 else "<0.1%" if part < whole / 2 else ">99.9%"


def points(share: float, sign: bool = False, digits: int = 1) -> str:
    """A share in 0..1 in percent, without the percent sign."""
    return format(100 * share, f"{'+' if sign else ''}.{digits}f")


def worth(share: float) -> str:
    """A sum of shares, as a number of images."""
    return "<0.01" if 0 < share < 0.005 else f"{share:,.2f}" if share < 100 else f"{share:,.0f}"
