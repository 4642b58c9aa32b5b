"""Where each tensor of a FluxFlow 0.8 flow processor and text encoder lives in `FluxFlow08Flow` and `FluxFlow08Text`.

Ours are fused where theirs stand side by side (the pillars, query and key-value), and apart where only a part has an
effect (keys of an attention to one token) or is the same for all samples (the weights of the coordinates).
d width, k pillar.
"""

from itertools import chain

from fluxflow_train.interop.keys08 import Entry, layer, points, under
from fluxflow_train.models.fluxflow08_flow import NUM_PILLARS, PILLAR_DEPTH, FluxFlow08Flow

PLAIN = {
    "vae_to_dmodel": "embed",
    "dmodel_to_vae": "head.out",
    "ctx_mixer.norm_in": "mixer.norm_in",
    "ctx_mixer.norm_out": "mixer.norm_out",
    "ctx_mixer.q_proj": "mixer.query",
    "ctx_mixer.out_proj": "mixer.out",
    "time_embed.1": "time_embed.1",
    "time_embed.3": "time_embed.3",
    "text_proj": "text_token",
    "text_cond_proj": "film_cond",
    "context_injection.gate.0": "context_gate",
    "context_injection.bias": "context_bias",
    "flow_predictor.0": "head.conv1",
    "flow_predictor.2": "head.conv2",
}
PLAIN_IN_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "norm3": "norm3",
    "norm_pillar": "pillar_norm",
    "ffn.0": "feed_forward",
    "self_attn.out_proj": "attention.out",
}


def rows(theirs: str, ours: str, start: int, length: int) -> list[Entry]:
    """A layer of theirs that is `length` rows of one of ours."""
    return [entry._replace(at=(slice(start, start + length),)) for entry in layer(theirs, ours)]


def one_token_attention(theirs: str, ours: str, d: int) -> list[Entry]:
    """Their key-value layer is two of ours."""
    halves = [
        entry._replace(span=(0, start, d))
        for start, name in ((0, "key"), (d, "value"))
        for entry in layer(f"{theirs}.kv_proj", f"{ours}.{name}")
    ]
    return [*layer(f"{theirs}.q_proj", f"{ours}.query"), *halves, *layer(f"{theirs}.out_proj", f"{ours}.out")]


def pillar(k: int, d: int) -> list[Entry]:
    entries = rows(f"film_p{k}", "film", 2 * d * k, 2 * d)
    for j in range(PILLAR_DEPTH):
        entries.append(Entry(f"p{k}.{j}.0.weight", f"pillars.weights.{j}", at=(k,)))
        entries.append(Entry(f"p{k}.{j}.0.bias", f"pillars.biases.{j}", at=(k,)))
    return entries


def block_entries(d: int) -> list[Entry]:
    plain = chain.from_iterable(layer(theirs, ours) for theirs, ours in PLAIN_IN_BLOCK.items())
    return [
        *plain,
        *rows("self_attn.q_proj", "attention.qkv", 0, d),
        *rows("self_attn.kv_proj", "attention.qkv", d, 2 * d),
        *one_token_attention("cross_attn", "text_attention", d),
        *one_token_attention("pillar_cross_attn", "pillar_text_attention", d),
        *chain.from_iterable(pillar(k, d) for k in range(NUM_PILLARS)),
    ]


def flow_entries(flow: FluxFlow08Flow) -> list[Entry]:
    d = flow.width
    entries = list(chain.from_iterable(layer(theirs, ours) for theirs, ours in PLAIN.items()))
    entries += [Entry("ctx_mixer.cls", "mixer.cls"), Entry("time_embed.0.weight", "time_embed.0.weight")]
    entries += rows("ctx_mixer.k_proj", "mixer.key_value", 0, d) + rows("ctx_mixer.v_proj", "mixer.key_value", d, d)
    entries += points("time_embed.2", "time_embed.2")
    entries += points("flow_predictor.1", "head.curve1", trailing=2)
    entries += points("context_final.1", "head.context_curve", trailing=2)
    entries += [
        Entry("context_final.0.weight", "head.context_conv.weight", span=(1, 0, d)),
        Entry("context_final.0.weight", "head.coordinate_conv.weight", span=(1, d, 2)),
        Entry("context_final.0.bias", "head.context_conv.bias"),
    ]
    for i in range(len(flow.blocks)):
        theirs = f"transformer_blocks.{i}."
        entries += under(theirs, f"blocks.{i}.", block_entries(d))
        entries.append(Entry(f"{theirs}rotary_pe.inv_freq", "inv_freq"))  # a copy in every block of theirs
    return entries


def projection_entries() -> list[Entry]:
    """The trained part of the text encoder; the published name has this spelling."""
    layers = (layer(f"ouput_layer.{i}", f"{i}", planar_dim=0) for i in (0, 1, 3, 4))
    return list(chain.from_iterable(layers))
