"""Compare an ExecuTorch program with the transformers model of the INT4 folder it was exported from.

    python benchmarks/program_agreement.py RUN/artifacts/int4 PROGRAM

On five prompts of eval/device/prompts: greedy text of 64 tokens, and where the texts part the gap of the two tokens'
logits in standard deviations of that position's logits. Then, fed the transformers model's text: SQNR, cosine and the
share of equal choices.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer

from eval.device import prompts
from eval.device.runtime import DeviceProgram
from eval.hf_mobilemoe import MobileMoEForCausalLM

NEW_TOKENS = 64


def five_prompts() -> list[str]:
    texts = prompts.load_texts()
    cuts = (("knowledge", 0), ("knowledge", 600), ("code", 1000), ("maths", 0), ("maths", 800))
    return [texts[domain][start : start + 300] for domain, start in cuts]


@torch.no_grad()
def compare(program: DeviceProgram, hf: MobileMoEForCausalLM, ids: list[int]) -> str:
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": NEW_TOKENS}
    expected = hf.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()
    found = program.greedy(ids, NEW_TOKENS)
    verdict = "equal text"
    if found != expected:
        first = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
        logits = hf(torch.tensor([ids + expected[:first]])).logits[0, -1]
        gap = (logits[expected[first]] - logits[found[first]]) / logits.std()
        verdict = f"parts at token {first}, gap {gap:.4f}"
    text = ids + expected
    own = [program.logits(ids, 0), *(program.logits([text[i]], i) for i in range(len(ids), len(text) - 1))]
    own_TV, hf_TV = torch.stack(own), hf(torch.tensor([text])).logits[0, len(ids) - 1 : -1]
    sqnr = 20 * torch.log10(hf_TV.norm() / (own_TV - hf_TV).norm())
    cosine = torch.nn.functional.cosine_similarity(own_TV, hf_TV).min()
    same = (own_TV.argmax(-1) == hf_TV.argmax(-1)).float().mean()
    return f"{len(ids)} tokens: {verdict}; SQNR {sqnr:.1f} dB, lowest cosine {cosine:.5f}, same choice {same:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("program", type=Path)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    hf = MobileMoEForCausalLM.from_pretrained(arguments.folder).eval()
    program = DeviceProgram(arguments.program / "model.pte")
    for text in five_prompts():
        print(compare(program, hf, tokenizer(text)["input_ids"]))


if __name__ == "__main__":
    main()
