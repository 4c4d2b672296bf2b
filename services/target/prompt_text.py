"""Prompts to token ids: the tokenizer, the chat template, and the wall between a user's text and the control tokens.

A raw prompt (`/v1/completions`) may spell control tokens such as `<|user|>`: the prompt format needs them, and the
whole prompt is the caller's. In a chat only the template places them; a message that spells one gets its characters.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel

from services.target.openai_requests import ChatMessage
from services.target.text_stream import TokenBytes
from slipstream.errors import CheckpointError, RequestError

_CLOSING: Final = "\ue001"


class PromptText:
    """The text side of a target directory: `tokenizer.json` and `tokenizer_config.json`.

    Raises CheckpointError if the tokenizer is missing, unreadable, or not byte-level.
    """

    def __init__(self, directory: Path) -> None:
        self._tokenizer = _load_tokenizer(directory)
        self._plain_tokenizer = _load_tokenizer(directory)
        self._plain_tokenizer.encode_special_tokens = True
        self._settings = _load_settings(directory)
        self._template = _compile(self._settings.get("chat_template"), directory)
        controls = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        ordered = sorted(controls, key=lambda control: (-len(control), control))
        self._controls = re.compile("|".join(map(re.escape, ordered)) or "(?!)")
        self._number_of = {control: number for number, control in enumerate(ordered)}
        self._spelled = [self.encode_plain(control) for control in ordered]
        self.token_bytes = TokenBytes(self._tokenizer)

    def encode_raw(self, prompt: str) -> tuple[int, ...]:
        """Token ids of a raw prompt; a control token's spelling becomes the token."""
        return tuple(self._tokenizer.encode(prompt, add_special_tokens=False).ids)

    def encode_plain(self, text: str) -> tuple[int, ...]:
        """Token ids of text as such; a control token's spelling stays characters."""
        return tuple(self._plain_tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_chat(self, messages: Sequence[ChatMessage]) -> tuple[int, ...]:
        """Token ids of a conversation up to where the assistant's next words begin.

        Raises RequestError if the target has no chat template or the template refuses the messages.
        """
        if self._template is None:
            raise RequestError("this model has no chat template; use /v1/completions", param="messages")
        opening = f"\ue000{secrets.token_hex(8)}:"
        walled = [{"role": m.role, "content": self._walled(m.content, opening)} for m in messages]
        first, *rest = self._render(walled).split(opening)
        ids = list(self.encode_raw(first))
        for part in rest:
            number, _, text = part.partition(_CLOSING)
            ids += self._spelled[_control_number(number)]
            ids += self.encode_raw(text)
        return tuple(ids)

    def _walled(self, content: str, opening: str) -> str:
        """`content` with every spelling of a control token replaced by its number behind `opening`.

        Nobody can guess an `opening` that is new for every request, so no message can hold one; one mark for all
        keeps the work linear in the text.
        """
        return self._controls.sub(lambda match: f"{opening}{self._number_of[match[0]]}{_CLOSING}", content)

    def _render(self, messages: list[dict[str, str]]) -> str:
        assert self._template is not None
        special = {name: _token_text(self._settings.get(name)) for name in ("bos_token", "eos_token", "pad_token")}
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, tools=None, **special)
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise RequestError(f"the chat template refuses these messages: {error}", param="messages") from error


def _control_number(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        message = "the chat template cuts into a control token that a message spells; leave it out"
        raise RequestError(message, param="messages") from error


def _load_tokenizer(directory: Path) -> Tokenizer:
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, expected a Hugging Face tokenizer file; choose another target")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        raise CheckpointError(f"{path}: {error}; expected a Hugging Face tokenizer file") from error
    if not isinstance(tokenizer.decoder, ByteLevel):
        kind = type(tokenizer.decoder).__name__
        raise CheckpointError(f"{path}: decoder is {kind}, expected ByteLevel; only byte-level BPE is served")
    return tokenizer


def _load_settings(directory: Path) -> dict[str, Any]:
    path = directory / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; expected JSON") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path}: {type(settings).__name__}, expected a JSON object")
    return settings


def _compile(source: Any, directory: Path) -> jinja2.Template | None:
    """The template in a sandbox that can neither change its arguments nor reach into Python."""
    if source is None:
        return None
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    try:
        return environment.from_string(source)
    except (jinja2.TemplateError, TypeError) as error:
        raise CheckpointError(f"{directory}: chat_template: {error}; expected a Jinja template") from error


def _refuse(message: str) -> str:
    raise jinja2.TemplateError(message)


def _token_text(value: Any) -> str:
    """A token as `tokenizer_config.json` writes it: a string, or an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""
