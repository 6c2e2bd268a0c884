"""Speed of the data step's blocks in MB/s a core, and of read + tokenize + write against the tokenizers library alone.

    python benchmarks/data_speed.py [--rounds 3] [--megabytes 40] [--parts blocks prose tokenize minhash sizes]

The texts are those of the Python environment: descriptions, documentation, source; none occurs twice. Each figure is
the median of the rounds. Variants that are compared run in turn, so a busy machine slows all alike.
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
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain, cycle, islice
from pathlib import Path

import fsspec
import numpy as np
import two_cores
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import MinhashDedupSignature
from datatrove.pipeline.filters import GopherRepetitionFilter
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils import text as datatrove_text
from datatrove.utils.word_tokenizers import load_word_tokenizer

from data.catalogue.corpora import CATALOGUE, LANGUAGE_PACKAGE
from data.catalogue.corpus import Corpus, PackageFile, Unit
from data.compat import LocalFolder, rank_file
from data.config import DataConfig
from data.execution import StepRunner
from data.filters import decontaminate, dedup, near_pairs
from data.filters.exact_dedup import ExactFilter, ExactFind, ExactSignature
from data.filters.language import make_language_filter, unpack_model
from data.filters.quality import (
    LANGUAGE_STYLES,
    PIIRedaction,
    StyleFilter,
    TextRepair,
    make_filters,
    make_quality_filters,
)
from data.filters.split import SplitTagger
from data.filters.time_limit import SlowDocuments
from data.readers.corpus_reader import RankReader
from data.tokens import mds, shard_writer, tokenizer
from data.tokens.chat import Encoder
from data.tokens.existing_tokenizer import load_existing
from data.tokens.shard_writer import ShardWriter

CORPORA = ("package-descriptions", "python-topics", "sympy-docs", "scipy-docs", "sklearn-docs", "python-stdlib")
VOCAB_SIZE = 16_384
RANKS = 4
BLOCKS_EVERY = 12
"""Step between the documents that the blocks are timed on: one in 12 is enough."""
PROSE_COPIES = 4
"""How often the part `prose` takes its texts: the first round alone would mostly load models."""
CLUSTERED = 300_000
"""Number of documents, all of them in pairs, that the clustering step is timed on."""
BARE = """
import json, sys, time
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[1])
texts = json.load(open(sys.argv[2]))[int(sys.argv[3]) :: int(sys.argv[4])]
wall, cpu = time.perf_counter(), time.process_time()
for first in range(0, len(texts), 1000):
    tokenizer.encode_batch(texts[first : first + 1000])
print(time.perf_counter() - wall, time.process_time() - cpu)
"""
"""Script that times the library alone. It runs in a process of its own, because the library fixes its number of threads
when it starts, and in batches of 1,000 texts, because all encodings at once would take gigabytes."""


class TimedWriter(ShardWriter):
    """Writes a task's times beside its part, without those of starting the process and loading the tokenizer."""

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        shard_writer.load_encoder(self.tokenizer_folder, tokenizer.hash_tokenizer(self.tokenizer_folder))
        wall, cpu = time.perf_counter(), time.process_time()
        super().run(data, rank, world_size)
        (self.parts / f"{rank}.json").write_text(json.dumps([wall, time.perf_counter(), time.process_time() - cpu]))


def read_texts() -> list[str]:
    """Return real documents, some 12 MB."""
    return [record["text"] for name in CORPORA for record in CATALOGUE[name].read(Unit(CATALOGUE[name], "", 0, 0))]


def count_megabytes(documents: Iterable[str]) -> float:
    return sum(len(text.encode()) for text in documents) / 1e6


def make_documents(found: list[str], style: str) -> list[Document]:
    return [Document(text=text, id=str(i), metadata={"style": style}) for i, text in enumerate(found)]


def time_seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def time_blocks(found: list[str], rounds: int, language_wheel: Path | None, scratch: Path) -> None:
    """Print the speed of each block alone on one core; every block gets all documents, also those it would drop."""
    size = count_megabytes(found)
    rates: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, work in list_block_work(found, language_wheel, scratch):
            datatrove_text.split_into_parts.cache_clear()
            started = time.process_time()
            work()
            rates.setdefault(name, []).append(size / (time.process_time() - started))
    print(f"\n{size:.1f} MB, {len(found):,} documents\n\n| block | MB a second of CPU |\n|---|--:|")
    for name, values in rates.items():
        print(f"| {name} | {statistics.median(values):.2f} |")


