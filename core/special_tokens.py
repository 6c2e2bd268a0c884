"""Name the Llama-3 special tokens that shards, chat template and exports rely on."""

BOS, EOS, PAD, EOT = "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|eot_id|>"
EOM = "<|eom_id|>"
START_HEADER, END_HEADER = "<|start_header_id|>", "<|end_header_id|>"
SPECIAL_TOKENS = (BOS, EOS, PAD, START_HEADER, END_HEADER, EOM, EOT, "<|python_tag|>")
REQUIRED_TOKENS = (BOS, EOS, PAD, START_HEADER, END_HEADER, EOT)
"""Special tokens that a tokenizer must have: shards, the chat template, training and every export use them."""
STOP_TOKENS = (EOS, EOT, EOM)
"""Tokens at which an exported model stops. The chat template must close an answer with one of them."""
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
"""Smallest vocabulary of a byte-level tokenizer: one token for every byte value, and the special tokens."""
