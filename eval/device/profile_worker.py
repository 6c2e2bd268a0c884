"""This module is the process of one measurement of `mobilemoe profile`.

    python -m eval.device.profile_worker < SPEC

SPEC is JSON, see `main`. The process prints one JSON object. Every measurement has a process of its own, because the
system counts peak memory for each process, and because warm caches and thread pools must not speed up the next one.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

CLEAR_PEAK = "5"
"""Text that sets the peak to the current size when it is written to /proc/self/clear_refs (man 5 proc)."""


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Load the artifact, run prompt and answer `repetitions` times, and return times in seconds and memory in bytes.

    Args:
        spec: `artifact` (folder), `tokens` (prompt, then the answer that is fed token by token), `n_answer`,
            `repetitions`, `threads` (None: the runtime's choice).

    Returns:
        load_seconds, lists prefill_seconds and decode_seconds (of the whole answer), floor_bytes (resident before the
        artifact is loaded, libraries included), peak_bytes, experts_read (number of layer x expert matrices that
        prompt and answer read; None if the op does not count them).
    """
    artifact, n_answer = Path(spec["artifact"]), spec["n_answer"]
    prompt, answer = spec["tokens"][:-n_answer], spec["tokens"][-n_answer:]
    kind = DeviceModel if (artifact / "model.pte").is_file() else TransformersModel
    kind.import_libraries(spec["threads"])
    reset_peak()
    floor = read_memory("VmRSS")
    start = time.perf_counter()
    model = kind(artifact, spec["threads"])
    load_seconds = time.perf_counter() - start
    prefill, decode, experts = [], [], None
    for _ in range(spec["repetitions"]):
        before = model.experts_read()
        start = time.perf_counter()
        model.prefill(prompt)
        prefill.append(time.perf_counter() - start)
        between = model.experts_read()
        start = time.perf_counter()
        for i, token in enumerate(answer):
            model.decode(token, len(prompt) + i)
        decode.append(time.perf_counter() - start)
        if before is not None:
            after = model.experts_read()
            assert between is not None and after is not None, "an op that counts, always counts"
            experts = {"prompt": between - before, "answer": after - between}
    return {
        "load_seconds": load_seconds, "prefill_seconds": prefill, "decode_seconds": decode, "floor_bytes": floor,
        "peak_bytes": read_memory("VmHWM"), "experts_read": experts,
    }  # fmt: skip


class DeviceModel:
    """ExecuTorch program behind the interface that `main` measures."""

    @staticmethod
    def import_libraries(threads: int | None) -> None:
        import executorch.runtime  # noqa: F401  (its memory belongs to the floor)

        from eval.compat import register_executorch_ops

        register_executorch_ops()

    def __init__(self, artifact: Path, threads: int | None):
        from eval.device.runtime import DeviceProgram

        self._program = DeviceProgram(artifact / "model.pte", threads)

    def prefill(self, tokens: list[int]) -> int:
        return int(self._program.logits(tokens, 0).argmax())

    def decode(self, token: int, position: int) -> int:
        return int(self._program.logits([token], position).argmax())

    def experts_read(self) -> int | None:
        from eval.device import expert_op

        return expert_op.load().mobilemoe_experts_read() if self._program.uses_fast_op else None


class TransformersModel:
    """Hugging Face folder behind the same interface, run by our modeling code on the CPU in `choose_dtype`'s dtype."""

    @staticmethod
    def import_libraries(threads: int | None) -> None:
        import torch

        import eval.hf_mobilemoe  # noqa: F401

        if threads is not None:
            torch.set_num_threads(threads)

    def __init__(self, artifact: Path, threads: int | None):
        from eval.compute_dtype import choose_float_dtype
        from eval.hf_mobilemoe import MobileMoEForCausalLM

        self._model = MobileMoEForCausalLM.from_pretrained(artifact, dtype=choose_float_dtype(artifact)).eval()
        self._read = 0
        for layer in self._model.model.layers:
            self._count(layer.feed_forward)

    def _count(self, feed_forward: Any) -> None:
        """Wrap the layer's router so that it counts the distinct experts of every call."""
        route = feed_forward.route

        def counted(x_TD):
            experts_TK, weights_TK = route(x_TD)
            self._read += len(experts_TK.unique())
            return experts_TK, weights_TK

        feed_forward.route = counted

    def prefill(self, tokens: list[int]) -> int:
        self._cache = None
        return self._step(tokens)

    def decode(self, token: int, position: int) -> int:
        return self._step([token])

    def _step(self, tokens: list[int]) -> int:
        import torch

        with torch.inference_mode():
            output = self._model(torch.tensor([tokens]), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = output.past_key_values
        return int(output.logits[0, -1].argmax())

    def experts_read(self) -> int | None:
        return self._read


def reset_peak() -> None:
    """Set this process's peak memory to its current resident size (Linux)."""
    Path("/proc/self/clear_refs").write_text(CLEAR_PEAK, encoding="ascii")


def read_memory(key: str) -> int:
    """Return bytes of this process's memory: VmRSS is the resident size, VmHWM its peak since `reset_peak`."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}; profiling needs Linux")


if __name__ == "__main__":
    print(json.dumps(main(json.load(sys.stdin))))
