"""Loads a tokenizer that somebody else made, and refuses what training, evaluation or an export could not use.

tokenizer.json alone says what the tokens are: the classes of transformers, which may change them on loading, are left
out, and what is saved has the plainest class. From the folder's other files comes the chat template.
"""

import json
from pathlib import Path
from typing import Any, NoReturn

from tokenizers import Tokenizer, models, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from core.errors import RefusedInput
from core.literal_text import list_control_tokens
from core.marked_text import MarkedTextEncoder, UnusableConversationError
from core.special_tokens import BOS, EOS, PAD, REQUIRED_TOKENS, STOP_TOKENS
from data.tokens.chat import Encoder
from data.tokens.template_date import pin_date
from data.tokens.tokenizer import CHAT_TEMPLATE
from data.tokens.tokenizer_files import CONFIG, TEMPLATE, locate_tokenizer

FIELD = "data.tokenizer.path"
PROBE_TEXTS = (
    " a leading space, two  spaces, a trailing one ", "tabs\tand\r\nline\n\n\nbreaks", "UPPER and lower",
    "don't , do .", "\u00e9 and e\u0301, \ufb01 \u00bd \u2460 \u00c5 \u212b", "日本語 한국어 العربية हिन्दी",
    "\U0001f469\u200d\U0001f467 \u200b\ufeff\u00a0", "1234567 3.14", "\u2581 \u0120 \u010a",
    # Every byte that UTF-8 has.
    "".join(map(chr, range(0x801))) + "".join(chr(n << 12) for n in range(1, 16))
    + "\U00010000\U00040000\U00080000\U000c0000\U00100000",
)  # fmt: skip
"""Texts that encoding and decoding must give back as they are."""
PROBE_QUESTIONS, PROBE_ANSWERS = ("How many?", "And now <|eot_id|>?"), ("There are 12.", "Still 12.")
"""A plain conversation of two turns, which a chat template must render. One message spells a special token."""


def load_existing(path: str, template_date: str = "") -> PreTrainedTokenizerFast:
    """Load a tokenizer folder or a tokenizer.json, with a chat template whose date is `template_date`.

    Where there is no chat template it gets ours. bos in front of a text is added once, whatever it added before.

    Raises:
        RefusedInput: the tokenizer loses or changes text, or its files contradict each other, or it lacks a special
            token, or its chat template cannot be used; names the rule and the way out.
    """
    file = locate_tokenizer(path)
    text = _read_text(file)
    try:
        backend = Tokenizer.from_str(text)
    # The tokenizers library raises Exception itself.
    except Exception as error:
        _refuse(path, f"{file} is no Hugging Face tokenizer.json ({error})", "save the tokenizer in that format")
    # A stored truncation would cut every document without a word.
    backend.no_truncation()
    backend.no_padding()
    _check_entries(path, backend, json.loads(text))
    template = CHAT_TEMPLATE
    if not path.endswith(".json"):
        config = _read_config(path)
        try:
            _check_config(path, config, backend)
            template = _read_template(path, config) or CHAT_TEMPLATE
        except (AttributeError, KeyError, TypeError) as error:
            _refuse(path, f"{CONFIG} is not of transformers' form ({error!r})", "save the tokenizer with transformers")
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))]),
        ]
    )
    try:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=PAD,
            chat_template=pin_date(template, template_date), clean_up_tokenization_spaces=False,
        )  # fmt: skip
        encoder = Encoder(tokenizer)
    except RefusedInput as error:
        raise RefusedInput(f"{FIELD} = {path!r}: {error}") from error
    _check_texts(path, backend, encoder.marked)
    _check_template(path, encoder)
    return tokenizer


def _refuse(path: str, rule: str, way_out: str) -> NoReturn:
    raise RefusedInput(f"{FIELD} = {path!r}: {rule}; {way_out}")


