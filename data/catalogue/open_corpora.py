"""The open corpora of the published recipe's families (arXiv 2605.27358 names the families, not the exact lists).

The order is the reading order. A document that occurs in two corpora is kept in the first, so small sources come before
the web.

Checked against the data set cards and file lists that public pages and repositories quote: hub ids, licences, folders
and file names except for those below; the sizes of the Dolma and Proof Pile parts (from OLMoE's card; the files are
OLMo 2's, whose card lists the same folders, while OLMoE's no longer has the arXiv files); WildGuardMix's labels; the
columns of ToolACE, xLAM, OpenThoughts and the Nemotron sets. FinePDFs-Edu has 23.0M English documents, its tokens are
these times the 4,990 a document that a derivative's card counts. Of Dolma 3's science PDFs, 972B tokens in 101M
documents, a tenth is read.

NOT checked: the sizes of FineWeb-Edu and xLAM; the file names of OpenCodeInstruct, Tulu 3, OpenThoughts, Natural
Reasoning and UltraChat; the columns of Natural Reasoning, WildChat and of OpenCoder's `synthetic_qa`; OpenThoughts'
licence; Cosmopedia's tokens; WildChat-1M's size (in proportion to the first WildChat's); of Nemotron-SFT-Safety-v1 all
but its file, its 45,100 rows and the 77 MB of a copy. No address was opened: the data step names a wrong one when it
reads it. Gated sets need an accepted agreement and HF_TOKEN. NVIDIA's sets are reported to withhold prompts that belong
to others (LMSYS's in `chat`): such a row has a user's message without text and is excluded; the manifest counts them.

`deduplicated` states what publishers did about near duplicates; where nothing is known of it, the data step searches.
Corpora with a statement are 24.8 of 26.9 TB of text. That FineWeb-Edu was deduplicated within every crawl and DCLM in
ten parts is also what the publisher of a third corpus writes (Zyphra); NOT checked: the papers that are named.

`language_filtered`, `quality_filtered` and `pii_redacted` were read in FineWeb's card and in datatrove's script of it,
whose limits and replacements are those of data/filters/quality.py (FineWeb-Edu is a part of FineWeb by its own card),
and in DCLM's configuration (`dclm_baseline_refinedweb.yaml`), which redacts nothing. DCLM's rules are Gopher's and not
C4's and FineWeb's; a classifier decides beside them. Of the other corpora nothing was seen: all filters run.

`tokens` is the publisher's count with its own tokenizer; None where no figure was found. `text_bytes` is the size of
the uncompressed text where a card states it. Otherwise it is an estimate for the disk check: 4.5 bytes a token or, for
conversations, the size of the files.
"""

from functools import partial

from data.catalogue.corpus import Corpus, RemoteFiles
from data.readers import remote_readers

_HF = "hf://datasets"
_OLMO = f"{_HF}/allenai/olmo-mix-1124"
_DOLMINO = f"{_HF}/allenai/dolmino-mix-1124"
_NEMOTRON = f"{_HF}/nvidia/Nemotron-Post-Training-Dataset-v1"
_LLAMA_NEMOTRON = f"{_HF}/nvidia/Llama-Nemotron-Post-Training-Dataset"

_text = partial(Corpus, kind="text", read=remote_readers.read_text)
_midtrain = partial(_text, stages=("midtrain",))
_sft = partial(Corpus, kind="sft", style="conversation")

_WEB = (
    _text(
        name="fineweb-edu", domain="web", style="prose", licence="ODC-BY-1.0", tokens=1.3e12,
        source=RemoteFiles(f"{_HF}/HuggingFaceFW/fineweb-edu", "data/*/*.parquet"), text_bytes=int(5.9e12),
        deduplicated="MinHash within every crawl (FineWeb, arXiv 2406.17557)",
        language_filtered="English by fastText, 0.65 at least (FineWeb's card, arXiv 2406.17557)",
        quality_filtered="Gopher's, C4's and FineWeb's rules (FineWeb's card, arXiv 2406.17557), and a classifier",
        pii_redacted="e-mail and public IP addresses (FineWeb's card, arXiv 2406.17557)",
    ),
    _text(
        name="dclm-baseline", domain="web", style="prose", licence="CC-BY-4.0", tokens=3.86e12, documents=2_950_000_000,
        source=RemoteFiles(f"{_HF}/mlfoundations/dclm-baseline-1.0-parquet", "**/*.parquet"),
        text_bytes=int(16.7e12),
        deduplicated="Bloom filters over paragraphs and documents, in ten parts (DataComp-LM, arXiv 2406.11794)",
        language_filtered="English by fastText, 0.65 at least (its repository's configuration, arXiv 2406.11794)",
        quality_filtered="RefinedWeb's rules, Gopher's among them, and a classifier (DataComp-LM, arXiv 2406.11794)",
    ),
)  # fmt: skip