def list_block_work(found: list[str], language_wheel: Path | None, scratch: Path) -> Iterator[tuple[str, Callable]]:
    def apply(block) -> Callable[[], None]:
        documents = make_documents(found, block.styles[0])
        return lambda: [block.filter(document) for document in documents]

    if language_wheel:
        model = unpack_model(language_wheel, scratch / "language")
        yield "language", apply(StyleFilter(make_language_filter(model, ("en",)), LANGUAGE_STYLES, "language"))
    chosen = [block for block in make_quality_filters() if not block.name.startswith("encyclopedia")]
    for block in chosen:
        yield block.name, apply(block)
        if block.name == "gopher_repetition":
            yield f"{block.name}, datatrove's", apply(StyleFilter(GopherRepetitionFilter(), block.styles, "theirs"))
    prose = [block for block in chosen if "prose" in block.styles]
    yield (
        "the four prose filters in a row",
        lambda: [all(block.filter(document) is True for block in prose) for document in make_documents(found, "prose")],
    )
    repair = TextRepair()
    yield "repair", lambda: [repair.format(text) for text in found]
    yield "repair, datatrove's", lambda: [super(TextRepair, repair).format(text) for text in found]
    redaction = PIIRedaction()
    yield "pii", lambda: [redaction.format(text) for text in found]
    yield "pii, datatrove's", lambda: [super(PIIRedaction, redaction).format(text) for text in found]
    index = benchmark_index(found, scratch)
    block = decontaminate.DecontaminationFilter(index, 13, None)
    documents = make_documents(found, "prose")
    yield "words of decontamination", lambda: [decontaminate.split_words(text) for text in found]
    yield (
        "words of decontamination, datatrove's",
        lambda: [datatrove_text.simplify_text(text, decontaminate.NORMALISATION).split() for text in found],
    )
    yield "decontamination", lambda: [block.filter(document) for document in documents]
    signature = dedup.make_near_signature(scratch / "near", ["all"])
    yield "minhash signature", lambda: [signature.get_signature(signature.get_shingles(text)) for text in found]
    signature = MinhashDedupSignature(str(scratch / "near"), near_pairs.MINHASH)
    assert signature.word_tokenizer is load_word_tokenizer("eng")
    yield (
        "minhash signature, datatrove's words",
        lambda: [signature.get_signature(signature.get_shingles(text)) for text in found],
    )


def time_prose(archive: Path, wheel: Path, rounds: int, scratch: Path) -> None:
    """Print the speed of steps 1, 2, 3 and 7 for web prose on one core, files between them included.

    The texts are the C4 sample's: as a corpus that nobody has filtered, and as ones that their publishers have.
    """
    web = CATALOGUE["c4-sample"]
    found = [record["text"] for record in web.read(Unit(web, str(archive), 0, 0))]
    # Each copy has a number, so that none is an exact duplicate.
    texts = [f"{text} {number}." for number in range(PROSE_COPIES) for text in found]
    size = count_megabytes(texts)
    model, index = unpack_model(wheel, scratch / "language"), benchmark_index(found, scratch)
    corpora = {
        "nobody": web,
        "language, quality (as DCLM)": replace(web, language_filtered="done", quality_filtered="done"),
        "language, quality, addresses (as FineWeb-Edu)": replace(
            web, language_filtered="done", quality_filtered="done", pii_redacted="done"
        ),
    }
    rates: dict[str, list[float]] = {}
    for number in range(rounds):
        for name, corpus in corpora.items():
            datatrove_text.split_into_parts.cache_clear()
            documents = [
                Document(text, id=str(i), metadata={"style": web.style, "corpus": web.name})
                for i, text in enumerate(texts)
            ]
            folder = scratch / f"{len(rates)}.{number}.{name[-9:]}"
            started = time.process_time()
            clean_prose(documents, corpus, model, index, folder)
            rates.setdefault(name, []).append(size / (time.process_time() - started))
    print(f"\n{size:.1f} MB\n\n| filtered before | MB a second of CPU |\n|---|--:|")
    for name, values in rates.items():
        print(f"| {name} | {statistics.median(values):.2f} |")