def _read_text(file: Path) -> str:
    """Read a file in UTF-8."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        _refuse(str(file.parent), f"{file} cannot be read ({error})", "give a folder with tokenizer.json, in UTF-8")
    if text.startswith("\ufeff"):
        _refuse(str(file.parent), f"{file} begins with a byte order mark", "save it in UTF-8 without one")
    return text


def _read_config(path: str) -> dict[str, Any]:
    file = Path(path) / CONFIG
    if not file.exists():
        return {}
    try:
        config = json.loads(_read_text(file))
    except json.JSONDecodeError as error:
        _refuse(path, f"{file} is no JSON ({error})", "copy it again")
    return config if isinstance(config, dict) else _refuse(path, f"{file} holds no object", "copy it again")


def _check_entries(path: str, backend: Tokenizer, file: dict[str, Any]) -> None:
    """Check the kind of tokenizer and its vocabulary: ids without holes, the special tokens, nothing random."""
    if not isinstance(backend.model, models.BPE):
        _refuse(path, f"is a {type(backend.model).__name__}, which loses text", "take a byte-level BPE, as Llama 3's")
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        rule = f"its {len(vocabulary)} entries do not have the ids 0 to {len(vocabulary) - 1}, each once"
        _refuse(path, rule, "save it with an entry for every row of the model")
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    moved = [t["content"] for t in file.get("added_tokens", ()) if vocabulary.get(t["content"]) != t["id"]]
    if moved:
        _refuse(path, f"other entries have the ids of {', '.join(moved[:5])}", "save it with transformers again")
    absent = [token for token in REQUIRED_TOKENS if token not in added or not added[token].special]
    if absent:
        rule = f"lacks {', '.join(absent)} among its special tokens, which training and export need"
        _refuse(path, rule, "take a tokenizer of the Llama-3 family, from 3.1 on")
    if backend.normalizer is not None:
        rule = f"its normalizer ({type(backend.normalizer).__name__}) changes text before it is encoded"
        _refuse(path, rule, "take a byte-level BPE without one, as Llama 3's")
    if backend.model.dropout:
        _refuse(path, "BPE with dropout gives other tokens each time", 'set "dropout" to null in tokenizer.json')
    for text in list_control_tokens(backend):
        if added[text].lstrip or added[text].rstrip:
            _refuse(path, f"{text!r} takes the white space beside it away", "set lstrip and rstrip to false")
        if len(text) == 1:
            _refuse(path, f"the added token {text!r} is one character, which any text may hold", "remove it")


def _check_config(path: str, config: dict[str, Any], backend: Tokenizer) -> None:
    """Check that tokenizer_config.json asks for no code, and that transformers reads the tokens of tokenizer.json."""
    if config.get("auto_map"):
        rule = "tokenizer_config.json asks for code of its own (auto_map), which is never run"
        _refuse(path, rule, "save the tokenizer as PreTrainedTokenizerFast")
    added = {str(index): token.content for index, token in backend.get_added_tokens_decoder().items()}
    for index, token in config.get("added_tokens_decoder", {}).items():
        if added.get(index) != token["content"]:
            rule = f"token {index} is {token['content']!r} in tokenizer_config.json, not in tokenizer.json"
            _refuse(path, rule, "copy both files from one place")
    if config.get("tokenizer_class", "PreTrainedTokenizerFast") == "PreTrainedTokenizerFast":
        return
    try:
        read = AutoTokenizer.from_pretrained(path, local_files_only=True)
        pairs = ((read.encode(text, add_special_tokens=False), _encode(backend, text)) for text in PROBE_TEXTS)
        changed = any(by_class != by_file for by_class, by_file in pairs)
    # The classes of transformers raise what they will on what they cannot load.
    except Exception as error:
        _refuse(path, f"transformers cannot load it ({error})", 'set "tokenizer_class" to "PreTrainedTokenizerFast"')
    if changed:
        rule = f"transformers' class {config['tokenizer_class']} gives other tokens than tokenizer.json"
        _refuse(path, rule, 'set "tokenizer_class" to "PreTrainedTokenizerFast"')


def _read_template(path: str, config: dict[str, Any]) -> str:
    """Return the folder's chat template, "" where it has none."""
    stated = config.get("chat_template") or ""
    if isinstance(stated, list):
        # Other names are for other uses, such as tools; transformers takes this one by default.
        stated = {entry["name"]: entry["template"] for entry in stated}.get("default", "")
        if not stated:
            _refuse(path, "none of its chat templates is named default", "name the one to train with so")
    if not isinstance(stated, str):
        raise TypeError(f"chat_template is {type(stated).__name__}")
    file = Path(path) / TEMPLATE
    if not file.exists():
        return stated
    written = _read_text(file)
    if stated and stated != written:
        _refuse(path, f"{file} and tokenizer_config.json hold different chat templates", "remove one of them")
    return written


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def _check_texts(path: str, backend: Tokenizer, marked: MarkedTextEncoder) -> None:
    """Check that every text comes back as it was: no unknown token or prefix space changes it."""
    for text in PROBE_TEXTS:
        found = backend.decode(_encode(backend, text), skip_special_tokens=False)
        if found != text:
            same = next(i for i in range(len(text) + 1) if text[: i + 1] != found[: i + 1])
            rule = f"it changes text: {text[same : same + 20]!r} comes back as {found[same : same + 20]!r}"
            _refuse(path, rule, "take a byte-level BPE without a prefix space, as Llama 3's")
        beside = f"{EOS}{text}{EOS}"
        if marked.encode(beside, "") != _encode(backend, beside):
            rule = f"it encodes text beside a special token in another way, for example {text[:20]!r}"
            _refuse(path, rule, "take a byte-level BPE without a prefix space, as Llama 3's")


def _check_template(path: str, encoder: Encoder) -> None:
    """Check the chat template on a plain conversation of two turns."""
    messages = []
    for question, answer in zip(PROBE_QUESTIONS, PROBE_ANSWERS, strict=True):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    try:
        tokens, mask, _ = encoder.encode_conversation(messages, 1 << 20)
    except UnusableConversationError as error:
        _refuse(path, f"its chat template cannot render two plain turns: {error}", "give it a template that can")
    written = encoder.tokenizer.decode(tokens.tolist())
    absent = [message["content"] for message in messages if message["content"] not in written]
    if absent:
        _refuse(path, f"its chat template leaves out or changes the message {absent[0]!r}", "give it one that does not")
    trained = encoder.tokenizer.decode(tokens[mask == 1].tolist())
    if not all(any(answer + stop in trained for stop in STOP_TOKENS) for answer in PROBE_ANSWERS):
        stops = ", ".join(STOP_TOKENS)
        rule = f"its chat template closes an answer with none of {stops}: a model would learn {trained!r}"
        _refuse(path, rule, "give it a chat template that closes an answer so, or leave it out for Llama 3's")
