"""The demo's client: sends queries to the running service and measures what comes back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import islice

import httpx
import msgspec

from deploy.local.queries import Query

MAX_TOKENS = 64
REQUEST_TIMEOUT_S = 60.0
PROBE_DOMAIN = "probe"
"""Domain of the speed probes: they are counted apart and never learned from."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """One request: `error` is "" if it was answered; `seconds` from sending to the whole answer."""

    num_tokens: int
    seconds: float
    error: str


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens a second on the same prompts, one request at a time, with and without speculation."""

    with_speculation: float
    without_speculation: float


class Client:
    """One connection pool to the service; greedy chat requests of at most MAX_TOKENS tokens."""

    def __init__(self, http: httpx.AsyncClient, *, model: str) -> None:
        self._http = http
        self._model = model

    async def ask(self, query: Query, *, domain: str, speculate: bool = True, train: bool = True) -> Outcome:
        """Send one query and wait for the answer; never raises for a request that fails."""
        headers = {
            "X-Slipstream-Domain": domain,
            "X-Slipstream-Speculation": "on" if speculate else "off",
            "X-Slipstream-No-Train": "0" if train else "1",
        }
        began = time.monotonic()
        try:
            answer = await self._http.post("/v1/chat/completions", json=self._body(query), headers=headers)
            error = "" if answer.status_code == 200 else f"HTTP {answer.status_code}: {answer.text[:200]}"
            num_tokens = answer.json()["usage"]["completion_tokens"] if not error else 0
        except (httpx.HTTPError, ValueError, KeyError) as problem:
            error, num_tokens = f"{type(problem).__name__}: {problem}", 0
        return Outcome(num_tokens=num_tokens, seconds=time.monotonic() - began, error=error)

    async def first_token(self, query: Query) -> str:
        """Stream one answer; returns the first text that arrives."""
        body = self._body(query) | {"stream": True}
        headers = {"X-Slipstream-Domain": PROBE_DOMAIN, "X-Slipstream-No-Train": "1"}
        async with self._http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                event = line.removeprefix("data: ")
                if line.startswith("data: {") and (text := _delta(event)):
                    return text
        return ""

    def _body(self, query: Query) -> dict[str, object]:
        message = {"role": "user", "content": query.prompt}
        return {"model": self._model, "messages": [message], "max_tokens": MAX_TOKENS, "temperature": 0}


@asynccontextmanager
async def connected(api_url: str) -> AsyncIterator[Client]:
    """A client of the service, which must be ready."""
    async with httpx.AsyncClient(base_url=api_url, timeout=REQUEST_TIMEOUT_S, trust_env=False) as http:
        models = (await http.get("/v1/models")).raise_for_status().json()
        yield Client(http, model=models["data"][0]["id"])


async def send_stream(
    client: Client,
    queries: Iterator[Query],
    *,
    domain: str,
    concurrency: int,
    queries_per_s: float,
    is_over: Callable[[], bool],
    on_outcome: Callable[[Outcome], None],
) -> None:
    """Send until `is_over` or the queries run out; all are answered on return.

    At most `concurrency` are in flight, and at most `queries_per_s` start: a service is not always asked for all it
    can give, and on two cores the workers live on what it leaves.
    """
    next_start = time.monotonic()

    async def sender() -> None:
        nonlocal next_start
        for query in queries:  # one iterator for all senders: each query goes out once
            my_start = max(next_start, time.monotonic())
            next_start = my_start + 1 / queries_per_s
            await asyncio.sleep(my_start - time.monotonic())
            on_outcome(await client.ask(query, domain=domain))
            if is_over():
                return

    await asyncio.gather(*(sender() for _ in range(concurrency)))


async def measure_speed(
    client: Client, queries: Iterator[Query], *, num_prompts: int, errors: list[str]
) -> Speed | None:
    """Ask the same prompts with and without speculation, in alternating order.

    None if no prompt is left or a request failed, which then stands in `errors`.
    """
    totals = {True: [0, 0.0], False: [0, 0.0]}
    for number, query in enumerate(islice(queries, num_prompts)):
        for speculate in (True, False) if number % 2 == 0 else (False, True):
            outcome = await client.ask(query, domain=PROBE_DOMAIN, speculate=speculate, train=False)
            if outcome.error:
                errors.append(outcome.error)
                return None
            totals[speculate][0] += outcome.num_tokens
            totals[speculate][1] += outcome.seconds
    if not totals[True][1]:
        return None
    return Speed(
        with_speculation=totals[True][0] / totals[True][1], without_speculation=totals[False][0] / totals[False][1]
    )


def _delta(event: str) -> str:
    choices = msgspec.json.decode(event).get("choices") or [{}]
    return choices[0].get("delta", {}).get("content") or ""