def clean_prose(documents: list[Document], corpus: Corpus, model: Path, index: Path, folder: Path) -> None:
    """Run the blocks of steps 1, 2, 3 and 7 on the documents, as data/pipeline.py chains them."""
    unit, exact = Unit(corpus, "", 0, 0), folder / "exact"
    filters = make_filters(DataConfig(corpora=(corpus.name,)), model, [corpus])
    steps: list[list[PipelineStep]] = [
        [TextRepair(), *filters, PIIRedaction([corpus]), SlowDocuments(folder / "slow"), write_to(folder / "filtered"),
         ExactSignature(exact)],
        [ExactFind(exact, [unit])],
        [RankReader(folder / "filtered"), ExactFilter(exact, 1, 1), write_to(folder / "distinct")],
        [RankReader(folder / "distinct"), decontaminate.DecontaminationFilter(index, 13, None),
         SplitTagger([unit], 0, 0.02, 0.25), write_to(folder / "clean")],
    ]  # fmt: skip
    flow: Iterable[Document] | None = documents
    for blocks in steps:
        for block in blocks:
            flow = block.run(flow, 0, 1)
        for _ in flow or ():
            pass
        flow = None


def write_to(folder: Path) -> JsonlWriter:
    return JsonlWriter(LocalFolder(folder), output_filename="${rank}.jsonl.zst", compression="zstd")


def benchmark_index(found: list[str], scratch: Path) -> Path:
    """Write the index of 50,000 items of 40 words, none of which occurs in a text: their words are in reverse order."""
    path = scratch / "items.jsonl"
    words = cycle(word for text in found for word in reversed(text.split()))
    path.write_text(
        "".join(json.dumps({"benchmark": "b", "text": " ".join(islice(words, 40))}) + "\n" for _ in range(50_000))
    )
    decontaminate.build_index(path, 13, scratch / "benchmarks")
    return scratch / "benchmarks"


def time_tokenizing(found: list[str], rounds: int, size: float, scratch: Path) -> None:
    """Print the speed of read + tokenize + write and of the library's encode_batch, on 1 and on 2 cores, in turn."""
    tokenizer.save(tokenizer.train(iter(found), VOCAB_SIZE), scratch / "tokenizer")
    many = take_megabytes(chain(found, read_installed_sources()), size)
    size = count_megabytes(many)
    (scratch / "texts.json").write_text(json.dumps(many))
    write_clean(many, scratch / "clean")
    del many
    taken: dict[tuple[str, int], list[tuple[float, float]]] = {}
    whole: dict[int, list[float]] = {1: [], 2: []}
    for number in range(rounds):
        for cores in (1, 2):
            taken.setdefault(("encode_batch, threads", cores), []).append(time_bare_library(scratch, 1, cores))
            if cores > 1:
                taken.setdefault(("encode_batch, processes", cores), []).append(time_bare_library(scratch, cores, 1))
            started = time.perf_counter()
            taken.setdefault(("read + tokenize + write", cores), []).append(time_shard_writing(scratch, cores))
            whole[cores].append(time.perf_counter() - started)
        print(f"round {number + 1}", {key: values[-1] for key, values in taken.items()}, file=sys.stderr)
    wall, cpu = ({key: statistics.median(v[i] for v in values) for key, values in taken.items()} for i in (0, 1))
    print(f"\n{size:.1f} MB, vocabulary {VOCAB_SIZE:,}\n")
    print("| cores | | MB/s | MB a second of CPU | CPU of encode_batch / its own |\n|--:|---|--:|--:|--:|")
    for side, cores in taken:
        ratio = cpu["encode_batch, threads", 1] / cpu[side, cores]
        print(f"| {cores} | {side} | {size / wall[side, cores]:.2f} | {size / cpu[side, cores]:.2f} | {ratio:.2f} |")
    for cores, times in whole.items():
        start = statistics.median(times) - wall["read + tokenize + write", cores]
        print(
            f"\nstart of the processes and loading the tokenizer, {cores} cores: {start:.1f} s of wall clock beside it"
        )
    for two, one in (
        ("encode_batch, threads", "encode_batch, threads"), ("encode_batch, processes", "encode_batch, threads"),
        ("read + tokenize + write", "read + tokenize + write"),
    ):  # fmt: skip
        print(f"{two}, 2 cores / 1 core: {wall[one, 1] / wall[two, 2]:.2f}")
    print(two_cores.format_limits())


