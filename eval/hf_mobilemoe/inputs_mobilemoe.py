"""This module checks what MobileMoE's `forward` and `generate` are given; a copy of it is in every exported folder.

An input that the model cannot mean anything by raises a ValueError with the value and its limit. Without the checks
some end as an IndexError, some stop a GPU, and others compute: a negative id of a packed embedding is a row from its
end, and a gap in the positions is a border between documents.

Shapes, dtypes and lengths are checked at every call. Values are compared where that does not wait for a GPU: on the CPU
at every call, elsewhere once in `generate`. While torch compiles or exports, nothing is checked.
"""

from itertools import pairwise
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig, GenerationMixin

from .configuration_mobilemoe import MobileMoEConfig
from .versions_mobilemoe import read_capacity

INTEGERS = (torch.int64, torch.int32)
"""Dtypes of ids and positions. Others would not look rows up: torch reads bool and uint8 as masks."""
IGNORED_LABEL = -100
"""Label of positions that do not count in the loss."""


def check_inputs(
    config: MobileMoEConfig,
    input_ids: Any,
    inputs_embeds: Any,
    attention_mask: Any,
    position_ids: Any,
    past_key_values: Any,
    cache_position: Any,
) -> None:
    """Check the arguments of `MobileMoEModel.forward`, whose docstring describes them.

    Raises:
        ValueError: one has another type, shape or dtype, or a value beyond its limit; or two do not fit together.
    """
    if torch.compiler.is_compiling():
        return
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    if inputs_embeds is None:
        check_ids(input_ids, config.vocab_size, look=_is_near(input_ids))
        batch, length = input_ids.shape
    else:
        check_embeds(inputs_embeds, config.hidden_size)
        batch, length = inputs_embeds.shape[:2]
    seen = check_cache(past_key_values, config, batch)
    check_mask(attention_mask, batch, None if seen is None else seen + length, look=_is_near(attention_mask))
    index_L = check_cache_position(cache_position, past_key_values, seen, length)
    limit = config.max_position_embeddings
    if position_ids is not None:
        check_positions(position_ids, attention_mask, index_L, batch, length, limit)
    elif index_L is not None and index_L[-1] >= limit:
        raise ValueError(
            f"the call ends at position {int(index_L[-1])}: the model's context (max_position_embeddings) is {limit} "
            f"tokens, positions 0 to {limit - 1}; shorten the input"
        )


def check_ids(ids: Any, vocab_size: int, *, look: bool) -> None:
    """Check token ids, integers [B, L] of 0 to vocab_size - 1.

    Rows of the vocabulary that no token of the tokenizer has are legal ids: the model has them, and may choose them.

    Args:
        look: compare the values too.

    Raises:
        ValueError: the ids are none, or one is outside of the vocabulary.
    """
    if not isinstance(ids, torch.Tensor) or ids.dtype not in INTEGERS or ids.dim() != 2:
        raise ValueError(f"input_ids is {_describe(ids)}: give int64 ids [batch, length]")
    if not ids.numel():
        raise ValueError(
            f"input_ids is {_describe(ids)}: the prompt is empty; give at least one token, such as begin-of-text"
        )
    if look:
        for value in (int(ids.min()), int(ids.max())):
            if not 0 <= value < vocab_size:
                raise ValueError(f"input_ids has {value}: ids are 0 to {vocab_size - 1} (vocab_size {vocab_size})")


def check_embeds(embeds: Any, hidden_size: int) -> None:
    """Check embeddings, floats [B, L, hidden_size]; raise a ValueError for anything else."""
    fits = isinstance(embeds, torch.Tensor) and embeds.is_floating_point() and embeds.dim() == 3
    if not fits or embeds.shape[2] != hidden_size or not embeds.numel():
        raise ValueError(f"inputs_embeds is {_describe(embeds)}: give floats [batch, length, {hidden_size}]")


