"""`mobilemoe scaling-law`: print the law, run a sweep, fit the law to it, and solve it for a phone."""

import stat
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any

import tyro
from rich.console import Group
from rich.table import Table
from rich.text import Text

from core.atomic import write_json
from core.errors import RefusedInput
from pipelines.commands import inputs
from pipelines.commands.command import UsageShown, emit_result, parse_arguments, require_known
from pipelines.commands.scaling_sweep import Result, SweepArguments, sweep
from pipelines.scaling.sizes import parse_size


@dataclass(frozen=True)
class LawArguments:
    """Print the predicted loss over a grid, and the published findings as the law gives them."""

    law: Path | None = None
    """law.json of `scaling-law fit`; the published law if not given."""
    active: tuple[str, ...] = ("0.3B", "0.5B", "0.9B")
    """Active parameters."""
    tokens: tuple[str, ...] = ("100B", "250B", "500B", "6T")
    """Training tokens."""
    experts: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Numbers of coarse experts; 1 is a dense model."""
    figures: Path | None = None
    """Folder for the pictures: loss by experts, equal compute and memory, the best model by memory and compute."""
    json: bool = False
    """Print one JSON object on stdout."""


@dataclass(frozen=True)
class FitArguments:
    """Fit the law to the points of a sweep, and write law.json."""

    points: tyro.conf.Positional[tuple[Path, ...]]
    """CSV files, JSON lines, or run folders, with active, tokens, experts and loss."""
    out: Path = Path("law.json")
    """File to write; `scaling-law law` and `solve` read it with --law."""
    heldout: tuple[Path, ...] = ()
    """Points that the fit does not see; their error is reported."""
    granularity: int | None = None
    """Take only the points of this granularity and of --shared or --no-shared, with the dense ones."""
    shared: bool = True
    """Whether the points of --granularity have a shared expert."""
    starts: int = 2_000
    """Starts of the search."""
    draws: int = 200
    """Bootstrap samples, for the 95% intervals."""
    seed: int = 0
    """Seed of the bootstrap."""
    figures: Path | None = None
    """Folder for the pictures: the law with the points, and the residuals."""
    json: bool = False
    """Print one JSON object on stdout."""


@dataclass(frozen=True)
class SolveArguments:
    """Find the model of least predicted loss for a phone."""

    memory: str
    """Memory for weights and KV cache, for example 3GB."""
    context: int = 8192
    """Positions of the KV cache."""
    kv_bits: float = 8
    """Bits of a value in the KV cache."""
    weight_bits: float | None = None
    """Bits of a weight; if not given, the exact size of the INT4 folder that `export` writes (about 4.5 bits)."""
    decode_flops: float = inf
    """Largest number of FLOPs a token in decoding, 2 x active parameters."""
    train_flops: float | None = None
    """FLOPs of the training, 6 x active parameters x tokens. Give this or --tokens."""
    tokens: str | None = None
    """Tokens of the training, for example 500B."""
    experts: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Numbers of coarse experts to choose from."""
    granularity: int = 8
    """Fine experts in a coarse one."""
    shared: bool = True
    """Whether half of a token's fine experts are one shared expert."""
    law: Path | None = None
    """law.json of `scaling-law fit`; the published law if not given."""
    write_recipe: Path | None = None
    """Python file to write; `mobilemoe run FILE` trains the model."""
    json: bool = False
    """Print one JSON object on stdout."""


@dataclass(frozen=True)
class ScalingLaw:
    """Print the on-device scaling law, run a sweep, fit the law to it, or solve it for a phone."""

    action: LawArguments | FitArguments | SolveArguments | SweepArguments


ACTIONS: dict[str, type] = {
    "law": LawArguments, "fit": FitArguments, "solve": SolveArguments, "sweep": SweepArguments,
}  # fmt: skip


def parse(words: Sequence[str]) -> ScalingLaw:
    """Parse the action and its options.

    Raises:
        RefusedInput: there is no such action.
        UsageShown: no action is named.
        SystemExit: a wrong option, or --help after the action.
    """
    if not words or words[0] in ("-h", "--help"):
        lines = [f"  {name:6} {(kind.__doc__ or '').splitlines()[0]}" for name, kind in ACTIONS.items()]
        usage = "usage: mobilemoe scaling-law ACTION ...  (mobilemoe scaling-law ACTION --help says more)"
        raise UsageShown("\n".join([usage, "", *lines]), asked=bool(words))
    name, *rest = words
    require_known("action of scaling-law", name, ACTIONS)
    return ScalingLaw(parse_arguments(ACTIONS[name], rest, f"scaling-law {name}"))


