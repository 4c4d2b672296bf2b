"""What every request passes: identity, a request id, errors in OpenAI's shape, and the count of how it ended.

Everything is denied unless the caller is known or the path is public: a new endpoint is closed until someone opens it.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Mapping
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.target.callers import Callers
from services.target.openai_answers import error_body
from slipstream.errors import EngineStopped, GenerationFailed, QueueFull, RequestError, RequestTooLarge, UnknownModel
from slipstream.telemetry import ReplicaMetrics

logger = logging.getLogger(__name__)

PUBLIC_PATHS: Final = frozenset({"/health", "/ready"})
CALLER: Final = "slipstream.caller"
OUTCOME: Final = "slipstream.outcome"
"""Scope key under which a stream that failed after its headers leaves the status it would have had."""

RETRY_AFTER_S: Final = 1
_CLIENT_LEFT: Final = 499
_UNCOUNTED_PATHS: Final = PUBLIC_PATHS | {"/metrics"}


class FrontDoor:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, *, callers: Callers, metrics: ReplicaMetrics) -> None:
        self._app = app
        self._callers = callers
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; whatever it raises becomes an error answer."""
        if scope["type"] != "http":
            await _serve_no_http(scope, receive, send)
            return
        status = _CLIENT_LEFT
        # Serve gives every request an id and puts it on the answer; without Serve before us we do.
        new_id = None if "x-request-id" in Headers(scope=scope) else uuid.uuid4().hex

        async def send_noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if new_id is not None:
                    MutableHeaders(scope=message)["x-request-id"] = new_id
            await send(message)

        try:
            await self._serve(scope, receive, send_noting)
        except (ClientDisconnect, asyncio.CancelledError) as departure:
            status = _CLIENT_LEFT
            if isinstance(departure, asyncio.CancelledError):
                raise
        finally:
            if scope["path"] not in _UNCOUNTED_PATHS:
                self._metrics.requests.labels(str(scope.get(OUTCOME, status))).inc()

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = self._callers.identify(Headers(scope=scope).get("authorization"))
        if caller is None and scope["path"] not in PUBLIC_PATHS:
            await _unknown_caller()(scope, receive, send)
            return
        scope[CALLER] = caller
        try:
            await self._app(scope, receive, send)
        except ClientDisconnect:
            raise
        except Exception as error:  # noqa: BLE001 - the outermost frame of a request: it ends with an answer
            await error_response(error)(scope, receive, send)


async def _serve_no_http(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer the server's start and stop messages; turn web sockets away."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    for phase in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{phase}.complete"})


def error_response(error: Exception) -> Response:
    """The answer to a request that failed; an error nobody foresaw is logged and its text kept from the caller."""
    if isinstance(error, UnknownModel):
        return _response(404, str(error), kind="invalid_request_error", code="model_not_found", param=error.param)
    if isinstance(error, RequestError):
        status = 413 if isinstance(error, RequestTooLarge) else 400
        return _response(status, str(error), kind="invalid_request_error", param=error.param)
    if isinstance(error, QueueFull):
        return _response(429, str(error), kind="rate_limit_error", code="queue_full", headers=_retry_later())
    if isinstance(error, EngineStopped):
        return _response(503, str(error), kind="server_error", code="replica_stopping", headers=_retry_later())
    return _response(500, failure_message(error), kind="server_error", code="internal_error")


def failure_message(error: Exception) -> str:
    """What a caller may read about a failure on our side; the traceback goes to the log."""
    logger.error("a request failed", exc_info=error)
    if isinstance(error, GenerationFailed):
        return str(error)
    return "the service failed on this request; its log has the cause, send it again"


def not_found(path: str, method: str, *, allowed: str) -> Response:
    """The answer for a path that does not exist (404, `allowed` empty) or a method that it does not take (405)."""
    expected = f"{path} takes {allowed}" if allowed else "there is POST /v1/chat/completions, GET /v1/models and more"
    message = f"{method} {path[:200]} is no endpoint of this service; {expected}"
    return _response(405 if allowed else 404, message, kind="invalid_request_error", code="unknown_endpoint")


def _unknown_caller() -> Response:
    message = "the API key is missing or unknown; send Authorization: Bearer YOUR_KEY"
    headers = {"www-authenticate": "Bearer"}
    return _response(401, message, kind="invalid_request_error", code="invalid_api_key", headers=headers)


def _retry_later() -> dict[str, str]:
    return {"retry-after": str(RETRY_AFTER_S)}


def _response(
    status: int,
    message: str,
    *,
    kind: str,
    code: str | None = None,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    body = error_body(message, kind=kind, code=code, param=param)
    return Response(body, status, headers, media_type="application/json")
