"""A stop string ends a request with the token that completes it, wherever it falls: in bytes, tokens or blocks."""

from __future__ import annotations

import random

import msgspec
import pytest
from conftest import LIMITS, MODELS, Served, serve
from tokenizers import Tokenizer
from trees import TreeDrafter, deep, hidden_path

from services.target.text_stream import TokenBytes
from slipstream.engine.stops import StopStrings
from slipstream.models.checkpoint import Checkpoint

Prompts = list[tuple[int, ...]]


def token_bytes() -> list[bytes]:
    """The bytes of every token of the reference tokenizer."""
    table = TokenBytes(Tokenizer.from_file(str(MODELS / "mix-moe-11m" / "tokenizer.json")))
    return [table[token] for token in range(4096)]


@pytest.mark.usefixtures("exact_kernels")
def test_a_stop_string_ends_the_request_with_the_token_that_completes_it(target: Checkpoint, prompts: Prompts) -> None:
    spelled = token_bytes()
    few = prompts[16:40:3]
    plain = serve(target, few, Served(max_tokens=40))
    futures = {1000 + n: (*few[n], *output) for n, output in enumerate(plain.outputs)}
    drafters = (None, TreeDrafter(deep, futures), TreeDrafter(hidden_path, futures))
    rng = random.Random(3)
    num_inside = 0
    for drafter in drafters:
        text = b"".join(spelled[token] for token in rng.choice(plain.outputs)).decode("utf-8", "ignore")
        start = rng.randrange(len(text) // 2)
        stops = (text[start : start + 7], "never said anywhere")
        served = Served(drafter=drafter, max_tokens=40, token_bytes=spelled.__getitem__, more={"stop_strings": stops})
        served.limits = msgspec.structs.replace(LIMITS, num_draft_tokens=9)
        run = serve(target, few, served)
        for output, whole, blocks in zip(run.outputs, plain.outputs, run.blocks, strict=True):
            said = [b"".join(spelled[token] for token in whole[: n + 1]) for n in range(len(whole))]
            ends = [n + 1 for n, one in enumerate(said) if stops[0].encode() in one]
            assert output == whole[: ends[0]] if ends else output == whole
            assert blocks[-1].finish_reason == ("stop" if ends or output[-1] == 0 else "length")
            num_inside += bool(ends) and len(blocks[-1].token_ids) <= blocks[-1].num_accepted
    assert num_inside >= 1


@pytest.mark.parametrize(
    ("stops", "pieces", "completed"),
    [
        (("ab",), [b"a", b"b"], [False, True]),
        (("ab",), [b"xa", b"", b"bx"], [False, False, True]),
        (("aab",), [b"a", b"a", b"a", b"b"], [False, False, False, True]),
        (("b",), [b"a", b"ab"], [False, True]),
        (("b", "long one"), [b"a", b"a long", b" one"], [False, False, True]),
        (("é",), ["é".encode()[:1], "é".encode()[1:]], [False, True]),
    ],
)
def test_a_stop_string_may_straddle_tokens(stops: tuple[str, ...], pieces: list[bytes], completed: list[bool]) -> None:
    watch = StopStrings(stops, pieces.__getitem__)
    assert [watch.completed_by(token) for token in range(len(pieces))] == completed
