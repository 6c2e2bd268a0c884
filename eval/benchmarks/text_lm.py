"""lm-eval's Hugging Face model with one difference: the items of a benchmark are encoded as text."""

from functools import cached_property
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from core.errors import RefusedInput
from core.literal_text import copy_literal_tokenizer, list_control_tokens

RENDERED, BREAK = "\ufdd1", "\ufdd2"
"""Code points that Unicode keeps for internal use: the first begins a prompt that a chat template has rendered, the
second breaks a text that spells a special token."""


class TextLM(HFLM):
    """A model that reads the text of an item as text, where HFLM makes special tokens of what spells them.

    An item that quotes `<|eot_id|>` would otherwise end the turn, and one that begins with the spelling of bos would
    lose bos. All that the post-processor of the tokenizer adds to a text (bos) is added as HFLM does it.
    """

    @cached_property
    def _literal(self) -> Any:
        """The tokenizer (of the tokenizers library) that knows no special tokens."""
        if not self.tokenizer.is_fast:
            raise RefusedInput(
                f"{self.tokenizer.name_or_path} has no tokenizer.json; save its tokenizer in that format"
            )
        return copy_literal_tokenizer(self.tokenizer.backend_tokenizer)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the prompt of a conversation, marked as one that the template has rendered. lm-eval calls this.

        What a message spells is broken by a mark, so that only the template's own special tokens become tokens.
        """
        history = [message | {"content": self._break_spellings(message["content"])} for message in chat_history]
        return RENDERED + super().apply_chat_template(history, add_generation_prompt)

    def _break_spellings(self, text: str) -> str:
        for token in list_control_tokens(self.tokenizer.backend_tokenizer):
            text = text.replace(token, f"{token[0]}{BREAK}{token[1:]}")
        return text

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the ids of a text, of its end where it has more than `left_truncate_len` tokens.

        Raises:
            RefusedInput: the tokenizer is not of the tokenizers library, or cannot read its special tokens as text.
        """
        if string.startswith(RENDERED):
            # The template has written bos, if there is to be one. Text on both sides of a break is encoded apart.
            encode = self.tokenizer.backend_tokenizer.encode
            parts = string.removeprefix(RENDERED).split(BREAK)
            ids = [index for part in parts for index in encode(part, add_special_tokens=False).ids]
        else:
            ids = self._literal.encode(string, add_special_tokens=add_special_tokens is not False).ids
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and attention mask of texts, int64 [B, T], padded to the longest; each cut as by `tok_encode`."""
        assert not truncation, "a prompt is cut on the left alone"
        ids = [self.tok_encode(string, left_truncate_len=left_truncate_len) for string in strings]
        padded = self.tokenizer.pad({"input_ids": ids}, padding_side=padding_side, return_tensors="pt")
        return padded["input_ids"], padded["attention_mask"]
