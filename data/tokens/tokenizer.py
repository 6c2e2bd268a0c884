"""Training of a byte-level BPE in Llama-3's form, and loading and saving of Hugging Face tokenizer folders."""

from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from core.atomic import atomic_write
from core.hashing import sha256_file
from core.special_tokens import BOS, EOS, PAD, SPECIAL_TOKENS

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZATION = rf"{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"
"""Regular expression of Llama-3 (and cl100k) that splits text into words, groups of up to three digits, punctuation and
white space."""
SINGLE_DIGITS = rf"{_LETTERS}|\p{{N}}|{_REST}"
"""The same with single digits, Qwen2's."""
MAX_TRAINING_WORD_CHARS = 256
"""Largest number of characters of a word that the training gets at once: its time grows with the square of a word's
length. It counts the pairs of a longer word in its pieces; the tokenizer that it makes does not cut words."""

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def train(texts: Iterator[str], vocab_size: int, single_digits: bool = False) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on texts; special tokens take the last ids, as in Llama-3.

    Args:
        vocab_size: number of entries, special tokens included; a text with too few distinct pairs gives fewer.
        single_digits: whether every digit is a token of its own.
    """
    tokenizer = Tokenizer(models.BPE())
    pattern = SINGLE_DIGITS if single_digits else PRE_TOKENIZATION
    words = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    pieces = pre_tokenizers.Split(Regex(rf"[\s\S]{{1,{MAX_TRAINING_WORD_CHARS}}}"), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pieces, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def save(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a Hugging Face tokenizer folder, which appears complete or not at all."""
    with atomic_write(folder) as partial:
        tokenizer.save_pretrained(str(partial))


def load(folder: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer that `save` wrote."""
    return AutoTokenizer.from_pretrained(str(folder))


def hash_tokenizer(folder: Path) -> str:
    """Return the SHA-256 of a saved tokenizer's tokenizer.json, which identifies it."""
    return sha256_file(folder / "tokenizer.json")