_MATH = (
    _text(
        name="finemath", domain="math", style="documentation", licence="ODC-BY-1.0", tokens=34e9, documents=21_405_610,
        source=RemoteFiles(f"{_HF}/HuggingFaceTB/finemath", "finemath-3plus/*.parquet"), text_bytes=137_764_105_388,
        deduplicated="MinHash with one band of ten hashes (SmolLM2, arXiv 2502.02737)",
    ),
    _text(
        name="infiwebmath", domain="math", style="documentation", licence="ODC-BY-1.0", tokens=20.5e9,
        documents=13_882_669, text_bytes=96_485_696_853,
        source=RemoteFiles(f"{_HF}/HuggingFaceTB/finemath", "infiwebmath-3plus/*.parquet"),
    ),
    _text(
        name="open-web-math", domain="math", style="documentation", licence="ODC-BY-1.0", tokens=12.7e9,
        documents=2_910_000, source=RemoteFiles(_OLMO, "data/open-web-math/**/*.json*"), text_bytes=int(42.4e9),
        deduplicated="SimHash (OpenWebMath, arXiv 2310.06786)",
    ),
    _text(
        name="algebraic-stack", domain="math", style="code", licence="ODC-BY-1.0", tokens=12.6e9, documents=2_830_000,
        source=RemoteFiles(_OLMO, "data/algebraic-stack/**/*.json*"), text_bytes=int(39.3e9),
    ),
    _text(
        name="megamath-web", domain="math", style="documentation", licence="ODC-BY-1.0", tokens=263.9e9,
        source=RemoteFiles(f"{_HF}/LLM360/MegaMath", "megamath-web/**/*.parquet"), text_bytes=int(1.19e12),
        deduplicated="MinHash (MegaMath, arXiv 2504.02807)",
    ),
    _midtrain(
        name="dolmino-math", domain="math", style="documentation", licence="ODC-BY-1.0",
        source=RemoteFiles(_DOLMINO, "data/math/**/*.json*"), text_bytes=int(5e10),
    ),
)  # fmt: skip

_CODE = (
    _text(
        name="starcoder", domain="code", style="code", licence="each repository's own, permissive ones only",
        tokens=250e9, source=RemoteFiles(f"{_HF}/bigcode/starcoderdata", "*/*.parquet", ("content",)),
        text_bytes=int(7.83e11), deduplicated="MinHash of files (StarCoder, arXiv 2305.06161)",
    ),
    _text(
        name="opencoder-web", domain="code", style="documentation", licence="MIT", documents=100_920_235,
        source=RemoteFiles(f"{_HF}/OpenCoder-LLM/opc-fineweb-code-corpus", "data/train-*.parquet"),
        text_bytes=254_927_419_643,
    ),
    _midtrain(
        name="opencoder-annealing", domain="code", style="code", licence="ODC-BY-1.0", documents=15_600_000,
        source=RemoteFiles(f"{_HF}/OpenCoder-LLM/opc-annealing-corpus", "*/*.arrow"), text_bytes=int(3e10),
    ),
)  # fmt: skip

_KNOWLEDGE = (
    _text(
        name="wikipedia", domain="knowledge", style="encyclopedia", licence="CC-BY-SA-3.0",
        source=RemoteFiles(f"{_HF}/wikimedia/wikipedia", "20231101.en/*.parquet"), text_bytes=int(2e10),
    ),
    _text(
        name="cosmopedia-v2", domain="knowledge", style="prose", licence="ODC-BY-1.0", tokens=28e9,
        documents=39_000_000, text_bytes=int(1.26e11),
        source=RemoteFiles(f"{_HF}/HuggingFaceTB/smollm-corpus", "cosmopedia-v2/*.parquet"),
    ),
    _text(
        name="cosmopedia", domain="knowledge", style="prose", licence="Apache-2.0", tokens=25e9,
        source=RemoteFiles(f"{_HF}/HuggingFaceTB/cosmopedia", "data/*/*.parquet"), text_bytes=int(1.13e11),
    ),
    _text(
        name="finepdfs-edu", domain="knowledge", style="documentation", licence="ODC-BY-1.0", tokens=115e9,
        documents=23_023_372, text_bytes=int(5.2e11),
        source=RemoteFiles(f"{_HF}/HuggingFaceFW/finepdfs-edu", "data/eng_Latn/train/*.parquet"),
    ),
    _midtrain(
        name="dolmino-flan", domain="knowledge", style="documentation", licence="ODC-BY-1.0",
        source=RemoteFiles(_DOLMINO, "data/flan/**/*.json*"), text_bytes=int(1e11),
    ),
    _midtrain(
        name="dolmino-stackexchange", domain="knowledge", style="documentation", licence="ODC-BY-1.0",
        source=RemoteFiles(_DOLMINO, "data/stackexchange/**/*.json*"), text_bytes=int(1e10),
    ),
)  # fmt: skip

