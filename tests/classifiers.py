"""Tiny random models with heads, and adapters that PEFT makes for them, with heads of their own."""

from collections.abc import Callable, Mapping

import peft
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    DebertaV2Config,
    LlamaConfig,
    ModernBertConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    RobertaConfig,
)

SIZES = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": 0, "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES: Mapping[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES, num_key_value_heads=2),
    "qwen2": lambda: Qwen2Config(**SIZES, num_key_value_heads=2),
    "bert": lambda: BertConfig(**SIZES),
    "roberta": lambda: RobertaConfig(**SIZES, type_vocab_size=1),
    "modernbert": lambda: ModernBertConfig(**SIZES, cls_token_id=1, sep_token_id=2),
    "deberta": lambda: DebertaV2Config(**SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "deberta_v3": lambda: DebertaV2Config(
        **SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True, position_buckets=8,
        norm_rel_ebd="layer_norm", type_vocab_size=0,
    ),
}  # fmt: skip
SHARED = ("deberta_v3",)
"""Their queries and keys are computed once for all rows too: of the relative positions."""
TARGETS = {
    "llama": ["q_proj", "v_proj", "up_proj"],
    "qwen2": ["q_proj", "v_proj", "up_proj"],
    "bert": ["query", "value", "intermediate.dense"],
    "roberta": ["query", "value", "intermediate.dense"],
    "modernbert": ["Wqkv", "Wo"],
    "deberta": ["query_proj", "value_proj", "intermediate.dense"],
    "deberta_v3": ["query_proj", "value_proj", "intermediate.dense"],
}
OTHERS = {
    "deberta": ["pooler", "classifier"],
    "deberta_v3": ["pooler", "classifier"],
    "modernbert": ["head", "classifier"],
}
"""What these classifiers have besides the body; PEFT's default is the last layer alone."""
CLASSES = {
    "classify": (AutoModelForSequenceClassification, peft.TaskType.SEQ_CLS),
    "tokens": (AutoModelForTokenClassification, peft.TaskType.TOKEN_CLS),
    "embed": (AutoModel, peft.TaskType.FEATURE_EXTRACTION),
}


def make(family: str, task: str, labels: int, seed: int) -> PreTrainedModel:
    """A classifier whose body is the same for every seed; its head is not."""
    config = FAMILIES[family]()
    config.num_labels = labels
    torch.manual_seed(0)
    model = CLASSES[task][0].from_config(config, dtype=torch.float32).eval()
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if task != "embed" and not name.startswith(f"{model.base_model_prefix}."):
            parameter.data.normal_()
    return model


def wrapped(family: str, task: str, labels: int, seed: int) -> peft.PeftModel:
    """The classifier with an adapter of PEFT's, and its head trained."""
    torch.manual_seed(seed)
    heads = None if task == "embed" else OTHERS.get(family)
    config = peft.LoraConfig(task_type=CLASSES[task][1], r=4, target_modules=TARGETS[family], modules_to_save=heads)
    model = peft.get_peft_model(make(family, task, labels, seed), config).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3 if "lora" in name else 1.0)
    return model
