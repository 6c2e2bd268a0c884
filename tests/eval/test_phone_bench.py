"""The phone's benchmark: its logits against the transformers model, on this processor and on emulated ARM."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from core.errors import RefusedInput
from eval.benchmarks.int8_activations import round_activations
from eval.device import phone_bench
from eval.export.dimensions import config_from_dims
from eval.export.hf_folder import write_hf_folder
from eval.export.source import open_folder
from eval.hf_mobilemoe.modeling_mobilemoe import MobileMoEForCausalLM
from tests.eval.test_kernels import KERNELS, skip_without_tools
from tests.eval.test_run_on_phone import ADB
from tests.eval.tiny_checkpoint import DIMS, quantize_folder, random_tensors, write_tokenizer
from titan_ext.config import FLAVORS
from titan_ext.quantization.config import QuantizationConfig

SCRIPT = Path(phone_bench.__file__).with_name("run_on_phone.sh")
PROMPT, ANSWER = 21, 6
ON = [("native", "portable"), ("native", None), ("max", "neon_i8mm"), ("cortex-a76", "neon_dot"), ("cortex-a53", None)]
"""Processor (this one, or one that qemu emulates) and kernel, None for the one that the program chooses."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An INT4 folder with random weights, and its model file beside it."""
    root = tmp_path_factory.mktemp("bench")
    tokenizer = write_tokenizer(root / "tokenizer")
    plain = write_hf_folder(random_tensors(), DIMS, tokenizer, root / "plain", dtype=torch.float32)
    int4 = quantize_folder(plain, root / "int4", QuantizationConfig())
    phone_bench.write_model(open_folder(int4), root / "tiny.model")
    return root


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Call (processor, arguments) -> finished process of the program, compiled for ARM or this machine when wanted."""
    built = {}

    def run(processor, *arguments):
        skip_without_tools(processor)
        compiler = "g++" if processor == "native" else phone_bench.ARM_COMPILER
        if compiler not in built:
            built[compiler] = tmp_path_factory.mktemp("program")
            phone_bench.build(built[compiler], compiler)
        emulator = [] if processor == "native" else ["qemu-aarch64", "-cpu", processor]
        command = [*emulator, str(built[compiler] / "device_bench"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    run.built = built
    return run


@pytest.fixture(scope="module")
def expected(folder):
    """Tokens, and the logits [1 + ANSWER, vocabulary] after the prompt and after every token of the answer."""
    tokens = torch.randint(8, DIMS.vocab_size, (1, PROMPT + ANSWER), generator=torch.Generator().manual_seed(0))
    model = MobileMoEForCausalLM.from_pretrained(folder / "int4", dtype=torch.float32).eval()
    round_activations(model)
    with torch.no_grad():
        return tokens[0], model(tokens).logits[0, PROMPT - 1 :]


def decibels(expected, found):
    return 20 * torch.log10(expected.norm(dim=-1) / (found - expected).norm(dim=-1))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("processor", "kernel"), ON)
def test_logits_are_those_of_the_model(bench, folder, expected, processor, kernel, threads, tmp_path):
    """The logits after the prompt and after each later token are compared, so the cache counts too."""
    tokens, logits = expected
    (tmp_path / "tokens").write_text(" ".join(map(str, tokens.tolist())))
    arguments = ["--threads", threads, "--prompt", PROMPT, "--answer", ANSWER, "--repetitions", 1]
    arguments += ["--tokens", tmp_path / "tokens", "--logits", tmp_path / "logits"]
    arguments += [] if kernel is None else ["--kernel", kernel]
    done = bench(processor, folder / "tiny.model", *arguments)
    assert done.returncode == 0, done.stderr
    found = torch.frombuffer(bytearray((tmp_path / "logits").read_bytes()), dtype=torch.float32)
    agreement = decibels(logits, found.view(logits.shape))
    # At some tokens an activation at the edge of two integers falls to the other one.
    assert agreement.median() > 100 and agreement.min() > 30
    printed = json.loads(done.stdout)
    assert printed["kernel"] in ([kernel] if kernel else KERNELS[processor]) and printed["threads"] == threads
    assert printed["weights"] == "given" and min(v for v in printed.values() if not isinstance(v, str)) >= 0


def test_a_shape_alone_gets_random_weights(bench, tmp_path):
    config = config_from_dims(DIMS)
    shape = tmp_path / "shape.model"
    shape.write_bytes(phone_bench.describe_shape(config, 32, 32, 32))
    done = bench("native", shape, "--prompt", 9, "--answer", 3, "--repetitions", 1, "--logits", tmp_path / "logits")
    assert done.returncode == 0, done.stderr
    logits = torch.frombuffer(bytearray((tmp_path / "logits").read_bytes()), dtype=torch.float32)
    assert logits.shape == (4 * DIMS.vocab_size,) and logits.isfinite().all() and logits.std() > 0.01
    printed = json.loads(done.stdout)
    assert printed["weights"] == "random"
    read = printed["weight_bytes_a_token"] + printed["cache_bytes_a_token"]
    assert printed["decode_bytes_per_second"] == pytest.approx(printed["decode_tokens_per_second"] * read, rel=1e-3)


def test_it_counts_what_a_token_reads(bench, folder):
    """The program's counts are compared with the sizes of the tensors that Python wrote."""
    done = bench("native", folder / "tiny.model", "--prompt", 10, "--answer", 4, "--repetitions", 1)
    printed = json.loads(done.stdout)
    weights = phone_bench.DeviceWeights(open_folder(folder / "int4"))
    sizes = [tensor.nbytes for tensor in phone_bench.list_tensors(weights)]
    experts = sum(sum(sizes[2 + 10 * i + 8 : 2 + 10 * i + 10]) for i in range(DIMS.n_layers))
    row = DIMS.d_model / 2 + 2 * DIMS.d_model / 32  # 4 bits a value, and a float16 for each group
    assert printed["weight_bytes_a_token"] == sum(sizes) - experts * (1 - DIMS.top_k / DIMS.n_experts) + row
    assert printed["cache_bytes_a_token"] == DIMS.n_layers * 2 * 4 * DIMS.n_kv_heads * DIMS.head_dim * (10 + 2.5)
    assert printed["weight_bytes"] + phone_bench.SHAPE_BYTES == (folder / "tiny.model").stat().st_size


