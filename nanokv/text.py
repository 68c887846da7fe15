"""Text for generation: prompts to token ids, and token ids to the text of samples."""

import codecs
from collections.abc import Collection
from contextlib import suppress

from torch import nn

from nanokv import tokenizer as tokenizers
from nanokv.config import UserError
from nanokv.generate import generate_lists


class TextStream:
    """The text of one sample, from its tokens. Only text that is certain is given out: an unfinished character
    waits for its last byte, and text that may begin a stop string waits until that is decided. A stop string
    ends the sample. Bytes that are not UTF-8 become U+FFFD.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, stop: Collection[str] = ()):
        self.tokenizer, self.stop, self.ended, self.held = tokenizer, stop, False, ""
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Add a token. Returns the text that is now certain; "" after the end of the stream."""
        return self._release(self.tokenizer.decode_single_token_bytes(token))

    def close(self) -> str:
        """End the stream. Returns the text that was still held."""
        return self._release(b"", last=True)

    def _release(self, new: bytes, last: bool = False) -> str:
        if self.ended:
            return ""
        self.held += self.decoder.decode(new, last)
        found = [at for stop in self.stop if (at := self.held.find(stop)) >= 0]
        self.ended = last or bool(found)
        # the longest end of the held text that begins a stop string
        begun = (n for stop in self.stop for n in range(len(stop)) if self.held.endswith(stop[:n]))
        cut = min(found, default=len(self.held) - (0 if last else max(begun, default=0)))
        text, self.held = self.held[:cut], self.held[cut:]
        return text


def encode_prompt(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    """Token ids of a prompt. An empty prompt begins a document: it is <|endoftext|> if the tokenizer has it, else
    a newline as in nanoGPT, else id 0. Raises UserError if the tokenizer cannot encode the text.
    """
    if ids := tokenizer.encode_ordinary(text):
        return ids
    if text:
        raise UserError(f"the prompt {text!r} holds no token; give another --start")
    if tokenizer.eot_token is not None:
        return [tokenizer.eot_token]
    with suppress(UserError):
        return tokenizer.encode_ordinary("\n") or [0]
    return [0]


def stop_ids(tokenizer: tokenizers.Tokenizer) -> tuple[int, ...]:
    """The token that ends a document, if the tokenizer has one."""
    return () if tokenizer.eot_token is None else (tokenizer.eot_token,)


def generate_text(model: nn.Module, tokenizer, max_new_tokens: int, start: str = "", **options) -> str:
    """One sample as text, `start` included. The model should be in eval mode. Options are those of `generate`."""
    options = dict(temperature=0.8, top_k=200) | options
    options |= dict(stop_ids=stop_ids(tokenizer), n_vocab=tokenizer.n_vocab)
    (tokens,) = generate_lists(model, [encode_prompt(tokenizer, start)], max_new_tokens, **options)
    stream = TextStream(tokenizer)
    return start + "".join(map(stream.push, tokens)) + stream.close()