_SCIENCE = (
    _text(
        name="pes2o", domain="science", style="documentation", licence="ODC-BY-1.0", tokens=57.2e9,
        documents=38_800_000, source=RemoteFiles(_OLMO, "data/pes2o/**/*.json*"), text_bytes=int(2.68e11),
    ),
    _text(
        name="arxiv", domain="science", style="documentation", licence="ODC-BY-1.0", tokens=21.1e9,
        documents=1_550_000, source=RemoteFiles(_OLMO, "data/arxiv/**/*.json*"), text_bytes=int(8.88e10),
    ),
    _text(  # a tenth of 972B tokens in 101M documents: the domain repeats 2.7 times with it, at a tenth of the cost
        name="olmocr-science-pdfs", domain="science", style="documentation", licence="ODC-BY-1.0", tokens=97.2e9,
        documents=10_100_000, max_documents=10_100_000, text_bytes=int(3.9e11),
        source=RemoteFiles(f"{_HF}/allenai/dolma3_pool", "data/olmocr_science_pdfs-*/*.jsonl.zst"),
    ),
)  # fmt: skip

_INSTRUCTIONS = (
    _sft(
        name="open-math-instruct-2", domain="math", licence="CC-BY-4.0", documents=14_000_000,
        source=RemoteFiles(
            f"{_HF}/nvidia/OpenMathInstruct-2", "data/train-*.parquet", ("problem", "generated_solution")
        ),
        read=remote_readers.read_pairs, text_bytes=int(2.5e10),
    ),
    _sft(
        name="nemotron-math", domain="math", licence="CC-BY-4.0", documents=2_044_407,
        source=RemoteFiles(_NEMOTRON, "data/math-*.parquet", ("messages",)), read=remote_readers.read_released_messages,
        text_bytes=79_173_786_238,
    ),
    _sft(
        name="open-code-instruct", domain="code", licence="CC-BY-4.0", documents=5_000_000,
        source=RemoteFiles(f"{_HF}/nvidia/OpenCodeInstruct", "data/train-*.parquet", ("input", "output")),
        read=remote_readers.read_pairs, text_bytes=int(1.5e10),
    ),
    _sft(
        name="open-code-reasoning", domain="code", licence="CC-BY-4.0", documents=567_850,
        source=RemoteFiles(f"{_HF}/nvidia/OpenCodeReasoning", "split_0/train-*.parquet", ("input", "output")),
        read=remote_readers.read_pairs, text_bytes=28_108_469_190,
    ),
    _sft(
        name="nemotron-chat", domain="chat", licence="CC-BY-4.0", documents=746_622,
        source=RemoteFiles(_NEMOTRON, "data/chat-*.parquet", ("messages",)), read=remote_readers.read_released_messages,
        text_bytes=3_824_039_827,
    ),
    _sft(
        name="nemotron-chat-2", domain="chat", licence="CC-BY-4.0", documents=627_720,
        source=RemoteFiles(
            f"{_HF}/nvidia/Nemotron-Post-Training-Dataset-v2", "data/chat-*.parquet", ("messages",)
        ),
        read=remote_readers.read_released_messages, text_bytes=5_971_361_114,
    ),
    _sft(
        name="ultrachat", domain="chat", licence="MIT", documents=207_865, text_bytes=1_397_058_554,
        source=RemoteFiles(f"{_HF}/HuggingFaceH4/ultrachat_200k", "data/train_sft-*.parquet", ("messages",)),
        read=remote_readers.read_messages,
    ),
    _sft(
        name="wildchat", domain="chat", licence="ODC-BY-1.0", documents=837_989, text_bytes=int(5e9),
        source=RemoteFiles(f"{_HF}/allenai/WildChat-1M", "data/train-*.parquet", ("conversation",)),
        read=remote_readers.read_messages,
    ),
    _sft(
        name="tulu-3", domain="chat", licence="ODC-BY-1.0, parts of it non-commercial", non_commercial=True,
        documents=939_343, text_bytes=2_914_250_827,
        source=RemoteFiles(f"{_HF}/allenai/tulu-3-sft-mixture", "data/train-*.parquet", ("messages",)),
        read=remote_readers.read_messages,
    ),
    _sft(
        name="smoltalk", domain="chat", licence="Apache-2.0", text_bytes=int(4e9),
        source=RemoteFiles(f"{_HF}/HuggingFaceTB/smoltalk", "data/all/train-*.parquet", ("messages",)),
        read=remote_readers.read_messages,
    ),
    _sft(
        name="nemotron-tools", domain="tool_use", licence="CC-BY-4.0", documents=310_051,
        source=RemoteFiles(_NEMOTRON, "data/tool-*.parquet", ("messages",)), read=remote_readers.read_released_messages,
        text_bytes=6_395_081_261,
    ),
    _sft(
        name="toolace", domain="tool_use", licence="Apache-2.0", documents=11_300, text_bytes=int(6e7),
        source=RemoteFiles(f"{_HF}/Team-ACE/ToolACE", "data.json", ("conversations", "system")),
        read=remote_readers.read_messages,
    ),
    _sft(
        name="hermes-function-calling", domain="tool_use", licence="Apache-2.0", documents=11_600,
        text_bytes=65_700_000,
        source=RemoteFiles(f"{_HF}/NousResearch/hermes-function-calling-v1", "*.json", ("conversations",)),
        read=remote_readers.read_messages,
    ),
    _sft(
        name="xlam-function-calling", domain="tool_use", licence="CC-BY-4.0", documents=60_000, text_bytes=int(1e8),
        source=RemoteFiles(f"{_HF}/Salesforce/xlam-function-calling-60k", "*.json", ("query", "tools", "answers")),
        read=remote_readers.read_function_calls,
    ),
    _sft(
        name="nemotron-stem", domain="science", licence="CC-BY-4.0", documents=20_662_167,
        source=RemoteFiles(_NEMOTRON, "data/stem-*.parquet", ("messages",)), read=remote_readers.read_released_messages,
        text_bytes=329_529_074_790,
    ),
    _sft(
        name="open-thoughts", domain="reasoning", licence="Apache-2.0", documents=1_200_000,
        source=RemoteFiles(
            f"{_HF}/open-thoughts/OpenThoughts3-1.2M", "data/train-*.parquet", ("conversations",)
        ),
        read=remote_readers.read_messages, text_bytes=int(6e10),
    ),
    _sft(
        name="natural-reasoning", domain="reasoning", licence="CC-BY-NC-4.0", non_commercial=True,
        documents=1_100_000, text_bytes=int(1e9),
        source=RemoteFiles(f"{_HF}/facebook/natural_reasoning", "*.jsonl", ("question", "reference_answer")),
        read=remote_readers.read_pairs,
    ),
    _sft(
        name="nemotron-safety", domain="safety", licence="CC-BY-4.0", documents=31_426,
        source=RemoteFiles(_LLAMA_NEMOTRON, "SFT/safety/*.jsonl", ("input", "output")),
        read=remote_readers.read_prompted, text_bytes=int(5e7),
    ),
    _sft(
        name="nemotron-safety-2", domain="safety", licence="CC-BY-4.0", documents=45_100, text_bytes=int(7.7e7),
        source=RemoteFiles(f"{_HF}/nvidia/Nemotron-SFT-Safety-v1", "data/train.jsonl", ("messages",)),
        read=remote_readers.read_released_messages,
    ),
    _sft(
        name="wildguardmix", domain="safety", licence="ODC-BY-1.0, for research by its terms of access",
        non_commercial=True, documents=86_759, text_bytes=int(1.5e8),
        source=RemoteFiles(
            f"{_HF}/allenai/wildguardmix", "train/*.parquet", ("prompt", "response", "response_harm_label")
        ),
        read=remote_readers.read_unharmful_pairs,
    ),
)  # fmt: skip

OPEN_CORPORA: tuple[Corpus, ...] = (*_KNOWLEDGE, *_SCIENCE, *_MATH, *_CODE, *_WEB, *_INSTRUCTIONS)
