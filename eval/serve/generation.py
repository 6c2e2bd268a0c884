"""Generates one answer, piece by piece, as text.

Shape suffixes: V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from tokenizers.decoders import DecodeStream

from eval.serve.backends import ServedModel
from eval.serve.errors import RequestRefused
from eval.serve.requests import Sampling

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class Finished:
    """The end of an answer."""

    reason: FinishReason
    tokens: int
    """Number of tokens that were generated, the one that ends the answer included."""


def check_length(n_prompt: int, context: int, sampling: Sampling) -> int:
    """Return the most tokens that the answer may have.

    Raises:
        RequestRefused: the prompt is empty, or prompt and answer do not fit into the context.
    """
    if n_prompt == 0:
        raise RequestRefused("the prompt has no tokens; give it some text", "prompt")
    wanted = sampling.max_tokens or 1
    if n_prompt + wanted > context:
        raise RequestRefused(
            f"the prompt has {n_prompt} tokens and the answer may have {wanted}: the model's context is {context} "
            "tokens for both; shorten the prompt or lower max_tokens",
            "max_tokens" if n_prompt < context else None, "context_length_exceeded",
        )  # fmt: skip
    return sampling.max_tokens or context - n_prompt


def generate(
    model: ServedModel, prompt: Sequence[int], sampling: Sampling, is_cancelled: Callable[[], bool] = lambda: False
) -> Iterator[str | Finished]:
    """Yield the pieces of an answer and then its end; nothing more once it is cancelled.

    Raises:
        RequestRefused: prompt and answer do not fit into the context.
    """
    most = check_length(len(prompt), model.context, sampling)
    generator = None if sampling.seed is None else torch.Generator().manual_seed(sampling.seed)
    text = StopFilter(sampling.stop)
    decoder = DecodeStream(skip_special_tokens=True)
    logits_V = model.sequence.extend(prompt, is_cancelled)
    tokens, ends = 0, False
    while logits_V is not None and not is_cancelled():
        token = draw_token(logits_V, sampling, generator)
        tokens += 1
        ends = token in model.stop_ids
        # The stream holds back a character whose bytes are not complete.
        if not ends and (piece := text.add(decoder.step(model.tokenizer.backend_tokenizer, token) or "")):
            yield piece
        if ends or text.stopped or tokens == most:
            if rest := "" if text.stopped else text.held:
                yield rest
            yield Finished("stop" if ends or text.stopped else "length", tokens)
            return
        logits_V = model.sequence.append([token])


def draw_token(logits_V: torch.Tensor, sampling: Sampling, generator: torch.Generator | None) -> int:
    """Draw one token: the likeliest at temperature 0, else by softmax(logits / temperature), cut off at top_p."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    shares_V = torch.softmax((logits_V - logits_V.max()) / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        ordered_V, order_V = shares_V.sort(descending=True)
        # A token stays if those that are likelier have less than top_p together; so the first one always does.
        ordered_V[ordered_V.cumsum(-1) - ordered_V >= sampling.top_p] = 0
        shares_V = torch.zeros_like(shares_V).scatter(-1, order_V, ordered_V)
    return int(torch.multinomial(shares_V, 1, generator=generator))


class StopFilter:
    """Passes text on up to the first stop, and holds back what may become one."""

    def __init__(self, stops: Sequence[str]):
        self._stops = stops
        self.held = ""
        self.stopped = False
        """Whether a stop has come."""

    def add(self, piece: str) -> str:
        """Return the text that is sure not to belong to a stop."""
        text = self.held + piece
        if found := [at for stop in self._stops if (at := text.find(stop)) >= 0]:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        kept = max((_count_overlap(text, stop) for stop in self._stops), default=0)
        self.held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _count_overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of a text with which a stop begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
