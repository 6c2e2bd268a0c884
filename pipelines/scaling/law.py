"""The on-device scaling law of arXiv 2605.27358: loss from active parameters, tokens and the number of experts.

    L(N, D, E) = A e^delta N^(alpha + gamma ln e) + B e^omega D^(beta + zeta ln e) + c        in nats a token

N are the active parameters and D the training tokens, both in BILLIONS. The public summaries of the paper state no
unit. Only with billions do the published coefficients give 2.2 to 2.5 nats and the published order of the numbers of
experts.

E is the number of coarse experts: experts of the full width 4 d_model, of which one is active. Fine granularity g
divides each of them into g, and a shared expert replaces some of them; neither changes active and total parameters. e,
the effective number of experts, saturates:

    1/e = 1 / (E - 1 + 1 / (1/E_start - 1/E_max)) + 1/E_max        e(1) = E_start = 1, e(infinity) = E_max = 32

All coefficients hold for one architecture x = (granularity, shared expert). Two forms with fewer coefficients are
special cases: a fixed architecture gives the joint MoE law (arXiv 2502.05172), whose coefficients are these nine, and a
fixed number of experts gives Chinchilla's five (arXiv 2203.15556).
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from core.errors import RefusedInput

E_START, E_MAX = 1.0, 32.0
"""Effective number of experts of a dense model, and the limit for ever more experts."""
BILLION = 1e9
Floats = NDArray[np.float64]


def effective_experts(experts: ArrayLike) -> Floats:
    """Return the effective number of experts e of E coarse experts; 1 is a dense model.

    Raises:
        RefusedInput: a number below 1.
    """
    count = np.asarray(experts, np.float64)
    if not (count >= 1).all():
        raise RefusedInput(f"experts = {experts!r}: a model has at least 1 coarse expert; 1 is a dense model")
    return 1 / (1 / (count - 1 + 1 / (1 / E_START - 1 / E_MAX)) + 1 / E_MAX)


def count_experts(effective: ArrayLike) -> Floats:
    """Return the number of coarse experts E of an effective number e: the inverse of `effective_experts`.

    Raises:
        RefusedInput: a number below 1, or not below E_MAX, which no number of experts reaches.
    """
    e = np.asarray(effective, np.float64)
    if not ((e >= E_START) & (e < E_MAX)).all():
        raise RefusedInput(f"effective experts = {effective!r}: lies from {E_START:g} up to, not including, {E_MAX:g}")
    return 1 / (1 / e - 1 / E_MAX) - 1 / (1 / E_START - 1 / E_MAX) + 1


@dataclass(frozen=True)
class ChinchillaCoefficients:
    """Coefficients of L = A N^alpha + B D^beta + c for one number of experts, N and D in billions."""

    A: float
    alpha: float
    B: float
    beta: float
    c: float

    def predict_loss(self, active: ArrayLike, tokens: ArrayLike) -> Floats:
        """Return the loss in nats a token of `active` parameters trained on `tokens` tokens (not billions)."""
        n, d = (np.asarray(value, np.float64) / BILLION for value in (active, tokens))
        return self.A * n**self.alpha + self.B * d**self.beta + self.c


@dataclass(frozen=True)
class Coefficients:
    """The nine coefficients of the law for one architecture, N and D in billions."""

    A: float
    delta: float
    alpha: float
    gamma: float
    B: float
    omega: float
    beta: float
    zeta: float
    c: float

    def predict_loss(self, active: ArrayLike, tokens: ArrayLike, experts: ArrayLike) -> Floats:
        """Return the loss in nats a token.

        Args:
            active: active parameters (not billions), embedding included.
            tokens: training tokens (not billions).
            experts: coarse experts E. The three arrays are broadcast against each other.
        """
        n, d = (np.asarray(value, np.float64) / BILLION for value in (active, tokens))
        e = effective_experts(experts)
        of_size = self.A * e**self.delta * n ** (self.alpha + self.gamma * np.log(e))
        of_data = self.B * e**self.omega * d ** (self.beta + self.zeta * np.log(e))
        return of_size + of_data + self.c

    def fix_experts(self, experts: float) -> ChinchillaCoefficients:
        """Return the Chinchilla form of the law at one number of coarse experts."""
        e = float(effective_experts(experts))
        return ChinchillaCoefficients(
            A=self.A * e**self.delta,
            alpha=self.alpha + self.gamma * np.log(e),
            B=self.B * e**self.omega,
            beta=self.beta + self.zeta * np.log(e),
            c=self.c,
        )


COEFFICIENT_NAMES = tuple(field.name for field in fields(Coefficients))


@dataclass(frozen=True)
class Range:
    """Smallest and largest value of one input among the points that a law was fitted to."""

    low: float
    high: float


@dataclass(frozen=True)
class Law:
    """A fitted law: coefficients, their origin, their error, and the range of the points behind them."""

    coefficients: Coefficients
    source: str
    rmse: float
    """Root mean square error of the fit, in nats a token or in log loss, as `source` states it."""
    active: Range
    """Active parameters of the points."""
    tokens: Range
    """Training tokens of the points."""
    experts: Range
    """Coarse experts of the points."""
    granularity: int | None
    """Granularity of the architecture, or None where the source does not state it."""
    shared_expert: bool | None
    vocab_size: int | None = None
    """Entries of the vocabulary of the points, or None where it is not known: losses a token depend on it."""
    draws: tuple[Coefficients, ...] = ()
    """Coefficients of the bootstrap's fits; empty where there are none, as for the published law."""

    def describe_extrapolation(self, active: float, tokens: float, experts: float) -> list[str]:
        """Return a sentence for every input that lies outside the range of the law's points."""
        notes = []
        for name, value, range_ in (
            ("active parameters", active, self.active), ("tokens", tokens, self.tokens),
            ("experts", experts, self.experts),
        ):  # fmt: skip
            if not range_.low * 0.999 <= value <= range_.high * 1.001:
                notes.append(
                    f"{name} {value:.4g} lie outside of the law's points ({range_.low:.4g} to {range_.high:.4g}): the "
                    "prediction is an extrapolation"
                )
        return notes

    def predict_interval(self, active: float, tokens: float, experts: float) -> tuple[float, float]:
        """Return the 95% interval of the predicted loss in nats a token.

        It covers the uncertainty of the coefficients (the bootstrap's draws) and the scatter of single runs (RMSE).
        The published law has no draws, so only its RMSE counts there.
        """
        loss = float(self.coefficients.predict_loss(active, tokens, experts))
        spread = 0.0
        if self.draws:
            drawn = [float(draw.predict_loss(active, tokens, experts)) for draw in self.draws]
            spread = float(np.std(drawn))
        half = 1.96 * float(np.hypot(spread, self.rmse))
        return loss - half, loss + half

    def to_dict(self) -> dict[str, Any]:
        """Return the law as nested dicts and lists, JSON-ready."""
        return asdict(self)