def take_megabytes(found: Iterable[str], size: float) -> list[str]:
    """Return the first `size` MB of the texts."""
    chosen, room = [], size * 1e6
    for text in found:
        chosen.append(text)
        room -= len(text.encode())
        if room <= 0:
            break
    return chosen


def read_installed_sources() -> Iterator[str]:
    """Yield the source files of the installed distributions: hundreds of megabytes without repetitions."""
    for path in sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip():
            yield text


def time_bare_library(scratch: Path, processes: int, threads: int) -> tuple[float, float]:
    """Return (seconds that the slowest process spends encoding its part of the texts, CPU seconds of all)."""
    environment = os.environ | {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": str(threads > 1).lower()}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", BARE, scratch / "tokenizer/tokenizer.json", scratch / "texts.json", str(part),
             str(processes)],
            env=environment, stdout=subprocess.PIPE, text=True,
        )
        for part in range(processes)
    ]  # fmt: skip
    times = [tuple(map(float, process.communicate()[0].split())) for process in started]
    return max(wall for wall, _ in times), sum(cpu for _, cpu in times)


def write_clean(found: list[str], folder: Path) -> None:
    """Write the texts as the output of step 7, divided into ranks."""
    metadata = {"corpus": "c", "domain": "web", "kind": "text", "style": "prose", "split": "pretrain"}
    folder.mkdir()
    for rank in range(RANKS):
        with fsspec.open(str(folder / rank_file(rank)), "wt", compression="infer") as file:
            for i, text in enumerate(found[rank::RANKS]):
                file.write(json.dumps({"text": text, "id": str(i), "metadata": metadata}) + "\n")


def time_shard_writing(scratch: Path, cores: int) -> tuple[float, float]:
    """Return (seconds from the start of the first task to the end of the last, CPU seconds of all)."""
    for leftover in (scratch / "parts", scratch / "logs"):
        shutil.rmtree(leftover, ignore_errors=True)
    writer = TimedWriter(scratch / "tokenizer", scratch / "parts", scratch / "set_aside", 64 << 20, 8192)
    runner = StepRunner("local", cores, scratch / "logs", lambda *_: None)
    runner.run("tokenize", [RankReader(scratch / "clean"), writer], [f"part {rank}" for rank in range(RANKS)])
    times = [json.loads(path.read_text()) for path in (scratch / "parts").glob("*.json")]
    return max(end for _, end, _ in times) - min(begin for begin, _, _ in times), sum(cpu for _, _, cpu in times)


def measure_sizes(archive: Path | None, path: str, scratch: Path) -> None:
    """Print the sizes that data/planning.py assumes of web text, measured on small samples, for comparison."""
    made = load_existing(path)
    encoder = Encoder(made)
    print(f"\nvocabulary {len(made):,}\n")
    print("| corpus | documents | bytes a token | bytes of shard a token | tokens a document |\n|---|--:|--:|--:|--:|")
    for name in ("c4-sample", "wikipedia-plain", "package-descriptions", "python-stdlib"):
        corpus = CATALOGUE[name]
        if isinstance(corpus.source, PackageFile) and not archive:
            continue
        found = [record["text"] for record in corpus.read(Unit(corpus, str(archive), 0, 0))]
        tokens = encoder.encode_documents(found)
        with mds.make_writer(scratch / name, "text", DataConfig.shard_bytes) as writer:
            for ids in tokens:
                writer.write({"tokens": ids})
        total = sum(map(len, tokens))
        stored = sum(path.stat().st_size for path in (scratch / name).glob("*.zstd"))
        print(
            f"| {name} | {len(found):,} | {count_megabytes(found) * 1e6 / total:.2f} | {stored / total:.2f} "
            f"| {total / len(found):,.0f} |"
        )