@pytest.mark.parametrize("flavor", FLAVORS)
def test_the_build_has_a_shape_of_every_flavor(bench, flavor):
    if not bench.built:
        bench("native", "--help")
    lines = next(iter(bench.built.values())).joinpath(f"{flavor}.model").read_bytes().rstrip(b"\0").decode()
    numbers = dict(line.split(" ", 1) for line in lines.splitlines()[1:])
    dims = FLAVORS[flavor]
    for name in ("d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "expert_hidden", "shared_hidden",
                 "n_experts", "top_k", "vocab_size"):  # fmt: skip
        assert int(numbers[name]) == getattr(dims, name)
    assert len(numbers["rope_frequencies"].split()) == dims.head_dim // 2


REFUSED = {
    "no model": ([], "device_bench MODEL"),
    "an option without a value": (["{model}", "--threads"], "device_bench MODEL"),
    "an unknown option": (["{model}", "--thread", "2"], "--thread: no such option"),
    "no threads": (["{model}", "--threads", "0"], "--threads 0: give 1 to"),
    "a number that is none": (["{model}", "--prompt", "4x"], "--prompt 4x: give 1 to"),
    "a kernel that the processor lacks": (["{model}", "--kernel", "neon"], "this processor does not have it"),
    "a file that is absent": (["{absent}"], "cannot be opened"),
    "a file of something else": (["{other}"], "has no shape of ours"),
    "a file that is cut off": (["{cut}"], "write it again"),
    "too few tokens": (["{model}", "--tokens", "{short}"], "has 2 tokens; --prompt and --answer need 160"),
    "a token that is none": (["{model}", "--tokens", "{high}"], "token 320 is none"),
    "logits to nowhere": (
        ["{model}", "--prompt", "3", "--answer", "1", "--logits", "{absent}/logits"], "cannot be written",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_it_refuses_what_it_cannot_use(bench, folder, case, tmp_path):
    arguments, message = REFUSED[case]
    paths = {"model": folder / "tiny.model", "absent": tmp_path / "absent"}
    for name, content in {
        "other": b"x" * 5000, "short": b"1 2", "high": b"1 320", "cut": (folder / "tiny.model").read_bytes()[:-1],
    }.items():  # fmt: skip
        paths[name] = tmp_path / name
        paths[name].write_bytes(content)
    done = bench("native", *(argument.format(**paths) for argument in arguments))
    assert done.returncode == 2 and message in done.stderr


def test_the_command_builds_and_writes(folder, tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "eval.device.phone_bench", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run("weights", folder / "int4", "--out", tmp_path / "m")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "m").read_bytes() == (folder / "tiny.model").read_bytes()
    done = run("build", "--out", tmp_path / "none", "--compiler", "no-such-compiler")
    assert done.returncode == 2 and "no C++ compiler was found (no-such-compiler)" in done.stderr
    assert not (tmp_path / "none").exists()


def test_a_width_that_is_no_whole_group_is_refused():
    with pytest.raises(RefusedInput, match="intermediate_size is 32 and its group 64"):
        phone_bench.describe_shape(config_from_dims(DIMS), 32, 32, 64)


def test_an_absent_compiler_is_refused_by_name(tmp_path):
    with pytest.raises(RefusedInput, match="apt-get install g"):
        phone_bench.build(tmp_path, "no-such-compiler")


@pytest.fixture
def phone(bench, tmp_path):
    """Runs the script for a phone with a stand-in for adb, which runs the program on this machine."""
    bench("native")
    program = next(folder for compiler, folder in bench.built.items() if compiler == "g++") / "device_bench"
    shape = tmp_path / "a shape.model"
    shape.write_bytes(phone_bench.describe_shape(config_from_dims(DIMS), 32, 32, 32))
    adb = tmp_path / "bin" / "adb"
    adb.parent.mkdir()
    adb.write_text(ADB)
    adb.chmod(0o755)

    def run(*numbers, model=shape, **environment):
        with tempfile.TemporaryDirectory(prefix="phone-") as root:
            env = os.environ | {"PATH": f"{adb.parent}:{os.environ['PATH']}", "PHONE": root} | environment
            command = [str(SCRIPT), str(program), str(model), str(tmp_path / "new" / "out.json"), *numbers]
            return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)

    run.out = tmp_path / "new" / "out.json"
    return run


def test_the_script_runs_it_once_for_each_number_of_threads(phone):
    done = phone("1 3", "9", "2")
    assert done.returncode == 0, done.stderr
    about, *runs = map(json.loads, phone.out.read_text().splitlines())
    assert list(about) == ["phone"]
    assert [(run["threads"], run["prompt"], run["answer"]) for run in runs] == [(1, 9, 2), (3, 9, 2)]


def test_a_run_that_fails_ends_the_script_without_a_result(phone, tmp_path):
    (tmp_path / "other").write_bytes(b"x" * 5000)
    done = phone("1", model=tmp_path / "other")
    assert done.returncode != 0 and "has no shape of ours" in done.stderr + done.stdout
    assert not phone.out.exists()


@pytest.mark.parametrize("numbers", [("0",), ("1 x",), ("1", "-1"), ("1", "9", "1.5"), ("1; reboot",)])
def test_the_script_refuses_numbers_that_are_none(phone, numbers):
    done = phone(*numbers)
    assert done.returncode == 2 and "whole numbers from 1" in done.stderr


def test_the_script_refuses_without_a_phone_and_without_a_file(phone, tmp_path):
    assert "adb sees no phone" in phone(ADB_STATE="offline").stderr
    assert "absent: no such file" in phone(model=tmp_path / "absent").stderr
