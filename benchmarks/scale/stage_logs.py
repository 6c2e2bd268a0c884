"""The log of expert load at the published size: bytes, and what a resume and a report take to read it.

    python -m benchmarks.scale.stage_logs [--records 140000] [--layers 32] [--experts 64]

Writes a synthetic expert_load.jsonl as training does, to a temporary folder: 140,000 records are 1.4M steps with
log_interval 10. A resume cuts the records of the last steps; a report reads all of them. Peak memory is that of this
process, which has imported the report's modules.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

from core.json_lines import cut_last_lines
from eval.report.collect import read_expert_load
from titan_ext.training.metrics import LOAD_LOGS

LOG_INTERVAL = 10


def write_log(path: Path, records: int, layers: int, experts: int) -> None:
    """Write a log in which every expert has an even share."""
    summary = {"max_over_mean": 1.2345, "entropy": 4.1234, "dead": 0, "dropped": 0.0, "router_entropy": 3.1234}
    whole = {"load": [round(1 / experts, 6)] * experts} | summary
    with path.open("w") as file:
        for number in range(1, records + 1):
            layer = whole if number == 1 or number % LOAD_LOGS == 0 else summary
            file.write(json.dumps({"step": LOG_INTERVAL * number, "layers": [layer] * layers}) + "\n")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=140_000)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--experts", type=int, default=64)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "expert_load.jsonl"
        write_log(path, arguments.records, arguments.layers, arguments.experts)
        size, last = path.stat().st_size, LOG_INTERVAL * arguments.records
        start = time.perf_counter()
        cut_last_lines(path, lambda record: record["step"] > last - 1000)
        cut = time.perf_counter() - start
        start = time.perf_counter()
        found = read_expert_load(path)
        read = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("| bytes | resume: cut 100 records, s | report: read, s | points of the curve | peak memory, bytes |")
    print("|--:|--:|--:|--:|--:|")
    print(f"| {size:,} | {cut:.3f} | {read:.1f} | {len(found['expert_load']):,} | {peak:,} |")


if __name__ == "__main__":
    main()
