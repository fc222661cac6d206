"""Asks mlx-lm, in a Python of its own: stdin {base, adapter, ids} -> stdout, the logits of each row.

`adapter` is a folder of mlx-lm, or empty. {base, save, parameters} makes a random one, as mlx-lm's training saves it.
Needs mlx-lm and nothing else.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load_model, save_config


def main() -> None:
    asked = json.load(sys.stdin)
    mx.set_default_device(mx.cpu)
    model, _ = load_model(Path(asked["base"]))
    if "save" in asked:
        save(model, Path(asked["save"]), asked)
    elif asked["adapter"]:
        load_adapters(model, asked["adapter"])
    model.eval()
    json.dump([model(mx.array([row]))[0].tolist() for row in asked["ids"]], sys.stdout)


def save(model, folder: Path, asked: dict) -> None:
    """Make an adapter, and save it as mlx_lm.lora does."""
    mx.random.seed(7)
    model.freeze()
    linear_to_lora_layers(model, asked["num_layers"], asked["lora_parameters"])
    tensors = {name: 0.2 * mx.random.normal(value.shape) for name, value in tree_flatten(model.trainable_parameters())}
    model.load_weights(list(tensors.items()), strict=False)
    folder.mkdir()
    table = {"fine_tune_type": "lora", "model": asked["base"], "seed": 0, "train": True, "data": "data"}
    save_config(
        {**table, **{key: asked[key] for key in ("num_layers", "lora_parameters")}}, folder / "adapter_config.json"
    )
    mx.save_safetensors(str(folder / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))


if __name__ == "__main__":
    main()
