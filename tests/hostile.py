"""Texts that try to run or load something in a page, and what of a page is alive."""

import re

from bleach._vendor import html5lib

TEXTS = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<iframe src=javascript:alert(1)></iframe>",
    "<svg onload=alert(1)><animate onbegin=alert(1)></svg>",
    "<body onload=alert(1)><details open ontoggle=alert(1)>",
    "[a link](javascript:alert(1)) <javascript:alert(1)>",
    '<a href="java&#10;script:alert(1)">x</a>',
    '<a href="data:text/html,<script>alert(1)</script>">x</a>',
    "![](https://elsewhere.example/x.png) <link rel=stylesheet href=//elsewhere.example>",
    "<style>@import '//elsewhere.example'</style><base href=//elsewhere.example>",
    '<meta http-equiv=refresh content="0;url=javascript:alert(1)">',
    "<form action=javascript:alert(1)><button formaction=javascript:alert(1)>x</button></form>",
    r"$\text{<img src=x onerror=alert(1)>}$ $\href{javascript:alert(1)}{x}$ $\frac$",
    r"$$\text{&lt;script&gt;alert(1)&lt;/script&gt;}$$ $\def\a{\a\a}\a$",
    "<math><mtext><table><mglyph><style><!--</style><img title='--><img src=x onerror=alert(1)>'>",
    "</pre></code></td></table>`</script><script>alert(1)</script>`",
    '" onmouseover="alert(1)" x="',
    "<noscript><p title='</noscript><img src=x onerror=alert(1)>'>",
)
_RUN_OR_LOAD = re.compile(
    "script|i?frame|object|embed|applet|form|base|link|svg|audio|video|source|track|input|button|portal"
    "|template|noscript"
)


def alive(page):
    """Return what a browser would run or load in a page, or follow to a script."""
    found = []
    for element in html5lib.parse(page, namespaceHTMLElements=False).iter():
        if not isinstance(element.tag, str):  # a comment
            continue
        tag = element.tag.split("}")[-1]
        if _RUN_OR_LOAD.fullmatch(tag) or (tag == "meta" and element.get("http-equiv") == "refresh"):
            found.append(tag)
        for name, value in element.attrib.items():
            target = re.sub(r"[\s\x00-\x1f]", "", value).lower()
            follows = "href" in name and re.match(r"(?!https?:|mailto:|#)[a-z]+:", target)
            loads = name in ("src", "srcset", "poster", "data") and target[:11] != "data:image/"
            if name.lower().startswith("on") or follows or loads:
                found.append(f"{tag} {name}={value}")
        if tag == "style" and "elsewhere.example" in "".join(element.itertext()):
            found.append("style")
    return found
