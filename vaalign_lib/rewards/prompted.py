"""Judges that answer with an interval: any model behind an OpenAI-compatible endpoint (Appendix C).

Every judgement is recorded as it arrives and never asked for again. With `replay_only` nothing is
asked at all. Keys come from the environment and go nowhere else.
"""

import hashlib
import logging
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property

import numpy as np
import openai
import tenacity
from jinja2 import Environment, PackageLoader, StrictUndefined

from vaalign_lib.progress import progress
from vaalign_lib.rewards.base import Array, Interval, Judgement, Policies
from vaalign_lib.rewards.records import JudgementStore, Record

RANGES = (100, 50, 20, 10)  # those of Table 4 and Figure 7
_HOPELESS = (401, 402, 403, 404)  # key, balance, permission, model: no text will fare better
_NUMBER = re.compile(
    r"(?:[ \t]*\**['\"]?(?P<name>[ab])['\"]?\**[ \t]*[:=])?[ \t]*(?P<value>\d+(?:\.\d+)?)[ \t]*",
    re.IGNORECASE,
)
REFUSED = "refused"  # how the failure begins of a text that asking again would not help
_LOG = logging.getLogger(__name__)


class ReplyError(ValueError):
    """A reply that is not two numbers with 1 <= a < b <= R."""


class JudgementError(RuntimeError):
    """Judgements that are missing: not recorded, or failed."""


def judge_prompt(text: str, highest: int = 100) -> str:
    """Return the prompt of Appendix C for a text, with rewards between 1 and `highest`."""
    environment = Environment(
        loader=PackageLoader("vaalign_lib"),
        undefined=StrictUndefined,
        autoescape=False,
    )
    return environment.get_template("judge_prompt.txt.jinja").render(text=text, range=highest)


def parse_interval(reply: str, highest: int = 100) -> tuple[float, float]:
    """Read a and b from a reply: two lines, each a number, with or without its name before it.

    Raises:
        ReplyError: there is anything else, or not 1 <= a < b <= `highest`.
    """
    lines = [line for line in reply.strip().splitlines() if line.strip()]
    found = [_NUMBER.fullmatch(line) for line in lines]
    matches = [match for match in found if match is not None]
    if len(lines) != 2 or len(matches) != 2:
        raise ReplyError(f"expected two lines with a number each, got {_shortened(reply)}")
    if [(m["name"] or name).lower() for m, name in zip(matches, "ab", strict=True)] != ["a", "b"]:
        raise ReplyError(f"expected a, then b, got {_shortened(reply)}")
    a, b = (float(match["value"]) for match in matches)
    if not 1 <= a < b <= highest:
        raise ReplyError(f"expected 1 <= a < b <= {highest}, got a={a:g}, b={b:g}")
    return a, b


