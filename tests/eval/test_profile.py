"""Profiling: a program by the command, an INT4 folder in this process, what is refused."""

import json

import pytest

from core.errors import RefusedInput
from eval import compute_dtype
from eval.config import N_ANSWER
from eval.device import profile_worker, prompts
from eval.device.profile import count_float_bytes, describe
from eval.export.dimensions import config_from_dims
from eval.export.hf_native import export_native
from eval.export.source import open_folder
from pipelines.cli import DONE, REFUSED, main
from tests.eval.conftest import ONE_LAYER
from tests.eval.tiny_checkpoint import DIMS


def test_a_program(program_folder, tmp_path, capsys):
    texts = tmp_path / "prompts.json"
    domain = "_[/x] $\\bad{$"  # neither markup of the terminal nor a formula of the picture
    texts.write_text(json.dumps({domain: "A stitch in time saves nine. Look before you leap. "}))
    command = ["profile", str(program_folder), "--prompts", str(texts), "--contexts", "64", "--threads", "1"]
    assert main([*command, "--repetitions", "2", "--out", str(tmp_path / "out"), "--json"]) == DONE
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "out" / "profile.json").read_text())
    assert [(m["domain"], m["context"]) for m in result["measurements"]] == [(domain, 64), (prompts.DUMMY, 64)]
    about = result["artifact"]
    for m in result["measurements"]:
        assert m["prefill_tokens_per_second"] == pytest.approx((64 - N_ANSWER) / m["ttft_seconds"])
        assert m["decode_tokens_per_second"] > 0 and m["load_seconds"] > 0
        assert m["peak_rss_bytes"] > m["floor_rss_bytes"] > 50e6
        experts = ONE_LAYER.top_k * about["expert_bytes"]
        assert m["weight_bytes_a_decoded_token"] == about["dense_bytes"] + experts
        assert m["weight_bytes_of_the_prompt"] is None
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"profile.json", "speed.png", "memory.png"}


def test_an_int4_folder_counts_the_experts_it_reads(int4_folder):
    ids = prompts.tokenize(int4_folder, prompts.load_texts(), DIMS.vocab_size, 48)
    found = {}
    for domain in ("knowledge", prompts.DUMMY):
        spec = {"artifact": str(int4_folder), "tokens": ids[domain], "n_answer": 8, "repetitions": 2, "threads": None}
        found[domain] = profile_worker.main(spec)
    assert len(found["knowledge"]["decode_seconds"]) == 2
    assert found["knowledge"]["experts_read"]["answer"] == 8 * ONE_LAYER.top_k
    real, dummy = (found[domain]["experts_read"]["prompt"] for domain in ("knowledge", prompts.DUMMY))
    assert ONE_LAYER.top_k <= dummy < real <= ONE_LAYER.n_experts
    about = describe(int4_folder)
    assert about["format"].startswith("INT4") and about["context"] == DIMS.max_seq_len


def test_weights_that_a_token_reads():
    from titan_ext.model_stats import count_parameters

    weights = count_float_bytes(config_from_dims(DIMS), 2)
    read = weights["dense_bytes"] + DIMS.n_layers * DIMS.top_k * weights["expert_bytes"]
    # The expert bias is a buffer and no parameter.
    assert read == 2 * (count_parameters(DIMS).active + DIMS.n_layers * DIMS.n_experts)


def test_the_profile_says_the_dtype_and_counts_its_bytes(int4_folder, monkeypatch):
    found = {}
    for supported in (True, False):
        monkeypatch.setattr(compute_dtype, "has_bfloat16_products", lambda answer=supported: answer)
        found[supported] = describe(int4_folder)
    assert found[True]["format"] == "INT4, dequantized, computed in bfloat16"
    assert found[False]["format"] == "INT4, dequantized, computed in float32"
    assert found[False]["dense_bytes"] == 2 * found[True]["dense_bytes"]


def test_a_folder_of_stock_transformers_is_refused(int4_folder, tmp_path):
    export_native(open_folder(int4_folder), tmp_path / "native")
    with pytest.raises(RefusedInput, match="give the bf16 folder"):
        describe(tmp_path / "native")


def test_prompts_are_three_domains_and_a_dummy(tmp_path):
    ids = prompts.tokenize(tmp_path, prompts.load_texts(), 1000, 5000)
    assert list(ids) == [*prompts.DOMAINS, prompts.DUMMY]
    assert all(len(found) == 5000 and max(found) < 1000 for found in ids.values())
    assert len(set(ids[prompts.DUMMY])) == 1
    with pytest.raises(ValueError, match="domain 'empty' is empty"):
        prompts.tokenize(tmp_path, {"empty": ""}, 1000, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contexts", "64,x"], "give numbers of tokens"),
        (["--contexts", "32"], "more than 32 and at most"),
        (["--contexts", "99999"], "more than 32 and at most"),
    ],
)
def test_refusals(int4_folder, arguments, message, capsys):
    assert main(["profile", str(int4_folder), *arguments]) == REFUSED
    assert message in capsys.readouterr().err


def test_what_is_no_artifact_is_refused(tmp_path, capsys):
    assert main(["profile", str(tmp_path)]) == REFUSED
    assert "no config.json" in capsys.readouterr().err
