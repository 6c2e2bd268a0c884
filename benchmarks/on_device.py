"""MobileMoE-S beside dense baselines as ExecuTorch programs on this machine: speed, memory, size.

    python -m benchmarks.on_device export --out DIR     # once; a minute or two a program
    python -m benchmarks.on_device measure --out DIR    # every program in every round; medians, printed as JSON

Tracing 20 or 30 layers takes long, so every model is cut to a part of its depth and of its vocabulary, a tenth unless
`--part` says otherwise: then output projection and layers keep the shares that they have in the whole model, and ratios
of times are those of whole models but for costs that do not shrink. Weights are random, on the INT4 grid.
- moe-stock, moe-fast: flavor S (20 layers), experts through llama::quantized_moe_ffn or our op, groups of 32;
- moe-fast-short: the same with room for 160 tokens instead of 1,024, for its memory;
- moe-fast-64, moe-fast-128: the experts in larger groups;
- dense-pro: MobileLLM-Pro (30 layers, width 1280, hidden 6144, 20 / 4 heads, vocabulary 202,048), full attention in
  every layer where it has three local ones to a global one: no difference up to 512 tokens;
- dense-active: as many weights as a token uses of S, in dense layers of S's width.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from eval.device import prompts
from titan_ext.config import FLAVORS

CONTEXT, N_PROMPT, N_ANSWER = 1024, 64, 64
SHORT_CONTEXT = 160
GROUPS = {"moe-stock": 32, "moe-fast": 32, "moe-fast-short": 32, "moe-fast-64": 64, "moe-fast-128": 128}
DENSE = ("dense-pro", "dense-active")


def cut(n: int, part: int, multiple: int = 1) -> int:
    """n / part, rounded up to a multiple."""
    return -(-n // (part * multiple)) * multiple


def export(name: str, part: int, folder: Path) -> None:
    """Export one program of random weights, cut to 1 / part of its depth and vocabulary."""
    import torch

    from eval.config import DeviceConfig
    from eval.device.executorch_export import export_dense, export_moe
    from eval.device.transformer import DenseDims
    from eval.device.weights import DeviceWeights
    from eval.export.dimensions import config_from_dims
    from eval.export.source import Source
    from eval.hf_mobilemoe.checkpoint_mobilemoe import tensor_shapes
    from tests.eval.tiny_checkpoint import write_tokenizer

    whole = FLAVORS["S"]
    s = dataclasses.replace(whole, n_layers=cut(whole.n_layers, part), vocab_size=cut(whole.vocab_size, part, 32))
    if name == "dense-pro":
        dims = DenseDims(1280, cut(30, part), 20, 4, 6144, cut(202_048, part, 32))
        export_dense(dims, folder, CONTEXT)
    elif name == "dense-active":
        hidden = s.shared_hidden + s.top_k * s.expert_hidden
        dims = DenseDims(s.d_model, s.n_layers, s.n_heads, s.n_kv_heads, hidden, s.vocab_size, s.head_dim)
        export_dense(dims, folder, CONTEXT)
    else:
        generator = torch.Generator().manual_seed(0)
        config = config_from_dims(s)
        tensors = {
            key: torch.ones(shape) if key.endswith("norm.weight") else 0.02 * torch.randn(shape, generator=generator)
            for key, shape in tensor_shapes(config).items()
        }
        context = SHORT_CONTEXT if name == "moe-fast-short" else CONTEXT
        device = DeviceConfig(context, "stock" if name == "moe-stock" else "fast", GROUPS[name])
        with tempfile.TemporaryDirectory() as tokenizer:
            source = Source(tensors, config, write_tokenizer(Path(tokenizer)))
            export_moe(DeviceWeights(source, device.expert_group_size), source.tokenizer, folder, device)


def measure(out: Path, rounds: int) -> None:
    """Append `rounds` rounds to measurements.jsonl; a round measures each program once with 1 and with 2 threads."""
    texts = {"knowledge": prompts.load_texts()["knowledge"]}
    vocab = min(json.loads(p.read_text())["constant_methods"]["get_vocab_size"] for p in out.glob("*/program.json"))
    tokens = prompts.tokenize(out, texts, vocab, N_PROMPT + N_ANSWER)["knowledge"]
    for _ in range(rounds):
        for threads in (1, 2):
            for folder in sorted(path.parent for path in out.glob("*/model.pte")):
                spec = {"artifact": str(folder), "tokens": tokens, "n_answer": N_ANSWER, "repetitions": 5}
                command = [sys.executable, "-m", "eval.device.profile_worker", json.dumps(spec | {"threads": threads})]
                done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
                result = {"program": folder.name, "threads": threads} | json.loads(done.stdout.splitlines()[-1])
                with (out / "measurements.jsonl").open("a") as file:
                    file.write(json.dumps(result) + "\n")


def summary(out: Path) -> dict[str, Any]:
    """Medians over all rounds of measurements.jsonl."""
    raw: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for line in (out / "measurements.jsonl").read_text().splitlines():
        run = json.loads(line)
        raw.setdefault((run["program"], run["threads"]), []).append(run)
    programs: dict[str, Any] = {}
    for (name, threads), runs in raw.items():
        file_bytes = (out / name / "model.pte").stat().st_size
        above = statistics.median(run["peak_bytes"] - run["floor_bytes"] for run in runs)
        entry = programs.setdefault(name, {"file_bytes": file_bytes})
        entry[f"threads_{threads}"] = {
            "prefill_tokens_per_second": N_PROMPT / statistics.median(s for r in runs for s in r["prefill_seconds"]),
            "decode_tokens_per_second": N_ANSWER / statistics.median(s for r in runs for s in r["decode_seconds"]),
            "load_seconds": statistics.median(r["load_seconds"] for r in runs),
            "peak_above_floor_bytes": above,
            "peak_above_floor_over_file": above / file_bytes,
        }
    rounds = min(len(runs) for runs in raw.values())
    return {"rounds": rounds, "prompt": N_PROMPT, "answer": N_ANSWER, "programs": programs, "ratios": ratios(programs)}


def ratios(programs: dict[str, Any]) -> dict[str, Any]:
    """Speed of each MoE program over that of each dense one."""
    result: dict[str, Any] = {}
    for name in programs:
        for dense in DENSE:
            other = programs.get(dense)
            if name in GROUPS and other:
                result[f"{name} / {dense}"] = {
                    f"{kind}, {threads} threads": programs[name][f"threads_{threads}"][f"{kind}_tokens_per_second"]
                    / other[f"threads_{threads}"][f"{kind}_tokens_per_second"]
                    for kind in ("prefill", "decode")
                    for threads in (1, 2)
                }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["export", "measure"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", type=int, default=10)
    parser.add_argument("--programs", nargs="*", default=[*GROUPS, *DENSE])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.action == "export":
        for name in arguments.programs:
            export(name, arguments.part, arguments.out / name)
    else:
        measure(arguments.out, arguments.rounds)
        print(json.dumps(summary(arguments.out), indent=2))


if __name__ == "__main__":
    main()