def time_near_deduplication(found: list[str], scratch: Path) -> None:
    """Print time and memory of each step of near deduplication, scaled to a million documents."""
    paragraphs = [p for text in found for p in text.split("\n\n") if len(p.split()) >= 20]
    documents = make_documents(paragraphs, "prose")
    folder = scratch / "dedup"
    steps = {
        "signatures": lambda: dedup.make_near_signature(folder, ["all"]).run(documents, 0, 1),
        "buckets (14 tasks)": lambda: find_pairs(folder),
    }
    scale = 1e6 / len(documents)
    mean = count_megabytes(paragraphs) * 1e6 / len(documents)
    print(f"\n{len(documents):,} documents of {mean:.0f} bytes on average\n")
    print("| step | s a million documents | peak memory, MB over the start |\n|---|--:|--:|")
    for name, work in steps.items():
        elapsed, memory = measure_in_process(work)
        print(f"| {name} | {elapsed * scale:.0f} | {memory:.0f} |")
    elapsed, memory = measure_in_process(lambda: cluster_pairs(scratch / "pairs", CLUSTERED))
    print(f"| cluster (1 task), {CLUSTERED:,} all in pairs | {elapsed * 1e6 / CLUSTERED:.0f} | {memory:.0f} |")
    signatures = sum(path.stat().st_size for path in (folder / "all" / "signatures").rglob("*.sig"))
    print(f"\nsignatures on disk: {signatures * scale / 1e6:.0f} MB a million documents")


def find_pairs(folder: Path) -> None:
    """Run the tasks of step 5."""
    block, labels = dedup.make_near_buckets(folder, ["all"])
    for task in range(len(labels)):
        block.run(None, task, len(labels))


def cluster_pairs(folder: Path, number: int) -> None:
    """Run the task of step 6 on `number` documents in pairs; it holds only documents that have a duplicate."""
    (folder / "pairs").mkdir(parents=True)
    documents = np.arange(number // 2 * 2, dtype=np.uint32).reshape(-1, 2)
    rank = np.zeros_like(documents[:, :1])
    for bucket in range(near_pairs.MINHASH.num_buckets):
        pairs = np.hstack([rank, documents[:, :1], rank, documents[:, 1:]]) if bucket == 0 else documents[:0]
        pairs.tofile(folder / f"pairs/{bucket:05d}_00.dups")
    block, _ = dedup.make_near_cluster(folder.parent, [folder.name])
    block.run(None, 0, 1)


def measure_in_process(work: Callable[[], object]) -> tuple[float, float]:
    """Run the work in a forked process; return (seconds, MB of peak memory beyond that at its start)."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        elapsed = time_seconds(work)
        sender.send((elapsed, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    result = receiver.recv()
    process.join()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=float, default=40)
    parser.add_argument("--language-wheel", type=Path, help=f"wheel of {LANGUAGE_PACKAGE}")
    parser.add_argument("--parts", nargs="+", default=["blocks", "tokenize", "minhash"])
    parser.add_argument("--tokenizer", help="folder or tokenizer.json, for the part `sizes`")
    parser.add_argument("--llamafactory", type=Path, help="its sdist, for the part `prose` and two corpora of `sizes`")
    arguments = parser.parse_args()
    found = read_texts() if set(arguments.parts) - {"sizes", "prose"} else []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if "blocks" in arguments.parts:
            time_blocks(found[::BLOCKS_EVERY], arguments.rounds, arguments.language_wheel, scratch)
        if "prose" in arguments.parts:
            time_prose(arguments.llamafactory, arguments.language_wheel, arguments.rounds, scratch)
        if "tokenize" in arguments.parts:
            time_tokenizing(found, arguments.rounds, arguments.megabytes, scratch)
        if "sizes" in arguments.parts:
            measure_sizes(arguments.llamafactory, arguments.tokenizer, scratch)
        if "minhash" in arguments.parts:
            time_near_deduplication(found[::4], scratch)


if __name__ == "__main__":
    main()
