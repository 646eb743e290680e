"""Judges that answer with an interval: any model behind an OpenAI-compatible endpoint (Appendix C).

Every judgement is recorded as it arrives and never asked for again. Keys come from the environment and go
nowhere else.
"""

import asyncio
import hashlib
import logging
import math
import os
import random
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from vaalign_lib.jobs import bar
from vaalign_lib.rewards.base import Interval, IntervalSource, PolicyIndex
from vaalign_lib.rewards.endpoint import RefusalError, Reply, StopError, TransientError, client_of, completion
from vaalign_lib.rewards.judgements import LEASE, JudgementStore, Record, RecordError
from vaalign_lib.rewards.replies import ReplyError, parse_interval
from vaalign_lib.store import FinalError

if TYPE_CHECKING:
    import openai

REPLIES = 2  # to one text that are paid for at most: one that is no interval is asked for once more
REFUSED = "refusal"  # how the failure begins of a text that asking again would not help
KEPT = 10_000  # characters of a reply
TOLD = 5.0  # seconds; longer waits are warned of
_BATCH = 32  # texts that a process claims at a time
_LEAST = {"highest": 2, "workers": 1, "attempts": 1, "replies": 1, "reply_tokens": 1}
_LOG = logging.getLogger(__name__)


class JudgementError(FinalError):
    """Judgements that are missing: they failed, or cannot be asked for."""


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
    """One judge: a model at an endpoint, asked with the paper's prompt; `store` has what it said."""

    store: JudgementStore
    model: str
    base_url: str | None = None  # None means OpenAI's
    key_variable: str = "OPENAI_API_KEY"  # the environment variable that holds the key
    highest: int = 100  # R, the upper end of the rewards
    temperature: float = 0.0
    workers: int = 8  # requests at a time
    attempts: int = 8  # requests for one text, at most
    replies: int = REPLIES  # to one text that are no interval, at most
    reply_tokens: int = 64  # at most; models that reason aloud need more
    longest_wait: float = 60.0  # seconds between two attempts, if the endpoint does not ask for more
    request_seconds: float = 60.0  # for a whole answer
    allow_failures: bool = False  # give NaN for texts without an interval instead of an error
    refusals_say_nothing: bool = False  # give a refused text the whole scale, and do not ask for it again

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name in _LEAST and not (type(value) is int and value >= _LEAST[name]):
                raise ValueError(f"{name}: expected a whole number from {_LEAST[name]}, got {value!r}")
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
            _check_base_url(self.base_url)

    def key(self, text: str) -> str:
        """Return the key of a text's judgement: model, temperature, prompt; not the endpoint."""
        asked = f"{self.model}\n{self.temperature}\n{judge_prompt(text, self.highest)}"
        return hashlib.sha256(asked.encode()).hexdigest()

    def records(self, texts: Sequence[str]) -> dict[str, Record]:
        """Return the record of every text, by text; asks once for those that are not recorded yet, and again
        for those that failed before.
        """
        keys = {text: self.key(text) for text in texts}
        sent = {key: text for text, key in keys.items()}  # texts may differ in what is not sent
        recorded = {key: self._recorded(key) for key in sent}
        known = {key: one for key, one in recorded.items() if one is not None and self._is_answered(one)}
        if missing := {key: text for key, text in sent.items() if key not in known}:
            known |= self._ask_all(missing)
        return {text: known[key] for text, key in keys.items()}

    def judge(self, prompts: Sequence[str], responses: Sequence[str], policy: PolicyIndex) -> Interval:
        """Judge responses: prompt and response are put to the judge as one text.

        Raises:
            JudgementError: a text has no interval after all attempts, unless `allow_failures`: then its
                bounds are NaN, and the number of such texts is logged.
        """
        texts = [f"{p}\n{r}" for p, r in zip(prompts, responses, strict=True)]
        found = self.records(texts)
        failed = [one for one in found.values() if one.failure and not self._is_settled(one)]
        if failed and not self.allow_failures:
            raise JudgementError(
                f"{self.model}: {len(failed)} of {len(found)} texts got no interval; the first: "
                f"{failed[0].failure}. With allow_failures they are left out as NaN"
            )
        whole = (1.0, float(self.highest))
        records = [found[text] for text in texts]
        bounds = [whole if self._is_settled(one) else (one.a, one.b) for one in records]
        return Interval(np.array(bounds, dtype=float))

    def _is_settled(self, record: Record) -> bool:
        """Whether a text was refused and is not to be asked for again."""
        return self.refusals_say_nothing and record.failure.startswith(REFUSED)

    def _is_answered(self, record: Record, since: str = "") -> bool:
        """Whether a text need not be asked for; `since`: nor where it failed after that date."""
        return not record.failure or self._is_settled(record) or bool(since and record.date >= since)

    def _recorded(self, key: str) -> Record | None:
        record = self.store.get(key)
        if record is not None and record.b is not None and record.b > self.highest:
            raise JudgementError(
                f"{self.store.path}: recorded is b={record.b:g} on a scale to {self.highest}, key {key}"
            )
        return record

    def _ask_all(self, texts: dict[str, str]) -> dict[str, Record]:
        """Ask for texts by key, in a thread with a loop of its own, for notebooks run one already."""
        secret = os.environ.get(self.key_variable, "")
        if not (secret and secret.isascii() and secret.isprintable()) or " " in secret:
            raise JudgementError(
                f"{self.model}: set the environment variable {self.key_variable} to your key, without "
                "spaces, line ends and letters beyond ASCII"
            )
        asking = _Asking(self, texts, secret)
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
        if failed := [one.failure for one in asking.found.values() if one.failure]:
            told = (self.model, len(failed), len(texts), failed[0])
            _LOG.warning("%s: %d of %d texts got no interval; the first: %s", *told)
        return asking.found

    def record_of(
        self, text: str, reply: Reply, interval: tuple[float, float] | None, failure: str
    ) -> Record:
        """Return what is kept of an answer."""
        text_hash = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        said = (reply.served[:200], reply.text[:KEPT], failure)
        served, reply_text, failure = (one.encode("utf-8", "backslashreplace").decode() for one in said)
        a, b = interval or (None, None)
        return Record(self.key(text), text_hash, self.model, served, reply_text, a, b, failure, _now())


