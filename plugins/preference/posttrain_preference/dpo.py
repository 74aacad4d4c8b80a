"""Direct preference optimisation (arXiv:2305.18290), stacked on the SFT artifact."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from posttrain import Interrupted, StageContext
from posttrain_preference.pairs import TokenPairs, render_pairs
from posttrain_preference.quiet import quiet

if TYPE_CHECKING:
    from posttrain_preference.trainer import PairTrainer


def run(context: StageContext) -> None:
    """Train the parent's adapter, or its full weights, towards the chosen answers.

    Continues from the newest checkpoint in ``context.checkpoints``. Raises BadInput when no pair can be trained on,
    ArtifactDamaged when the reference is not the SFT model, Interrupted when the run was asked to stop.
    """
    with quiet():
        pairs = render_pairs(context)
        policy = context.policy()
        configs = [(holder, name, copy.deepcopy(value)) for holder, name, value in _configs(policy)]
        trainer = _train(context, pairs, policy)
        if trainer.ref_model is None:
            policy.delete_adapter("ref")
        for holder, name, value in configs:  # TRL adapts them to training; the artifact keeps the parent's
            setattr(holder, name, value)
        context.metrics.update(_metrics(pairs, trainer))
        context.save(policy)


def _train(context: StageContext, pairs: TokenPairs, policy: Any) -> PairTrainer:
    from posttrain_preference import checkpoint
    from posttrain_preference.reference import answer_log_probs, prove_reference
    from posttrain_preference.trainer import build_trainer, uses_autocast

    first = pairs.rows[: context.config.per_device_batch_size]
    expected = answer_log_probs(policy, first, uses_autocast(context, policy))
    trainer = build_trainer(context, pairs, policy, _reference(context, policy))
    if trainer.ref_model is None:
        freeze_reference(policy)
    prove_reference(trainer, first, expected, context.dtype)
    resumed = checkpoint.newest(context.checkpoints, context.progress.note)
    trainer.train(resume_from_checkpoint=resumed and str(resumed))
    if trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(f"{context.name} was stopped after step {trainer.state.global_step}; its checkpoint is kept")
    return trainer


def _reference(context: StageContext, policy: Any) -> Any | None:
    """The parent once more when full weights are trained; None when an adapter is."""
    from peft import PeftModel

    return None if isinstance(policy, PeftModel) else context.policy().requires_grad_(False).eval()


def freeze_reference(policy: Any) -> None:
    """Make the adapter ``ref`` equal ``default`` in every tensor and number format; TRL's own copy leaves some out."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    for name, parameter in policy.named_parameters():
        if ".default" in name:
            copied = policy.get_parameter(name.replace(".default", ".ref"))
            copied.data = copied.data.to(parameter.dtype)
    tensors = get_peft_model_state_dict(policy, adapter_name="default", save_embedding_layers=False)
    set_peft_model_state_dict(policy, tensors, adapter_name="ref")


def _configs(policy: Any) -> list[tuple[Any, str, Any]]:
    model = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    return [(model, name, getattr(model, name)) for name in ("config", "generation_config")]


def _metrics(pairs: TokenPairs, trainer: PairTrainer) -> dict[str, Any]:
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    return {
        "pairs": len(pairs.rows),
        "dropped": pairs.dropped,
        "steps": trainer.state.global_step,
        "final_loss": last["loss"],
        "rewards_margin": last["rewards/margins"],
        "tokens": int(last["num_tokens"]),
    }
