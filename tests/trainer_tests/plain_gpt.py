"""The model written a second time, straight from its equations, for tests to compare with.

One row at a time, one head at a time, softmax spelled out; weights come by name from a dictionary.
Nothing of trainer.model is used; layers are lists of numbers that the test writes down.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.trainer_tests.plain_attention import plain_attention
from trainer.config import ModelConfig

Weights = dict[str, Tensor]


@dataclass
class Row:
    """What the blocks of one row of tokens share."""

    x0: Tensor
    value_embed: Tensor | None
    first_value: list[Tensor] = field(default_factory=list)


def plain_logits(config: ModelConfig, w: Weights, tokens: Tensor) -> Tensor:
    """Softcapped logits of every row, [B, T, V], in the weights' dtype."""
    return torch.stack([_row_logits(config, w, row.tolist()) for row in tokens])


def plain_loss(config: ModelConfig, w: Weights, tokens: Tensor, targets: Tensor) -> Tensor:
    """Nats of each target, [B, T]."""
    logits = plain_logits(config, w, tokens)
    log_total = torch.log(torch.exp(logits).sum(-1))
    return log_total - logits.gather(-1, targets[..., None])[..., 0]


def _rms(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 2.0**-23)


def _sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def _row_logits(config: ModelConfig, w: Weights, tokens: list[int]) -> Tensor:
    x = _embed(config, w, tokens)
    value_embed = None
    if config.value_embed_dim:
        looked_up = torch.stack([w["value_embed.table.weight"][token] for token in tokens])
        value_embed = looked_up @ w["value_embed.proj.weight"].T * w["value_embed.scale"]
    row = Row(x, value_embed)
    run = _unet if config.num_loops == 1 else _loops
    if config.num_passes == 1:
        x = run(config, w, x, row)
    else:
        for place in range(config.num_passes):
            is_cut = config.passes_gradient == "last" and place
            x = _rms(run(config, w, x.detach() if is_cut else x, Row(row.x0, value_embed)))
    head = w["tok_emb.weight"] if config.tie_embeddings else w["head.weight"]
    head = head[: config.vocab_size]
    return config.logit_softcap * torch.tanh(_rms(x) @ head.T / config.logit_softcap)


def _embed(config: ModelConfig, w: Weights, tokens: list[int]) -> Tensor:
    alone = [
        t == 0 or (config.mask_documents and tokens[t] == config.bos_id) for t in range(len(tokens))
    ]
    x = [w["tok_emb.weight"][token] for token in tokens]
    if config.bigram_buckets:
        last = config.bigram_buckets - 1
        for t, token in enumerate(tokens):
            bucket = last if alone[t] else ((36313 * token) ^ (27191 * tokens[t - 1])) % last
            looked_up = w["bigram.table.weight"][bucket]
            if "bigram.proj.weight" in w:
                looked_up = w["bigram.proj.weight"] @ looked_up
            x[t] = x[t] + w["bigram.scale"] * looked_up
    if config.smear == "token":
        gate, scale = w["token_smear.gate"], w["token_smear.scale"]
        raw = list(x)
        for t in range(len(tokens)):
            if not alone[t]:
                x[t] = raw[t] + scale * _sigmoid(gate @ raw[t][: len(gate)]) * raw[t - 1]
    x = [_rms(value) for value in x]
    if config.smear == "channel":
        g = _sigmoid(w["channel_smear.gate"])
        normed = list(x)
        for t in range(len(tokens)):
            x[t] = (1 - g) * normed[t] + (0 if alone[t] else g * normed[t - 1])
    return torch.stack(x)


def _places(config: ModelConfig) -> list[int]:
    """Blocks in the order in which they are visited, written out as the loop that it is."""
    if config.recur_visits == 1:
        return list(range(config.num_layers))
    order, layer, left = [], 0, config.recur_visits - 1
    while layer < config.num_layers:
        order.append(layer)
        if layer == config.recur_last and left:
            left, layer = left - 1, config.recur_first
        else:
            layer += 1
    return order


