"""One request to a judge's endpoint, and what comes of it.

The rule, for every answer that an endpoint can give:

- a completion: its text, which `replies` reads. No interval in it is a `ReplyError`: asked once more,
  then a failure, told loudly;
- `RefusalError`: this text is refused. Only a completed answer without content, a content filter, or a
  400 or 403 about the text is that, and `refusals_say_nothing` makes nothing else the whole scale;
- `TransientError`: the endpoint may answer later. Time-outs, broken connections, 408, 409, 425, 429, 5xx,
  and whatever is no completion although its status says so; asked again after a wait;
- `StopError`: no text will fare better. Keys, balance, model, settings, redirects, a wait of hours; told
  in the endpoint's own words. Nothing is recorded.
"""

import asyncio
import json
import math
import re
import time
from contextlib import aclosing
from dataclasses import dataclass
from email.utils import mktime_tz, parsedate_tz
from typing import TYPE_CHECKING, Any

import httpx2
from pydantic import BaseModel, Field

from vaalign_lib.rewards.replies import ReplyError, shortened

if TYPE_CHECKING:
    import openai

OPENAI = "https://api.openai.com/v1"
LONGEST = 2**20  # bytes of an answer; a judge's has some hundreds
PATIENCE = 600.0  # seconds that an endpoint may ask to wait
_TRANSIENT = (408, 409, 425, 429, *range(500, 600))
_CODES = {  # where an error inside a body says its kind and no status; anything else is transient
    400: r"invalid_request|unsupported|context_length|bad_request|invalid_argument|content_filter",
    401: r"api_key|authenti|unauthorized",
    403: r"permission|forbidden",
    404: r"not_found",
}
_SPENT = re.compile(r"insufficient_(quota|balance)|billing|quota_?exhausted", re.IGNORECASE)
_FILTERED = re.compile(
    r"content_?filter|content_policy|responsibleaipolicy|prohibited_content|data_?inspection"
    r"|moderation_blocked|^invalid_prompt$|^safety$|blocklist",
    re.IGNORECASE,
)
_ABOUT_TEXT = re.compile(  # where there is no code for it: OpenRouter, DeepSeek
    r"\b(?:input|prompt|text|content|message|request)s?\b.{0,80}\b(?:flagged|moderation|filtered|"
    r"content (?:management )?polic|safety system|exists risk|inappropriate|harmful|unsafe)"
    r"|content exists risk|requires moderation",
    re.IGNORECASE | re.DOTALL,
)
_ABOUT_US = re.compile(
    r"\b(?:account|organi[sz]ation|project|api.?key|billing|parameter|unsupported|unrecognized|"
    r"not (?:supported|enabled|allowed|available))\b",
    re.IGNORECASE,
)


class RefusalError(RuntimeError):
    """A text that the judge does not judge."""


class TransientError(RuntimeError):
    """An endpoint that may answer if it is asked again, after the seconds of `wait` for which it asked."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


class StopError(RuntimeError):
    """An endpoint that will answer no text before something is changed."""


@dataclass(frozen=True)
class Reply:
    """What a judge said, or the whole lines of it before the limit of tokens, and the model that answered."""

    served: str = ""
    text: str = ""


class _Message(BaseModel, extra="allow"):
    content: str | list[dict[str, Any]] | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message = _Message()
    finish_reason: str | None = None
    error: Any = None


class _Completion(BaseModel):
    model: str | None = None
    choices: list[_Choice] = Field(min_length=1)


def client_of(base_url: str | None, key: str, seconds: float) -> "openai.AsyncOpenAI":
    """Return a client that follows no redirect and reads no more than `LONGEST` bytes of an answer.

    Where there cannot be one, say for the proxy that the environment names, that is a `StopError`.
    """
    import openai  # here, for it takes a second

    try:
        http = openai.DefaultAsyncHttpxClient(follow_redirects=False, event_hooks={"response": [_bounded]})
        return openai.AsyncOpenAI(
            api_key=key,
            base_url=base_url or OPENAI,
            timeout=seconds,
            max_retries=0,  # those of the library would ask again where nothing helps
            http_client=http,
            default_headers={"Accept-Encoding": "identity"},  # nothing small becomes large here
        )
    except (ValueError, ImportError, openai.OpenAIError, httpx2.InvalidURL) as error:
        raise StopError(f"no connection can be made: {error}") from None


async def _bounded(response: httpx2.Response) -> None:
    """Read an answer's bytes, up to `LONGEST`."""
    if (coding := response.headers.get("content-encoding", "identity")) != "identity":
        raise httpx2.DecodingError(f"coded as {coding} although plain text was asked for")
    stream: Any = response.stream
    body = bytearray()
    async with aclosing(stream):
        async for chunk in stream:
            body += chunk
            if len(body) > LONGEST:
                raise ReplyError(f"expected a short reply, got more than {LONGEST} bytes")
    response.stream = httpx2.ByteStream(bytes(body))


async def completion(client: "openai.AsyncOpenAI", seconds: float, **request: Any) -> Reply:
    """Ask once and return the judge's words, or raise as above; `seconds` are for the whole answer."""
    import openai

    try:
        async with asyncio.timeout(seconds):
            raw = await client.chat.completions.with_raw_response.create(**request)
    except TimeoutError:
        raise TransientError(f"no whole answer in {seconds:g} seconds") from None
    except openai.APIStatusError as error:
        raise _fault(error.body, error.response.headers, error.status_code) from None
    except openai.APIConnectionError as error:
        cause = f" ({error.__cause__})" if str(error.__cause__ or "") else ""
        raise TransientError(f"{type(error).__name__}{cause}") from None
    return _read(raw.http_response.content, raw.headers)


