"""Encodes documents and conversations to token ids, with the mask that says which tokens are trained."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from core.errors import RefusedInput
from data.compat import copy_literal_tokenizer


class Conversation(NamedTuple):
    """An encoded conversation."""

    tokens: NDArray[np.uint32]
    """Token ids, uint32 [n]."""
    loss_mask: NDArray[np.uint8]
    """Mask of the trained tokens, uint8 [n]."""
    shortened: bool
    """Whether the last turns were left out to fit."""


class Encoder:
    """Encodes batches with one tokenizer; the results do not depend on the division into batches.

    The environment variable TOKENIZERS_PARALLELISM tells the tokenizers library whether to use several threads.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.special_ids = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        self._literal = copy_literal_tokenizer(tokenizer.backend_tokenizer)

    def encode_documents(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        """Return the tokens of each text between bos and eos, uint32 [n].

        The name of a special token inside a text is encoded as ordinary text, never as the special token.
        """
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        # The fast form leaves out the offsets, which are not used here.
        encodings = self._literal.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array([bos, *encoding.ids, eos], dtype=np.uint32) for encoding in encodings]

    def encode_conversations(self, conversations: list[list[dict]], max_tokens: int) -> list[Conversation | None]:
        """Return the tokens of each conversation, rendered by the chat template, and their mask.

        The mask is 1 on the assistant's contents and the tokens that close them. Each assistant turn is encoded apart
        from the text before it, as at inference, where the prompt ends before it. A conversation of more than
        `max_tokens` ends after the last answer that fits: an answer is never cut. The result is None where not even the
        first answer fits.

        Raises:
            RefusedInput: the chat template does not render a conversation as a prefix of its continuation.
        """
        pieces = [self._split_turns(messages) for messages in conversations]
        flat = [text for pairs in pieces for pair in pairs for text in pair]
        encoded = iter(self.tokenizer.backend_tokenizer.encode_batch_fast(flat, add_special_tokens=False))
        return [self._join([(next(encoded), next(encoded)) for _ in pairs], max_tokens) for pairs in pieces]

    def _split_turns(self, messages: list[dict]) -> list[tuple[str, str]]:
        """Return (text since the turn before, answer) of every assistant turn, as the template renders them."""
        pieces = []
        rendered = ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:index], add_generation_prompt=True)
            through = self._render(messages[: index + 1], add_generation_prompt=False)
            if not (prompt.startswith(rendered) and through.startswith(prompt)):
                raise RefusedInput(
                    "tokenizer.chat_template: rendering more messages changes the text of the earlier ones, so the "
                    "assistant's tokens cannot be told apart; use a template that only appends"
                )
            pieces.append((prompt[len(rendered) :], through[len(prompt) :]))
            rendered = through
        return pieces

    def _join(self, turns: list[tuple[Encoding, Encoding]], max_tokens: int) -> Conversation | None:
        """Concatenate the turns that fit into `max_tokens`."""
        ids: list[int] = []
        mask: list[int] = []
        kept = 0
        for before, answer in ((before.ids, answer.ids) for before, answer in turns):
            if len(ids) + len(before) + len(answer) > max_tokens:
                break
            # The answer ends with its last special token: a template may add more after it, for example a newline.
            end = 1 + max((i for i, token in enumerate(answer) if token in self.special_ids), default=len(answer) - 1)
            ids += before + answer
            mask += [0] * len(before) + [1] * end + [0] * (len(answer) - end)
            kept += 1
        if kept == 0:
            return None
        return Conversation(np.array(ids, np.uint32), np.array(mask, np.uint8), shortened=kept < len(turns))

    def _render(self, messages: list[dict], add_generation_prompt: bool) -> str:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        assert isinstance(text, str), "tokenize=False gives one conversation's text"
        return text
