"""Name the Llama-3 special tokens that shards, chat template and exports rely on."""

BOS, EOS, PAD, EOT = "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|eot_id|>"
SPECIAL_TOKENS = (
    BOS, EOS, PAD, "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", EOT, "<|python_tag|>",
)  # fmt: skip
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
"""Smallest vocabulary of a byte-level tokenizer: one token for every byte value, and the special tokens."""