def check_cache(cache: Any, config: MobileMoEConfig, batch: int) -> int | None:
    """Check that a KV cache is of such a model and batch.

    Returns:
        Number of tokens that it holds; None where only a GPU knows it.

    Raises:
        ValueError: it is no cache of transformers, or has other layers, heads or sequences.
    """
    if cache is None:
        return 0
    if not isinstance(cache, Cache):
        raise ValueError(f"past_key_values is {_describe(cache)}: give a Cache of transformers, as a call returned it")
    if len(cache.layers) not in (0, config.num_hidden_layers):
        raise ValueError(
            f"past_key_values has {len(cache.layers)} layers, the model {config.num_hidden_layers}: it is another's"
        )
    keys = getattr(cache.layers[0], "keys", None) if cache.layers else None
    if keys is not None and keys.dim() == 4:
        found, wanted = (
            (keys.shape[0], keys.shape[1], keys.shape[3]),
            (batch, config.num_key_value_heads, config.head_dim),
        )
        if found != wanted:
            raise ValueError(
                f"past_key_values has (batch, key/value heads, head_dim) {found}, this call {wanted}: it is another "
                "model's or batch's"
            )
    seen = cache.get_seq_length()
    return seen if isinstance(seen, int) else None  # a static cache counts on its device


def check_mask(mask: Any, batch: int, length: int | None, *, look: bool) -> None:
    """Check a padding mask, 0 and 1 [B, past + L]; a mask of four dimensions, or a dict of one, is taken as it is.

    Args:
        length: number of tokens, those in the cache included; None if it is not known.
        look: compare the values too.

    Raises:
        ValueError: another shape, another value, or a sequence without a token.
    """
    if mask is None or isinstance(mask, dict) or (isinstance(mask, torch.Tensor) and mask.dim() == 4):
        return
    shape = f"[{batch}, {'past + length' if length is None else length}], the tokens in the cache included"
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or mask.shape[0] != batch:
        raise ValueError(f"attention_mask is {_describe(mask)}: give {shape}")
    if length is not None and mask.shape[1] != length:
        raise ValueError(f"attention_mask is {_describe(mask)}: give {shape}")
    if look:
        if wrong := mask[(mask != 0) & (mask != 1)].tolist():
            raise ValueError(f"attention_mask has {wrong[0]}: give 1 for a token and 0 for padding")
        if empty := (mask == 0).all(dim=1).nonzero().flatten().tolist():
            raise ValueError(f"attention_mask is 0 throughout sequence {empty[0]}: an empty prompt has no next token")


def check_cache_position(
    cache_position: Any, cache: Cache | None, seen: int | None, length: int
) -> torch.Tensor | None:
    """Check the places [L] in the KV cache, which must go on where it ends.

    Returns:
        The places; None where only a GPU knows them.

    Raises:
        ValueError: they leave a gap, go back, or lie beyond the cache.
    """
    if cache_position is None:
        return None if seen is None else torch.arange(seen, seen + length)
    if not isinstance(cache_position, torch.Tensor) or cache_position.shape != (length,):
        raise ValueError(f"cache_position is {_describe(cache_position)}: give int64 places [{length}]")
    if not _is_near(cache_position):
        return None
    first = int(cache_position[0]) if seen is None else seen
    if cache_position.tolist() != list(range(first, first + length)):
        raise ValueError(
            f"cache_position is {cache_position.tolist()}: {length} tokens after the {first} in the cache take the "
            f"places {first} to {first + length - 1}"
        )
    capacity = -1 if cache is None else read_capacity(cache)
    if 0 < capacity < first + length:
        raise ValueError(f"the call ends at place {first + length - 1}: the cache holds {capacity} tokens")
    return cache_position


