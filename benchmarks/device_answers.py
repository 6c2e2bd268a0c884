"""Ask a run's ExecuTorch program the questions of the suite `questions`, and compare with the run's evaluation.

    python -m benchmarks.device_answers RUN [--items 50]

For each kind: how many of the first items the program answers right, how many the INT4 folder did in the evaluation
(transformers, activations in floats), and how many answers are the same text.
"""

import argparse
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from core.special_tokens import EOT
from eval.benchmarks.slices import read_samples
from eval.benchmarks.suites import QUESTIONS
from eval.device.runtime import DeviceProgram

LONGEST = 40
"""Most tokens of an answer, as in eval/benchmarks/tasks/questions.yaml."""


def answer(program: DeviceProgram, tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """Return the program's greedy answer."""
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    ids, end = program.greedy(prompt, LONGEST), tokenizer.convert_tokens_to_ids(EOT)
    ids = ids[: ids.index(end)] if end in ids else ids
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def main() -> None:
    """Print one row a kind, and a few answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--items", type=int, default=50)
    arguments = parser.parse_args()
    folder = arguments.run / "artifacts/program"
    program, tokenizer = DeviceProgram(folder / "model.pte"), AutoTokenizer.from_pretrained(folder)
    print("| kind | items | program, right | INT4 folder, right | same answer |\n|---|--:|--:|--:|--:|")
    examples = []
    for benchmark in QUESTIONS:
        samples = read_samples(arguments.run / f"eval/qat_int4/{benchmark.key}.samples.jsonl.zst")[: arguments.items]
        own = [answer(program, tokenizer, sample["doc"]["question"]) for sample in samples]
        right = sum(text == sample["target"] for text, sample in zip(own, samples, strict=True))
        evaluated = sum(int(sample["exact_match"]) for sample in samples)
        same = sum(text == sample["filtered_resps"][0] for text, sample in zip(own, samples, strict=True))
        print(f"| {benchmark.title} | {len(own)} | {right} | {evaluated} | {same} |", flush=True)
        examples.append((samples[0]["doc"]["question"], own[0], samples[0]["target"]))
    for question, text, target in examples:
        print(f"\n{question}\n{text}" + ("" if text == target else f"   (right: {target})"))


if __name__ == "__main__":
    main()
