"""Any OpenAI-compatible server as a function: chats with images in, answers out.

In: a base URL, a model id, chats. Out: texts, and token ids and log-probs where the server gives them.
Not here: starting a server, what is asked, what is done with an answer. Neither torch nor a session.

Inside, requests run concurrently in an event loop of a thread of its own; outside, everything is an
ordinary call. Images travel inside the messages as PNG data URLs, so the server sees the pixels we see.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from evals import chats
from runtime.errors import MissingExtra, PocketError

Message = Mapping[str, Any]
Messages = Sequence[Message]
TRANSIENT = {408, 409, 425, 429}
LONGEST_PAUSE_SECONDS = 60.0
LOCAL = {"localhost", "127.0.0.1", "::1"}


class ServerError(PocketError):
    """A server gives no usable answer. `status` is the HTTP status of its last one, None without any."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class RequestRefused(ServerError):
    """The server is well but will not answer this request (400, 413, 422): too long, a bad image."""


@dataclass(frozen=True)
class Ask:
    """What is wanted of a chat. `count` answers; `seed` and the ids are honoured where the server can."""

    max_new_tokens: int = 1024
    greedy: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    count: int = 1
    seed: int | None = None
    tokens: bool = False
    """Ask for token ids and their log-probs."""


@dataclass(frozen=True)
class Choice:
    """One answer. `finish` is `stop`, `length` or what else the server says.

    `token_ids` (with the end token where it was generated) and `log_probs`, one a token, are None where
    the server does not give them.
    """

    text: str
    finish: str
    token_ids: tuple[int, ...] | None = None
    log_probs: tuple[float, ...] | None = None


@dataclass
class Usage:
    """What a client has used so far. `retries` counts attempts beyond the first; `faults` says why."""

    requests: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    faults: Counter[str] = field(default_factory=Counter)


