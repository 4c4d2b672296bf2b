"""An ingress over a scripted engine, called in process, for tests."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

from services.target.callers import Callers
from services.target.ingress import Ingress, ServedModel
from services.target.prompt_text import PromptText
from slipstream.config import Tenant
from slipstream.engine.request import FinishReason, Request, TokenBlock
from slipstream.telemetry import ReplicaMetrics

TARGET = Path(__file__).parents[2] / "deploy" / "models" / "mix-moe-11m"
PROMPT_TEXT = PromptText(TARGET)
KEY = "secret-key"
HASHED = hashlib.sha256(KEY.encode()).hexdigest()

Script = Sequence[tuple[str, FinishReason | None]]
ANSWER: Script = (("SELECT", None), (" a", "stop"))


class ScriptedRunner:
    """Answers every request with the same blocks, from a thread of its own like the engine.

    The text that comes with the finish reason "error" is the error's.
    """

    def __init__(self, script: Script, *, refusal: Exception | None = None) -> None:
        self.requests: list[Request] = []
        self.cancelled: list[str] = []
        self.draft_version = 7
        self.healthy = True
        self._script = script
        self._refusal = refusal

    def submit(self, request: Request, on_block: Callable[[TokenBlock], None]) -> None:
        if self._refusal is not None:
            raise self._refusal
        self.requests.append(request)
        threading.Thread(target=self._answer, args=(request, on_block)).start()

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)

    def is_healthy(self) -> bool:
        return self.healthy

    def _answer(self, request: Request, on_block: Callable[[TokenBlock], None]) -> None:
        for text, finish_reason in self._script:
            on_block(
                TokenBlock(
                    request_id=request.request_id,
                    token_ids=() if finish_reason == "error" else PROMPT_TEXT.encode_raw(text),
                    draft_version=7,
                    routing_version=0,
                    num_proposed=0,
                    num_accepted=0,
                    finish_reason=finish_reason,
                    error=text if finish_reason == "error" else "",
                )
            )


class Service:
    """An ingress over a scripted runner, called in process."""

    def __init__(
        self,
        script: Script = ANSWER,
        *,
        keys: bool = False,
        refusal: Exception | None = None,
        prompt_text: PromptText = PROMPT_TEXT,
        max_context_tokens: int = 64,
    ) -> None:
        self.runner = ScriptedRunner(script, refusal=refusal)
        self.metrics = ReplicaMetrics()
        tenants = {"acme": Tenant(key_sha256=HASHED), "shy": Tenant(key_sha256="0" * 64, train=False)} if keys else None
        model = ServedModel(
            name="m", created=11, vocab_size=4096, max_context_tokens=max_context_tokens, stop_token_ids=(0,)
        )
        ingress = Ingress(
            model, prompt_text=prompt_text, runner=self.runner, metrics=self.metrics, callers=Callers(tenants)
        )
        self.app = ingress.app()

    def send(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **options)

        return asyncio.run(call())

    def complete(self, *, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
        return self.send("POST", "/v1/completions", json={"model": "m", "prompt": "hi"} | fields, headers=headers)

    def count(self, code: int) -> float:
        return self.metrics.registry.get_sample_value("slipstream_requests_total", {"code": str(code)}) or 0.0

    def num_unexpected(self) -> float:
        return self.metrics.registry.get_sample_value("slipstream_unexpected_errors_total") or 0.0
