"""The OpenAI-compatible endpoints, inside the process that owns the engine: tokens reach the socket without a hop."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Final, TypeVar

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from services.target import openai_answers as answers
from services.target.callers import Caller, Callers
from services.target.connection import EventStream, while_connected
from services.target.front_door import CALLER, FrontDoor, not_found
from services.target.generation import Generation, Runner
from services.target.openai_requests import GenerationCall, parse_chat, parse_completion
from services.target.prompt_text import PromptText
from slipstream import __version__
from slipstream.engine.request import Request, SamplingParams
from slipstream.errors import RequestError, RequestTimedOut, RequestTooLarge, UnknownModel
from slipstream.records import sample_id
from slipstream.telemetry import ReplicaMetrics
from slipstream.versions import DEFAULT_DOMAIN, NO_VERSION

MAX_BODY_BYTES: Final = 4 * 2**20
BYTES_BESIDE_THE_TEXT: Final = 256 * 2**10
"""Room for all other fields in a body; the text itself may have all its characters escaped."""

BODY_TIMEOUT_S: Final = 30.0
"""A body that takes longer ends with 408: it holds one of the few places that Serve gives out."""

MAX_BYTES_ON_THE_LOOP: Final = 4096
"""Longer texts are parsed and tokenized in a thread: 4 KiB take up to 2 ms of the event loop, which all share."""

_BYTES_OF_AN_ESCAPE: Final = 6
_MODEL_PREFIX: Final = "/v1/models/"
_DOMAIN: Final = re.compile(r"[a-z0-9_-]{1,32}")

_A = TypeVar("_A")
_R = TypeVar("_R")
Handler = Callable[[HttpRequest], Awaitable[Response]]


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """What the ingress knows of the target; `created` is in seconds since the epoch."""

    name: str
    created: int
    vocab_size: int
    max_context_tokens: int
    stop_token_ids: tuple[int, ...]


class Ingress:
    """The HTTP face of one replica."""

    def __init__(
        self, model: ServedModel, *, prompt_text: PromptText, runner: Runner, metrics: ReplicaMetrics, callers: Callers
    ) -> None:
        self._model = model
        self._prompt_text = prompt_text
        self._runner = runner
        self._metrics = metrics
        self._callers = callers
        most_text = _BYTES_OF_AN_ESCAPE * model.max_context_tokens * prompt_text.token_bytes.longest
        self._max_body_bytes = min(most_text + BYTES_BESIDE_THE_TEXT, MAX_BODY_BYTES)

    def app(self) -> ASGIApp:
        """The ASGI application, identity check and error shapes included."""
        return FrontDoor(self._serve, callers=self._callers, metrics=self._metrics)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        http = HttpRequest(scope, receive, send)
        method, handler = self._endpoint(http.scope["path"])
        if handler is None or http.method != method:
            response = not_found(http.scope["path"], http.method, allowed=method)
        else:
            response = await handler(http)
        await response(scope, receive, send)

    def _endpoint(self, path: str) -> tuple[str, Handler | None]:
        """The method and handler of a path; no handler if there is no such path."""
        if path.startswith(_MODEL_PREFIX):
            return "GET", self._one_model
        return {
            "/v1/completions": ("POST", self._completions),
            "/v1/chat/completions": ("POST", self._chat_completions),
            "/v1/models": ("GET", self._models),
            "/health": ("GET", self._health),
            "/ready": ("GET", self._ready),
            "/metrics": ("GET", self._metrics_text),
            "/version": ("GET", self._version),
        }.get(path, ("", None))

    async def _completions(self, http: HttpRequest) -> Response:
        return await self._generate(http, parse_completion)

    async def _chat_completions(self, http: HttpRequest) -> Response:
        return await self._generate(http, parse_chat)

    async def _generate(self, http: HttpRequest, parse: Callable[[bytes], GenerationCall]) -> Response:
        arrived_at = time.monotonic()
        body = await _read_body(http, max_bytes=self._max_body_bytes)
        call = await _beside_the_loop(parse, body, size=len(body))
        self._check_model(call.model)
        prompt_ids = await self._prompt_ids(call)
        self._check_logit_bias(call)
        request = self._request(call, prompt_ids, http, arrived_at=arrived_at)
        token_bytes = self._prompt_text.token_bytes
        headers = self._version_headers()
        answer = answers.answer_for(
            call, request_id=request.request_id, created=int(time.time()), token_bytes=token_bytes
        )
        samples = _samples(request, call.num_samples)
        generation = Generation(self._runner, samples, token_bytes=token_bytes, metrics=self._metrics)
        if call.stream:
            events = _events(answer, generation, num_prompt=len(prompt_ids))
            return EventStream(events, on_close=generation.close, headers=headers)
        try:
            whole = await while_connected(http.receive, _whole(answer, generation, num_prompt=len(prompt_ids)))
        finally:
            generation.close()
        return Response(whole, headers=headers, media_type="application/json")

    def _request(
        self, call: GenerationCall, prompt_ids: tuple[int, ...], http: HttpRequest, *, arrived_at: float
    ) -> Request:
        """The engine's request; its id is always ours, so that two callers can never share one."""
        caller: Caller = http.scope[CALLER]
        return Request(
            request_id=uuid.uuid4().hex,
            prompt_ids=prompt_ids,
            sampling=self._sampling(call, num_prompt=len(prompt_ids)),
            tenant=caller.tenant,
            domain=_domain(http),
            may_train=caller.may_train and not _switch(http, "x-slipstream-no-train", on="1", off="0", default=False),
            arrived_at=arrived_at,
            speculate=_switch(http, "x-slipstream-speculation", on="on", off="off", default=True),
            num_logprobs=call.num_logprobs,
        )

    def _sampling(self, call: GenerationCall, *, num_prompt: int) -> SamplingParams:
        return SamplingParams(
            seed=secrets.randbits(63) if call.seed is None else call.seed,
            max_tokens=self._max_tokens(call, num_prompt),
            temperature=call.temperature,
            top_k=call.top_k,
            top_p=call.top_p,
            min_p=call.min_p,
            repetition_penalty=call.repetition_penalty,
            presence_penalty=call.presence_penalty,
            frequency_penalty=call.frequency_penalty,
            logit_bias=call.logit_bias,
            stop_token_ids=self._model.stop_token_ids,
            stop_strings=call.stop,
        )

    def _check_logit_bias(self, call: GenerationCall) -> None:
        largest = max((token_id for token_id, _ in call.logit_bias), default=0)
        if largest >= self._model.vocab_size:
            raise RequestError(
                f"logit_bias has token id {largest}, expected ids from 0 to {self._model.vocab_size - 1}",
                param="logit_bias",
            )

    def _check_model(self, name: str) -> None:
        if name != self._model.name:
            raise UnknownModel(
                f"model is {name[:64]!r}, expected {self._model.name!r}; see GET /v1/models", param="model"
            )

    async def _prompt_ids(self, call: GenerationCall) -> tuple[int, ...]:
        prompt, text = call.prompt, self._prompt_text
        if isinstance(prompt, str):
            size = self._checked_size([prompt], "prompt")
            return await _beside_the_loop(text.encode_raw, prompt, size=size)
        if isinstance(prompt[0], int):
            self._check_room(len(prompt), "prompt")
        ids = tuple(item for item in prompt if isinstance(item, int))
        if not ids:
            messages = [item for item in prompt if not isinstance(item, int)]
            size = self._checked_size([message.content for message in messages], "messages")
            return await _beside_the_loop(text.encode_chat, messages, size=size)
        if max(ids) >= self._model.vocab_size:
            size = self._model.vocab_size
            raise RequestError(f"prompt has token id {max(ids)}, expected ids from 0 to {size - 1}", param="prompt")
        return ids

    def _checked_size(self, texts: Sequence[str], field: str) -> int:
        """Bytes of these texts; refused, before the work of tokenizing them, if they cannot fit the context."""
        context, longest = self._model.max_context_tokens, self._prompt_text.token_bytes.longest
        size = sum(len(text.encode()) for text in texts)
        if size > context * longest:
            raise RequestError(
                f"{field} has {size} bytes, expected at most {context * longest}: the context holds {context} tokens "
                f"of at most {longest} bytes; shorten it",
                param=field,
            )
        if len(texts) > context:
            raise RequestError(
                f"{field} has {len(texts)} entries, expected at most {context}: each takes one token of the context "
                "or more; send fewer",
                param=field,
            )
        return size

    def _max_tokens(self, call: GenerationCall, num_prompt: int) -> int:
        """The answer's length limit; prompt and answer must fit the context together."""
        context = self._model.max_context_tokens
        prompt_field = "messages" if call.kind == "chat" else "prompt"
        self._check_room(num_prompt, prompt_field)
        room = context - num_prompt
        if call.max_tokens is None:
            return room
        if call.max_tokens > room:
            raise RequestError(
                f"max_tokens is {call.max_tokens}, expected at most {room}: the context holds {context} tokens and "
                f"{prompt_field} has {num_prompt}; ask for fewer or shorten it",
                param="max_tokens",
            )
        return call.max_tokens

    def _check_room(self, num_prompt: int, field: str) -> None:
        context = self._model.max_context_tokens
        if not 0 < num_prompt < context:
            raise RequestError(
                f"{field} has {num_prompt} tokens, expected 1 to {context - 1}: the context holds {context} with the "
                "answer; shorten it",
                param=field,
            )

    def _version_headers(self) -> dict[str, str]:
        """The versions that serve as the answer starts; a long answer may outlive them."""
        return {
            "x-slipstream-draft-version": str(self._runner.draft_version),
            "x-slipstream-routing-version": str(NO_VERSION),
        }

    async def _models(self, http: HttpRequest) -> Response:
        return _json({"object": "list", "data": [answers.model_card(self._model.name, self._model.created)]})

    async def _one_model(self, http: HttpRequest) -> Response:
        self._check_model(http.scope["path"].removeprefix(_MODEL_PREFIX))
        return _json(answers.model_card(self._model.name, self._model.created))

    async def _health(self, http: HttpRequest) -> Response:
        return _json({"status": "alive"})

    async def _ready(self, http: HttpRequest) -> Response:
        is_ready = self._runner.is_healthy()
        return _json({"status": "ready" if is_ready else "not ready"}, status=200 if is_ready else 503)

    async def _metrics_text(self, http: HttpRequest) -> Response:
        return Response(generate_latest(self._metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def _version(self, http: HttpRequest) -> Response:
        return _json({"version": __version__, "model": self._model.name, "draft_version": self._runner.draft_version})


def _samples(request: Request, num_samples: int) -> list[Request]:
    """The engine's requests of one call: alike but for the sample index, which tells their noise apart."""
    if num_samples == 1:
        return [request]
    return [
        msgspec.structs.replace(
            request,
            request_id=sample_id(request.request_id, index),
            sampling=msgspec.structs.replace(request.sampling, sample_index=index),
        )
        for index in range(num_samples)
    ]


async def _whole(answer: answers.Answer, generation: Generation, *, num_prompt: int) -> bytes:
    parts = [part async for part in generation.parts()]
    return answers.whole(answer, parts, answers.usage(num_prompt=num_prompt, num_output=generation.num_tokens))


async def _events(answer: answers.Answer, generation: Generation, *, num_prompt: int) -> AsyncIterator[bytes]:
    """The events of a streamed answer."""
    if roles := answers.role_events(answer):
        yield roles
    async for part in generation.parts():
        if events := answers.part_events(answer, part):
            yield events
    counts = answers.usage(num_prompt=num_prompt, num_output=generation.num_tokens)
    yield answers.usage_event(answer, counts) + answers.STREAM_END


async def _beside_the_loop(work: Callable[[_A], _R], argument: _A, *, size: int) -> _R:
    """`work(argument)`, in a thread if its `size` in bytes is so large that every other request would wait for it."""
    if size <= MAX_BYTES_ON_THE_LOOP:
        return work(argument)
    return await asyncio.to_thread(work, argument)


async def _read_body(http: HttpRequest, *, max_bytes: int) -> bytes:
    """The body, refused as soon as it is known to be too long, or if it does not come."""
    announced = http.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise _too_large(int(announced), max_bytes)
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for part in http.stream():
                size += len(part)
                if size > max_bytes:
                    raise _too_large(size, max_bytes)
                parts.append(part)
    except TimeoutError as error:
        raise RequestTimedOut(
            f"{size} bytes of the body came within {BODY_TIMEOUT_S:g} seconds, expected all of it; send it again"
        ) from error
    return b"".join(parts)


def _too_large(size: int, max_bytes: int) -> RequestTooLarge:
    return RequestTooLarge(f"the body has {size} bytes or more, expected at most {max_bytes}; send less")


def _domain(http: HttpRequest) -> str:
    domain = http.headers.get("x-slipstream-domain", DEFAULT_DOMAIN)
    if not _DOMAIN.fullmatch(domain):
        raise RequestError(
            f"header X-Slipstream-Domain is {domain[:64]!r}, expected 1 to 32 of a-z 0-9 _ -",
            param="X-Slipstream-Domain",
        )
    return domain


def _switch(http: HttpRequest, name: str, *, on: str, off: str, default: bool) -> bool:
    value = http.headers.get(name)
    if value is None:
        return default
    if value not in (on, off):
        raise RequestError(f"header {name} is {value[:64]!r}, expected {on} or {off}", param=name)
    return value == on


def _json(payload: dict[str, Any], *, status: int = 200) -> Response:
    return Response(msgspec.json.encode(payload), status, media_type="application/json")