@dataclass(frozen=True)
class PromptedJudge:
    """One judge: a model at an endpoint, asked with the paper's prompt.

    Attributes:
        store: where judgements are recorded.
        model: its name at the endpoint.
        base_url: of an OpenAI-compatible endpoint; None means OpenAI's.
        key_variable: the environment variable that holds the key.
        highest: R, the upper end of the rewards.
        temperature: of the judge's sampling.
        workers: requests at a time.
        attempts: requests for one text, at most.
        replies: replies to one text that are no interval, at most.
        reply_tokens: of a reply, at most; models that reason aloud need more.
        longest_wait: seconds between two attempts, at most; a longer Retry-After is respected.
        request_seconds: time-out of a request.
        replay_only: never call out; what is not recorded is an error.
        allow_failures: give NaN for texts without an interval instead of an error.
        refusals_say_nothing: give a text that the judge does not judge the whole scale, the widest
            interval there is, and do not ask for it again.
    """

    store: JudgementStore
    model: str
    base_url: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    highest: int = 100
    temperature: float = 0.0
    workers: int = 8
    attempts: int = 8
    replies: int = 3
    reply_tokens: int = 64
    longest_wait: float = 60.0
    request_seconds: float = 60.0
    replay_only: bool = False
    allow_failures: bool = False
    refusals_say_nothing: bool = False

    @cached_property
    def _client(self) -> openai.OpenAI:
        key = os.environ.get(self.key_variable)
        if not key:
            raise JudgementError(
                f"{self.model}: set the environment variable {self.key_variable} to your key, "
                "or use replay_only"
            )
        return openai.OpenAI(
            api_key=key,
            base_url=self.base_url,
            timeout=self.request_seconds,
            max_retries=0,
        )

    def key(self, text: str) -> str:
        """Return the key of a text's judgement: model, temperature, prompt; not the endpoint."""
        asked = f"{self.model}\n{self.temperature}\n{judge_prompt(text, self.highest)}"
        return hashlib.sha256(asked.encode()).hexdigest()

    def records(self, texts: Sequence[str]) -> dict[str, Record]:
        """Return the record of every text, by text; asks for those that are not recorded yet.

        A text that occurs several times is asked for once. One that failed before is asked for again.

        Raises:
            JudgementError: with `replay_only`, if a text is not recorded.
        """
        known = {text: self.store.get(self.key(text)) for text in dict.fromkeys(texts)}
        missing = [
            text
            for text, one in known.items()
            if one is None or (one.failure and not self._settled(one))
        ]
        if self.replay_only:
            absent = [text for text in missing if known[text] is None]
            if absent:
                raise JudgementError(
                    f"{self.store.path}: {len(absent)} of {len(known)} texts have no judgement by "
                    f"{self.model} with R = {self.highest}; the first: {_shortened(absent[0])}"
                )
            missing = []
        if missing:
            known.update(self._ask_all(missing))
        return {text: one for text, one in known.items() if one is not None}

    def judge(self, prompts: Sequence[str], responses: Sequence[str], policy: Policies) -> Interval:
        """Judge responses: prompt and response are put to the judge as one text.

        Raises:
            JudgementError: a text has no interval after all attempts, unless `allow_failures`: then its
                bounds are NaN, and the number of such texts is logged.
        """
        texts = [f"{p}\n{r}" for p, r in zip(prompts, responses, strict=True)]
        found = self.records(texts)
        failed = [one for one in found.values() if one.failure and not self._settled(one)]
        if failed and not self.allow_failures:
            raise JudgementError(
                f"{self.model}: {len(failed)} of {len(found)} texts got no interval; the first: "
                f"{failed[0].failure}. With allow_failures they are left out as NaN"
            )
        whole = (1.0, float(self.highest))
        bounds = [
            whole if self._settled(one) else (one.a, one.b) for one in map(found.__getitem__, texts)
        ]
        return Interval(np.array(bounds, dtype=float))

    def _settled(self, record: Record) -> bool:
        """Whether a text was refused and is not to be asked for again."""
        return self.refusals_say_nothing and record.failure.startswith(REFUSED)

    def true_reward(
        self, judgement: Judgement, prompts: Sequence[str], responses: Sequence[str]
    ) -> Array:
        """Return the middle of the interval (responses,), as Algorithm 9 does."""
        if not isinstance(judgement, Interval):
            raise TypeError("judgement: expected the interval of this judge")
        return judgement.midpoint()

    # --- asking ---

    def _ask_all(self, texts: list[str]) -> dict[str, Record]:
        client = self._client  # a missing key is told before any thread starts
        found: dict[str, Record] = {}
        pool = ThreadPoolExecutor(self.workers)
        try:
            waiting = {pool.submit(self._ask, client, text): text for text in texts}
            for done in progress(as_completed(waiting), f"judge {self.model}", total=len(texts)):
                found[waiting[done]] = done.result()
        finally:
            pool.shutdown(
                wait=True, cancel_futures=True
            )  # also on Ctrl-C: nothing paid for is lost
        failed = sum(bool(one.failure) for one in found.values())
        if failed:
            _LOG.warning("%s: %d of %d texts got no interval", self.model, failed, len(texts))
        return found

    def _ask(self, client: openai.OpenAI, text: str) -> Record:
        """Ask for one text until there is an interval, and record what came."""
        last = {"served": "", "reply": ""}
        tries, unfit = 0, 0

        def again(error: BaseException) -> bool:
            nonlocal unfit
            unfit += isinstance(error, ReplyError)
            return unfit < self.replies if isinstance(error, ReplyError) else _is_transient(error)

        @tenacity.retry(
            retry=tenacity.retry_if_exception(again),
            wait=self._wait,
            stop=tenacity.stop_after_attempt(self.attempts),
            reraise=True,
        )
        def attempt() -> tuple[float, float]:
            nonlocal tries
            tries += 1
            last["served"], last["reply"] = self._request(client, text)
            return parse_interval(last["reply"], self.highest)

        interval: tuple[float | None, float | None] = (None, None)
        failure = ""
        try:
            interval = attempt()
        except ReplyError as error:
            failure = f"{REFUSED}: {error}, in attempt {tries}"
        except openai.APIStatusError as error:
            if error.status_code in _HOPELESS:
                raise JudgementError(
                    f"{self.model} at {client.base_url.host}: refused with status "
                    f"{error.status_code}; check the model's name, your balance and "
                    f"{self.key_variable}"
                ) from None
            refused = "" if _is_transient(error) else f"{REFUSED}: "
            failure = f"{refused}status {error.status_code}, in attempt {tries}"
        except openai.APIError as error:
            failure = f"{type(error).__name__}, in attempt {tries}"
        record = Record(
            key=self.key(text),
            text_hash=hashlib.sha256(text.encode()).hexdigest(),
            model_asked=self.model,
            model_served=last["served"],
            reply=last["reply"],
            a=interval[0],
            b=interval[1],
            failure=failure,
            date=datetime.now(UTC).isoformat(timespec="milliseconds"),
        )
        self.store.put(record)
        return self.store.get(record.key) or record  # another process may have asked first

    def _request(self, client: openai.OpenAI, text: str) -> tuple[str, str]:
        try:
            return self._completion(client, text)
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            if isinstance(error, ReplyError):
                raise
            raise ReplyError(f"expected a completion, got something else ({error})") from None

    def _completion(self, client: openai.OpenAI, text: str) -> tuple[str, str]:
        answer = client.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": judge_prompt(text, self.highest)}],
            temperature=self.temperature,
            max_tokens=self.reply_tokens,
        )
        content = answer.choices[0].message.content
        if not isinstance(content, str):
            raise ReplyError(f"expected text, got {type(content).__name__}")
        return str(answer.model or ""), content

    def _wait(self, state: tenacity.RetryCallState) -> float:
        """Wait longer after every failure, and at least as long as the endpoint asks."""
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, ReplyError):
            return 0.0
        asked = 0.0
        if isinstance(error, openai.APIStatusError):
            try:
                asked = float(error.response.headers.get("retry-after", 0))
            except ValueError:
                asked = 0.0
        backoff = tenacity.wait_random_exponential(multiplier=0.5, max=self.longest_wait)
        return max(asked, backoff(state))


def _is_transient(error: BaseException) -> bool:
    """Whether an endpoint may answer if it is asked again later."""
    if isinstance(error, openai.APIStatusError):
        return error.status_code in (408, 409, 425, 429) or error.status_code >= 500
    return isinstance(error, openai.APIConnectionError)


def _shortened(text: str, length: int = 80) -> str:
    return repr(text if len(text) <= length else text[: length - 1] + "…")
