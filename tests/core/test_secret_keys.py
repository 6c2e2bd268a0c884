"""Addresses with keys in them, and messages that quote one."""

import pytest

from core.secret_keys import hide_keys, holds_key

SIGNED = "https://cdn.example/x?X-Amz-Credential=AKIA%2F1&X-Amz-Signature=0f3a&range=1"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://AKIAX:wJalr/x@bucket/a", "s3://***@bucket/a"),
        ("https://hf_abcdef@host/a: 404", "https://***@host/a: 404"),
        ("simplecache::https://me:pw@host/a", "simplecache::https://***@host/a"),
        (SIGNED, "https://cdn.example/x?X-Amz-Credential=***&X-Amz-Signature=***&range=1"),
        ("https://blob.example/x?sv=2024&sig=ab%3D", "https://blob.example/x?sv=2024&sig=***"),
        ("https://host/x?api_key=1&access_token=q'", "https://host/x?api_key=***&access_token=***'"),
        ("hf://datasets/owner/name@main/file", "hf://datasets/owner/name@main/file"),
        ("s3://bucket/a@b:c/d", "s3://bucket/a@b:c/d"),
        ("http://host:80/a@b and c@d", "http://host:80/a@b and c@d"),
        ("/data/a:b@c?key", "/data/a:b@c?key"),
        ("12:30 tokens=5, the key is here", "12:30 tokens=5, the key is here"),
    ],
)
def test_what_is_hidden_of_an_address(text, shown):
    assert hide_keys(text) == shown
    assert holds_key(text) == (shown != text)


def test_values_of_secret_variables_are_hidden_and_others_are_not(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_planted_1")
    monkeypatch.setenv("WANDB_API_KEY", "hf_planted_1_longer")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted/2")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "short")
    for name in ("RAY_AUTH_TOKEN_PATH", "AWS_ACCESS_KEY_ID", "TOKENIZERS_PARALLELISM", "HOME_OF_KEYS"):
        monkeypatch.setenv(name, "a-plain-value")
    assert hide_keys("hf_planted_1_longer, hf_planted_1: planted/2 short a-plain-value") == (
        "***, ***: *** short a-plain-value"
    )
