"""Name the Llama-3 special tokens that shards, chat template and exports rely on."""

BOS, EOS, PAD, EOT = "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|eot_id|>"
SPECIAL_TOKENS = (
    BOS, EOS, PAD, "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", EOT, "<|python_tag|>",
)  # fmt: skip
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
"""Number of tokens that a byte-level tokenizer has at least: one a byte, and the special tokens."""
