import torch
from loradeck.native.table import *


def describe(hf):
    c = hf.config
    D = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    from loradeck.ops.layer_kinds import dense_weight

    def lin(path):
        m = hf.get_submodule(path)
        return Linear(path, dense_weight(m), 0, m.out_features, m.bias)

    def layer(i):
        p = f"model.layers.{i}."
        L = {s: lin(p + ("self_attn." if s in "qkvo" else "mlp.") + s + "_proj") for s in SLOTS}
        w = lambda n: hf.get_submodule(p + n).weight.float()
        return Layer(L, w("input_layernorm"), None, w("post_attention_layernorm"), None, None, None, 0, None)

    def rot(n):
        ang = torch.arange(n).double()[:, None] * (
            c.rope_parameters["rope_theta"] ** (-torch.arange(0, D, 2).double() / D)
        )
        return ang.cos().float(), ang.sin().float()

    if c.model_type != "llama":
        raise ValueError("no llama")
    return Table(
        c.hidden_size,
        c.num_attention_heads,
        c.num_key_value_heads,
        D,
        c.intermediate_size,
        c.vocab_size,
        c.rms_norm_eps,
        tuple(layer(i) for i in range(c.num_hidden_layers)),
        hf.model.embed_tokens.weight,
        None,
        1.0,
        hf.model.norm.weight.float(),
        lin("lm_head"),
        (rot,),
        "silu",
        D**-0.5,
        None,
        1.0,
        1.0,
        None,
    )
