"""Whole converted heads (one KV group each) in PyTorch, f64: inputs, weights, output, and gradients for a random cotangent.

Follows the module documentation of crates/model/src/mixers/mod.rs line by line. Tensors are named `<case>.x`,
`<case>.head.<tensor>`, `<case>.base.<tensor>`, `<case>.out`, `<case>.cot` and `<case>.grad.(x|head.<t>|base.<t>)`."""

from pathlib import Path

import torch
import torch.nn.functional as F

import goldens_recurrences as rec
from goldens_common import generator, save_json, save_tensors

T, M, G, D, K = 33, 18, 3, 6, 4  # tokens, d_model, query heads, head_dim, conv taps
MAMBA_STATE = 5
L2_EPS, NORM_EPS, THETA = 1e-6, 1e-5, 100.0
# name: (recurrent, window, sinks, biases and q/k norms in the base, dropped tokens weighed)
CASES = {
    "mamba": ("mamba", 0, 0, False),
    "mamba_local": ("mamba", 7, 2, False),
    "mamba2": ("mamba2", 0, 0, False),
    "mamba2_local": ("mamba2", 7, 1, False),
    "mamba2_local_bias_norm": ("mamba2", 5, 2, True),
    "gated_delta": ("gated-delta", 0, 0, True),
    "gated_delta_local": ("gated-delta", 7, 1, False),
    "local": ("none", 7, 1, True),
    "gated_delta_weighed": ("gated-delta", 5, 2, True, True),
}


