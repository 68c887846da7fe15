"""Between text and token ids, around generation: prompts in, samples out."""

import codecs
from collections.abc import Collection
from contextlib import suppress

from torch import nn

from nanokv import tokenizer as tokenizers
from nanokv.config import UserError
from nanokv.generate import generate_lists


class TextStream:
    """The text of one sample, from its tokens, as far as it is certain: an unfinished character waits for its
    last byte, and what may begin a stop string, which ends the sample, waits until it is one or is not. Bytes
    that are no UTF-8 become U+FFFD.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, stop: Collection[str] = ()):
        self.tokenizer, self.stop, self.ended, self.held = tokenizer, stop, False, ""
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that this token makes certain; nothing once the stream has ended."""
        return self._release(self.tokenizer.decode_single_token_bytes(token))

    def close(self) -> str:
        """End the stream: the text still held."""
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
    """Token ids of a prompt. An empty one begins a document: with <|endoftext|>, else as in nanoGPT with a
    newline, else with id 0. Raises UserError if the tokenizer cannot encode the text.
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
    """One sample as text, `start` included, of a model in eval mode; options as for `generate`."""
    options = dict(temperature=0.8, top_k=200) | options
    options |= dict(stop_ids=stop_ids(tokenizer), n_vocab=tokenizer.n_vocab)
    (tokens,) = generate_lists(model, [encode_prompt(tokenizer, start)], max_new_tokens, **options)
    stream = TextStream(tokenizer)
    return start + "".join(map(stream.push, tokens)) + stream.close()
