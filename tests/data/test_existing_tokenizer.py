"""Tokenizers that others made: what training or an export could not use is refused before anything starts."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from core.errors import RefusedInput
from core.special_tokens import PAD, SPECIAL_TOKENS
from data.config import DataConfig, TokenizerConfig
from data.tokens import tokenizer
from data.tokens.chat import Encoder
from data.tokens.existing_tokenizer import PROBE_TEXTS, load_existing
from data.validate_config import validate_config
from tests.data.planted import page

TEXT = "A river of 1234 lanterns, é <|eot_id|>  <think>"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A folder that is in order."""
    folder = tmp_path_factory.mktemp("tokenizer") / "llama"
    tokenizer.save(tokenizer.train((page(number) for number in range(40)), vocab_size=400), folder)
    return folder


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A copy of it to damage."""
    copy = tmp_path / "llama"
    copy.mkdir()
    for file in original.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def change(folder: Path, name: str, **values) -> None:
    """Set keys of one of the JSON files; the keys `model__x` are those of its model."""
    content = json.loads((folder / name).read_text())
    for key, value in values.items():
        place = content["model"] if key.startswith("model__") else content
        place[key.removeprefix("model__")] = value
    (folder / name).write_text(json.dumps(content))


def change_backend(folder: Path, **attributes) -> None:
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for name, value in attributes.items():
        setattr(backend, name, value)
    backend.save(str(folder / "tokenizer.json"))


def refuse(folder: Path, rule: str) -> None:
    """Check that loading refuses the folder with this rule, naming the field and the value."""
    with pytest.raises(RefusedInput) as refused:
        load_existing(str(folder))
    assert rule in str(refused.value)
    assert str(refused.value).startswith("data.tokenizer.path = ") and str(folder) in str(refused.value)


def test_without_a_pad_token_the_recipe_is_refused(folder):
    """Llama 3.0 has none; the export, days later, needs it."""
    content = json.loads((folder / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        if token["content"] == PAD:
            token["content"] = "<|reserved_special_token_0|>"
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    refuse(folder, "lacks <|finetune_right_pad_id|> among its special tokens")
    with pytest.raises(RefusedInput, match=r"take a tokenizer of the Llama-3 family, from 3\.1 on"):
        validate_config(DataConfig(corpora=("python-stdlib",), tokenizer=TokenizerConfig(path=str(folder))))


@pytest.mark.parametrize(
    "normalizer",
    [normalizers.Lowercase(), normalizers.NFC(), normalizers.StripAccents(), normalizers.Replace("a", "b")],
)
def test_a_normalizer_is_refused_by_name(folder, normalizer):
    change_backend(folder, normalizer=normalizer)
    refuse(folder, f"its normalizer ({type(normalizer).__name__}) changes text")


@pytest.mark.parametrize(
    "pre_tokenizer",
    [pre_tokenizers.ByteLevel(add_prefix_space=True), pre_tokenizers.Whitespace(), pre_tokenizers.Metaspace()],
)
def test_a_pre_tokenizer_that_changes_text_is_refused(folder, pre_tokenizer):
    change_backend(folder, pre_tokenizer=pre_tokenizer)
    refuse(folder, "changes text")


def test_a_vocabulary_without_all_bytes_is_refused(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    # 0xFF is no byte of UTF-8; 0xF4 begins the highest characters alone.
    content["model"]["vocab"]["unused"] = content["model"]["vocab"].pop("\u00f4")
    (folder / "tokenizer.json").write_text(json.dumps(content))
    refuse(folder, r"changes text: '\U00100000'")


@pytest.mark.parametrize(
    "model", [models.WordPiece(unk_token="[UNK]"), models.Unigram(), models.WordLevel(unk_token="??")]
)
def test_models_that_lose_text_are_refused(folder, model):
    lossy = Tokenizer(model)
    lossy.pre_tokenizer = pre_tokenizers.Whitespace()
    made = {models.WordPiece: trainers.WordPieceTrainer, models.WordLevel: trainers.WordLevelTrainer}
    trainer = made.get(type(model), trainers.UnigramTrainer)
    lossy.train_from_iterator([page(1)], trainer(special_tokens=["[UNK]", "??", *SPECIAL_TOKENS], show_progress=False))
    lossy.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").unlink()
    refuse(folder, f"is a {type(model).__name__}, which loses text")


def test_dropout_is_refused(folder):
    change(folder, "tokenizer.json", model__dropout=0.1)
    refuse(folder, "dropout gives other tokens each time")


def test_a_stored_truncation_cuts_no_text(folder, tmp_path):
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(max_length=4)
    backend.enable_padding(length=512)
    backend.save(str(folder / "tokenizer.json"))
    tokenizer.save(load_existing(str(folder)), tmp_path / "saved")
    loaded = tokenizer.load(tmp_path / "saved")
    expected = [loaded.bos_token_id, *loaded.encode(TEXT, add_special_tokens=False, split_special_tokens=True)]
    assert len(expected) > 20
    assert Encoder(loaded).encode_documents([TEXT])[0].tolist() == [*expected, loaded.eos_token_id]
    stored = json.loads((tmp_path / "saved/tokenizer.json").read_text())
    assert stored["truncation"] is None and stored["padding"] is None


@pytest.mark.parametrize("form", ["none", "twice", "eos", "bert"])
def test_bos_is_added_once_whatever_the_tokenizer_added(folder, tmp_path, form):
    bos, eos = ("<|begin_of_text|>", 392), ("<|end_of_text|>", 393)
    change_backend(
        folder,
        post_processor={
            "none": processors.ByteLevel(trim_offsets=True),
            "twice": processors.TemplateProcessing(single=f"{bos[0]} {bos[0]} $A", special_tokens=[bos]),
            "eos": processors.TemplateProcessing(single=f"{bos[0]} $A {eos[0]}", special_tokens=[bos, eos]),
            "bert": processors.BertProcessing(sep=eos, cls=bos),
        }[form],
    )
    tokenizer.save(load_existing(str(folder)), tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert loaded("A river")["input_ids"] == [392, *loaded.encode("A river", add_special_tokens=False)]


def test_holes_and_double_ids_are_refused(folder):
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    unused = next(text for text in reversed(vocabulary) if len(text) > 6)
    change(folder, "tokenizer.json", model__vocab=vocabulary | {"qqqq": 3})
    refuse(folder, "do not have the ids 0 to")
    change(folder, "tokenizer.json", model__vocab=vocabulary | {"qqqq": 1000})
    refuse(folder, "do not have the ids 0 to")
    assert unused


def test_added_tokens_on_ids_of_others_are_refused(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"][-1]["id"] = 500
    (folder / "tokenizer.json").write_text(json.dumps(content))
    refuse(folder, "other entries have the ids of <|python_tag|>")


def test_special_tokens_that_are_only_words_are_refused(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["special"] = token["special"] and token["content"] != "<|eot_id|>"
    (folder / "tokenizer.json").write_text(json.dumps(content))
    refuse(folder, "lacks <|eot_id|> among its special tokens")


@pytest.mark.parametrize(
    ("token", "rule"),
    [
        (AddedToken("<x>", lstrip=True), "'<x>' takes the white space beside it away"),
        (AddedToken("<x>", rstrip=True, special=True), "'<x>' takes the white space beside it away"),
        (AddedToken("§"), "'§' is one character"),
    ],
)
def test_added_tokens_that_touch_the_text_are_refused(folder, token, rule):
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens([token])
    backend.save(str(folder / "tokenizer.json"))
    refuse(folder, rule)


def test_files_that_disagree_are_refused(folder):
    (folder / "chat_template.jinja").write_text(tokenizer.CHAT_TEMPLATE)
    change(folder, "tokenizer_config.json", chat_template="{{ bos_token }}")
    refuse(folder, "hold different chat templates")
    change(folder, "tokenizer_config.json", chat_template=tokenizer.CHAT_TEMPLATE)
    load_existing(str(folder))
    change(folder, "tokenizer_config.json", added_tokens_decoder={"398": {"content": "<|end|>"}})
    refuse(folder, "token 398 is '<|end|>' in tokenizer_config.json")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_byte_order_mark_is_refused_by_file(folder, name):
    file = folder / name
    file.write_text("\ufeff" + file.read_text(encoding="utf-8"), encoding="utf-8")
    refuse(folder, f"{file} begins with a byte order mark")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_files_that_are_no_json_are_refused_by_name(folder, name):
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1")
    refuse(folder, str(folder / name))


@pytest.mark.parametrize(
    "values", [{"chat_template": 3}, {"chat_template": ["x"]}, {"added_tokens_decoder": []}, {"chat_template": [{}]}]
)
def test_a_config_of_another_form_is_refused(folder, values):
    (folder / "chat_template.jinja").unlink()
    change(folder, "tokenizer_config.json", **values)
    refuse(folder, "tokenizer_config.json is not of transformers' form")


def test_code_is_never_run(folder):
    change(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.Mine", None]})
    (folder / "mine.py").write_text("raise SystemExit('ran')")
    refuse(folder, "asks for code of its own (auto_map)")


def test_of_named_templates_the_default_is_taken(folder, tmp_path):
    (folder / "chat_template.jinja").unlink()
    tools = {"name": "tool_use", "template": "{{ tools }}"}
    change(folder, "tokenizer_config.json", chat_template=[tools])
    refuse(folder, "none of its chat templates is named default")
    change(
        folder, "tokenizer_config.json", chat_template=[tools, {"name": "default", "template": tokenizer.CHAT_TEMPLATE}]
    )
    tokenizer.save(load_existing(str(folder)), tmp_path / "saved")
    # One template alone: no caller gets other tokens by passing tools.
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == tokenizer.CHAT_TEMPLATE


CONTENT = "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] + '<|eot_id|>' }}"
LOOP = "{% for message in messages %}" + CONTENT + "{% endfor %}"


@pytest.mark.parametrize(
    ("template", "rule"),
    [
        ("{{ raise_exception('no') }}", "cannot render two plain turns: the chat template fails with TemplateError"),
        ("{{ messages[0]['content'] + 1 }}", "the chat template fails with TypeError"),
        ("{{ now() }}", "the chat template fails with UndefinedError"),
        (f"{{{{ messages | length }}}}{LOOP}", "changes the text of messages when others follow"),
        (LOOP.replace("'<|eot_id|>'", "'\n'"), "closes an answer with none of <|end_of_text|>, <|eot_id|>, <|eom_id|>"),
        (LOOP.replace("<|eot_id|>", "<|im_end|>"), "closes an answer with none of"),
        (LOOP.replace("message['content']", "'hello'"), "leaves out or changes the message 'How many?'"),
        (LOOP.replace("message['content']", "message['content'] | upper"), "leaves out or changes the message"),
        (LOOP.replace("message['content']", "message['content'] | tojson(ensure_ascii=true)"), "escapes characters"),
    ],
)  # fmt: skip
def test_a_template_that_no_conversation_passes_is_refused(folder, template, rule):
    (folder / "chat_template.jinja").write_text(template)
    refuse(folder, rule)


@pytest.mark.parametrize("threads", ["false", "true"])
def test_batches_and_threads_do_not_change_the_tokens(original, threads, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", threads)
    encoder = Encoder(load_existing(str(original)))
    texts = [*PROBE_TEXTS, *(page(number) for number in range(60)), TEXT]
    together = encoder.encode_documents(texts)
    assert [ids.tolist() for ids in together] == [encoder.encode_documents([text])[0].tolist() for text in texts]


def test_saved_and_loaded_the_tokens_are_those_of_the_file(folder, tmp_path):
    """transformers may change a tokenizer on loading, by its class or its config; what is saved has the plainest."""
    change(
        folder, "tokenizer_config.json", clean_up_tokenization_spaces=True, split_special_tokens=True,
        fix_mistral_regex=True, add_prefix_space=True, add_bos_token=True, legacy=True,
    )  # fmt: skip
    tokenizer.save(load_existing(str(folder)), tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
    check_tokens(folder, tmp_path / "saved")


def check_tokens(folder: Path, saved: Path) -> None:
    """Check that AutoTokenizer makes the tokens of `folder`'s tokenizer.json, and gives their text back."""
    file, raw = (Tokenizer.from_file(str(place / "tokenizer.json")) for place in (folder, saved))
    loaded = AutoTokenizer.from_pretrained(saved)
    for text in (*PROBE_TEXTS, TEXT, "it 's , is n't . x != y"):
        ids = file.encode(text, add_special_tokens=False).ids
        assert raw.encode(text, add_special_tokens=False).ids == ids
        assert loaded.encode(text, add_special_tokens=False) == ids
        assert loaded.decode(ids) == text