class Client:
    """Chats with one model of one server.

    A request is tried `1 + retries` times, with exponential pauses and jitter (or as long as the
    server's Retry-After says), on 408, 409, 425, 429, 5xx, a lost connection, silence for
    `timeout_seconds`, and on an answer that is no whole chat completion.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        timeout_seconds: float = 600.0,
        retries: int = 5,
        concurrency: int = 32,
        pause_seconds: float = 0.5,
    ) -> None:
        self.base_url, self.model = base_url.rstrip("/"), model
        self.timeout_seconds, self.retries, self.concurrency = timeout_seconds, retries, concurrency
        self.pause_seconds = pause_seconds
        self.usage = Usage()
        self._draining = False
        self._understood: int | None = None  # index in chats.DIALECTS
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._api: Any = None
        self._api_key = api_key or os.environ.get("OPENAI_API_KEY") or "none"

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def dialect(self) -> str | None:
        """How the server was found to take its options (see `chats.DIALECTS`); None before any answer."""
        return None if self._understood is None else chats.DIALECTS[self._understood].name

    def chat(self, conversations: Iterable[Messages], **options: Any) -> list[list[Choice]]:
        """`options` are the fields of `Ask`, the same for all. Raises ServerError; what had arrived is lost.

        To keep answers as they come, use `stream`.
        """
        ask = Ask(**options)
        found = dict(self.stream((messages, ask) for messages in conversations))
        return [found[place] for place in range(len(found))]

    def generate(self, conversations: Iterable[Messages], **options: Any) -> list[str]:
        """One text a chat, greedy unless `options` say otherwise: what a judge takes."""
        return [choices[0].text for choices in self.chat(conversations, **{"greedy": True, **options})]

    def stream(
        self,
        requests: Iterable[tuple[Messages, Ask]],
        refused: Callable[[int, RequestRefused], None] | None = None,
    ) -> Iterator[tuple[int, list[Choice]]]:
        """Yield (place of the request, its choices) in the order in which they arrive.

        At most `concurrency` requests are under way, and one is taken from `requests` when there is room
        for it, so the images of a long list are never all in memory. When a request fails for good, no
        more are taken or tried again, those under way are still yielded, then the error is raised.
        `refused` is told of requests that the server will not answer, instead.
        """
        self._draining = False
        arrived: queue.SimpleQueue[tuple[int, concurrent.futures.Future[list[Choice]]]] = queue.SimpleQueue()
        running: dict[int, concurrent.futures.Future[list[Choice]]] = {}
        source, error, more = enumerate(requests), None, True
        try:
            while True:
                while more and error is None and len(running) < self.concurrency:
                    taken = next(source, None)
                    if taken is None:
                        more = False
                        break
                    place, (messages, ask) = taken
                    running[place] = self._submit(self._ask(chats.for_server(messages), ask))
                    running[place].add_done_callback(lambda done, place=place: arrived.put((place, done)))  # type: ignore[misc]
                if not running:
                    break
                place, done = arrived.get()
                del running[place]
                try:
                    choices = done.result()
                except ServerError as failed:
                    if refused is not None and isinstance(failed, RequestRefused):
                        refused(place, failed)
                        continue
                    error, self._draining = error or failed, True
                    continue
                yield place, choices
            if error is not None:
                raise error
        finally:
            for future in running.values():
                future.cancel()

    def models(self) -> list[dict[str, Any]]:
        """What the server lists as served; each entry has an `id`, vLLM's also the `root` it loaded.

        Asked once. Raises ServerError: not every server has a list.
        """
        return list(self._submit(self._list()).result())

    def close(self) -> None:
        """End the connections and the thread. The client opens them again when it is used again."""
        if self._loop is None or self._thread is None:
            return
        with contextlib.suppress(Exception):
            self._submit(self._api.close()).result(timeout=5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)
        if not self._thread.is_alive():
            self._loop.close()
        self._loop = self._thread = self._api = None

    def _submit(self, work: Any) -> concurrent.futures.Future[Any]:
        if self._loop is None:
            self._api = _connect(self.base_url, self._api_key, self.timeout_seconds)
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="client", daemon=True)
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _ask(self, messages: list[dict[str, Any]], ask: Ask) -> list[Choice]:
        """One chat, in the dialect that the server has understood before, or the first that it does."""
        path = f"{self.base_url}/chat/completions"
        completions = self._api.chat.completions.with_raw_response
        tried = range(len(chats.DIALECTS)) if self._understood is None else [self._understood]
        for number in tried:
            body = chats.DIALECTS[number].body(ask)

            async def post(body: dict[str, Any] = body) -> Any:
                raw = await completions.create(model=self.model, messages=messages, extra_body=body)
                return raw.http_response.json()

            try:
                payload = await self._tried(path, post, check=chats.choices)
            except RequestRefused:
                if number == tried[-1]:
                    raise
                continue
            self._understood = number
            self._count(payload.get("usage"))
            return [Choice(*parts) for parts in chats.choices(payload)]
        raise AssertionError("unreachable: the last dialect returns or raises")

    async def _list(self) -> list[dict[str, Any]]:
        async def get() -> Any:
            return (await self._api.models.with_raw_response.list()).http_response.json()

        found = (await self._tried(f"{self.base_url}/models", get, retries=0)).get("data") or []
        return [entry for entry in found if isinstance(entry, dict) and "id" in entry]

    def _count(self, usage: Any) -> None:
        self.usage.requests += 1
        if isinstance(usage, dict):
            self.usage.prompt_tokens += usage.get("prompt_tokens") or 0
            self.usage.completion_tokens += usage.get("completion_tokens") or 0

    async def _tried(
        self,
        path: str,
        call: Callable[[], Any],
        check: Callable[[Any], Any] | None = None,
        retries: int | None = None,
    ) -> dict[str, Any]:
        """The JSON object that `call` gives, after retries. Raises ServerError, RequestRefused."""
        import openai

        began, attempt = time.monotonic(), 0
        retries = self.retries if retries is None else retries
        while True:
            status, wait = None, None
            try:
                payload = await asyncio.wait_for(call(), self.timeout_seconds)
                if not isinstance(payload, dict):
                    raise ValueError(f"a JSON {type(payload).__name__} where an object was wanted")
                if check is not None:
                    check(payload)
                return payload
            except (asyncio.TimeoutError, TimeoutError, openai.APITimeoutError):
                fault = f"no answer within {self.timeout_seconds:g} s"
            except openai.APIConnectionError as error:
                fault = f"no connection ({_short(error.__cause__ or error)})"
            except openai.APIStatusError as error:
                status = error.status_code
                fault = f"HTTP {status}: {_short(_words(error.body) or error.message)}"
                if status < 500 and status not in TRANSIENT:
                    raise self._refusal(path, status, fault) from error
                wait = _retry_after(error.response.headers)
            except (ValueError, openai.APIResponseValidationError) as error:
                fault = f"half an answer ({_short(error)})"
            attempt += 1
            self.usage.faults[fault] += 1
            if attempt > retries or self._draining:
                raise ServerError(
                    f"{path}: no usable answer in {attempt} tries over {time.monotonic() - began:.0f} s, "
                    f"the last: {fault}; wanted a chat completion of {self.model}. Look at the server's log, "
                    "then run the same command again",
                    status,
                )
            self.usage.retries += 1
            pause = min(self.pause_seconds * 2 ** (attempt - 1), LONGEST_PAUSE_SECONDS)
            await asyncio.sleep(wait if wait is not None else pause * random.uniform(0.5, 1.0))
            if self._draining:
                raise ServerError(f"{path}: {fault}; not tried again", status)

    def _refusal(self, path: str, status: int, fault: str) -> ServerError:
        if status in {400, 413, 422}:
            return RequestRefused(f"{path}: the server refuses the request ({fault})", status)
        hint = {
            401: "give an API key (OPENAI_API_KEY)",
            403: "give an API key that may use this model",
            404: "compare the model id with what the server lists at /v1/models",
        }.get(status, "look at the server's log")
        return ServerError(f"{path}: {fault}; wanted a chat completion of {self.model}; {hint}", status)


def _connect(base_url: str, api_key: str, timeout_seconds: float) -> Any:
    try:
        import openai
    except ImportError as error:
        raise MissingExtra("openai", "distill") from error
    client = getattr(openai, "DefaultAsyncHttpx2Client", None) or openai.DefaultAsyncHttpxClient
    local = urlsplit(base_url).hostname in LOCAL  # a proxy of the environment cannot reach this machine
    return openai.AsyncOpenAI(
        base_url=base_url,
        api_key=api_key,
        max_retries=0,
        timeout=timeout_seconds,
        http_client=client(trust_env=not local, timeout=timeout_seconds),
    )


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait, at most a minute; None where it says nothing usable."""
    try:
        return min(max(float(headers.get("retry-after", "")), 0.0), LONGEST_PAUSE_SECONDS)
    except ValueError:
        return None


def _words(body: object) -> str:
    """What a server says in an error's body. openai's own text leaves FastAPI's `detail` out, which is where
    `transformers serve` says what it wants."""
    if isinstance(body, Mapping):
        return str(body.get("message") or body.get("detail") or dict(body))
    return str(body or "")


def _short(error: object, most: int = 300) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[: most - 3] + "..."
