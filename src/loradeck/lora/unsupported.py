"""PEFT's settings that LoraConfig does not have: what each would change, and what to do about it.

The facts are from PEFT 0.21's source.
"""

from collections.abc import Callable
from typing import Any

ORIGIN = frozenset({"base_model_name_or_path", "revision", "task_type"})
# Settings of training, or PEFT's bookkeeping: the output of the trained tensors does not depend on them.
WITHOUT_EFFECT = frozenset({
    "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "loftq_config", "lora_ga_config", "megatron_core", "merge_weights", "peft_type",
    "peft_version", "qalora_group_size", "runtime_config",
})  # fmt: skip
# Settings that replace weights of the base by tensors of the file: it counts whether there are any.
IN_TENSORS = frozenset({"bias"})

INIT, CHANGED = "init_lora_weights", "was initialised from the base's weights and changed them"
BASE_CHANGED = ("pissa", "olora", "corda", "loftq", "lora_ga")
RETRAIN = "Train it again without this setting, or merge it into its base with PEFT and use that model."
CONVERT = "`loradeck convert` makes it a plain LoRA, from the weights of its base or from its first values."
ANY_BASE = {
    "python": "If you know that this one is compatible, pass any_base=True.",
    "cli": "If you know that this one is compatible: `loradeck generate`, `chat` and `merge` take --any-base.",
}
REFUSED: dict[str, tuple[Callable[[Any], bool], str, str]] = {
    "use_dora": (bool, "is DoRA, whose magnitudes rescale the base", RETRAIN),
    "bias": (lambda v: bool(v) and v != "none", "trains biases of the base itself", RETRAIN),
    "enable_lora": (bool, "adapts parts of merged projections, as PEFT before 0.3 did", RETRAIN),
    "lora_bias": (bool, "adds a bias to B", RETRAIN),
    "trainable_token_indices": (bool, "replaces rows of the embedding", RETRAIN),
    "target_parameters": (bool, "adapts bare parameters (MoE experts), not modules", RETRAIN),
    "layer_replication": (bool, "repeats layers of the base", RETRAIN),
    "megatron_config": (bool, "is for Megatron's parallel layers", RETRAIN),
    "alora_invocation_tokens": (bool, "is an activated LoRA, active only after certain tokens", RETRAIN),
    "use_qalora": (bool, "is QALoRA, whose A takes pooled inputs", RETRAIN),
    "use_bdlora": (bool, "is a block-diagonal LoRA", RETRAIN),
    "arrow_config": (bool, "routes between adapters by itself", RETRAIN),
    "kasa_config": (bool, "is KaSA, which changes the base by a truncated SVD", RETRAIN),
    "velora_config": (bool, "is VeLoRA, which saves tensors of its training too", RETRAIN),
    "monteclora_config": (bool, "is MonteCLoRA, which samples its tensors", RETRAIN),
    INIT: (
        lambda v: isinstance(v, str) and v.lower().startswith(BASE_CHANGED),
        CHANGED,
        CONVERT,
    ),
}


def may_change_results(key: str) -> bool:
    """Whether an unknown key of an adapter_config.json may be a switch, or a method's settings, of a later PEFT."""
    return key.startswith("use_") or (key.endswith("_config") and not key.startswith("_"))
