"""What a judge's reply says: two numbers, however they are written (bold, a list, JSON, named, "out of R").

It is not read where anything else could be meant: other digits on the line, two values of one name, signs.
"""

import json
import re
from typing import Any

_A, _B = (
    rf"(?:{letter}|{word}(?:[ _-]bound)?|{short}(?:imum)?)"
    for letter, word, short in (("a", "low(?:er)?", "min"), ("b", "(?:upp|high)(?:er)?", "max"))
)
_VALUE = r"\+?(\d{1,9}(?:\.\d{1,20})?)(?![^\W_]|[.,_'’]\d|[.\s]*[%‰°²³½])"
_DECOR = r"[\s*_`'\"“”„«»()\[\]{}\\$#>|]{0,40}"  # that means nothing
_END = r"[ \t*_`'\"“”„«»)\]}\\$|.,;!]{0,40}"
_ASIDE = r"(?:\([^()\d]*\))?"
_IS = r"(?:[:=|≈~→]|-+>|=>|\bis\b|\bequals\b|[ ]-+[ ])"
_FROM_TO = (  # a dash with a space on one side only is a sign
    r"(?:\s*(?:[,;~|<&]|\.{2,3}|…|→|,\s*and\b)\s*|[ ]-[ ]|(?<=\d)-(?=\d)"
    r"|\s+(?:to|and|through|until)\s+)"
)
_REASONING = r"(think|thinking|reasoning)"
_SAME = {"٫": ".", "٬": ",", "、": ",", "。": ".", "〜": "~"} | dict.fromkeys("‐‑‒–—―−﹣", "-")

LONGEST = 50_000  # characters of a reply that is read, reasoning included


class ReplyError(ValueError):
    """A reply that is not two numbers with 1 <= a < b <= R.

    Attributes:
        interval: what it says all the same where a = b; None otherwise.
    """

    interval: tuple[float, float] | None = None


def parse_interval(reply: str, highest: float = 100) -> tuple[float, float]:
    """Read a and b from a reply.

    Raises:
        ReplyError: it does not say exactly one a and b, or not 1 <= a < b <= `highest`.
    """
    text = _plain(reply, highest)
    said = _json(text, highest) or _named(text, highest)
    pair = (said["a"], said["b"]) if len(said) == 2 else _bare(text, highest)
    if pair is None or not said.items() <= dict(zip("ab", pair, strict=True)).items():
        raise ReplyError(f"expected two numbers, a and b, got {shortened(reply)}")
    a, b = map(float, pair)
    if not 1 <= a < b <= highest:
        error = ReplyError(f"expected 1 <= a < b <= {highest:g}, got a={a:g}, b={b:g}")
        error.interval = (a, b) if 1 <= a == b <= highest else None
        raise error
    return a, b


def shortened(text: str, length: int = 80) -> str:
    """Return a text in quotes, its end left out where it is long."""
    return repr(text if len(text) <= length else text[: length - 1] + "…")


def _plain(reply: str, highest: float) -> str:
    """Return what a reply says without its reasoning, in ASCII digits, signs and spaces."""
    if len(reply) > LONGEST:
        raise ReplyError(f"expected a short reply, got {len(reply)} characters")
    text = re.sub(rf"<{_REASONING}>.*?</\1>", " ", reply, flags=re.DOTALL | re.IGNORECASE)
    text = re.split(rf"</(?:{_REASONING})>", text, flags=re.IGNORECASE)[-1]  # begun in the prompt
    if re.search(rf"<{_REASONING}>", text, re.IGNORECASE):
        raise ReplyError(f"expected an answer after the reasoning, got {shortened(reply)}")
    text = "".join(map(_character, text))
    text = re.sub(r"\A\s*a:\s*\n\s*b:\s*\n(?=\s*\d)", "", text)  # the prompt's end, repeated
    if re.search(r"<a>", text, re.IGNORECASE) and re.search(r"<b>", text, re.IGNORECASE):
        text = re.sub(r"<([ab])>", r" \1: ", text, flags=re.IGNORECASE)
    text = re.sub(r"</?[a-z][^<>\d\n]*>|\\(?:boxed|mathbf)\b", " ", text, flags=re.IGNORECASE)
    asked = r"\bscale (?:of|from) 1(?: to |-| - )R\b|1 ?(?:≤|<=) ?a ?< ?b ?(?:≤|<=) ?R\b"
    asked = asked.replace("R", f"{highest:g}") + r"(?![.,]\d)"
    return re.sub(asked, " ", text)  # the prompt's words


def _character(one: str) -> str:
    if one.isdecimal():
        return str(int(one))
    if "\uff01" <= one <= "\uff5e":  # full width
        return chr(ord(one) - 0xFEE0)
    if one not in "\n\t " and (one.isspace() or not one.isprintable()):
        return "\n" if one in "\r\v\f\x85\u2028\u2029" else " "
    return _SAME.get(one, one)


def _out_of(highest: float) -> str:
    return rf"(?:[ \t]*(?:/|out of)[ \t]*{highest:g}(?:\.0+)?(?![^\W_]|[.,]\d|\s*%))?"


