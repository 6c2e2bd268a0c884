"""This module runs an exported ExecuTorch program on this machine, through ExecuTorch's Python runtime."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from core.errors import RefusedInput
from eval.compat import register_executorch_ops, set_executorch_threads
from eval.device import expert_op

CONSTANTS = ("get_max_context_len", "get_vocab_size")
"""Constant methods without which inputs cannot be checked."""


class DeviceProgram:
    """A loaded program; it keeps the KV cache of one conversation.

    Loading registers the ops that the program calls: ExecuTorch's custom and quantized ones, and our expert op if the
    program uses it.

    Args:
        path: the .pte file.
        threads: number of threads in ExecuTorch's pool; None keeps its default (one thread for each performance core).

    Raises:
        RefusedInput: the file does not exist or is no program of a language model, it needs our op and no compiler is
            installed, or `threads` is below 1.
    """

    def __init__(self, path: Path, threads: int | None = None):
        if not Path(path).is_file():
            raise RefusedInput(f"{path}: no such program; give a .pte file, or a folder that holds model.pte")
        if threads is not None and threads < 1:
            raise RefusedInput(f"threads is {threads}: give a number from 1")
        from executorch.runtime import Runtime

        register_executorch_ops()
        if threads is not None:
            set_executorch_threads(threads)
        try:
            self._program = Runtime.get().load_program(Path(path))
        except RuntimeError as error:
            raise RefusedInput(f"{path} is no ExecuTorch program ({error}); export or copy it again") from error
        if lacking := {"forward", *CONSTANTS} - set(self._program.method_names):
            raise RefusedInput(
                f"{path} has no {', '.join(sorted(lacking))}: no program that `mobilemoe export` wrote; export it again"
            )
        self.uses_fast_op = bool(self.constant("uses_fast_expert_op", False))
        if self.uses_fast_op:
            expert_op.load()
        self._forward = self._program.load_method("forward")
        self.context: int = self.constant("get_max_context_len")
        self.vocab_size: int = self.constant("get_vocab_size")
        self.length = 0
        """Number of tokens in the KV cache."""

    def constant(self, name: str, default: Any = None) -> Any:
        """Return the value of a constant method; `default` if the program has no method of that name."""
        if name not in self._program.method_names:
            return default
        values = self._program.load_method(name).execute([])
        return values[0] if len(values) == 1 else list(values)

    def logits(self, tokens: Sequence[int] | torch.Tensor, position: int) -> torch.Tensor:
        """Return float32 logits [vocab_size] after `tokens`, the first of which is at `position`.

        The KV cache holds the tokens before `position`, from earlier calls. Position 0 begins a new conversation, and a
        position within the earlier tokens drops those from there on. The program itself checks nothing: it would look
        up rows that are not there, and attend to empty places of the cache.

        Raises:
            RefusedInput: there is no token, one is no id of the vocabulary, the position leaves a gap, the tokens end
                beyond the context, or one call has as many tokens as the context (a call takes at most one less).
        """
        ids = self._read_ids(tokens)
        if not isinstance(position, int) or isinstance(position, bool) or not 0 <= position <= self.length:
            raise RefusedInput(
                f"position is {position!r}: {self.length} tokens are in the cache, so the next is at {self.length}; "
                "a smaller one, down to 0, computes again from there"
            )
        if position + len(ids) > self.context or len(ids) == self.context:
            raise RefusedInput(
                f"{position + len(ids)} tokens: the program's context is {self.context}, and one less in one call"
            )
        self.length = position  # also if the call fails: what it wrote behind this is not to be read
        logits = self._forward.execute((ids[None], torch.tensor([position])))[0][0]
        self.length = position + len(ids)
        return logits

    def greedy(self, prompt: Sequence[int] | torch.Tensor, max_new_tokens: int) -> list[int]:
        """Return the greedy continuation of `max_new_tokens` token ids; stop tokens do not end it.

        Raises:
            RefusedInput: the prompt is empty or has another value than ids of the vocabulary, no token is to be added,
                or prompt and continuation are longer than the context.
        """
        if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool) or max_new_tokens < 1:
            raise RefusedInput(f"max_new_tokens is {max_new_tokens!r}: give a whole number from 1")
        n = len(self._read_ids(prompt))
        if n + max_new_tokens > self.context:
            raise RefusedInput(
                f"the prompt has {n} tokens and max_new_tokens is {max_new_tokens}: the program's context is "
                f"{self.context} tokens for both"
            )
        new = [int(self.logits(prompt, 0).argmax())]
        while len(new) < max_new_tokens:
            new.append(int(self.logits(new[-1:], n + len(new) - 1).argmax()))
        return new

    def _read_ids(self, tokens: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Return the ids of one sequence as int64 [T]; raise RefusedInput if they are none of this vocabulary."""
        try:
            ids = torch.as_tensor(tokens)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise RefusedInput(f"tokens: {error}; give ids of 0 to {self.vocab_size - 1}") from error
        if ids.dim() != 1 or not len(ids):
            raise RefusedInput(
                f"tokens have the shape {list(ids.shape)}: give the ids of one sequence, at least one, such as the "
                "begin-of-text token"
            )
        if ids.dtype not in (torch.int64, torch.int32):
            raise RefusedInput(f"tokens are {str(ids.dtype).removeprefix('torch.')}: give whole numbers")
        for value in (int(ids.min()), int(ids.max())):
            if not 0 <= value < self.vocab_size:
                raise RefusedInput(f"tokens have {value}: ids are 0 to {self.vocab_size - 1}")
        return ids.long().cpu()
