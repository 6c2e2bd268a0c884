"""The artifacts that can be served, behind one interface: an ExecuTorch program, or a Hugging Face folder.

Shape suffixes: V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from core.errors import RefusedInput
from core.special_tokens import STOP_TOKENS
from eval.benchmarks.cached_rows import can_continue
from eval.compute_dtype import choose_float_dtype
from eval.device.executorch_export import PROGRAM
from eval.device.runtime import DeviceProgram

CHUNK = 256
"""Most tokens of one forward pass; a request that is given up ends after it."""


class Backend(Protocol):
    """A model with a KV cache of one sequence."""

    context: int
    """Number of tokens of prompt and answer together."""

    def feed(self, ids: Sequence[int], position: int) -> torch.Tensor:
        """Return float32 logits [V] after `ids`; the cache keeps what is before `position`, and `ids` behind it."""


class ProgramBackend:
    """An ExecuTorch program."""

    def __init__(self, path: Path, threads: int | None):
        self._program = DeviceProgram(path, threads)
        self.context = self._program.context

    def feed(self, ids: Sequence[int], position: int) -> torch.Tensor:
        """Return what `Backend.feed` does."""
        return self._program.logits(ids, position)


class TransformersBackend:
    """A causal model that transformers loads, on the CPU."""

    def __init__(self, folder: Path, threads: int | None):
        """Load the model.

        Raises:
            RefusedInput: transformers cannot load it, or its cache cannot be cut (sliding windows, states).
        """
        from transformers import AutoModelForCausalLM

        import eval.hf_mobilemoe  # noqa: F401  (registers MobileMoE)

        if threads is not None:
            torch.set_num_threads(threads)
        try:
            self._model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=choose_float_dtype(folder), local_files_only=True
            ).eval()
        except (OSError, ValueError, KeyError) as error:
            raise RefusedInput(f"{folder}: transformers cannot load it ({error}); export or copy it again") from error
        if not can_continue(self._model):
            raise RefusedInput(
                f"{folder}: {type(self._model).__name__} has no plain cache of all tokens, which serving cuts and "
                "continues; serve it with a program of its own"
            )
        self.context = self._model.config.max_position_embeddings
        self._cache: Any = None

    def feed(self, ids: Sequence[int], position: int) -> torch.Tensor:
        """Return what `Backend.feed` does."""
        if position == 0:
            self._cache = None
        else:
            self._cache.crop(position)
        with torch.inference_mode():
            output = self._model(
                torch.tensor([list(ids)]), past_key_values=self._cache, use_cache=True, logits_to_keep=1
            )
        self._cache = output.past_key_values
        return output.logits[0, -1].float()


class CachedSequence:
    """The tokens in a backend's cache. A conversation that goes on computes its new tokens alone."""

    def __init__(self, backend: Backend):
        self._backend = backend
        self._ids: list[int] = []

    def extend(self, ids: Sequence[int], is_cancelled: Callable[[], bool]) -> torch.Tensor | None:
        """Return the logits [V] after `ids`, a whole sequence; None if it was cancelled on the way."""
        shared = 0
        # The last token is computed in any case: its logits are not in the cache.
        for cached, wanted in zip(self._ids, ids[:-1], strict=False):
            if cached != wanted:
                break
            shared += 1
        del self._ids[shared:]
        logits_V = None
        chunk = min(CHUNK, self._backend.context - 1)
        for start in range(shared, len(ids), chunk):
            if is_cancelled():
                return None
            logits_V = self.append(ids[start : start + chunk])
        return logits_V

    def append(self, ids: Sequence[int]) -> torch.Tensor:
        """Return the logits [V] after `ids` behind the tokens so far."""
        logits_V = self._backend.feed(ids, len(self._ids))
        self._ids += ids
        return logits_V


@dataclass
class ServedModel:
    """A model that is loaded, with its tokenizer."""

    name: str
    """Its id in the interface: the name of the artifact's folder."""
    context: int
    sequence: CachedSequence
    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]


def load_model(artifact: Path, threads: int | None = None) -> ServedModel:
    """Load an artifact.

    Args:
        artifact: .pte file with its tokenizer beside it, the folder of one, or a Hugging Face folder.
        threads: number of threads of the runtime; its own choice if not given.

    Raises:
        RefusedInput: the artifact is no model, or has no tokenizer.
    """
    program = artifact if artifact.suffix == ".pte" else artifact / PROGRAM
    folder = program.parent
    if not (folder / "tokenizer.json").is_file():
        raise RefusedInput(
            f"{folder} has no tokenizer.json: texts cannot be read; put the model's own tokenizer there, or give a "
            "folder that `mobilemoe export` wrote"
        )
    if not program.is_file() and not (folder / "config.json").is_file():
        raise RefusedInput(
            f"{folder} has neither {PROGRAM} nor config.json: it is no model; give a folder that `mobilemoe export` "
            "wrote, or a .pte file"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    backend: Backend = (ProgramBackend if program.is_file() else TransformersBackend)(
        program if program.is_file() else folder, threads
    )
    name = folder.resolve().name
    return ServedModel(name, backend.context, CachedSequence(backend), tokenizer, find_stop_ids(folder, tokenizer))


def find_stop_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids at which an answer ends.

    They are those of generation_config.json, the tokenizer's end of text, and the Llama-3 tokens that end a turn.
    """
    ids = {tokenizer.eos_token_id}
    if (folder / "generation_config.json").is_file():
        stated = GenerationConfig.from_pretrained(folder).eos_token_id
        ids |= set(stated) if isinstance(stated, list) else {stated}
    known = tokenizer.get_added_vocab()
    return frozenset(ids - {None} | {known[token] for token in STOP_TOKENS if token in known})