def _unet(config: ModelConfig, w: Weights, x: Tensor, row: Row) -> Tensor:
    places = _places(config)
    half = len(places) // 2
    if config.recur_skips == "layers":
        return _unet_by_layer(config, w, x, row, places)
    num_skips = half if config.recur_skips == "all" else config.num_layers // 2
    weights, gates = _rows(w, "skip_weights"), _rows(w, "skip_gates")
    outputs: list[Tensor] = []
    lanes: list[Tensor] = []
    for place, layer in enumerate(places):
        step = place - half
        if 0 <= step < min(num_skips, half):
            skip = weights[step] * outputs[half - 1 - step]
            if config.gated_skips:
                g = _sigmoid(gates[step])
                x = g * x + (1 - g) * skip
            else:
                x = x + skip
        if config.parallel == "lanes" and layer >= config.parallel_start:
            lanes = _lanes(config, w, layer, x, lanes[1] if lanes else x, row)
            x = lanes[0]
        else:
            x = _visit(config, w, layer, places[:place], outputs, x, row)
        outputs.append(x)
    if lanes:
        share = {"mean": 0.5, "attention": 1.0, "mlp": 0.0}.get(config.parallel_merge)
        share = w["lane_merge.share"] if share is None else share
        x = share * lanes[0] + (1 - share) * lanes[1]
    if config.backout_layer >= 0:
        last_visit = max(i for i, layer in enumerate(places) if layer == config.backout_layer)
        x = x - w["backout"] * outputs[last_visit]
    return x


def _unet_by_layer(
    config: ModelConfig, w: Weights, x: Tensor, row: Row, places: list[int]
) -> Tensor:
    """Block half + s always takes the output of block half - 1 - s, however often it is visited."""
    half = config.num_layers // 2
    encoder: dict[int, Tensor] = {}
    for place, layer in enumerate(places):
        if half <= layer < 2 * half:
            x = x + w["skip_weights"][layer - half] * encoder[2 * half - 1 - layer]
        x = _visit(config, w, layer, places[:place], [], x, row)
        if layer < half:
            encoder[layer] = x
    return x


def _rows(w: Weights, name: str) -> list[Tensor]:
    """Those of the plain order, then those that only recurrence has."""
    more = [value for key, value in w.items() if key.startswith(f"recur_{name}.")]
    return [*w.get(name, ()), *more]


def _visit(
    config: ModelConfig,
    w: Weights,
    layer: int,
    earlier: list[int],
    outputs: list[Tensor],
    x: Tensor,
    row: Row,
) -> Tensor:
    """A first visit is the block itself; a repeat has matrices, an MLP and a blend of its own."""
    b, repeat = f"blocks.{layer}.", earlier.count(layer) - 1
    if repeat < 0:
        return _block(config, w, layer, b, x, row)
    r = f"{b}repeats.{repeat}."
    merged = dict(w)
    for name, value in w.items():
        part = name.removeprefix(b).removesuffix(".weight").split(".")[-1]
        if name.startswith(b) and "repeats" not in name and f"{r}lora.{part}.a" in w:
            merged[name] = value + (w[f"{r}lora.{part}.a"] @ w[f"{r}lora.{part}.b"]).T
        if f"{r}{name.removeprefix(b)}" in w:
            merged[name] = w[f"{r}{name.removeprefix(b)}"]
    y = _block(config, merged, layer, b, x, row)
    if config.recur_blend == "alpha":
        return x + w[f"{r}blend_factors"] * (y - x)
    if config.recur_blend == "ab":
        before = max(place for place, other in enumerate(earlier) if other == layer)
        factor_a, factor_b = w[f"{r}blend_factors"]
        return factor_a * y + factor_b * outputs[before]
    return y


def _lanes(
    config: ModelConfig, w: Weights, layer: int, lane0: Tensor, lane1: Tensor, row: Row
) -> list[Tensor]:
    b = f"blocks.{layer}."
    scale = 1 / math.sqrt(layer + 1) if config.ln_scale else 1.0
    read = w[b + "resid_mix"][0] * lane0 + w[b + "resid_mix"][1] * row.x0
    attended = w[b + "attn_scale"] * _attention(
        config, w, layer, b + "attn.", _rms(read) * scale, row
    )
    mixed = w[b + "mlp_scale"] * _mlp(config, w, b, _rms(lane1) * scale)
    if config.layer_scale:
        attended, mixed = w[b + "layer_scale"] * attended, w[b + "layer_scale"] * mixed
    keep, post = w[b + "lanes.resid"], w[b + "lanes.post"]
    return [
        keep[lane] * stream + post[0][lane] * attended + post[1][lane] * mixed
        for lane, stream in enumerate((lane0, lane1))
    ]


