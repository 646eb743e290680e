"""Judges that answer with an interval: any model behind an OpenAI-compatible endpoint (Appendix C).

Every judgement is recorded as it arrives and never asked for again. With `replay_only` nothing is
asked at all. Keys come from the environment and go nowhere else.
"""

import asyncio
import hashlib
import logging
import math
import os
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import openai
import tenacity
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from vaalign_lib.jobs import bar
from vaalign_lib.rewards.base import Interval, IntervalSource, PolicyIndex
from vaalign_lib.rewards.endpoint import RefusalError, Reply, StopError, TransientError, client_of, completion
from vaalign_lib.rewards.judgements import LEASE, JudgementStore, Record, RecordError
from vaalign_lib.rewards.replies import ReplyError, parse_interval, shortened
from vaalign_lib.store import FinalError

RANGES = (100, 50, 20, 10)  # those of Table 4 and Figure 7
REPLIES = 2  # to one text that are paid for at most: one that is no interval is asked for once more
REFUSED = "refusal"  # how the failure begins of a text that asking again would not help
KEPT = 10_000  # characters of a reply
TOLD = 5.0  # seconds; longer waits are warned of
_BATCH = 32  # texts that a process claims at a time
_LOG = logging.getLogger(__name__)


class JudgementError(FinalError):
    """Judgements that are missing: not recorded, or failed."""


def judge_prompt(text: str, highest: int = 100) -> str:
    """Return the prompt of Appendix C for a text, with rewards between 1 and `highest`.

    Half a character (a lone surrogate), which no endpoint can be sent, becomes a question mark.
    """
    sent = text.encode("utf-8", "replace").decode()
    return _template().render(text=sent, range=highest)


@cache
def _template() -> Template:
    loader = PackageLoader("vaalign_lib.rewards")
    environment = Environment(loader=loader, undefined=StrictUndefined, autoescape=False)
    return environment.get_template("judge_prompt.txt.jinja")


