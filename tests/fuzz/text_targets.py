"""Targets that need a tokenizer: chat templates of others, and the metadata of GGUF files."""

import json
import random
import time
from pathlib import Path

from gguf import GGUFReader, GGUFWriter
from transformers import AutoTokenizer

from core import template_limits
from eval.export.gguf_tokenizer import write_tokenizer
from eval.export.tensor_files import read_config
from eval.serve.chat_prompt import PromptEncoder
from tests.fuzz.mutations import mutate_text, mutate_value
from tests.fuzz.targets import Target

SECONDS, MOST_SECONDS = 0.3, 20.0
"""Limit of a rendering here, and processor time within which it must have ended."""
SNIPPETS = (
    "{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}", "{{ 'a' * 10000000000 }}",
    "{{ 9 ** 9 ** 9 }}", "{{ 'x'|center(10000000000) }}", "{{ '%10000000000d' % 1 }}", "{% include '/etc/passwd' %}",
    "{% set ns = namespace(n=99) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "{% set ns = namespace(s='aa') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{{ messages.append(1) }}", "{{ raise_exception('no') }}", "{{ strftime_now('%s' * 100000) }}", "{{ x|urlize }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ messages|map(attribute='__class__')|list }}",
    "{{ ''|attr('__class__') }}", "{{ {}.__init__ }}", "{{ '{0.__class__}'.format(1) }}", "{{ lipsum(n=100000) }}",
    "{{ ((((((((((1)))))))))) }}", "{% raw %}{{ '{% endraw %}{{ 9**9 }}", "{% generation %}a{% endgeneration %}",
)  # fmt: skip
"""What a hostile template tries."""
SLOW_SHARE = 0.003
"""Share of the inputs that take one of the snippets: many of them last as long as they may."""


def make_text_targets(folder: Path) -> list[Target]:
    """Return the targets of a model's folder with a tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = tokenizer.chat_template
    content = json.loads((folder / "tokenizer.json").read_text())
    config = read_config(folder)
    messages = [{"role": "user", "content": "hi <|eot_id|>"}, {"role": "assistant", "content": "x"}]

    def render_chat(chance: random.Random, target: Path) -> None:
        text = mutate_text(template, chance)
        if chance.random() < SLOW_SHARE:
            text = text + chance.choice(SNIPPETS).replace("CANARY", str(target / "canary"))
        tokenizer.chat_template = text
        former, template_limits.SECONDS = template_limits.SECONDS, SECONDS
        begun = time.process_time()
        try:
            said = mutate_text(messages[0]["content"], chance).encode("utf-8", "replace").decode()
            ids = PromptEncoder(tokenizer).encode_chat([{"role": "user", "content": said}, *messages[1:]])
        finally:
            template_limits.SECONDS = former
            assert time.process_time() - begun < MOST_SECONDS, "it took long"
            assert not (target / "canary").exists(), "it ran code"
        assert all(type(number) is int for number in ids)

    def write_gguf(chance: random.Random, target: Path) -> None:
        (target / "tokenizer.json").write_text(json.dumps(mutate_value(content, chance)))
        path = target / "tokenizer.gguf"
        writer = GGUFWriter(path, "llama")
        chat = mutate_text(template, chance).encode("utf-8", "replace").decode()
        write_tokenizer(writer, target, chat, config)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        fields = GGUFReader(path).fields
        assert fields["tokenizer.chat_template"].contents() == chat
        assert len(fields["tokenizer.ggml.tokens"].contents()) == config.vocab_size

    return [Target("chat template", render_chat, 60), Target("GGUF metadata", write_gguf, 40)]