@pytest.mark.parametrize("model_type", ["mobilemoe", "mistral"])
def test_a_large_vocabulary_beside_a_model_keeps_its_tokens(folder, tmp_path, model_type):
    """transformers takes a local tokenizer of more than 100,000 entries beside a config.json for Mistral's."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {token["content"]: token["id"] for token in content["added_tokens"]}
    content["model"]["vocab"] |= {f"unused {index}": 400 + index for index in range(100_000)}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer.save(load_existing(str(folder)), tmp_path / "saved")
    config = {"model_type": model_type, "transformers_version": "4.57.6"}
    (tmp_path / "saved/config.json").write_text(json.dumps(config))
    check_tokens(folder, tmp_path / "saved")


@pytest.mark.parametrize("name", ["LlamaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer", "BertTokenizer"])
def test_a_class_that_changes_the_tokens_is_refused_and_another_is_left_out(folder, name):
    change(folder, "tokenizer_config.json", tokenizer_class=name)
    file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    try:
        found = load_existing(str(folder))
    except RefusedInput as error:
        assert name in str(error) or "transformers cannot load it" in str(error)
    else:
        assert type(found).__name__ == "PreTrainedTokenizerFast"
        for text in PROBE_TEXTS:
            assert found.encode(text, add_special_tokens=False) == file.encode(text, add_special_tokens=False).ids
