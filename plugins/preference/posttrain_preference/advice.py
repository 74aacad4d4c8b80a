"""The field's practice with preferences as rules: every departure is named with the reason, and never changed.

Settings and facts about the rows go in, sentences come out. Unknown facts are not judged: a plan applies the rules it
can, and the start of a stage applies all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from posttrain import Advice, Rule

if TYPE_CHECKING:
    from posttrain_preference.config import PreferenceSettings
    from posttrain_preference.rows import TokenRows

RATES = {True: (5e-7, 5e-5), False: (5e-8, 5e-6)}
"""Usual learning rates against a reference, of adapters (True) and of all weights; without a reference, four times."""
STEPS = 20
"""Fewest optimizer steps of a schedule with a warm-up."""
SURE = 3.0
"""Standard errors from one half at which a share of pairs is no accident."""
UNEVEN = 1.25
"""Ratio of mean lengths from which on one kind of answer is called longer."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """Facts beside the settings; None is unknown."""

    adapter: bool | None = None
    """True when an adapter is trained, False for all weights."""
    rows: int | None = None
    """Pairs or judged answers trained in one epoch."""
    dropped: int = 0
    """Those longer than the sequence length."""
    repeated: int = 0
    """Rows equal to an earlier one."""
    contradicted: int = 0
    """Rows that judge answers the other way round than an earlier one."""
    overlap: int = 0
    """Eval rows that are trained as well."""
    longer: float = 0.5
    """Share of the pairs whose chosen answer is the longer one; a half where neither is."""
    lengths: tuple[float, float] = (0.0, 0.0)
    """Mean tokens of chosen and of rejected answers."""

    @classmethod
    def of(cls, rows: TokenRows[Any], *, adapter: bool) -> Known:
        """Return the facts about rendered rows."""
        own = rows.own
        seen: set[Any] = set()
        repeated = contradicted = 0
        for row in own:
            repeated += row.judgement in seen
            contradicted += row.opposite in seen
            seen.add(row.judgement)
        pairs = [(len(row.chosen), len(row.rejected)) for row in own if hasattr(row, "rejected")]
        apart = [chosen > rejected for chosen, rejected in pairs if chosen != rejected]
        return cls(
            adapter=adapter,
            rows=len(own),
            dropped=rows.dropped,
            repeated=repeated,
            contradicted=contradicted,
            overlap=sum(row.judgement in seen for row in rows.eval_rows),
            longer=sum(apart) / len(apart) if apart else 0.5,
            lengths=(_mean([chosen for chosen, _ in pairs]), _mean([rejected for _, rejected in pairs])),
        )


def _rate(config: PreferenceSettings, known: Known) -> str | None:
    if known.adapter is None:
        return None
    low, high = (rate * (1 if config.referenced else 4) for rate in RATES[known.adapter])
    return None if low <= config.lr <= high else f"{config.lr:g} for {'an adapter' if known.adapter else 'all weights'}"


def _beta(config: PreferenceSettings, known: Known) -> str | None:
    return f"{config.beta:g}" if config.referenced and not 0.01 <= config.beta <= 0.5 else None


def _passes(config: PreferenceSettings, known: Known) -> float:
    """Return the trained epochs; ``max_steps`` may end within the first."""
    if config.max_steps is None or known.rows is None:
        return 1 if config.max_steps else config.epochs
    per_step = config.per_device_batch_size * config.gradient_accumulation
    return min(config.epochs, config.max_steps / -(-known.rows // per_step))


def _epochs(config: PreferenceSettings, known: Known) -> str | None:
    passes = _passes(config, known)
    return f"{passes:g}" if passes > 3 else None


def _eval_loss(config: PreferenceSettings, known: Known) -> str | None:
    passes = _passes(config, known)
    measured = config.eval_share or config.eval_data is not None
    return None if measured or passes <= 1 else f"no eval records in {passes:g} epochs"


def _steps(config: PreferenceSettings, known: Known) -> str | None:
    if known.rows is None:
        return None
    steps = config.epochs * -(-known.rows // (config.per_device_batch_size * config.gradient_accumulation))
    steps = min(steps, config.max_steps or steps)
    return f"{steps} optimizer steps for {known.rows:,} rows" if steps < STEPS else None


def _batch(config: PreferenceSettings, known: Known) -> str | None:
    rows = config.per_device_batch_size * config.gradient_accumulation
    return None if 8 <= rows <= 256 else f"an optimizer step sees {rows} rows"


def _dropped(config: PreferenceSettings, known: Known) -> str | None:
    share = known.dropped / max(1, known.dropped + (known.rows or 0))
    return f"{known.dropped:,} rows ({share:.1%}) are longer and dropped" if share > 0.01 else None


def _repeated(config: PreferenceSettings, known: Known) -> str | None:
    share = known.repeated / max(1, known.rows or 0)
    return f"{known.repeated:,} rows ({share:.1%}) are the same as an earlier one" if share > 0.01 else None


def _contradicted(config: PreferenceSettings, known: Known) -> str | None:
    return f"{known.contradicted:,} rows judge the other way round" if known.contradicted else None


def _overlap(config: PreferenceSettings, known: Known) -> str | None:
    return f"{known.overlap:,} eval rows are trained as well" if known.overlap else None


def _length(config: PreferenceSettings, known: Known) -> str | None:
    chosen, rejected = known.lengths
    if config.per_token or not known.rows or not chosen or max(chosen / rejected, rejected / chosen) < UNEVEN:
        return None
    if abs(known.longer - 0.5) <= SURE * 0.5 / known.rows**0.5:
        return None
    means = f"{chosen:.0f} tokens on average against {rejected:.0f}"
    return f"chosen answers have {means}, and are longer in {known.longer:.0%} of the pairs"


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values) if values else 0.0


ADVICE: Advice[PreferenceSettings, Known] = Advice(
    (
        Rule(
            "lr",
            "5e-7 to 5e-5 for an adapter and a tenth of it for all weights, four times as much without a reference",
            "higher rates drive both answers' likelihoods down, and lower ones hardly move the policy in one pass",
            _rate,
        ),
        Rule(
            "beta",
            "0.01 to 0.5 against a reference",
            "less lets the policy run away from it, and more holds it where it was (arXiv:2305.18290)",
            _beta,
        ),
        Rule("epochs", "1 to 3", "rewards of pairs seen more often grow without the model getting better", _epochs),
        Rule(
            "eval_share",
            "0.01 to 0.1, or eval_data, for more than one epoch",
            "overfitting after the first epoch shows in the eval loss alone",
            _eval_loss,
        ),
        Rule("eval_data", "records that are not in data", "the loss of what is trained falls in any case", _overlap),
        Rule(
            "gradient_accumulation",
            f"at least {STEPS} optimizer steps",
            "the rate of fewer is warm-up and decay: lower it, or train more epochs",
            _steps,
        ),
        Rule(
            "gradient_accumulation",
            "8 to 256 rows in an optimizer step",
            "smaller steps follow the noise of single judgements, and larger ones leave too few of them",
            _batch,
        ),
        Rule(
            "sequence_length",
            "long enough for 99 of 100 rows",
            "what is dropped are the long ones, and the policy learns from short answers alone",
            _dropped,
        ),
        Rule("data", "each judgement once", "repeated rows weigh more than the others: remove them", _repeated),
        Rule(
            "data", "one judgement of two answers", "such rows take back what others teach: remove them", _contradicted
        ),
        Rule(
            "data",
            "chosen and rejected answers of about equal length",
            "a loss of summed log-probabilities learns the length (arXiv:2403.19159): even it out, or take simpo or "
            "loss_type=[sigmoid_norm], which count per token",
            _length,
        ),
    )
)
"""All rules, as the README of this plugin shows them."""