class Group:
    """Tensors of one case, drawn on first use so that only what the mixer reads is recorded."""

    def __init__(self, seed: int, biased: bool):
        self.gen, self.biased, self.tensors = generator(seed), biased, {}

    def get(self, name: str, *shape: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
        if name not in self.tensors:
            value = shift + scale * torch.randn(shape, generator=self.gen)
            self.tensors[name] = value.double().requires_grad_()
        return self.tensors[name]

    def qkv(self, owner: str, x):
        """q [T, G, D], k [T, 1, D], v [T, 1, D] from the projections of `owner` ("head" or "base")."""
        out = []
        for letter, heads in (("q", G), ("k", 1), ("v", 1)):
            y = x @ self.get(f"{owner}.{letter}_proj.weight", heads * D, M, scale=1.3 / M ** 0.5).T
            if self.biased:
                y = y + self.get(f"{owner}.{letter}_proj.bias", heads * D, scale=0.5)
            out.append(y.view(-1, heads, D))
        return out


def local(group: Group, owner: str, x, window: int, sinks: int):
    q, k, v = group.qkv(owner, x)
    if group.biased:
        q = rec.rms_norm(q, group.get("base.q_norm", D, scale=0.3, shift=1.0), NORM_EPS)
        k = rec.rms_norm(k, group.get("base.k_norm", D, scale=0.3, shift=1.0), NORM_EPS)
    frequencies = rec.inv_freq(D, THETA)
    out, lse = rec.attention(rec.rope(q, frequencies), rec.rope(k, frequencies), v,
                             rec.local_mask(x.shape[0], window, sinks), D ** -0.5)
    return out.reshape(-1, G * D), lse


def keep(group: Group, x, lse, window: int, sinks: int):
    """The window's share of the whole softmax, [T, G · D]: 1 while it drops no token."""
    dropped = (torch.arange(1, x.shape[0] + 1) - window - sinks).clamp(min=0).double()[:, None]
    far = (x @ group.get("head.far_proj.weight", G, M, scale=M ** -0.5).T + group.get("head.far_proj.bias", G)
           + group.get("head.far_count", G, scale=0.3, shift=0.5) * dropped.clamp(min=1).log())
    share = torch.where(dropped > 0, torch.sigmoid(lse - far), torch.ones(()).double())
    return share.repeat_interleave(D, dim=1)


def conv_qkv(group: Group, x):
    """The recurrent branch's q [T, G, D], k [T, D], v [T, D]: short conv on each, q and k unit length."""
    q, k, v = (t.reshape(t.shape[0], -1) for t in group.qkv("head", x))
    q = rec.short_conv(q, group.get("head.q_conv.weight", G * D, K, scale=0.5))
    k = rec.short_conv(k, group.get("head.k_conv.weight", D, K, scale=0.5))
    v = rec.short_conv(v, group.get("head.v_conv.weight", D, K, scale=0.5))
    return rec.l2_norm(q.view(-1, G, D), L2_EPS), rec.l2_norm(k, L2_EPS), v


def gate_and_gain(group: Group, x, y):
    gate = 2 * torch.sigmoid(x @ group.get("head.gate_proj.weight", G * D, M, scale=M ** -0.5).T)
    return group.get("head.out_gain", G * D, scale=0.5, shift=1.0) * y.reshape(-1, G * D) * gate


def mamba2(group: Group, x):
    q, k, v = conv_qkv(group, x)
    dt = F.softplus(x @ group.get("head.dt_proj.weight", G, M, scale=M ** -0.5).T
                    + group.get("head.dt_proj.bias", G, shift=-1.5))
    scale = (x @ group.get("head.in_scale.weight", G, M, scale=0.5 * M ** -0.5).T
             + group.get("head.in_scale.bias", G, scale=0.3)).clamp(max=30.0).exp()
    y, _ = rec.ssd(q, k, v, -dt, dt * scale, group.get("head.d_skip", G), x.new_zeros(G, D, D))
    return gate_and_gain(group, x, y)


def gated_delta(group: Group, x):
    q, k, v = conv_qkv(group, x)
    log_a = -F.softplus(x @ group.get("head.dt_proj.weight", 1, M, scale=M ** -0.5).T
                        + group.get("head.dt_proj.bias", 1, shift=-2.0))
    beta = torch.sigmoid(x @ group.get("head.beta_proj.weight", 1, M, scale=M ** -0.5).T
                         + group.get("head.beta_proj.bias", 1))
    y, _ = rec.gated_delta(q, k, v, log_a[:, 0], beta[:, 0], x.new_zeros(D, D))
    return gate_and_gain(group, x, y)


def mamba(group: Group, x):
    inner, n, rank = G * D, MAMBA_STATE, -(-M // 16)
    u, z = (x @ group.get("head.in_proj.weight", 2 * inner, M, scale=M ** -0.5).T).split(inner, -1)
    u = F.silu(rec.short_conv(u, group.get("head.conv.weight", inner, K, scale=0.5),
                              group.get("head.conv.bias", inner, scale=0.3)))
    low, b, c = (u @ group.get("head.x_proj.weight", rank + 2 * n, inner, scale=inner ** -0.5).T).split([rank, n, n], -1)
    delta = F.softplus(low @ group.get("head.dt_proj.weight", inner, rank, scale=rank ** -0.5).T
                       + group.get("head.dt_proj.bias", inner, shift=-1.0))
    a = -group.get("head.A_log", inner, n, scale=0.5).exp()
    y, _ = rec.selective_scan(u, delta, a, b, c, group.get("head.D", inner), x.new_zeros(inner, n))
    return y * F.silu(z)


def make(root: Path) -> None:
    out, described = {}, {}
    for index, (case, (recurrent, window, sinks, biased, *weighed)) in enumerate(CASES.items()):
        group = Group(400 + index, biased)
        x = group.get("x", T, M)
        branches = {"mamba": mamba, "mamba2": mamba2, "gated-delta": gated_delta}
        y = branches[recurrent](group, x) if recurrent in branches else 0.0
        if window:
            owner = "head" if recurrent in ("mamba2", "gated-delta") else "base"
            attended, lse = local(group, owner, x, window, sinks)
            if weighed:
                share = keep(group, x, lse, window, sinks)
                y = share * attended + (1 - share) * y
            else:
                y = y + attended
        cotangent = torch.randn(y.shape, generator=group.gen).double()
        gradients = torch.autograd.grad((y * cotangent).sum(), list(group.tensors.values()))
        out.update({f"{case}.out": y, f"{case}.cot": cotangent})
        for (name, value), gradient in zip(group.tensors.items(), gradients):
            out[f"{case}.{name}"], out[f"{case}.grad.{name}"] = value, gradient
        d_state = {"mamba": MAMBA_STATE, "none": 0}.get(recurrent, D)
        described[case] = {"spec": {"recurrent": recurrent, "window": window, "sinks": sinks, "d_state": d_state,
                                    "d_conv": 0 if recurrent == "none" else K,
                                    **({"dropped": "weighed"} if weighed else {})},
                           "dims": {"d_model": M, "q_heads": G, "head_dim": D, "biased": biased},
                           "rope_theta": THETA, "norm_eps": NORM_EPS}
    data = root / "crates/model/tests/data"
    save_tensors(data / "mixers.safetensors", out)
    save_json(data / "mixers.json", described)
