"""The faults of the suite that need no Ray: one record each."""

import json
from collections.abc import Callable

from tests.faults import places
from tests.faults.injection import Injection
from tests.faults.stores import STORE_FAULTS
from tests.faults.trial import Broken, Fault, Trial

SAME = "the same command ends with the same samples, parameters and files"
RESTARTED = "the step goes on by itself, with the same result"
NAMED = "the step fails and names it; with room again the same command goes on, with the same result"


def inject(process: str, target: str, action: str, **where: object) -> Callable[[Trial], str]:
    """Return what disturbs a trial by one injection, and lets the same command finish."""

    def disturb(trial: Trial) -> str:
        code = trial.inject(Injection(process, target, action, **where))
        return "went on by itself: exit 0" if code == 0 else f"exit {code}; {trial.finish()}"

    return disturb


def kills() -> list[Fault]:
    """Return the kills at named moments."""
    moments = [
        ("items", "items", "bbh", "a benchmark's items are renamed"), ("items", "items", "items", "items are renamed"),
        ("data", "data", "index.json", "an index of shards is renamed"),
        ("data", "data", "data_manifest.json", "the data manifest is renamed"),
        ("data", "driver", "data", "data is renamed"),
        ("pretrain", "pretrain.rank0", "SHA256SUMS", "a checkpoint's SHA256SUMS is renamed"),
        ("pretrain", "pretrain.rank0", ".metadata", "a checkpoint's .metadata is renamed"),
        ("pretrain", "pretrain.rank1", "*.sha256", "rank 1 leaves the hash of its file of a checkpoint"),
        ("qat", "qat.rank0", ".metadata", "a checkpoint of qat is renamed"),
        ("export", "export.bf16", "bf16", "artifacts/bf16 is renamed"),
        ("export", "export.int4", "int4", "artifacts/int4 is renamed"),
        ("eval", "eval.heldout", "*.json", "a held-out loss is renamed"),
        ("package", "package", "gguf", "artifacts/gguf is renamed"),
        ("report", "report", "report", "the report is renamed"),
    ]  # fmt: skip
    faults = []
    for step, process, target, moment in moments:
        for action, what in (("kill", "SIGKILL of the worker"), ("kill-driver", "SIGKILL of the driver")):
            for after in (False, True):
                if action == "kill" and (process == "driver" or (after and step not in ("pretrain", "export"))):
                    continue
                number = 3 if step == "pretrain" else 1
                faults.append(
                    Fault(
                        f"{what}, {'after' if after else 'before'} {moment}", step,
                        RESTARTED if action == "kill" else SAME,
                        inject(process, target, action, after=after, number=number),
                    )
                )  # fmt: skip
    return faults


def driver_kills() -> list[Fault]:
    """Return the kills of the driver around its own record of a step: this is between two steps."""
    faults = []
    for step in ("items", "midtrain", "package"):
        for number, moment in ((1, "the recipe"), (2, "the begin"), (3, "the end")):
            for after in (False, True):
                name = f"SIGKILL of the driver, {'after' if after else 'before'} the manifest with {moment} of {step}"
                faults.append(
                    Fault(name, step, SAME, inject("driver", "manifest.json", "kill", after=after, number=number))
                )
    return faults


def double_kill(trial: Trial) -> str:
    """Kill the driver at a checkpoint, then the next one while it makes up for that, then rank 1 of the third."""
    codes = [
        trial.inject(Injection("pretrain.rank0", ".metadata", "kill-driver", number=4)),
        trial.inject(Injection("pretrain.rank1", "*.sha256", "kill-driver", number=1)),
        trial.inject(Injection("pretrain.rank0", "SHA256SUMS", "kill", number=1)),
    ]
    return f"exit {codes}; {trial.finish() if codes[-1] else 'the third went on by itself'}"


def terminate(trial: Trial) -> str:
    """SIGTERM of the driver while a stage trains."""
    code = trial.inject(Injection("pretrain.rank0", "SHA256SUMS", "term", number=2))
    steps = json.loads((trial.run / "manifest.json").read_text())["steps"]
    if code != 130 or steps["pretrain"]["state"] != "interrupted":
        raise Broken(f"exit {code}, state {steps['pretrain']['state']}")
    return f"exit 130, interrupted; {trial.finish()}"


def full_disks() -> list[Fault]:
    """Return a disk that is really full, in every step that writes, and ENOSPC at single moments."""
    faults = [
        Fault(f"disk full in {step} (tmpfs with {room >> 10} KiB left)", step, NAMED, places.fill_disk(room))
        for step, room in (
            ("items", 40 << 10), ("data", 64 << 10), ("pretrain", 200 << 10), ("qat", 200 << 10), ("export", 100 << 10),
            ("package", 40 << 10), ("eval", 8 << 10), ("report", 40 << 10), ("midtrain", 0),
        )
    ]  # fmt: skip
    for process, target, step, number, moment in (
        ("driver", "manifest.json", "package", 2, "the manifest is written"),
        ("pretrain.rank0", "SHA256SUMS", "pretrain", 2, "a checkpoint's SHA256SUMS is written"),
        ("pretrain.rank1", "*.sha256", "pretrain", 2, "rank 1 writes the hash of its file"),
        ("export.int4", "int4", "export", 1, "artifacts/int4 is renamed"),
    ):
        disturb = inject(process, target, "full", number=number)
        faults.append(Fault(f"ENOSPC once, while {moment}", step, NAMED, disturb))
    promise = "refused, nothing changed; writable again, the same command goes on"
    return [*faults, Fault("read-only output", "items", promise, places.make_read_only)]


def hang(trial: Trial) -> str:
    """SIGSTOP of a rank, which is taken for one that hangs after a quarter of a minute."""
    trial.options += ["--cluster.hang-minutes", "0.25"]
    code = trial.inject(Injection("pretrain.rank1", "*.sha256", "stop", number=2))
    if code != 0 or "Timeout (0:00:15)!" not in (trial.run / "logs/pretrain.rank0.log").read_text():
        raise Broken(f"exit {code}: {trial.read_log_end()}")
    return "noticed; went on by itself: exit 0"


def all_faults() -> list[Fault]:
    """Return all faults of the list, in the order they are tried."""
    return [
        *kills(), *driver_kills(), *full_disks(),
        Fault("SIGKILL while another kill is recovered from, twice", "pretrain", SAME, double_kill),
        Fault("SIGTERM of the driver", "pretrain", "training writes a checkpoint; exit 130; " + SAME, terminate),
        Fault("SIGSTOP of a rank", "pretrain", RESTARTED, hang),
        Fault(
            "a worker has no more memory", "pretrain", RESTARTED,
            inject("pretrain.rank1", "*.sha256", "memory", number=2),
        ),
        *places.damaged_checkpoints(), *places.damaged_caches(), *places.locks(), *places.clocks(), *STORE_FAULTS,
    ]  # fmt: skip