def check_positions(
    position_ids: Any, mask: Any, index_L: torch.Tensor | None, batch: int, length: int, limit: int
) -> None:
    """Check positions [B, L]: each token's is one more than that of the token before it, or 0, where a document begins.

    Args:
        mask: padding mask, whose padding may have any position within the limit.
        index_L: places of the tokens among all tokens; None if they are not known.
        limit: number of positions of the model.

    Raises:
        ValueError: another shape or dtype, a position beyond the limit, or a gap.
    """
    fits = isinstance(position_ids, torch.Tensor) and position_ids.dtype in INTEGERS and position_ids.dim() == 2
    if not fits or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != length:
        raise ValueError(f"position_ids is {_describe(position_ids)}: give int64 positions [{batch}, {length}]")
    if not _is_near(position_ids):
        return
    for value in (int(position_ids.min()), int(position_ids.max())):
        if not 0 <= value < limit:
            raise ValueError(
                f"position_ids has {value}: positions are 0 to {limit - 1} (max_position_embeddings {limit})"
            )
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 2):
        return  # the mask alone says who sees whom
    kept = torch.ones(position_ids.shape, dtype=torch.bool)
    if mask is not None:
        kept = mask[:, -length:].bool().cpu()
    for row, here in zip(position_ids.expand(len(kept), -1), kept, strict=True):
        places = range(length) if index_L is None else index_L.tolist()
        _check_row(row[here].tolist(), [place for place, keep in zip(places, here.tolist(), strict=True) if keep],
                   knows_places=index_L is not None, padded=mask is not None)  # fmt: skip


def _check_row(positions: list[int], places: list[int], *, knows_places: bool, padded: bool) -> None:
    """Check the positions of one sequence's tokens, padding left out."""
    for before, after in pairwise(positions):
        if after not in (before + 1, 0):
            raise ValueError(
                f"position_ids go from {before} to {after}: {before + 1} follows, or 0, where a document begins"
            )
    if not positions or not knows_places:
        return
    # Padding in front, also in the cache, makes a position smaller than its place; nothing makes it larger.
    first, place = positions[0], places[0]
    if first > place or (not padded and first != place):
        raise ValueError(f"position_ids begin at {first}: {place} tokens are before it, so {place} follows")


def check_outputs(logits_to_keep: Any, labels: Any, inputs: Any, vocab_size: int) -> None:
    """Check the arguments of a causal model that concern its outputs.

    Args:
        logits_to_keep: number of last positions, or a tensor of positions.
        labels: ids [B, L], or -100 where the loss leaves a position out; None for no loss.
        inputs: input_ids or inputs_embeds.

    Raises:
        ValueError: a negative number, labels of another shape, or a label outside of the vocabulary.
    """
    if torch.compiler.is_compiling():
        return
    if isinstance(logits_to_keep, int) and logits_to_keep < 0:
        raise ValueError(f"logits_to_keep is {logits_to_keep}: give the number of last positions, or 0 for all")
    if labels is None or not isinstance(inputs, torch.Tensor):
        return
    if not isinstance(labels, torch.Tensor) or labels.dtype not in INTEGERS or labels.shape != inputs.shape[:2]:
        raise ValueError(f"labels is {_describe(labels)}: give int64 ids {list(inputs.shape[:2])}")
    if _is_near(labels) and labels.numel():
        wrong = labels[((labels < 0) & (labels != IGNORED_LABEL)) | (labels >= vocab_size)].tolist()
        if wrong:
            raise ValueError(
                f"labels has {wrong[0]}: give 0 to {vocab_size - 1} (vocab_size {vocab_size}), or {IGNORED_LABEL} to "
                "leave a position out"
            )