def _loops(config: ModelConfig, w: Weights, x: Tensor, row: Row) -> Tensor:
    """Each visit as an ordinary block whose matrices have the adapter's product added."""
    for loop in range(config.num_loops):
        for layer in range(config.num_layers):
            b, v = f"blocks.{layer}.", f"visits.{loop * config.num_layers + layer}."
            merged = {name.replace(v, b): value for name, value in w.items() if name.startswith(v)}
            merged[b + "attn.q_gain"] = merged[b + "q_gain"]
            for name, value in w.items():
                if name.startswith(b):
                    a = f"{v}lora.{name.split('.')[-2]}."
                    delta = (w[a + "a"] @ w[a + "b"]).T if a + "a" in w else 0
                    merged[name] = value + delta if name.endswith(".weight") else value
            x = _block(config, merged, layer, b, x, row)
    return x


def _block(config: ModelConfig, w: Weights, layer: int, b: str, x: Tensor, row: Row) -> Tensor:
    keep_attn, keep_mlp = w.get(b + "resid_lambdas", torch.ones(2, dtype=x.dtype))
    scale = 1 / math.sqrt(layer + 1) if config.ln_scale else 1.0
    both = w.get(b + "layer_scale", torch.ones((), dtype=x.dtype))
    if b + "resid_mix" in w:
        x = w[b + "resid_mix"][0] * x + w[b + "resid_mix"][1] * row.x0
    elif b + "keep_factor" in w:
        x = w[b + "keep_factor"] * x + w[b + "embed_factor"] * row.x0
    start = x
    one = torch.ones((), dtype=x.dtype)
    if b + "attn.q.weight" in w:
        attended = _attention(config, w, layer, b + "attn.", _rms(x) * scale, row)
        x = keep_attn * x + both * w.get(b + "attn_scale", one) * attended
    else:
        x = keep_attn * x
    is_joint = config.parallel == "joint" and layer >= config.parallel_start
    read = start if is_joint else x
    mixed = _mlp(config, w, b, _rms(read) * scale)
    return keep_mlp * x + both * w.get(b + "mlp_scale", one) * mixed


def _mlp(config: ModelConfig, w: Weights, b: str, h: Tensor) -> Tensor:
    hidden = h @ w[b + "mlp.up.weight"].T
    if config.mlp_kind == "swiglu":
        gate = h @ w[b + "mlp.swish.weight"].T
        return (gate * _sigmoid(gate) * hidden) @ w[b + "mlp.down.weight"].T
    hidden = torch.where(hidden > 0, hidden, config.leaky_slope * hidden) ** 2
    return hidden @ w[b + "mlp.down.weight"].T


