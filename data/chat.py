"""Documents and conversations to token ids, with the mask that says which tokens are trained."""

import numpy as np
from transformers import PreTrainedTokenizerBase


class Encoder:
    """Encodes with one tokenizer. Arrays: tokens uint32 [n], loss_mask uint8 [n]."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.special_ids = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)

    def document(self, text: str) -> np.ndarray:
        """bos, the text, eos. A special token's name inside the text is spelled out, never taken as the token."""
        backend = self.tokenizer.backend_tokenizer
        backend.encode_special_tokens = True
        try:
            ids = backend.encode(text, add_special_tokens=False).ids
        finally:
            backend.encode_special_tokens = False
        return np.array([self.tokenizer.bos_token_id, *ids, self.tokenizer.eos_token_id], dtype=np.uint32)

    def conversation(self, messages: list[dict]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of the rendered chat template and the mask: 1 on assistant contents and the token that closes them.

        Each assistant turn is encoded apart from what precedes it, as at inference, where the prompt ends before it.

        Raises:
            ValueError: the chat template does not render a conversation as a prefix of its continuation.
        """
        ids: list[int] = []
        mask: list[int] = []
        rendered = ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:index], add_generation_prompt=True)
            through = self._render(messages[: index + 1], add_generation_prompt=False)
            if not (prompt.startswith(rendered) and through.startswith(prompt)):
                raise ValueError(
                    "tokenizer.chat_template: rendering more messages changes the text of the earlier ones, so the "
                    "assistant's tokens cannot be told apart; use a template that only appends"
                )
            before = self._encode(prompt[len(rendered) :])
            answer = self._encode(through[len(prompt) :])
            # Whatever a template adds after the closing token (a newline, say) is no answer.
            end = 1 + max((i for i, token in enumerate(answer) if token in self.special_ids), default=len(answer) - 1)
            ids += before + answer
            mask += [0] * len(before) + [1] * end + [0] * (len(answer) - end)
            rendered = through
        return np.array(ids, dtype=np.uint32), np.array(mask, dtype=np.uint8)

    def _render(self, messages: list[dict], add_generation_prompt: bool) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)