def _json(text: str, highest: float) -> dict[str, str]:
    """Return the values of a JSON object with a and b, or of a list of two numbers; else nothing."""
    found = re.search(r"\{.*\}|\[.*\]", text, re.DOTALL)
    if found is None or re.search(r"\d", text[: found.start()] + text[found.end() :]):
        return {}
    kinds: Any = {"parse_int": str, "parse_float": str, "parse_constant": str}
    try:
        content = json.loads(found[0], object_pairs_hook=tuple, **kinds)
    except (ValueError, RecursionError):
        return {}
    values: Any = content
    if isinstance(content, tuple):
        named = [[v for key, v in content if re.fullmatch(one, key, re.I)] for one in (_A, _B)]
        values = [one[0] for one in named if len(one) == 1]
    number = re.compile(rf"\s*{_VALUE}{_out_of(highest)}\s*")
    matches = [number.fullmatch(value) for value in values if isinstance(value, str)]
    if len(values) != 2 or len(matches) != 2 or None in matches:
        return {}
    return {"a": matches[0][1], "b": matches[1][1]}  # type: ignore[index]


def _named(text: str, highest: float) -> dict[str, str]:
    """Return the values that are called a or b, if each has one and no number is beside it.

    Raises:
        ReplyError: a name has two values, or there are other digits on the line.
    """
    statement = re.compile(
        rf"(?:^[ \t]*[12][.)]{_DECOR})?(?<![^\W_])(?<![^\W\d_][-'’.])(?:({_A})|({_B}))"
        rf"(?:{_DECOR}\([^()\d]*\))?{_DECOR}{_IS}{_DECOR}(?!2[.)]\W*b){_VALUE}{_out_of(highest)}"
        rf"(?={_END}(?:$|[|&<#(]|//|[ ]-+(?:[ ]|$)|(?:and|to|but|because|{_A}|{_B})\b)"
        rf"|[ \t]*[*_`'\")\]}}\\$]*[.,;!](?!\d))",
        re.IGNORECASE | re.MULTILINE,
    )
    values: dict[str, set[float]] = {"a": set(), "b": set()}
    said: dict[str, str] = {}
    both = re.compile(rf"(?<![^\W_]){_A}[ ,&/-]+(?:and +)?\Z", re.IGNORECASE)
    for match in statement.finditer(text):
        if match[2] and both.search(text[max(0, match.start() - 40) : match.start()]):
            continue  # of "a, b: 30, 70"
        name = "a" if match[1] else "b"
        values[name].add(float(match[3]))
        said[name] = match[3]
    rest = statement.sub(lambda match: "\0" + "\n\0" * match[0].count("\n"), text)
    numbered = [line for line in rest.splitlines() if re.search(r"\d", line)]
    beside = any("\0" in line or not re.search(r"[^\W\d_]{2}", line) for line in numbered)
    if (beside and len(said) == 2) or max(map(len, values.values())) > 1:
        raise ReplyError(f"expected one a and one b, got {shortened(text.strip())}")
    return said


def _bare(text: str, highest: float) -> tuple[str, str] | None:
    """Return two numbers on two lines, or on one with a sign of a range between; no digits elsewhere."""
    number = _VALUE + _out_of(highest)
    item = re.compile(
        rf"\s*(?:([-*•+]|[12][.)])\s+)?{_DECOR}(?:(?:({_A})|({_B}))(?![\d+]))?{_DECOR}"
        rf"(?:{_IS}|[.)](?=\s))?{_DECOR}(?<![-+.,\d])(?![12][.)]\s*$){number}{_END}{_ASIDE}{_END}",
        re.IGNORECASE,
    )
    span = re.compile(
        rf"\s*(?:[^\d\n]*[:=])?\s*(?:(?:between|from)\s+)?{_DECOR}{number}[*_`\"')\]}}]*{_FROM_TO}"
        rf"{_DECOR}{number}{_END}{_ASIDE}{_END}",
        re.IGNORECASE,
    )
    lines = [line for line in text.splitlines() if re.search(r"\d", line)]
    if len(lines) == 1 and (match := span.fullmatch(lines[0])):
        return None if _one_name(re.split(r"\d", text)[0]) else (match[1], match[2])
    items = [item.fullmatch(line) for line in lines]
    if len(items) != 2 or items[0] is None or items[1] is None:
        return None
    marks = [one[1] and one[1][0] for one in items]  # type: ignore[index]
    if items[0][3] or items[1][2] or (marks[0] != marks[1] and marks != ["1", "2"]):
        return None
    return (items[0][4], items[1][4]) if marks != ["2", "2"] and marks != ["1", "1"] else None


def _one_name(label: str) -> bool:
    """Whether what stands before a range is the name of one number only."""
    last = re.search(rf"(?<![^\W_])(?:{_A}|{_B})\W*\Z", label, re.IGNORECASE)
    both = rf"(?<![^\W_]){_A}\W+(?:and\W+)?{_B}\W*\Z"
    return last is not None and not re.search(both, label, re.IGNORECASE)