@dataclass
class _Asking:
    """One call's questions: `workers` at a time, each text claimed before it is asked for.

    Of the `texts` by key, `waiting` are neither claimed, which are `ready`, nor answered, which are `found`;
    `stop` is set when no further text is to be asked for.
    """

    judge: PromptedJudge
    texts: dict[str, str]
    secret: str = field(repr=False)
    found: dict[str, Record] = field(default_factory=dict)
    ready: list[str] = field(default_factory=list)
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    served: set[str] = field(default_factory=set)
    owner: str = field(default_factory=lambda: uuid.uuid4().hex)
    since: str = field(default_factory=lambda: _now())
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self.waiting = list(self.texts)

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

    async def _work(self, client: "openai.AsyncOpenAI", progress: Any) -> None:
        try:
            while (key := await self._next(progress)) is not None:
                record = await self._ask(client, self.texts[key])
                await asyncio.to_thread(self.judge.store.put, record)
                self.found[key] = record
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
        """Return the key of a text that is claimed and has no answer, None when there is none left."""
        store = self.judge.store
        async with self.lock:
            while self.waiting and not self.ready and not self.stop.is_set():
                batch, self.waiting = self.waiting[:_BATCH], self.waiting[_BATCH:]
                mine = await asyncio.to_thread(store.claim, batch, self.owner)
                for key in batch:
                    record = store.get(key)  # another process may have been first
                    if record is not None and self.judge._is_answered(record, self.since):
                        self.found[key] = record
                        progress.update()
                    else:
                        (self.ready if key in mine else self.waiting).append(key)
                if self.waiting and not self.ready:
                    await self._sleep(0.1)  # others ask for these
            return self.ready.pop(0) if self.ready and not self.stop.is_set() else None

    async def _sleep(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self.stop.wait(), seconds)

    async def _ask(self, client: "openai.AsyncOpenAI", text: str) -> Record:
        """Ask for one text until there is an interval, a refusal, or no more to be tried."""
        judge, reply, unfit = self.judge, Reply(), 0
        request: dict[str, Any] = {"temperature": judge.temperature, "max_tokens": judge.reply_tokens}
        request["messages"] = [{"role": "user", "content": judge_prompt(text, judge.highest)}]
        for attempt in range(1, judge.attempts + 1):
            interval, failure, wait = None, "", 0.0
            try:
                reply = await completion(client, judge.request_seconds, model=judge.model, **request)
                self._compare(reply.served)
                interval = parse_interval(reply.text, judge.highest)
                break
            except RefusalError as error:
                failure = f"{REFUSED}: {error}, in attempt {attempt}"
                break
            except ReplyError as error:
                unfit += 1
                interval = error.interval  # asked twice and still sure
                failure = "" if interval else f"{error}, in attempt {attempt}"
            except TransientError as error:
                failure, wait = f"{error}, in attempt {attempt}", self._wait(error, attempt)
            except StopError as error:
                raise self._stopped(error) from None
            if unfit == judge.replies or attempt == judge.attempts or self.stop.is_set():
                break
            await self._sleep(wait)
        return judge.record_of(text, reply, interval, failure.replace(self.secret, "***"))

    def _wait(self, error: TransientError, attempt: int) -> float:
        """Wait longer after every failure, and at least as long as the endpoint asks."""
        backoff = random.uniform(0, min(self.judge.longest_wait, 0.5 * 2 ** min(attempt - 1, 30)))
        wait = max(error.wait, backoff)
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
        if self.judge.model.lower().rpartition("/")[2] not in served.lower():
            _LOG.warning("%s: the endpoint answers as %r", self.judge.model, served)
        elif len(self.served) > 1:
            _LOG.warning("%s: answered by %s", self.judge.model, ", ".join(sorted(self.served)))


def _check_base_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) > 0
        sound = sound and not (parts.username or parts.query or parts.fragment or set(url) & set(" \n\t"))
    except (ValueError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise ValueError(f"base_url: expected a URL like https://host/v1 without user or query, got {url!r}")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
