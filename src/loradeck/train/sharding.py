"""A base that does not fit into one process: its layers divided over a group of them (FSDP2)."""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from loradeck.base.frozen import Layout
from loradeck.errors import ConfigError
from loradeck.train.group import Group


def shard_layers(model: PreTrainedModel, group: Group) -> None:
    """Let each process hold its share of every layer's weights; a layer is whole only while it computes.

    The embeddings, the last norm and the head stay whole. Every process must compute the same layers at the same time:
    the same number of batches, whatever they hold.

    Raises:
        ConfigError: the group is a process alone, or the model has no list of layers, or its weights are packed or
            quantised.
    """
    if group.size == 1:
        raise ConfigError(
            "a base is sharded over several processes, and this one is alone",
            cli="Start them: torchrun --nproc-per-node 2 -m -- loradeck train …",
        )
    count = model.config.get_text_config().num_hidden_layers
    layers = next((each for each in model.modules() if isinstance(each, nn.ModuleList) and len(each) == count), None)
    if layers is None:
        raise ConfigError(f"{type(model).__name__} has no list of its {count} layers, so it cannot be sharded")
    if any(
        isinstance(each, Layout) or each.__class__.__module__.startswith("bitsandbytes") for each in layers.modules()
    ):
        raise ConfigError(
            "packed and quantised weights cannot be sharded",
            hint="Load plain weights in a dtype.",
            cli="Give --weights plain --dtype bfloat16.",
        )
    device = group.device or torch.device("cpu")
    mesh = init_device_mesh(device.type, (group.size,))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    model.to(device)  # type: ignore[arg-type]
