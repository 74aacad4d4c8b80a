"""The field's recipe as rules: every departure is named with the reason, and never changed.

Pure: settings and facts about data and model, such as the number of examples, go in; sentences come out. Unknown facts
are not judged: a plan applies the rules it can, and the start of a stage applies the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.advice import Advice, Rule
from posttrain.config.schema import Method

if TYPE_CHECKING:
    from posttrain.sft.config import SFTConfig

EPOCHS = ((50_000, 1), (10_000, 3), (1_000, 5), (0, 15))
"""Least number of examples, and the most epochs usual from there on."""
TINY = 1_000
"""Examples of a data set too big to be learned by heart easily."""
BIG = 1_000_000_000
"""Parameters of a model big enough to recompute activations."""
LONG = 8_192
"""Tokens of a forward pass long enough for the same."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """Facts beside the settings; None is unknown."""

    examples: int | None = None
    """Records trained in one epoch."""
    passes: float | None = None
    """Trained epochs, with ``max_steps`` taken into account."""
    documents_per_step: float | None = None
    """Documents in an optimizer step, of all rows and forward passes together."""
    truncated: float | None = None
    """Share of the records longer than a row, and cut."""
    refusals: float | None = None
    """Share of the records with a refusal as their answer."""
    overlap: int | None = None
    """Eval records in the training data."""
    parameters: int | None = None
    """Parameters of the model."""
    positions: int | None = None
    """Longest document the model was made for, in tokens."""


def usual_epochs(examples: int) -> int:
    """Return the most epochs usual for so many examples."""
    return next(epochs for least, epochs in EPOCHS if examples >= least)


def _adapter_rate(config: SFTConfig, known: Known) -> str | None:
    return None if config.method is Method.full else _outside(config.lr, 1e-4, 5e-4)


def _full_rate(config: SFTConfig, known: Known) -> str | None:
    return _outside(config.lr, 1e-6, 5e-5) if config.method is Method.full else None


def _weight_decay(config: SFTConfig, known: Known) -> str | None:
    return _outside(config.weight_decay, 0.0, 0.1)


def _warmup(config: SFTConfig, known: Known) -> str | None:
    return _outside(config.warmup_ratio, 0.01, 0.1)


def _floor(config: SFTConfig, known: Known) -> str | None:
    return _outside(config.min_lr_ratio, 0.0, 0.1)


def _passes(config: SFTConfig, known: Known) -> float:
    """Return the trained epochs, as far as known; ``max_steps`` may end within the first."""
    if known.passes is not None:
        return known.passes
    return 1 if config.max_steps else config.epochs


def _epochs(config: SFTConfig, known: Known) -> str | None:
    passes = _passes(config, known)
    if known.examples is None or passes <= usual_epochs(known.examples):
        return None
    return f"{passes:g} for {known.examples:,} examples"


def _eval_loss(config: SFTConfig, known: Known) -> str | None:
    if config.eval_share or config.eval_data is not None or _passes(config, known) <= 1:
        return None
    return f"no eval records in {_passes(config, known):g} epochs"


def _overlap(config: SFTConfig, known: Known) -> str | None:
    return f"{known.overlap:,} eval records are trained as well" if known.overlap else None


def _noise(config: SFTConfig, known: Known) -> str | None:
    return _outside(config.neftune_alpha, 5, 15) if config.neftune_alpha else None


def _no_noise(config: SFTConfig, known: Known) -> str | None:
    if config.neftune_alpha or known.examples is None or known.examples >= TINY or _passes(config, known) <= 1:
        return None
    return f"none for {known.examples:,} examples seen {_passes(config, known):g} times"


def _checkpointing(config: SFTConfig, known: Known) -> str | None:
    if config.gradient_checkpointing:
        return None
    if known.parameters is not None and known.parameters >= BIG:
        return f"off for {known.parameters / 1e9:.1f} billion parameters"
    tokens = config.sequence_length * config.per_device_batch_size
    return f"off for {tokens:,} tokens in a forward pass" if tokens >= LONG else None


def _batch(config: SFTConfig, known: Known) -> str | None:
    documents = known.documents_per_step
    if documents is None and not config.packing:
        documents = config.per_device_batch_size * config.gradient_accumulation
    if documents is None or 32 <= documents <= 256:
        return None
    return f"an optimizer step sees {documents:.0f} documents"


def _positions(config: SFTConfig, known: Known) -> str | None:
    if known.positions is None or config.sequence_length <= known.positions:
        return None
    return f"{config.sequence_length:,} tokens for a model of {known.positions:,}"


def _truncated(config: SFTConfig, known: Known) -> str | None:
    return f"{known.truncated:.1%} of the records are cut" if (known.truncated or 0) > 0.01 else None


def _rank(config: SFTConfig, known: Known) -> str | None:
    return None if config.method is Method.full else _outside(config.lora.r, 8, 256)


def _alpha(config: SFTConfig, known: Known) -> str | None:
    if config.method is Method.full or config.lora.r <= config.lora.alpha <= 2 * config.lora.r:
        return None
    return f"{config.lora.alpha} at rank {config.lora.r}"


def _dropout(config: SFTConfig, known: Known) -> str | None:
    return None if config.method is Method.full else _outside(config.lora.dropout, 0.0, 0.1)


def _targets(config: SFTConfig, known: Known) -> str | None:
    targets = config.lora.target_modules
    return None if config.method is Method.full or isinstance(targets, str) else f"{len(targets)} modules"


def _packing(config: SFTConfig, known: Known) -> str | None:
    return None if config.packing else "off"


def _refusals(config: SFTConfig, known: Known) -> str | None:
    return f"{known.refusals:.0%} of the answers are refusals" if (known.refusals or 0) > 0.1 else None


def _outside(value: float | None, low: float, high: float) -> str | None:
    return None if value is None or low <= value <= high else f"{value:g}"


ADVICE: Advice[SFTConfig, Known] = Advice(
    (
        Rule(
            "lr",
            "1e-4 to 5e-4 for an adapter",
            "adapters learn best at about ten times the rate of all weights (arXiv:2106.09685, LoRA Without Regret)",
            _adapter_rate,
        ),
        Rule(
            "lr",
            "1e-6 to 5e-5 for all weights",
            "higher rates overwrite what the base knows, and lower ones hardly move it in a few epochs",
            _full_rate,
        ),
        Rule(
            "epochs",
            "at most 1 from 50,000 examples on, 3 from 10,000, 5 from 1,000, 15 below",
            "large sets are learned in one pass, and after the first one the eval loss tends to rise",
            _epochs,
        ),
        Rule(
            "eval_share",
            "0.01 to 0.1, or eval_data, for more than one epoch",
            "overfitting after the first epoch shows in the eval loss alone",
            _eval_loss,
        ),
        Rule("eval_data", "records that are not in data", "the loss of what is trained falls in any case", _overlap),
        Rule(
            "gradient_accumulation",
            "32 to 256 documents in an optimizer step",
            "smaller steps follow the noise of single documents, and larger ones leave too few of them",
            _batch,
        ),
        Rule(
            "warmup_ratio",
            "0.01 to 0.1",
            "Adam's averages are noise in the first steps, and a longer warm-up leaves little at the peak",
            _warmup,
        ),
        Rule(
            "min_lr_ratio",
            "0 to 0.1",
            "a high rate at the end leaves the noise of the last steps in the weights",
            _floor,
        ),
        Rule(
            "weight_decay",
            "0 to 0.1",
            "stronger decay pulls weights away from the base rather than to the data",
            _weight_decay,
        ),
        Rule(
            "sequence_length",
            "at most the length the model was made for",
            "it has seen no position beyond, and computes those badly",
            _positions,
        ),
        Rule(
            "sequence_length",
            "long enough for 99 of 100 records",
            "a cut answer has no end and no stop token to learn",
            _truncated,
        ),
        Rule(
            "packing",
            "on",
            "a row of one short document uses little of the device; packed documents do not see each other",
            _packing,
        ),
        Rule(
            "gradient_checkpointing",
            "on from 1 billion parameters or 8,192 tokens in a forward pass on",
            "kept activations then take more memory than the weights",
            _checkpointing,
        ),
        Rule(
            "neftune_alpha",
            "5 to 15, or null",
            "the paper chooses among these values (arXiv:2310.05914)",
            _noise,
        ),
        Rule(
            "neftune_alpha",
            "5 for fewer than 1,000 examples seen more than once",
            "noise on the embeddings keeps few records from being learned by heart (arXiv:2310.05914)",
            _no_noise,
        ),
        Rule("lora.r", "8 to 256", "less holds too little of the data, and more costs memory without a gain", _rank),
        Rule("lora.alpha", "r to 2 r", "it multiplies the update, so that it acts like another learning rate", _alpha),
        Rule("lora.dropout", "0 to 0.1", "more slows learning down within the few epochs of fine-tuning", _dropout),
        Rule(
            "lora.target_modules",
            "all-linear",
            "adapters on attention alone learn less, at the same number of parameters too (LoRA Without Regret)",
            _targets,
        ),
        Rule(
            "data",
            "at most a tenth of refusals",
            "a model that sees more of them learns to decline what it could answer",
            _refusals,
        ),
    )
)
"""All rules, as docs/advice.md shows them."""