@dataclass(frozen=True)
class PromptedJudge(IntervalSource):
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
        longest_wait: seconds between two attempts, at most; a longer Retry-After is respected, up to
            `vaalign_lib.rewards.endpoint.PATIENCE`.
        request_seconds: for a whole answer.
        replay_only: never call out; what is not recorded is an error.
        allow_failures: give NaN for texts without an interval instead of an error.
        refusals_say_nothing: give a text that the judge refuses the whole scale, the widest interval
            there is, and do not ask for it again. `vaalign_lib.rewards.endpoint` says what a refusal is.
    """

    store: JudgementStore
    model: str
    base_url: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    highest: int = 100
    temperature: float = 0.0
    workers: int = 8
    attempts: int = 8
    replies: int = REPLIES
    reply_tokens: int = 64
    longest_wait: float = 60.0
    request_seconds: float = 60.0
    replay_only: bool = False
    allow_failures: bool = False
    refusals_say_nothing: bool = False

    def __post_init__(self) -> None:
        least = {"highest": 2, "workers": 1, "attempts": 1, "replies": 1, "reply_tokens": 1}
        for name, value in vars(self).items():
            whole = isinstance(value, int) and not isinstance(value, bool)
            if name in least and not (whole and value >= least[name]):
                raise ValueError(f"{name}: expected a whole number from {least[name]}, got {value!r}")
            if name in ("temperature", "longest_wait", "request_seconds") and not (
                isinstance(value, int | float) and 0 <= value < math.inf
            ):
                raise ValueError(f"{name}: expected a number from 0, got {value!r}")
            if name in ("model", "key_variable") and not (
                isinstance(value, str) and value and value == value.strip()
            ):
                raise ValueError(f"{name}: expected a name without space around, got {value!r}")
        if self.request_seconds == 0:
            raise ValueError("request_seconds: expected more than 0")
        if self.base_url is not None:
            check_base_url(self.base_url)

    def _key_of_endpoint(self) -> str:
        key = os.environ.get(self.key_variable, "")
        if not key:
            raise JudgementError(
                f"{self.model}: set the environment variable {self.key_variable} to your key, "
                "or use replay_only"
            )
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise JudgementError(
                f"{self.model}: the environment variable {self.key_variable} holds no key: there are "
                "spaces, line ends or letters beyond ASCII in it; set it again"
            )
        return key

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
        keys = {text: self.key(text) for text in dict.fromkeys(texts)}
        first: dict[str, str] = {}  # texts may differ in what is not sent
        for text, key in keys.items():
            first.setdefault(key, text)
        known = {text: self._recorded(key) for key, text in first.items()}
        missing = [text for text, one in known.items() if not self._is_answered(one)]
        if self.replay_only:
            absent = [text for text in missing if known[text] is None]
            if absent:
                raise JudgementError(
                    f"{self.store.path}: {len(absent)} of {len(known)} texts have no judgement by "
                    f"{self.model} with R = {self.highest}; the first: {shortened(absent[0])}"
                )
            missing = []
        if missing:
            known.update(self._ask_all(missing))
        answers = {text: known[first[key]] for text, key in keys.items()}
        return {text: one for text, one in answers.items() if one is not None}

    def judge(self, prompts: Sequence[str], responses: Sequence[str], policy: PolicyIndex) -> Interval:
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
        bounds = [whole if self._settled(one) else (one.a, one.b) for one in map(found.__getitem__, texts)]
        return Interval(np.array(bounds, dtype=float))

    def _settled(self, record: Record) -> bool:
        """Whether a text was refused and is not to be asked for again."""
        return self.refusals_say_nothing and record.failure.startswith(REFUSED)

    def _recorded(self, key: str) -> Record | None:
        record = self.store.get(key)
        if record is not None and record.b is not None and record.b > self.highest:
            raise JudgementError(
                f"{self.store.path}: recorded is b={record.b:g} on a scale to {self.highest}, key {key}"
            )
        return record

    def _is_answered(self, record: Record | None, since: str = "") -> bool:
        """Whether a text need not be asked for; `since`: nor where it failed after that date."""
        if record is None:
            return False
        return not record.failure or self._settled(record) or bool(since and record.date >= since)

    # --- asking ---

    def _ask_all(self, texts: list[str]) -> dict[str, Record]:
        """Ask in a thread with a loop of its own, for notebooks run one already."""
        asking = _Asking(self, texts, self._key_of_endpoint())
        loop = asyncio.new_event_loop()
        with ThreadPoolExecutor(1) as thread:
            running = thread.submit(loop.run_until_complete, asking.run())
            try:
                running.result()
            except KeyboardInterrupt:
                _LOG.warning("%s: stopping; requests on their way are waited for", self.model)
                loop.call_soon_threadsafe(asking.stop.set)  # nothing paid for is lost
                raise
            finally:
                thread.shutdown(wait=True)
                loop.close()
        failed = [one.failure for one in asking.found.values() if one.failure]
        if failed:
            told = (self.model, len(failed), len(texts), failed[0])
            _LOG.warning("%s: %d of %d texts got no interval; the first: %s", *told)
        return asking.found

    def record_of(
        self, text: str, reply: Reply, interval: tuple[float, float] | None, failure: str
    ) -> Record:
        """Return what is kept of an answer."""
        a, b = interval or (None, None)
        kept = [part.encode("utf-8", "backslashreplace").decode() for part in (reply.served, failure)]
        return Record(
            key=self.key(text),
            text_hash=hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
            model_asked=self.model,
            model_served=kept[0][:200],
            reply=reply.text[:KEPT].encode("utf-8", "backslashreplace").decode(),
            a=a,
            b=b,
            failure=kept[1],
            date=_now(),
        )


@dataclass
class _Asking:
    """One call's questions: `workers` at a time, each text claimed before it is asked for.

    Of the `texts` that nobody has an answer to yet, those that are claimed are `ready`; `found` holds records
    by text, filled as they come; `stop` is set when no further text is to be asked for.
    """

    judge: PromptedJudge
    texts: list[str]
    secret: str = field(repr=False)
    found: dict[str, Record] = field(default_factory=dict)
    ready: list[str] = field(default_factory=list)
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    served: set[str] = field(default_factory=set)
    owner: str = field(default_factory=lambda: uuid.uuid4().hex)
    since: str = field(default_factory=lambda: _now())
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def run(self) -> None:
        """Ask until every text has a record, or something stops it."""
        judge = self.judge
        try:
            client = client_of(judge.base_url, self.secret, judge.request_seconds)
        except StopError as error:
            raise self._stopped(error) from None
        renewing = asyncio.create_task(self._renew())
        try:
            with bar(len(self.texts), f"judge {judge.model}") as progress:
                workers = [self._work(client, progress) for _ in range(judge.workers)]
                results = await asyncio.gather(*workers, return_exceptions=True)
            for result in results:
                if isinstance(result, BaseException):
                    raise result
        finally:
            renewing.cancel()
            await asyncio.gather(renewing, client.close(), return_exceptions=True)
            judge.store.release(self.owner)

    async def _work(self, client: openai.AsyncOpenAI, progress: Any) -> None:
        try:
            while (text := await self._next(progress)) is not None:
                record = await self._ask(client, text)
                await asyncio.to_thread(self.judge.store.put, record)
                self.found[text] = record
                progress.update()
        except BaseException:
            self.stop.set()  # the others finish what they asked
            raise

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(LEASE / 5)
            with suppress(RecordError):  # locked for long: the next time, before the lease is over
                await asyncio.to_thread(self.judge.store.renew, self.owner)

    async def _next(self, progress: Any) -> str | None:
        """Return a text that is claimed and has no answer, None when there is none left."""
        async with self.lock:
            while self.texts and not self.ready and not self.stop.is_set():
                batch, self.texts = self.texts[:_BATCH], self.texts[_BATCH:]
                keys = {self.judge.key(text): text for text in batch}
                mine = await asyncio.to_thread(self.judge.store.claim, list(keys), self.owner)
                for key, text in keys.items():
                    record = self.judge.store.get(key)  # another process may have been first
                    if record is not None and self.judge._is_answered(record, self.since):
                        self.found[text] = record
                        progress.update()
                    else:
                        (self.ready if key in mine else self.texts).append(text)
                if self.texts and not self.ready:
                    await self._sleep(0.1)  # others ask for these
            return self.ready.pop(0) if self.ready and not self.stop.is_set() else None

    async def _sleep(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self.stop.wait(), seconds)

    async def _ask(self, client: openai.AsyncOpenAI, text: str) -> Record:
        """Ask for one text until there is an interval, a refusal, or no more to be tried."""
        judge, replies, unfit = self.judge, [Reply()], 0

        def again(error: BaseException) -> bool:
            nonlocal unfit
            unfit += isinstance(error, ReplyError)
            return isinstance(error, TransientError) or (
                isinstance(error, ReplyError) and unfit < judge.replies
            )

        async def attempt() -> tuple[float, float]:
            answer = await completion(
                client,
                judge.request_seconds,
                model=judge.model,
                messages=[{"role": "user", "content": judge_prompt(text, judge.highest)}],
                temperature=judge.temperature,
                max_tokens=judge.reply_tokens,
            )
            replies.append(answer)
            self._compare(replies[-1].served)
            return parse_interval(replies[-1].text, judge.highest)

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(again),
            wait=self._wait,
            stop=lambda state: self.stop.is_set() or state.attempt_number >= judge.attempts,
            sleep=self._sleep,
            reraise=True,
        )
        interval: tuple[float, float] | None = None
        failure = ""
        try:
            interval = await retrying(attempt)
        except ReplyError as error:
            interval = error.interval  # asked twice and still sure
            failure = "" if interval else str(error)
        except RefusalError as error:
            failure = f"{REFUSED}: {error}"
        except TransientError as error:
            failure = str(error)
        except StopError as error:
            raise self._stopped(error) from None
        if failure:
            failure = f"{failure}, in attempt {retrying.statistics['attempt_number']}"
        return judge.record_of(text, replies[-1], interval, failure.replace(self.secret, "***"))

    def _wait(self, state: tenacity.RetryCallState) -> float:
        """Wait longer after every failure, and at least as long as the endpoint asks."""
        error = state.outcome.exception() if state.outcome else None
        if not isinstance(error, TransientError):
            return 0.0
        backoff = tenacity.wait_random_exponential(multiplier=0.5, max=self.judge.longest_wait)
        wait = max(error.wait, backoff(state))
        told = str(error).replace(self.secret, "***")
        level = logging.WARNING if wait >= TOLD else logging.INFO
        _LOG.log(level, "%s: %s; asked again in %.3g seconds", self.judge.model, told, wait)
        return wait

    def _stopped(self, error: StopError) -> JudgementError:
        host = urlsplit(self.judge.base_url or "").hostname or "api.openai.com"
        told = str(error).replace(self.secret, "***")
        return JudgementError(
            f"{self.judge.model} at {host}: {told} (check the model's name, your balance and "
            f"{self.judge.key_variable}); nothing was recorded for this text"
        )

    def _compare(self, served: str) -> None:
        """Warn where another model answers than was asked for, or than answered before."""
        if not served or served in self.served:
            return
        self.served.add(served)
        asked = self.judge.model.lower().rpartition("/")[2]
        if asked not in served.lower():
            _LOG.warning("%s: the endpoint answers as %r", self.judge.model, served)
        elif len(self.served) > 1:
            _LOG.warning("%s: answered by %s", self.judge.model, ", ".join(sorted(self.served)))


def check_base_url(url: str) -> None:
    """Check that a URL names an endpoint."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) > 0
        sound = sound and not (parts.username or parts.query or parts.fragment or set(url) & set(" \n\t"))
    except (ValueError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise ValueError(
            f"base_url: expected a URL such as https://host/v1, without user or query, got {url!r}"
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
