"""Encodes documents and conversations to token ids, with the mask that says which tokens are trained."""

from collections.abc import Iterator
from typing import NamedTuple

import jinja2
import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from core.literal_text import compile_spelling_pattern
from core.marked_text import (
    MarkedTextEncoder,
    UnusableConversationError,
    holds_escaped_mark,
    mark_messages,
)
from core.template_limits import check_templates, limit_rendering

TOO_LONG = "the first answer does not fit into data.max_conversation_tokens"
NO_ANSWER = "no message of the assistant"
NOT_APPENDED = "the chat template changes the text of messages when others follow"
ESCAPED = "the chat template escapes characters of a message that spells a special token"


class Conversation(NamedTuple):
    """An encoded conversation."""

    tokens: NDArray[np.uint32]
    """Token ids, uint32 [n]."""
    loss_mask: NDArray[np.uint8]
    """Mask of the trained tokens, uint8 [n]."""
    shortened: bool
    """Whether the last turns were left out to fit."""


class Encoder:
    """Encodes documents and conversations with one tokenizer; the results do not depend on batches or threads.

    Text is encoded as text: where it spells a special token, it becomes ordinary tokens. Only the chat template, and
    bos and eos around a document, are special tokens.

    The environment variable TOKENIZERS_PARALLELISM tells the tokenizers library whether to use several threads.

    Raises:
        RefusedInput: the tokenizer cannot encode the spelling of a special token as text, or its chat template could
            run for hours.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        check_templates(tokenizer.chat_template, jinja2.Environment().lex)
        self.tokenizer = tokenizer
        self.marked = MarkedTextEncoder(tokenizer.backend_tokenizer)
        self.control_ids = set(self.marked.control.values())
        self._spelling = compile_spelling_pattern(self.marked.control)

    def encode_documents(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        """Return the tokens of each text between bos and eos, uint32 [n]."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        # The fast form leaves out the offsets, which are not used here.
        encodings = self.marked.literal.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array([bos, *encoding.ids, eos], dtype=np.uint32) for encoding in encodings]

    def encode_conversation(self, messages: list[dict], max_tokens: int) -> Conversation:
        """Return the tokens of a conversation, rendered by the chat template, and their mask.

        The mask is 1 on the assistant's contents and the tokens that close them. Each assistant turn is encoded apart
        from the text before it, as at inference, where the prompt ends before it. A conversation of more than
        `max_tokens` ends after the last answer that fits: an answer is never cut.

        Raises:
            UnusableConversationError: not even the first answer fits, there is none, or the template cannot render it.
        """
        marked, mark = mark_messages(messages, self._spelling)
        ids: list[int] = []
        mask: list[int] = []
        shortened = False
        # The template renders each prefix anew. To stop at the first answer that does not fit bounds their number.
        for texts in self._render_turns(marked, mark):
            before, answer = self._encode_rendered(texts, mark)
            shortened = len(ids) + len(before) + len(answer) > max_tokens
            if shortened:
                break
            # The answer ends with its last special token: a template may add more after it, for example a newline.
            end = 1 + max((i for i, token in enumerate(answer) if token in self.control_ids), default=len(answer) - 1)
            ids += before + answer
            mask += [0] * len(before) + [1] * end + [0] * (len(answer) - end)
        if not ids:
            raise UnusableConversationError(TOO_LONG if shortened else NO_ANSWER)
        return Conversation(np.array(ids, np.uint32), np.array(mask, np.uint8), shortened)

    def _encode_rendered(self, texts: tuple[str, str], mark: str) -> list[list[int]]:
        if mark:
            return [self.marked.encode(text, mark) for text in texts]
        backend = self.tokenizer.backend_tokenizer
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _render_turns(self, messages: list[dict], mark: str) -> Iterator[tuple[str, str]]:
        """Yield (text since the turn before, answer) of every assistant turn, as the template renders them."""
        rendered = ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:index], add_generation_prompt=True)
            through = self._render(messages[: index + 1], add_generation_prompt=False)
            if not (prompt.startswith(rendered) and through.startswith(prompt)):
                raise UnusableConversationError(NOT_APPENDED)
            if holds_escaped_mark(through, mark):
                raise UnusableConversationError(ESCAPED)
            yield prompt[len(rendered) :], through[len(prompt) :]
            rendered = through

    def _render(self, messages: list[dict], add_generation_prompt: bool) -> str:
        try:
            # As a batch of one: transformers does not take an empty list of messages for a conversation.
            with limit_rendering():
                rendered = self.tokenizer.apply_chat_template(
                    [messages], tokenize=False, add_generation_prompt=add_generation_prompt
                )
        # A template is a program: it raises what it will (TemplateError, TypeError, ...) on what it is given.
        except Exception as error:
            reason = f"the chat template fails with {type(error).__name__}: {error}"
            raise UnusableConversationError(reason.splitlines()[0][:200]) from error
        assert isinstance(rendered, list) and isinstance(rendered[0], str), "tokenize=False gives the texts"
        if any("\ud800" <= sign <= "\udfff" for sign in rendered[0]):
            raise UnusableConversationError("the chat template renders half of a character (a surrogate)")
        return rendered[0]
