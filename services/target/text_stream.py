"""Tokens to text, block by block: what was emitted never changes, and no half character is ever sent.

A byte-level BPE token is a piece of a byte string, so the text of a prefix is not always text: the bytes of an
unfinished character wait for the next token. The joined text equals the tokenizer's own decoding of all tokens.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from tokenizers import Tokenizer


class TokenBytes:
    """The bytes that each token of a byte-level BPE vocabulary stands for; special tokens stand for none.

    `longest` is the length in bytes of the longest token as a prompt spells it, special tokens included.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        byte_of = {character: byte for byte, character in enumerate(_byte_level_alphabet())}
        added = tokenizer.get_added_tokens_decoder()
        self._special = {token_id: token.content for token_id, token in added.items() if token.special}
        self._bytes: list[bytes] = []
        for token_id in range(tokenizer.get_vocab_size(with_added_tokens=True)):
            if token_id in added:
                token = added[token_id]
                self._bytes.append(b"" if token.special else token.content.encode())
            else:
                self._bytes.append(_token_bytes(tokenizer.id_to_token(token_id) or "", byte_of))
        self.longest = max(map(len, [*self._bytes, *(token.content.encode() for token in added.values())]), default=0)

    def __getitem__(self, token_id: int) -> bytes:
        """The bytes of a token; none for an id beyond the tokenizer (a padded vocabulary)."""
        return self._bytes[token_id] if token_id < len(self._bytes) else b""

    def spelling(self, token_id: int) -> str:
        """A token as a reader may see it: a special token's name, else its bytes, what is no UTF-8 replaced."""
        return self._special.get(token_id) or self[token_id].decode("utf-8", "replace")


class TextStream:
    """The text of one answer as its tokens arrive, cut before the first stop string.

    `token_offsets` has an entry per token taken in: the number of characters that were complete before it, which is
    where its own begin (or where the character does that it continues). `is_stopped` says that a stop string was
    completed, after which nothing more is emitted or taken in.
    """

    def __init__(self, token_bytes: TokenBytes, stop: Sequence[str] = ()) -> None:
        self._token_bytes = token_bytes
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._num_characters = 0
        self.token_offsets: list[int] = []
        self.is_stopped = False

    @property
    def num_tokens(self) -> int:
        """Tokens taken in, the one that completed a stop string included."""
        return len(self.token_offsets)

    def push(self, token_ids: Sequence[int]) -> str:
        """Take a block in and return the text that is now certain; it may be empty."""
        emitted = ""
        for token_id in token_ids:
            if self.is_stopped:
                break
            self.token_offsets.append(self._num_characters)
            characters = self._decoder.decode(self._token_bytes[token_id])
            self._num_characters += len(characters)
            emitted += self._take(characters)
        return emitted

    def finish(self) -> str:
        """The text still held back when the answer has ended; an unfinished character becomes U+FFFD."""
        if self.is_stopped:
            return ""
        rest = self._take(self._decoder.decode(b"", final=True))
        if not self.is_stopped:
            rest, self._held = rest + self._held, ""
        return rest

    def _take(self, text: str) -> str:
        """Add decoded text; return what no stop string can claim any more."""
        self._held += text
        found = [index for index in (self._held.find(stop) for stop in self._stop) if index >= 0]
        if found:
            self.is_stopped = True
            emitted, self._held = self._held[: min(found)], ""
            return emitted
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        emitted, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return emitted


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if stop.startswith(text[-size:])), 0)


def _token_bytes(token: str, byte_of: dict[str, int]) -> bytes:
    """A token's bytes; one with a character outside the alphabet stands for its own text, as in `tokenizers`."""
    if all(character in byte_of for character in token):
        return bytes(byte_of[character] for character in token)
    return token.encode()


def _byte_level_alphabet() -> list[str]:
    """The printable character that stands for each byte (GPT-2's table, also in `tokenizers`)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    unprintable = [byte for byte in range(256) if byte not in printable]
    shifted = {byte: 256 + index for index, byte in enumerate(unprintable)}
    return [chr(shifted.get(byte, byte)) for byte in range(256)]