def _attention(config: ModelConfig, w: Weights, layer: int, a: str, h: Tensor, row: Row) -> Tensor:
    width = config.head_dim

    def heads(name: str, number: int) -> list[Tensor]:
        values = h @ w[f"{a}{name}.weight"].T
        return [values[:, i * width : (i + 1) * width] for i in range(number)]

    q, k = heads("q", config.num_heads), heads("k", config.num_kv_heads)
    v = heads("v", config.num_kv_heads)
    is_mixed = layer in _iha_layers(config)
    if config.iha == "fused" and is_mixed:
        q, k, v = (
            [sum(w[f"{a}iha.{name}"][h, m] * part[m] for m in range(len(part))) for h in _of(part)]
            for name, part in (("q", q), ("k", k), ("v", v))
        )
    v = _values(config, w, a, v, row, is_first=layer == 0)
    if a + "value_proj.proj.weight" in w:
        gates, extra = w[a + "value_proj.gate.weight"], row.x0 @ w[a + "value_proj.proj.weight"].T
        for i, own in enumerate(v):
            g = 2 * _sigmoid(sum(gates[i, j] * h[:, j] for j in range(gates.size(1))))
            v[i] = own + g[:, None] * extra[:, i * width : (i + 1) * width]
    attend = _maps if config.diff_attention == "off" else _differences
    if config.iha == "interleaved" and is_mixed:
        attend = _interleaved
    out = attend(config, w, layer, a, q, k, v)
    if layer >= config.num_layers - config.xsa_last_n:
        per_group = config.num_heads // config.num_kv_heads
        for head, y in enumerate(out):
            own = v[head // per_group]
            along = (y * own).sum(-1, keepdim=True) / (own * own).sum(-1, keepdim=True)
            strength = torch.tanh(w[a + "xsa.strength"][head]) if a + "xsa.strength" in w else 1
            out[head] = y - strength * along * own
    if config.attn_gate != "off":
        out = _gated(config, w, a, h, out)
    if a + "iha.out" in w:
        mix = w[a + "iha.out"]
        out = [sum(mix[h, m] * out[h] for h in _of(out)) for m in _of(out)]
    return torch.cat(out, -1) @ w[a + "out.weight"].T


def _of(heads: list[Tensor]) -> range:
    return range(len(heads))


def _iha_layers(config: ModelConfig) -> list[int]:
    windowed = [i for i in range(config.num_layers) if _window(config, i) is not None]
    plain = [i for i in range(config.num_layers) if i not in windowed]
    everything = list(range(config.num_layers))
    named = {"all": everything, "odd": everything[1::2], "short": windowed, "long": plain}
    return named[config.iha_layers]


def _interleaved(
    config: ModelConfig,
    w: Weights,
    layer: int,
    a: str,
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
) -> list[Tensor]:
    """Pseudo-token by pseudo-token and head by head; each looks at a list of (t', p')."""
    num_tokens, num_pseudo, width = len(q[0]), config.iha_pseudo_heads, config.head_dim
    per_group = len(q) // len(k)
    gain, collapse = w[a + "q_gain"], w[a + "iha.collapse"]

    def mixed(name: str, heads: list[Tensor], head: int, t: int, p: int) -> Tensor:
        alpha = w[f"{a}iha.{name}"]
        return sum(alpha[m, head, p] * heads[m][t] for m in range(len(heads)))

    def placed(x: Tensor, t: int, p: int) -> Tensor:
        place = t * num_pseudo + p if config.iha_positions == "pseudo" else t
        return _turned(config, _rms(x), torch.tensor(float(place), dtype=x.dtype), config.rope_base)

    everyone = [(t, p) for t in range(num_tokens) for p in range(num_pseudo)]
    each: dict[tuple[int, int, int], Tensor] = {}
    for head in range(len(q)):
        group = head // per_group
        keys = {(t, p): placed(mixed("k", k, group, t, p), t, p) for t, p in everyone}
        values = {(t, p): mixed("v", v, group, t, p) for t, p in everyone}
        for t, p in everyone:
            query = gain[head] * placed(mixed("q", q, head, t, p), t, p)
            seen = [key for key in everyone if _sees(config, layer, t, p, *key)]
            scores = torch.stack([query @ keys[key] / math.sqrt(width) for key in seen])
            weights = torch.exp(scores) / torch.exp(scores).sum()
            each[head, t, p] = sum(x * values[key] for x, key in zip(weights, seen, strict=True))
    out = []
    for head in range(len(q)):
        tokens = []
        for t in range(num_tokens):
            total = torch.zeros(width, dtype=q[0].dtype)
            for other in range(len(q)):
                for p in range(num_pseudo):
                    if config.iha_collapse == "all":
                        total = total + collapse[head, other * num_pseudo + p] * each[other, t, p]
                    elif other == head:
                        total = total + collapse[head, p] * each[other, t, p]
            tokens.append(total)
        out.append(torch.stack(tokens))
    return out


def _sees(config: ModelConfig, layer: int, t: int, p: int, key_t: int, key_p: int) -> bool:
    num_pseudo, window = config.iha_pseudo_heads, _window(config, layer)
    if config.iha_mask == "causal":
        distance = (t - key_t) * num_pseudo + p - key_p
        factor = num_pseudo if config.iha_windows == "tokens" else 1 / num_pseudo
    else:
        distance = t - key_t
        factor = 1 if config.iha_windows == "tokens" else 1 / num_pseudo**2
    return distance >= 0 and (window is None or distance <= window * factor)


def _gated(config: ModelConfig, w: Weights, a: str, h: Tensor, out: list[Tensor]) -> list[Tensor]:
    gate, gated = w[a + "gate.weight"], []
    for head, y in enumerate(out):
        score = sum(gate[head, i] * h[:, i] for i in range(gate.size(1)))
        if config.attn_gate == "window":
            g = 2 * _sigmoid(score)
        elif config.attn_gate == "sparse":
            g = _sigmoid(config.attn_gate_scale * score)
        elif config.attn_gate == "biased":
            g = _sigmoid(score + w[a + "gate.bias"][head])
        else:
            g = _sigmoid(score)
        gated.append(g[:, None] * y)
    return gated


def _values(
    config: ModelConfig, w: Weights, a: str, v: list[Tensor], row: Row, is_first: bool
) -> list[Tensor]:
    if is_first:  # a repeat visit of layer 0 mixes nothing in either
        row.first_value = row.first_value or v
    elif config.value_residual == "half":
        v = [
            0.5 * own + 0.5 * first.detach() for own, first in zip(v, row.first_value, strict=True)
        ]
    elif config.value_residual == "gated":
        g = _sigmoid(w[a + "value_residual.gate"])
        v = [(1 - g) * own + g * first for own, first in zip(v, row.first_value, strict=True)]
    elif config.value_residual == "learned":
        l0, l1 = w[a + "value_residual.factors"]
        v = [l0 * first + l1 * own for own, first in zip(v, row.first_value, strict=True)]
    if a + "value_embed.scale" in w:
        assert row.value_embed is not None
        parts = row.value_embed.split(config.head_dim, dim=-1)
        v = [own + w[a + "value_embed.scale"] * part for own, part in zip(v, parts, strict=True)]
    return v


def _window(config: ModelConfig, layer: int) -> int | None:
    if config.window_layers == "SSL":  # tiled over five layers: S S L S, then L as the last
        return config.window if layer in (0, 1, 3) else None
    layers = {"": [], "even": range(0, 99, 2), "odd": range(1, 99, 2), "1,3": [1, 3]}
    return config.window if layer in layers[config.window_layers] else None


def _attend(config: ModelConfig, layer: int, *heads: list[Tensor]) -> list[Tensor]:
    q, k, v = (torch.stack(part, 1)[None] for part in heads)
    return list(plain_attention(q, k, v, window=_window(config, layer))[0].unbind(1))


def _maps(
    config: ModelConfig,
    w: Weights,
    layer: int,
    a: str,
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
) -> list[Tensor]:
    gain = w.get(a + "q_gain", [1.0] * config.num_heads)
    q = [gain[i] * _rotary(config, _rms(head)) for i, head in enumerate(q)]
    k = [_rotary(config, _rms(head)) for head in k]
    if config.key_offset_layers and str(layer) in config.key_offset_layers.split(","):
        half = config.head_dim // 2
        for head in k:
            late = head[:, half:].clone()
            head[1:, half:] = late[:-1]
    return _attend(config, layer, q, k, v)


def _differences(
    config: ModelConfig,
    w: Weights,
    layer: int,
    a: str,
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
) -> list[Tensor]:
    start = 0.8 - 0.6 * math.exp(-0.3 * layer)
    weight = (
        torch.exp(w[a + "lambda_q1"] @ w[a + "lambda_k1"])
        - torch.exp(w[a + "lambda_q2"] @ w[a + "lambda_k2"])
        + start
    )
    half = config.head_dim // 2
    whole = config.diff_attention == "full"
    maps = []
    for part in (slice(None, half), slice(half, None)):
        values = v if whole else [head[:, part] for head in v]
        halves = ([head[:, part] for head in q], [head[:, part] for head in k])
        maps.append(_maps(config, w, layer, a, *halves, values))
    if whole:
        out = [first - weight * second for first, second in zip(*maps, strict=True)]
    else:
        out = [
            torch.cat((first, -weight * second), -1) for first, second in zip(*maps, strict=True)
        ]
    return [_rms(head) * (1 - start) for head in out]


def _rotary(config: ModelConfig, x: Tensor) -> Tensor:
    """Pair (i, i + R/2) as a complex number, turned by position * base^(-2i/R); R dims turn."""
    turned_dims = config.rope_dims or x.size(-1)
    base = config.rope_base
    if config.rope_ntk_len and len(x) > config.rope_ntk_len:
        base *= (len(x) / config.rope_ntk_len) ** (turned_dims / (turned_dims - 2))
    return _turned(config, x, torch.arange(len(x), dtype=x.dtype)[:, None], base)


def _turned(config: ModelConfig, x: Tensor, place: Tensor, base: float) -> Tensor:
    turned_dims = config.rope_dims or x.size(-1)
    half = turned_dims // 2
    pairs = torch.complex(x[..., :half], x[..., half:turned_dims])
    frequency = base ** (-2 * torch.arange(half, dtype=x.dtype) / turned_dims)
    if config.half_rope:
        frequency = base ** (-4 * torch.arange(half, dtype=x.dtype) / turned_dims)
        frequency[half // 2 :] = 0
    turned = pairs * torch.exp(-1j * place * frequency)
    return torch.cat((turned.real, turned.imag, x[..., turned_dims:]), -1)