def run(arguments: ScalingLaw) -> None:
    """Do the action and print its result.

    Raises:
        RefusedInput: an option or a file cannot be used.
    """
    action = arguments.action
    if isinstance(action, LawArguments):
        result, format_result = show_law(action)
    elif isinstance(action, FitArguments):
        result, format_result = fit(action)
    elif isinstance(action, SweepArguments):
        result, format_result = sweep(action)
    else:
        result, format_result = solve(action)
    emit_result(action.json, result, format_result)


def show_law(arguments: LawArguments) -> Result:
    """Return the grid of losses and the findings."""
    from pipelines.scaling.findings import compute_findings, tabulate_losses

    law = _load_law(arguments.law)
    _require_experts(arguments.experts)
    if arguments.figures:
        inputs.require_output_folder("--figures", arguments.figures)
    sizes = [parse_size(text, "--active") for text in arguments.active]
    lengths = [parse_size(text, "--tokens") for text in arguments.tokens]
    rows = tabulate_losses(law, sizes, lengths, arguments.experts)
    findings = compute_findings() if arguments.law is None else []
    if arguments.figures:
        from pipelines.scaling.figures import draw_law

        draw_law(law, sizes, lengths, [], arguments.figures)
    result = {
        "coefficients": asdict(law.coefficients), "source": law.source, "rmse": law.rmse, "losses": rows,
        "findings": [asdict(finding) for finding in findings],
    }  # fmt: skip

    def format_result() -> Group:
        table = Table(title="predicted loss, nats a token", caption=law.source, caption_justify="left")
        for column in rows[0]:
            table.add_column(column, justify="right")
        for row in rows:
            outside = law.describe_extrapolation(row["active"], row["tokens"], law.experts.low)
            cells = [f"{value:.4f}" for name, value in row.items() if name.startswith("E=")]
            mark = "*" if outside else ""
            table.add_row(f"{row['active'] / 1e9:g}B", f"{row['tokens'] / 1e9:g}B{mark}", *cells)
        parts: list[Any] = [table, Text("* outside of the points behind the law: an extrapolation")]
        verdicts = {True: "follows", False: "does not follow", None: "not stated by the coefficients"}
        parts += [Text(f"\n{finding.claim}: {verdicts[finding.follows]}\n  {finding.evidence}") for finding in findings]
        return Group(*parts)

    return result, format_result


def fit(arguments: FitArguments) -> Result:
    """Fit the law, write law.json, and return the coefficients with their intervals and errors."""
    from pipelines.scaling.fit import fit_law
    from pipelines.scaling.points import list_rule_points, read_points, select_architecture

    for option, value, least in (("--starts", arguments.starts, 1), ("--draws", arguments.draws, 0)):
        if value < least:
            raise RefusedInput(f"{option} {value}: must be at least {least}")
    if arguments.figures:
        inputs.require_output_folder("--figures", arguments.figures)
    inputs.require_output_file("--out", arguments.out)
    for path in (*arguments.points, *arguments.heldout):
        mode = inputs.find_mode("points", path)
        require = inputs.require_folder if mode is not None and stat.S_ISDIR(mode) else inputs.require_file
        require("points", path)
    points, heldout = (list_rule_points(read_points(files)) for files in (arguments.points, arguments.heldout))
    if arguments.granularity is not None:
        points, heldout = (select_architecture(p, arguments.granularity, arguments.shared) for p in (points, heldout))
    found = fit_law(
        points, num_starts=arguments.starts, num_draws=arguments.draws, heldout=heldout, seed=arguments.seed
    )  # fmt: skip
    result = found.to_dict() | {"law": str(arguments.out)}
    if arguments.figures:
        from pipelines.scaling.figures import draw_fit

        draw_fit(found, arguments.figures)
    write_json(arguments.out, {"law": found.law.to_dict(), "fit": result, "residuals": found.residuals})

    def format_result() -> Group:
        table = Table(title=f"{found.form} law, {len(found.points)} points, RMSE {found.law.rmse:.4f} nats")
        for column in ("coefficient", "value", "95% interval"):
            table.add_column(column, justify="left" if column == "coefficient" else "right")
        for name, value in result["coefficients"].items():
            low, high = found.intervals.get(name, (float("nan"), float("nan")))
            table.add_row(name, f"{value:.4f}", f"{low:.4f} to {high:.4f}")
        errors = Table(title="error without a scale, RMSE of log loss")
        errors.add_column("left out")
        errors.add_column("error there", justify="right")
        for name, error in found.left_out.items():
            errors.add_row(name, f"{error:.4f}")
        lines = [f"law: {arguments.out}"]
        if found.diverged:
            lines.insert(
                0, f"{found.diverged} bootstrap samples gave infinite coefficients: the points hardly determine them"
            )
        return Group(table, errors, Text("\n".join(lines)))

    return result, format_result