class CheckedGenerationMixin(GenerationMixin):
    """transformers' generation for prompts that have been checked."""

    def generate(self, inputs: Any = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does.

        Raises:
            ValueError: the prompt is empty, is no token ids, has ids outside of the vocabulary or padding behind its
                tokens; or prompt and new tokens together are longer than the model's context.
        """
        model: Any = self  # the class that this one is mixed into
        config = model.config
        settings = (generation_config, model.generation_config)
        ids: Any
        embeds: Any
        ids, embeds = kwargs.get("input_ids") if inputs is None else inputs, kwargs.get("inputs_embeds")
        if ids is not None or embeds is not None:
            check_prompt(ids, embeds, config, kwargs, _find_setting("pad_token_id", kwargs, settings),
                         _find_setting("eos_token_id", kwargs, settings))  # fmt: skip
            given: Any = ids if embeds is None else embeds
            new = _find_setting("max_new_tokens", kwargs, settings)
            length = _find_setting("max_length", kwargs, settings)
            if length == GenerationConfig().max_length and "max_length" not in kwargs:
                length = None  # nobody gave it; transformers then adds as many tokens as there is room for
            check_length(given.shape[1], new, length, config.max_position_embeddings)
        return super().generate(inputs, generation_config, *args, **kwargs)


def check_prompt(
    ids: Any, embeds: Any, config: MobileMoEConfig, kwargs: dict[str, Any], pad_id: Any, eos_ids: Any
) -> None:
    """Check what `generate` continues; values are compared on every device.

    Args:
        kwargs: options of `generate`.
        pad_id: id of padding, by which transformers finds the mask if none is given; None if there is no such id.
        eos_ids: id or ids at which generation stops.

    Raises:
        ValueError: the prompt is none, or padded behind its tokens.
    """
    if ids is not None and embeds is not None:
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    if embeds is None:
        check_ids(ids, config.vocab_size, look=True)
    else:
        check_embeds(embeds, config.hidden_size)
    batch, length = (ids if embeds is None else embeds).shape[:2]
    past = kwargs.get("past_key_values", kwargs.get("cache"))
    seen = past.get_seq_length() if isinstance(past, Cache) and embeds is None else 0
    if isinstance(seen, int) and seen >= length:
        raise ValueError(
            f"input_ids has {length} tokens and past_key_values holds {seen}: give the whole conversation, at least "
            "one token behind those in the cache"
        )
    mask = kwargs.get("attention_mask")
    stops = eos_ids if isinstance(eos_ids, list | tuple) else [eos_ids]
    if mask is None and embeds is None and pad_id is not None and pad_id not in stops:
        mask = (ids != pad_id).long()
    # Embeddings that continue a cache come without those before them; `forward` checks the mask then.
    check_mask(mask, batch, length if past is None else None, look=True)
    if isinstance(mask, torch.Tensor) and mask.dim() == 2 and not bool(mask[:, -1].all()):
        row = int((mask[:, -1] == 0).nonzero()[0])
        raise ValueError(
            f"attention_mask ends with 0 in sequence {row}: the prompt must be padded on the left, not behind"
        )


def check_length(length: int, new: Any, max_length: Any, limit: int) -> None:
    """Check the number of tokens that `generate` is to add, and that the model has room for them.

    Args:
        length: tokens of the prompt.
        new: `max_new_tokens`, if it is given.
        max_length: `max_length`, if it is given: tokens of prompt and answer; `new` goes before it.
        limit: tokens of the model's context.

    Raises:
        ValueError: no token is to be added, or more than there is room for.
    """
    for name, value in (("max_new_tokens", new), ("max_length", max_length)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name} is {value!r}: give a whole number from 1")
    end = length + new if new is not None else max_length or length
    if end > limit:
        asked = f"max_new_tokens is {new}" if new is not None else f"max_length is {max_length}"
        raise ValueError(
            f"the prompt has {length} tokens and {asked if end > length else 'an answer needs more'}: the context "
            f"(max_position_embeddings) is {limit} tokens for both"
        )


def _find_setting(name: str, kwargs: dict[str, Any], configs: tuple[Any, ...]) -> Any:
    """Return an option of `generate`, or else that of the first generation config that has it."""
    found = [kwargs.get(name), *(getattr(config, name, None) for config in configs)]
    return next((value for value in found if value is not None), None)


def _is_near(tensor: Any) -> bool:
    """Return whether values can be compared without waiting for a GPU, and outside of a trace."""
    return isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu" and not torch.jit.is_tracing()


def _describe(value: Any) -> str:
    """Return shape and dtype of a tensor, or the type of something else."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"a {type(value).__name__}"
