"""An ingress over a scripted engine, called in process, for tests."""

from __future__ import annotations

import asyncio
import hashlib
import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

from services.target.callers import Callers
from services.target.ingress import Ingress, ServedModel
from services.target.prompt_text import PromptText
from slipstream.config import Tenant
from slipstream.engine.request import FinishReason, Request, TokenBlock, TokenLogprobs
from slipstream.telemetry import ReplicaMetrics

TARGET = Path(__file__).parents[2] / "deploy" / "models" / "mix-moe-11m"
PROMPT_TEXT = PromptText(TARGET)
KEY = "secret-key"
HASHED = hashlib.sha256(KEY.encode()).hexdigest()

Script = Sequence[tuple[str | tuple[int, ...], FinishReason | None]]
"""Blocks of an answer, each as text or as token ids, with the finish reason if it is the last."""

ANSWER: Script = (("SELECT", None), (" a", "stop"))

END = 0
(MORE_LIKELY,) = PROMPT_TEXT.encode_raw("x")


class ScriptedRunner:
    """Answers sample i of every call with the blocks of script i, or the last one, from a thread like the engine's.

    The text that comes with the finish reason "error" is the error's. Once `num_accepted` requests are in, each
    further one meets the `refusal`.
    """

    def __init__(self, scripts: Sequence[Script], *, refusal: Exception | None = None, num_accepted: int = 0) -> None:
        self.requests: list[Request] = []
        self.cancelled: list[str] = []
        self.draft_version = 7
        self.healthy = True
        self._scripts = scripts
        self._refusal = refusal
        self._num_accepted = num_accepted

    def submit(self, request: Request, on_block: Callable[[TokenBlock], None]) -> None:
        if self._refusal is not None and len(self.requests) >= self._num_accepted:
            raise self._refusal
        self.requests.append(request)
        threading.Thread(target=self._answer, args=(request, on_block)).start()

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)

    def is_healthy(self) -> bool:
        return self.healthy

    def _answer(self, request: Request, on_block: Callable[[TokenBlock], None]) -> None:
        script = self._scripts[min(request.sampling.sample_index, len(self._scripts) - 1)]
        for said, finish_reason in script:
            text = said if isinstance(said, str) else ""
            token_ids = PROMPT_TEXT.encode_raw(said) if isinstance(said, str) else said
            if finish_reason == "error":
                token_ids = ()
            on_block(
                TokenBlock(
                    request_id=request.request_id,
                    token_ids=token_ids,
                    logprobs=() if request.num_logprobs is None else tuple(map(scripted_logprobs, token_ids)),
                    draft_version=7,
                    routing_version=0,
                    num_proposed=0,
                    num_accepted=0,
                    finish_reason=finish_reason,
                    error=text if finish_reason == "error" else "",
                )
            )


def scripted_logprobs(token_id: int) -> TokenLogprobs:
    """Two top tokens whatever was asked for: one more likely than the emitted one, and one that is impossible."""
    return TokenLogprobs(logprob=-token_id / 1024, top=((MORE_LIKELY, -0.125), (END, -math.inf)))


class Service:
    """An ingress over a scripted runner, called in process; without scripts every sample is answered with ANSWER."""

    def __init__(
        self,
        *scripts: Script,
        keys: bool = False,
        refusal: Exception | None = None,
        num_accepted: int = 0,
        prompt_text: PromptText = PROMPT_TEXT,
        max_context_tokens: int = 64,
    ) -> None:
        self.runner = ScriptedRunner(scripts or [ANSWER], refusal=refusal, num_accepted=num_accepted)
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

    def chat(self, **fields: Any) -> httpx.Response:
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
        return self.send("POST", "/v1/chat/completions", json=body | fields)

    def count(self, code: int) -> float:
        return self.metrics.registry.get_sample_value("slipstream_requests_total", {"code": str(code)}) or 0.0

    def num_unexpected(self) -> float:
        return self.metrics.registry.get_sample_value("slipstream_unexpected_errors_total") or 0.0
