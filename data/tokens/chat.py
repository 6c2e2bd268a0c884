"""Documents and conversations to token ids, with the mask that says which tokens are trained."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from core.errors import RefusedInput


class Conversation(NamedTuple):
    """tokens uint32 [n], loss_mask uint8 [n]; `shortened` where turns were left off to fit."""

    tokens: NDArray[np.uint32]
    loss_mask: NDArray[np.uint8]
    shortened: bool


class Encoder:
    """Encodes batches with one tokenizer; results are the same for any division into batches.

    Whether a batch runs on several threads is the tokenizers library's to say (TOKENIZERS_PARALLELISM).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.special_ids = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        # Of its own: the flag is a state of the tokenizer, and conversations are rendered with special tokens in them.
        self._literal = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._literal.encode_special_tokens = True

    def documents(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        """bos, the text, eos. A special token's name inside a text is spelled out, never taken as the token."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        # The fast form leaves out the offsets, which nobody asks for.
        found = self._literal.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array([bos, *encoding.ids, eos], dtype=np.uint32) for encoding in found]

    def conversations(self, conversations: list[list[dict]], max_tokens: int) -> list[Conversation | None]:
        """Tokens of the rendered chat template and the mask: 1 on assistant contents and the token that closes them.

        Each assistant turn is encoded apart from what precedes it, as at inference, where the prompt ends before it.
        A conversation of more than `max_tokens` ends after its last answer that fits: an answer is never cut. Where
        not even the first fits, None.

        Raises:
            RefusedInput: the chat template does not render a conversation as a prefix of its continuation.
        """
        pieces = [self._pieces(messages) for messages in conversations]
        flat = [text for pairs in pieces for pair in pairs for text in pair]
        encoded = iter(self.tokenizer.backend_tokenizer.encode_batch_fast(flat, add_special_tokens=False))
        return [self._join([(next(encoded), next(encoded)) for _ in pairs], max_tokens) for pairs in pieces]

    def _pieces(self, messages: list[dict]) -> list[tuple[str, str]]:
        """(what precedes, answer) of every assistant turn, as rendered."""
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
        ids: list[int] = []
        mask: list[int] = []
        kept = 0
        for before, answer in ((before.ids, answer.ids) for before, answer in turns):
            if len(ids) + len(before) + len(answer) > max_tokens:
                break
            # Whatever a template adds after the closing token (a newline, say) is no answer.
            end = 1 + max((i for i, token in enumerate(answer) if token in self.special_ids), default=len(answer) - 1)
            ids += before + answer
            mask += [0] * len(before) + [1] * end + [0] * (len(answer) - end)
            kept += 1
        if kept == 0:
            return None
        return Conversation(np.array(ids, np.uint32), np.array(mask, np.uint8), shortened=kept < len(turns))

    def _render(self, messages: list[dict], add_generation_prompt: bool) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
