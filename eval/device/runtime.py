"""This module runs an exported ExecuTorch program on this machine, through ExecuTorch's Python runtime."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from core.errors import RefusedInput
from eval.compat import register_executorch_ops, set_executorch_threads
from eval.device import expert_op


class DeviceProgram:
    """A loaded program; it keeps the KV cache of one conversation.

    Loading registers the ops that the program calls: ExecuTorch's custom and quantized ones, and our expert op if the
    program uses it.

    Args:
        path: the .pte file.
        threads: number of threads in ExecuTorch's pool; None keeps its default (one thread for each performance core).

    Raises:
        RefusedInput: the file does not exist, or it needs our op and no compiler is installed.
    """

    def __init__(self, path: Path, threads: int | None = None):
        if not Path(path).is_file():
            raise RefusedInput(f"{path}: no such program; give a .pte file, or a folder that holds model.pte")
        from executorch.runtime import Runtime

        register_executorch_ops()
        if threads is not None:
            set_executorch_threads(threads)
        self._program = Runtime.get().load_program(Path(path))
        self.uses_fast_op = bool(self.constant("uses_fast_expert_op", False))
        if self.uses_fast_op:
            expert_op.load()
        self._forward = self._program.load_method("forward")
        self.context: int = self.constant("get_max_context_len")

    def constant(self, name: str, default: Any = None) -> Any:
        """Return the value of a constant method; `default` if the program has no method of that name."""
        if name not in self._program.method_names:
            return default
        values = self._program.load_method(name).execute([])
        return values[0] if len(values) == 1 else list(values)

    def logits(self, tokens: Sequence[int], position: int) -> torch.Tensor:
        """Return float32 logits [vocab_size] after `tokens`, the first of which is at `position`.

        The KV cache holds the tokens before `position`, from earlier calls.

        Raises:
            RefusedInput: the tokens end beyond the context, or one call has as many tokens as the context (a call takes
                at most one less).
        """
        if position + len(tokens) > self.context or len(tokens) == self.context:
            raise RefusedInput(
                f"{position + len(tokens)} tokens: the program's context is {self.context}, and one less in one call"
            )
        inputs = (torch.tensor([list(tokens)]), torch.tensor([position]))
        return self._forward.execute(inputs)[0][0]

    def greedy(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        """Return the greedy continuation of `max_new_tokens` token ids; stop tokens do not end it."""
        new = [int(self.logits(prompt, 0).argmax())]
        while len(new) < max_new_tokens:
            new.append(int(self.logits(new[-1:], len(prompt) + len(new) - 1).argmax()))
        return new