def solve(arguments: SolveArguments) -> Result:
    """Solve the law for a phone; write the recipe where one is asked for."""
    from pipelines.scaling.recipe_file import write_recipe_file
    from pipelines.scaling.solve import Budget, describe_candidate
    from pipelines.scaling.solve import solve as solve_law

    law = _load_law(arguments.law)
    _require_experts(arguments.experts)
    if arguments.write_recipe:
        inputs.require_output_file("--write-recipe", arguments.write_recipe)
        if not arguments.shared:
            raise RefusedInput(
                "--no-shared --write-recipe: a run exports the released format, which has a shared expert in every "
                "layer; leave one of them out"
            )
    budget = Budget(
        memory=parse_size(arguments.memory, "--memory"),
        context=arguments.context,
        kv_bits=arguments.kv_bits,
        weight_bits=arguments.weight_bits,
        decode_flops=arguments.decode_flops,
        train_flops=arguments.train_flops,
        tokens=None if arguments.tokens is None else parse_size(arguments.tokens, "--tokens"),
    )
    solution = solve_law(
        law, budget, experts=arguments.experts, granularity=arguments.granularity, shared=arguments.shared
    )  # fmt: skip
    result = {
        "best": describe_candidate(solution.best, law),
        "interval": solution.interval,
        "binds": solution.binds,
        "by_experts": [describe_candidate(candidate, law) for candidate in solution.by_experts],
        "smaller_phone": None,
        "notes": solution.notes,
        "law": law.source,
    }
    if solution.smaller_phone:
        memory, smaller = solution.smaller_phone
        result["smaller_phone"] = {"phone_bytes": memory} | describe_candidate(smaller, law)
    if arguments.write_recipe:
        write_recipe_file(arguments.write_recipe, solution.best, law)
        result["recipe"] = str(arguments.write_recipe)
    return result, lambda: _format_solution(result)


def _format_solution(result: dict[str, Any]) -> Group:
    best, (low, high) = result["best"], result["interval"]
    table = Table(title="the best model for each number of experts", caption=result["law"], caption_justify="left")
    for column in ("E", "d_model", "layers", "experts", "active", "total", "tokens", "memory", "loss"):
        table.add_column(column, justify="right")
    for candidate in result["by_experts"]:
        dims = candidate["dimensions"]
        style = "bold" if candidate["experts"] == best["experts"] else ""
        table.add_row(
            str(candidate["experts"]), str(dims["d_model"]), str(dims["n_layers"]),
            f"{dims['n_experts']}+1" if dims["shared_hidden"] else str(dims["n_experts"]),
            f"{candidate['active'] / 1e6:,.0f}M", f"{candidate['total'] / 1e9:.2f}B",
            f"{candidate['tokens'] / 1e9:,.0f}B", f"{candidate['memory_bytes'] / 1e9:.2f} GB",
            f"{candidate['loss']:.4f}", style=style,
        )  # fmt: skip
    lines = [
        f"predicted loss {best['loss']:.4f} nats a token, 95% interval {low:.4f} to {high:.4f}",
        f"what binds: {', '.join(result['binds'])}",
    ]
    if result["smaller_phone"]:
        smaller = result["smaller_phone"]
        lines.append(
            f"with {smaller['phone_bytes'] / 1e9:g} GB, the next smaller phone: E = {smaller['experts']}, d_model "
            f"{smaller['dimensions']['d_model']}, {smaller['dimensions']['n_layers']} layers, loss "
            f"{smaller['loss']:.4f}, {smaller['loss'] - best['loss']:+.4f}"
        )
    lines += result["notes"]
    if "recipe" in result:
        lines.append(f"recipe: {result['recipe']}")
    return Group(table, Text("\n".join(lines)))


def _require_experts(experts: tuple[int, ...]) -> None:
    if not experts or min(experts) < 1:
        raise RefusedInput(f"--experts {experts}: give numbers of coarse experts, each at least 1; 1 is a dense model")


def _load_law(path: Path | None) -> Any:
    from pipelines.scaling.law import PUBLISHED, load_law

    if path is None:
        return PUBLISHED
    inputs.require_file("--law", path)
    return load_law(path)
