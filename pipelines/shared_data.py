"""A finished data set that several runs share: at a path, or at an address such as s3://bucket/data.

A run takes over its manifest, its tokenizer, its held-out shards and the indexes of the training shards, each checked
against the hashes of the manifest. The training shards stay where they are: beside each index a file says where
(`core.samples.SHARDS_AT`), and the loader fetches and checks them from there.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from core.errors import DamagedData, RefusedInput
from core.inside import Folder, check_names
from core.progress import Progress
from core.samples import SHARDS_AT
from core.shard_columns import COLUMNS_FILE, build_columns
from data.config import RUNTIME_FIELDS, DataConfig
from data.tokens.tokenizer_files import hash_tokenizer_files
from data.tokens.verify_shards import MANIFEST, PAGE, list_destinations
from pipelines.engine.fingerprints import flatten
from pipelines.engine.manifest import Manifest

DATA_ADDRESS = "data_address"
"""Key of a run's manifest: the address of the data set that it takes over."""
MAX_MANIFEST_BYTES = 1 << 30
"""Largest manifest of a data set; at the published size it has a few megabytes."""
SENDING_THREADS = 16
"""Number of shards that are sent at once: a store answers each only after some time."""


@dataclass(frozen=True)
class SharedData:
    """A data set at an address, and the content of its manifest when it was opened."""

    address: str
    """Folder of the manifest: an absolute path, or an address."""
    content: bytes
    """The manifest, JSON."""

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Return the manifest as an object."""
        return json.loads(self.content)


def open_shared_data(address: str) -> SharedData:
    """Find the manifest of a data set at a run folder, at its folder `data`, or at an address that it was sent to.

    Raises:
        RefusedInput: there is no finished data set, or the address cannot be read.
    """
    from pipelines.commands.receive import read_small_file
    from pipelines.commands.transfer import find_local_path, locate, open_address

    system, root = open_address(address)
    shown = root if find_local_path(address) is not None else address.rstrip("/")
    for below in ("", "/data"):
        try:
            content = read_small_file(system, locate(system, f"{root}{below}", MANIFEST), MAX_MANIFEST_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except Exception as error:  # each file system has exception types of its own
            raise RefusedInput(
                f"--data {address}: cannot be read ({type(error).__name__}: {error}); check the address and the access"
            ) from error
        try:
            shared = SharedData(f"{shown}{below}", content)
            missing = {"plan", "tokenizer", "shards", "heldout"} - shared.manifest.keys()
        except (UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
            raise RefusedInput(f"--data {address}: its {MANIFEST} is damaged ({error}); send it again") from error
        if missing or "files" not in shared.manifest["tokenizer"]:
            raise RefusedInput(
                f"--data {address}: its {MANIFEST} is of an older version of this program; make the data anew with "
                "`mobilemoe data`"
            )
        return shared
    raise RefusedInput(
        f"--data {address}: no {MANIFEST} there, nor in its folder data: no data set, or an unfinished one; make it "
        "with `mobilemoe data RECIPE --out ADDRESS`"
    )


def choose_shared_data(address: str | None, config: DataConfig, run: Path) -> SharedData | None:
    """Open the data set that a run takes over, and check that it is what its recipe asks for.

    Args:
        address: None stands for the address of the run's last call, if it had one.
        run: run folder, which need not exist.

    Raises:
        RefusedInput: the data set is not, or is the run's own.
    """
    address = Manifest(run).content.get(DATA_ADDRESS) if address is None else address
    if address is None:
        return None
    shared = open_shared_data(address)
    if Path(shared.address) == run / "data":
        raise RefusedInput(f"--data {address}: is this run's own data, which it takes anyway; leave the option away")
    check_config(shared, config)
    return shared


def check_config(shared: SharedData, config: DataConfig) -> None:
    """Check that a data set is what a recipe asks for. A tokenizer is known by its files and not by its path.

    Raises:
        RefusedInput: options of the recipe's data differ; names each with both values.
    """
    made = flatten(shared.manifest["plan"]["config"])
    fields = {name: value for name, value in asdict(config).items() if name not in RUNTIME_FIELDS}
    wanted = flatten(json.loads(json.dumps(fields)))
    differing = [
        f"data.{name} is {made.get(name)!r} there, {wanted.get(name)!r} here"
        for name in sorted(made.keys() | wanted.keys())
        if made.get(name) != wanted.get(name) and name != "tokenizer.path"
    ]
    files = hash_tokenizer_files(config.tokenizer.path) if config.tokenizer.path else {}
    if files != shared.manifest["plan"]["tokenizer_sha256"]:
        differing.append("data.tokenizer.path: other files")
    if differing:
        listed = "\n".join(f"  - {line}" for line in differing)
        raise RefusedInput(
            f"--data {shared.address}: made with other options than the recipe's; give the recipe these, or make the "
            f"data anew with `mobilemoe data`:\n{listed}"
        )


def find_uncovered(shared: SharedData, benchmarks: list[str]) -> list[str]:
    """Return the benchmarks whose items the data set was not searched for."""
    covered = shared.manifest["decontamination"]["benchmarks"]
    return [name for name in benchmarks if name not in covered]


def receive_data(shared: SharedData, folder: Path, progress: Progress) -> None:
    """Write to `folder` what a run needs of a shared data set. An interrupted call leaves what it has received.

    Raises:
        DamagedData: a file has another hash than the manifest states, or is missing.
    """
    from pipelines.commands.receive import receive_file
    from pipelines.commands.transfer import locate, open_address

    system, root = open_address(shared.address)
    hashes = {f"tokenizer/{name}": sha256 for name, sha256 in shared.manifest["tokenizer"]["files"].items()}
    targets = [(f"{target}/index.json", entry["index_sha256"]) for target, entry in list_destinations(shared.manifest)]
    check_names([*hashes, *(index for index, _ in targets)], f"{shared.address}/{MANIFEST}")
    folder.mkdir(parents=True, exist_ok=True)
    with Folder(folder) as inside:

        def receive(name: str, expected: str | None, list_name: str = MANIFEST) -> None:
            receive_file(system, locate(system, root, name), inside, name, expected, list_name)

        for name, expected in hashes.items():
            receive(name, expected)
        for done, (index, expected) in enumerate(targets):
            target = index.removesuffix("/index.json")
            progress(target, done, len(targets))
            receive(index, expected)
            content = inside.read(index)
            if not (folder / target / COLUMNS_FILE).exists():
                inside.write(f"{target}/{COLUMNS_FILE}", build_columns(content, expected, shared.address))
            if target.startswith("shards/"):
                inside.write(f"{target}/{SHARDS_AT}", f"{shared.address}/{target}\n".encode())
                continue
            shards = json.loads(content)["shards"]
            names = [f"{target}/{shard['zip_data']['basename']}" for shard in shards]
            check_names(names, f"{shared.address}/{index}")
            for name, shard in zip(names, shards, strict=True):
                receive(name, shard["zip_data"]["hashes"]["sha256"], index)
        receive(PAGE, None)
        inside.write(MANIFEST, shared.content)
        inside.require_in_place()
    progress("received", len(targets), len(targets))


def send_data(folder: Path, address: str, progress: Progress) -> None:
    """Send a finished data set to an address. What is there already is not sent again; the manifest comes last.

    Objects appear whole in a store, and their names hold a hash of their content, so that a shard of the same size
    there is the same. A reader checks its hash all the same.

    Raises:
        DamagedData: a shard is missing here.
        RefusedInput: the address cannot be written to, or the data set states a name that is not a plain one.
    """
    from pipelines.commands.transfer import locate, open_destination, open_for_writing

    system, root = open_for_writing(address)
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    shards: list[str] = []
    others = [f"tokenizer/{name}" for name in manifest["tokenizer"]["files"]]
    for target, _ in list_destinations(manifest):
        index = json.loads((folder / target / "index.json").read_text(encoding="utf-8"))
        shards += [f"{target}/{shard['zip_data']['basename']}" for shard in index["shards"]]
        others.append(f"{target}/index.json")
    check_names([*shards, *others], str(folder))
    total = len(shards) + len(others) + 2
    with open_destination(address, system, root) as send, ThreadPoolExecutor(SENDING_THREADS) as pool:

        def send_shard(name: str) -> str:
            path, remote = _require_file(folder / name), locate(system, root, name)
            if not system.exists(remote) or system.info(remote)["size"] != path.stat().st_size:
                send(path, name)
            return name

        for done, name in enumerate(pool.map(send_shard, shards), 1):
            progress(name, done, total)
        for done, name in enumerate([*others, PAGE, MANIFEST], len(shards) + 1):
            send(_require_file(folder / name), name)
            progress(name, done, total)


def _require_file(path: Path) -> Path:
    if not path.is_file():
        raise DamagedData(f"{path} is missing: run the data step again")
    return path
