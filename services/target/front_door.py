"""What every request passes: identity, a request id, errors in OpenAI's shape, and the count of how it ended.

Everything is denied unless the caller is known or the path is public: a new endpoint is closed until someone opens it.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.target.callers import Callers
from services.target.openai_answers import error_body, error_event
from slipstream.errors import (
    EngineStopped,
    GenerationFailed,
    QueueFull,
    RequestError,
    RequestTimedOut,
    RequestTooLarge,
    UnknownModel,
)
from slipstream.telemetry import ReplicaMetrics

logger = logging.getLogger(__name__)

PUBLIC_PATHS: Final = frozenset({"/health", "/ready"})
CALLER: Final = "slipstream.caller"

RETRY_AFTER_S: Final = 1
_RETRY_LATER: Final = MappingProxyType({"retry-after": str(RETRY_AFTER_S)})
_NOT_ANSWERED: Final = 0
_CLIENT_LEFT: Final = 499
_INTERNAL_ERROR: Final = 500
_STATUS_OF: Final = MappingProxyType({RequestTooLarge: 413, RequestTimedOut: 408})
_UNCOUNTED_PATHS: Final = PUBLIC_PATHS | {"/metrics"}


class FrontDoor:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, *, callers: Callers, metrics: ReplicaMetrics) -> None:
        self._app = app
        self._callers = callers
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; whatever it raises becomes an error answer and is counted."""
        if scope["type"] != "http":
            await _serve_no_http(scope, receive, send)
            return
        # Serve gives every request an id and puts it on the answer; without Serve before us we do.
        answer = _Answer(send, new_id=None if "x-request-id" in Headers(scope=scope) else uuid.uuid4().hex)
        status = _CLIENT_LEFT
        try:
            status = await self._serve(scope, receive, answer)
        except ClientDisconnect:
            pass
        finally:
            if scope["path"] not in _UNCOUNTED_PATHS:
                self._metrics.requests.labels(str(status)).inc()

    async def _serve(self, scope: Scope, receive: Receive, answer: _Answer) -> int:
        """Serve one request; returns the status it ended with, which for a stream may come after its headers."""
        caller = self._callers.identify(Headers(scope=scope).get("authorization"))
        if caller is None and scope["path"] not in PUBLIC_PATHS:
            await _unknown_caller()(scope, receive, answer)
            return answer.status
        scope[CALLER] = caller
        try:
            await self._app(scope, receive, answer)
        except ClientDisconnect:
            raise
        except Exception as error:  # noqa: BLE001 - the outermost frame of a request: it ends with an answer
            return await self._fail(error, scope, receive, answer)
        return answer.status

    async def _fail(self, error: Exception, scope: Scope, receive: Receive, answer: _Answer) -> int:
        """Answer with the error; in a stream that has begun it is the last event. Returns its status."""
        failure = _failure_of(error)
        if failure.status == _INTERNAL_ERROR:
            logger.error("a request failed", exc_info=error)
            if not isinstance(error, GenerationFailed):
                self._metrics.unexpected_errors.inc()
        if answer.status == _NOT_ANSWERED:
            await _response(failure)(scope, receive, answer)
        else:
            event = error_event(failure.message, kind=failure.kind, code=failure.code)
            await answer({"type": "http.response.body", "body": event, "more_body": False})
        return failure.status


class _Answer:
    """Sends an answer on, notes its status (0 until there is one), and gives it a request id if it has none."""

    def __init__(self, send: Send, *, new_id: str | None) -> None:
        self._send = send
        self._new_id = new_id
        self.status = _NOT_ANSWERED

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if self._new_id is not None:
                MutableHeaders(scope=message)["x-request-id"] = self._new_id
        await self._send(message)


class _Failure(msgspec.Struct, frozen=True):
    """How a request fails, in OpenAI's terms."""

    status: int
    message: str
    kind: str
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] | None = None


async def _serve_no_http(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer the server's start and stop messages; turn web sockets away."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    for phase in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{phase}.complete"})


def _failure_of(error: Exception) -> _Failure:
    """The answer to an error; the text of one that nobody foresaw is kept from the caller, the log has it."""
    if isinstance(error, UnknownModel):
        return _Failure(404, str(error), "invalid_request_error", "model_not_found", error.param)
    if isinstance(error, RequestError):
        return _Failure(_STATUS_OF.get(type(error), 400), str(error), "invalid_request_error", None, error.param)
    if isinstance(error, QueueFull):
        return _Failure(429, str(error), "rate_limit_error", "queue_full", headers=_RETRY_LATER)
    if isinstance(error, EngineStopped):
        return _Failure(503, str(error), "server_error", "replica_stopping", headers=_RETRY_LATER)
    foreseen = isinstance(error, GenerationFailed)
    message = str(error) if foreseen else "the service failed on this request; its log has the cause, send it again"
    return _Failure(_INTERNAL_ERROR, message, "server_error", "internal_error")


def not_found(path: str, method: str, *, allowed: str) -> Response:
    """The answer for a path that does not exist (404, `allowed` empty) or a method that it does not take (405)."""
    expected = f"{path} takes {allowed}" if allowed else "there is POST /v1/chat/completions, GET /v1/models and more"
    message = f"{method} {path[:200]} is no endpoint of this service; {expected}"
    return _response(_Failure(405 if allowed else 404, message, "invalid_request_error", "unknown_endpoint"))


def _unknown_caller() -> Response:
    message = "the API key is missing or unknown; send Authorization: Bearer YOUR_KEY"
    headers = {"www-authenticate": "Bearer"}
    return _response(_Failure(401, message, "invalid_request_error", "invalid_api_key", headers=headers))


def _response(failure: _Failure) -> Response:
    body = error_body(failure.message, kind=failure.kind, code=failure.code, param=failure.param)
    return Response(body, failure.status, failure.headers, media_type="application/json")