def _read(body: bytes, headers: httpx2.Headers) -> Reply:
    """Return the judge's words from an answer whose status is 200."""
    try:
        content = json.loads(body)
        content = content[0] if isinstance(content, list) and content else content
        if isinstance(content, dict) and content.get("error"):
            raise _fault(content["error"], headers)
        answer = _Completion.model_validate(content)
    except (ValueError, RecursionError):
        kind, told = headers.get("content-type", "nothing"), shortened(body.decode("utf-8", "replace"))
        raise TransientError(f"expected a completion, got {kind}: {told}") from None
    if answer.choices[0].error:
        raise _fault(answer.choices[0].error, headers)
    return Reply(answer.model or "", _words(answer.choices[0]))


def _words(choice: _Choice) -> str:
    """Return the text of a choice, parts joined; of one cut off, the whole lines."""
    message, reason = choice.message, choice.finish_reason or ""
    if _FILTERED.search(reason) or (message.refusal or "").strip():
        raise RefusalError(message.refusal or f"finish_reason {reason}")
    parts = message.content or ""
    if isinstance(parts, list):
        said = [part["text"] for part in parts if isinstance(part.get("text"), str)]
        if not said and parts:
            raise TransientError(f"expected text, got {shortened(str(parts))}")
        parts = "".join(said)
    if reason == "length":
        return _before_cut(parts)
    if parts.strip():
        return parts
    beside = message.model_extra or {}
    if any(beside.get(one) for one in ("tool_calls", "reasoning_content", "reasoning", "reasoning_details")):
        raise ReplyError("expected text, got only reasoning or calls of tools")
    if reason != "stop":
        raise TransientError(f"expected text, got none and finish_reason {reason or 'missing'}")
    raise RefusalError("a completion without content")


def _before_cut(text: str) -> str:
    if not text.strip():
        raise StopError("finish_reason length before the reply begins: raise reply_tokens, its limit")
    whole, _, last = text.rpartition("\n")
    if not whole.strip() or re.search(r"\d", last):
        raise ReplyError(f"cut off by the limit of tokens, raise reply_tokens: {shortened(text)}")
    return whole


# --- errors -------------------------------------------------------------------------------------------


def _fault(body: object, headers: httpx2.Headers, status: int = 0) -> Exception:
    """Return what an error is, of a status or inside a body: the text's, transient, or one that stops."""
    error = body[0] if isinstance(body, list) and body else body
    error = error.get("error", error) if isinstance(error, dict) else error
    told = error.get("message") or error.get("code") or error if isinstance(error, dict) else error
    words, codes = shortened(str(told or "without a word"), 300)[1:-1], _codes(error)
    status = status or _status(codes)
    if 300 <= status < 400:
        return StopError(f"status {status}: redirects to {headers.get('location')}; not followed")
    if status in (400, 403) and _is_about_text(error, words, codes):
        return RefusalError(f"status {status}: {words}")
    if status not in _TRANSIENT or any(map(_SPENT.search, codes)):
        return StopError(f"status {status}: {words}")
    wait = seconds_asked(headers)
    if wait > PATIENCE:
        return StopError(f"status {status}: {words}; asks to wait {wait:g} seconds, start again then")
    return TransientError(f"status {status}: {words}", wait)


def _is_about_text(error: object, words: str, codes: list[str]) -> bool:
    if not isinstance(error, dict):  # a page of a proxy or a firewall
        return False
    if any(map(_FILTERED.search, codes)):
        return True
    param = error.get("param")
    about_input = param is None or str(param).startswith(("messages", "prompt", "input"))
    return bool(about_input and _ABOUT_TEXT.search(words) and not _ABOUT_US.search(words))


def _status(codes: list[str]) -> int:
    """Return the status that an error inside a body stands for, 503 where it does not say."""
    for code in codes:
        if code.isdecimal() and 400 <= int(code) < 600:
            return int(code)
    if any(map(_FILTERED.search, codes)):
        return 400
    if any(map(_SPENT.search, codes)):
        return 429
    found = (status for status, known in _CODES.items() if re.search(known, " ".join(codes), re.I))
    return next(found, 503)


def _codes(error: object) -> list[str]:
    """Return all that names an error's kind."""
    if not isinstance(error, dict):
        return []
    inner = error.get("innererror") or error.get("metadata") or {}
    named = [error.get(name) for name in ("code", "type", "status")]
    if isinstance(inner, dict):
        named += [inner.get("code"), "content_filter" if "flagged_input" in inner else None]
    return [str(one) for one in named if isinstance(one, str | int)]


def seconds_asked(headers: httpx2.Headers) -> float:
    """Return for how long an endpoint asks to wait, 0 where it says nothing sensible."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        said = headers.get(name, "")
        try:
            seconds = float(said) * unit
        except ValueError:
            date = parsedate_tz(said)
            seconds = mktime_tz(date) - time.time() if date else 0.0
        if math.isfinite(seconds) and seconds > 0:
            return seconds
    return 0.0