PUBLISHED = Law(
    coefficients=Coefficients(
        A=0.2388,
        delta=0.0906,
        alpha=-0.2833,
        gamma=0.0387,
        B=0.6019,
        omega=1.0593,
        beta=-0.3210,
        zeta=-0.3684,
        c=1.9730,
    ),
    source="arXiv 2605.27358, joint fit of the sweep over the number of experts; RMSE as printed there",
    rmse=0.0076,
    active=Range(0.3e9, 0.9e9),
    tokens=Range(100e9, 500e9),
    experts=Range(1, 32),
    granularity=None,
    shared_expert=None,
    vocab_size=128_256,
)
"""The published law. N_act and D are in billions: see the module's docstring."""


def load_law(path: Path) -> Law:
    """Read a law that `mobilemoe scaling-law fit` wrote.

    Raises:
        RefusedInput: the file is missing, is no JSON, or has other fields.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        fit = content["law"]
        return Law(
            coefficients=Coefficients(**fit["coefficients"]),
            source=fit["source"],
            rmse=fit["rmse"],
            active=Range(**fit["active"]),
            tokens=Range(**fit["tokens"]),
            experts=Range(**fit["experts"]),
            granularity=fit["granularity"],
            shared_expert=fit["shared_expert"],
            vocab_size=fit.get("vocab_size"),
            draws=tuple(Coefficients(**draw) for draw in fit["draws"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RefusedInput(
            f"--law {path}: not a law that `mobilemoe scaling-law fit` wrote ({error!r}); give its law.json"
        ) from error
