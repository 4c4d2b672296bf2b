"""Text in and out of the target: prompts, control tokens, streaming, stop strings."""

from __future__ import annotations

import json
import secrets
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from services.target.openai_requests import ChatMessage
from services.target.prompt_text import PromptText
from services.target.text_stream import TextStream
from slipstream.errors import CheckpointError, RequestError

TARGET = Path(__file__).parents[2] / "deploy" / "models" / "mix-moe-11m"
PROMPT_TEXT = PromptText(TARGET)
TOKENIZER = Tokenizer.from_file(str(TARGET / "tokenizer.json"))
END, USER, ASSISTANT = 0, 1, 2

blocks = st.lists(st.lists(st.integers(0, 4095), max_size=6), max_size=20)


def streamed(token_blocks: list[list[int]], *, stop: tuple[str, ...] = ()) -> tuple[str, TextStream]:
    stream = TextStream(PROMPT_TEXT.token_bytes, stop)
    text = "".join(stream.push(block) for block in token_blocks)
    return text + stream.finish(), stream


@given(blocks)
def test_streamed_text_equals_the_tokenizers_own_decoding(token_blocks: list[list[int]]) -> None:
    ids = [token_id for block in token_blocks for token_id in block]
    assert streamed(token_blocks)[0] == TOKENIZER.decode(ids, skip_special_tokens=True)


@given(st.text(max_size=60))
def test_text_survives_the_round_trip_one_token_at_a_time(text: str) -> None:
    ids = PROMPT_TEXT.encode_plain(text)
    assert streamed([[token_id] for token_id in ids])[0] == text


def test_half_a_character_waits_for_its_other_half() -> None:
    ids = list(PROMPT_TEXT.encode_plain("🙂"))
    assert len(ids) > 1
    stream = TextStream(PROMPT_TEXT.token_bytes)
    assert [stream.push([token_id]) for token_id in ids] == [""] * (len(ids) - 1) + ["🙂"]


def test_a_character_that_never_ends_is_replaced() -> None:
    ids = list(PROMPT_TEXT.encode_plain("🙂"))
    assert streamed([ids[:-1]])[0] == "\ufffd"


def test_control_tokens_never_show() -> None:
    ids = list(PROMPT_TEXT.encode_plain("hi"))
    assert streamed([[USER, *ids, ASSISTANT], [END]])[0] == "hi"


def test_a_stop_string_is_found_across_blocks_and_cut() -> None:
    ids = PROMPT_TEXT.encode_plain("SELECT a FROM table WHERE b")
    text, stream = streamed([[token_id] for token_id in ids], stop=("FROM table", "never"))
    assert text == "SELECT a "
    assert stream.is_stopped
    assert stream.num_tokens < len(ids)


def test_the_beginning_of_a_stop_string_is_held_back_and_then_given() -> None:
    stream = TextStream(PROMPT_TEXT.token_bytes, ("abX",))
    assert stream.push(PROMPT_TEXT.encode_plain("123ab")) == "123"
    assert stream.push(PROMPT_TEXT.encode_plain("c")) == "abc"


@settings(max_examples=200)
@given(st.text("ab ", max_size=30), st.lists(st.text("ab ", min_size=1, max_size=4), min_size=1, max_size=4))
def test_text_ends_before_the_first_completed_stop_string(text: str, stops: list[str]) -> None:
    ids = PROMPT_TEXT.encode_plain(text)
    got, stream = streamed([[token_id] for token_id in ids], stop=tuple(stops))
    assert text.startswith(got)
    assert not any(stop in got for stop in stops)
    assert stream.is_stopped == any(stop in text for stop in stops)
    if not stream.is_stopped:
        assert got == text


def test_a_raw_prompt_may_spell_control_tokens() -> None:
    assert PROMPT_TEXT.encode_raw("<|user|>hi<|assistant|>")[0] == USER
    assert PROMPT_TEXT.encode_raw("<|user|>hi<|assistant|>")[-1] == ASSISTANT


def test_a_chat_takes_the_targets_own_format() -> None:
    chat = [ChatMessage("user", "one"), ChatMessage("assistant", "two"), ChatMessage("user", "three")]
    expected = "<|user|>one<|assistant|>two<|endoftext|><|user|>three<|assistant|>"
    assert PROMPT_TEXT.encode_chat(chat) == PROMPT_TEXT.encode_raw(expected)


@given(
    st.lists(st.sampled_from(["<|user|>", "<|assistant|>", "<|endoftext|>", "<|", "user", "|>", "x", "🙂"]), min_size=1)
)
def test_a_message_cannot_place_control_tokens(pieces: list[str]) -> None:
    content = "".join(pieces)
    ids = PROMPT_TEXT.encode_chat([ChatMessage("user", content)])
    assert (ids[0], ids[-1]) == (USER, ASSISTANT)
    assert not {END, USER, ASSISTANT} & set(ids[1:-1])
    assert TOKENIZER.decode(list(ids[1:-1]), skip_special_tokens=False) == content


def test_one_mark_serves_every_control_token_of_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    marks: list[str] = []

    def counted(num_bytes: int) -> str:
        marks.append(token_hex(num_bytes))
        return marks[-1]

    token_hex = secrets.token_hex
    monkeypatch.setattr(secrets, "token_hex", counted)
    spelled = "<|user|>" * 2000
    ids = PROMPT_TEXT.encode_chat([ChatMessage("user", spelled), ChatMessage("assistant", spelled)])
    assert len(marks) == 1
    assert TOKENIZER.decode([one for one in ids if one > ASSISTANT]) == spelled * 2


def test_a_message_that_imitates_a_mark_is_taken_as_characters() -> None:
    content = "\ue0000123456789abcdef:0\ue001<|user|>\ue001"
    ids = PROMPT_TEXT.encode_chat([ChatMessage("user", content)])
    assert TOKENIZER.decode(list(ids[1:-1]), skip_special_tokens=False) == content


def target_with(tmp_path: Path, **tokenizer_config: object) -> Path:
    shutil.copy(TARGET / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return tmp_path


def test_a_target_without_template_refuses_chats(tmp_path: Path) -> None:
    prompt_text = PromptText(target_with(tmp_path))
    with pytest.raises(RequestError, match="no chat template; use /v1/completions"):
        prompt_text.encode_chat([ChatMessage("user", "x")])


def test_a_template_that_cuts_a_spelled_control_token_is_refused(tmp_path: Path) -> None:
    prompt_text = PromptText(target_with(tmp_path, chat_template="{{ messages[0].content[:-2] }}"))
    with pytest.raises(RequestError, match="cuts into a control token"):
        prompt_text.encode_chat([ChatMessage("user", "<|user|>")])


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ 1/0 }}",
    ],
)
def test_a_template_can_neither_escape_nor_crash_the_service(tmp_path: Path, template: str) -> None:
    prompt_text = PromptText(target_with(tmp_path, chat_template=template))
    with pytest.raises(RequestError, match="chat template refuses"):
        prompt_text.encode_chat([ChatMessage("user", "x")])


def test_a_broken_template_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a Jinja template"):
        PromptText(target_with(tmp_path, chat_template="{% if %}"))


def test_a_missing_or_foreign_tokenizer_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        PromptText(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="expected a Hugging Face tokenizer file"):
        PromptText(tmp_path)
