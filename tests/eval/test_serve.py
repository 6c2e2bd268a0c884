"""`mobilemoe serve` as its users meet it: a process, and the `openai` client."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import contextmanager

import openai
import pytest
import torch
from transformers import AutoTokenizer

from eval.device.runtime import DeviceProgram
from eval.hf_mobilemoe import MobileMoEForCausalLM
from pipelines.cli import REFUSED, main

FIRST = [{"role": "user", "content": "the quick brown"}]


@contextmanager
def run_server(artifact, **environment):
    """Yield the base URL of a server on a free port; it must end well on SIGTERM."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "pipelines.cli",
        "serve",
        artifact,
        "--port",
        str(port),
        "--threads",
        "1",
        "--json",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | environment) as server:
        try:
            ready = json.loads(server.stdout.readline())
            assert ready["url"] == f"http://127.0.0.1:{port}/v1"
            yield ready["url"]
            assert server.poll() is None, "the server has ended"
        finally:
            server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0


@pytest.fixture(scope="module")
def url(int4_folder):
    with run_server(int4_folder) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def tokenizer(int4_folder):
    return AutoTokenizer.from_pretrained(int4_folder)


def ask(client, messages, **options):
    (model,) = client.models.list().data
    return client.chat.completions.create(model=model.id, messages=messages, **options)


def test_greedy_answers_are_those_of_transformers_turn_after_turn(client, int4_folder, tokenizer):
    """The second turn goes on in the cache of the first, the third is another conversation."""
    model = MobileMoEForCausalLM.from_pretrained(int4_folder, dtype=torch.float32).eval()
    messages = list(FIRST)
    for turn in range(3):
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": tokenizer.pad_token_id}
        expected = model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
        found = ask(client, messages, temperature=0, max_tokens=12)
        text = found.choices[0].message.content
        assert text == tokenizer.decode(expected, skip_special_tokens=True)
        assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(prompt), len(expected))
        assert found.choices[0].finish_reason == ("length" if len(expected) == 12 else "stop")
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "jumps"}]
        messages = messages if turn == 0 else [{"role": "user", "content": "lazy dog"}]


def test_a_stream_has_the_pieces_of_the_whole_answer(client):
    whole = ask(client, FIRST, temperature=0, max_tokens=20)
    chunks = list(ask(client, FIRST, temperature=0, max_tokens=20, stream=True, stream_options={"include_usage": True}))
    *pieces, last = chunks
    assert "".join(c.choices[0].delta.content or "" for c in pieces) == whole.choices[0].message.content
    assert pieces[0].choices[0].delta.role == "assistant"
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.choices == [] and last.usage == whole.usage and len({c.id for c in chunks}) == 1


def test_text_is_continued_and_ends_before_a_stop(client, tokenizer):
    (model,) = client.models.list().data
    options = {"model": model.id, "prompt": "the quick brown", "temperature": 0, "max_tokens": 24}
    whole = client.completions.create(**options)
    text = whole.choices[0].text
    assert whole.usage.prompt_tokens == len(tokenizer("the quick brown")["input_ids"]) and len(text) > 8
    cut = client.completions.create(**options, stop=[text[5:8]])
    assert cut.choices[0].text == text[: text.index(text[5:8])] and cut.choices[0].finish_reason == "stop"
    streamed = client.completions.create(**options, stop=[text[5:8]], stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == cut.choices[0].text


def test_a_seed_repeats_an_answer(client):
    texts = [
        ask(client, FIRST, seed=seed, temperature=1.5, max_tokens=20).choices[0].message.content for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"max_tokens": 100_000}, openai.BadRequestError, "context is"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"model": "gpt-5"}, openai.NotFoundError, "gpt-5"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "renders none"),
        ({"stream": True, "max_tokens": 100_000}, openai.BadRequestError, "context is"),
    ],
)
def test_a_refusal_reaches_the_client_and_the_server_goes_on(client, options, error, said):
    (model,) = client.models.list().data
    with pytest.raises(error, match=said):
        client.chat.completions.create(**{"model": model.id, "messages": FIRST, **options})
    assert ask(client, FIRST, max_tokens=1).usage.completion_tokens == 1


def post(url, data=b"{}", **headers):
    request = urllib.request.Request(f"{url}/chat/completions", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_pages_of_browsers_are_kept_out(url):
    """A page may send text to any port without asking; and a name of its own may lead to this machine."""
    body = json.dumps({"messages": FIRST, "max_tokens": 1}).encode()
    assert post(url, body, **{"Content-Type": "application/json"})[0] == 200
    assert post(url, body, **{"Content-Type": "text/plain"})[0] == 415
    assert post(url, body, **{"Content-Type": "application/json", "Host": "evil.example:80"})[0] == 403
    status, answer = post(url, b"{", **{"Content-Type": "application/json"})
    assert status == 400 and "not JSON" in answer["error"]["message"]
    assert post(f"{url}/nothing", body, **{"Content-Type": "application/json"})[0] == 404


def test_the_program_answers_as_the_devices_runtime_and_asks_for_its_key(program_folder, tokenizer):
    prompt = tokenizer.apply_chat_template(FIRST, add_generation_prompt=True)
    expected = DeviceProgram(program_folder / "model.pte").greedy(prompt, 8)
    with run_server(program_folder / "model.pte", MOBILEMOE_API_KEY="a key") as url:
        found = ask(openai.OpenAI(base_url=url, api_key="a key"), FIRST, temperature=0, max_tokens=8)
        assert found.choices[0].message.content == tokenizer.decode(expected, skip_special_tokens=True)
        for key in ("wrong", "ä"):
            assert post(url, Authorization=f"Bearer {key}".encode().decode("latin-1"))[0] == 401
        assert post(url)[0] == 401


def test_an_address_that_others_reach_needs_a_key_and_a_port_must_be_free(int4_folder, capsys, monkeypatch):
    monkeypatch.delenv("MOBILEMOE_API_KEY", raising=False)
    assert main(["serve", str(int4_folder), "--host", "0.0.0.0"]) == REFUSED
    assert "MOBILEMOE_API_KEY" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["serve", str(int4_folder), "--port", str(taken.getsockname()[1])]) == REFUSED
    assert "address already in use" in capsys.readouterr().err.lower()
