"""The recurrences and attention rules of the project, written token by token in PyTorch: the definitions that goldens of
kernels and of whole mixers share. Shapes: T tokens, G query heads, D head_dim, N d_state, P value width."""

import torch


def ssd(q, k, v, log_a, b, d_skip, state):
    """S_t = a_t S_{t-1} + b_t k_t v_t', y_t = S_t' q_t + d v_t. q [T, G, N], k [T, N], v [T, P], log_a and b [T, G],
    d_skip [G], state [G, N, P] -> y [T, G, P], final state (arXiv 2405.21060)."""
    rows = []
    for t in range(q.shape[0]):
        write = torch.einsum("g,n,p->gnp", b[t], k[t], v[t])
        state = log_a[t].exp()[:, None, None] * state + write
        rows.append(torch.einsum("gn,gnp->gp", q[t], state) + d_skip[:, None] * v[t])
    return torch.stack(rows), state


def gated_delta(q, k, v, log_a, beta, state):
    """S_t = a_t S_{t-1} + beta_t k_t (v_t - a_t S_{t-1}' k_t)', y_t = S_t' q_t. q [T, G, N], k [T, N], v [T, P], log_a and
    beta [T], state [N, P] -> y [T, G, P], final state (arXiv 2412.06464)."""
    rows = []
    for t in range(q.shape[0]):
        decayed = log_a[t].exp() * state
        state = decayed + beta[t] * torch.outer(k[t], v[t] - decayed.T @ k[t])
        rows.append(q[t] @ state)
    return torch.stack(rows), state


def selective_scan(u, delta, a, b, c, d, state):
    """h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t, y_t = C_t h_t + D u_t. u and delta [T, I], a [I, N], b and c [T, N],
    d [I], state [I, N] -> y [T, I], final state (arXiv 2312.00752, algorithm 2)."""
    rows = []
    for t in range(u.shape[0]):
        write = (delta[t] * u[t])[:, None] * b[t]
        state = (delta[t][:, None] * a).exp() * state + write
        rows.append(state @ c[t] + d * u[t])
    return torch.stack(rows), state


def short_conv(x, weight, bias=None, tail=None):
    """out[t, c] = sum_i weight[c, i] x[t - (K-1) + i, c] + bias[c]; x [T, C], weight [C, K], tail [K-1, C] (zeros when None)."""
    taps = weight.shape[1]
    if tail is None:
        tail = x.new_zeros(taps - 1, x.shape[1])
    padded = torch.cat([tail, x])
    out = sum(padded[i:i + x.shape[0]] * weight[:, i] for i in range(taps))
    return out if bias is None else out + bias


def local_mask(tokens, window, sinks):
    """[T, T], true where query i sees key j: j <= i and (i - j < window or j < sinks)."""
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)[None, :]
    return (j <= i) & ((i - j < window) | (j < sinks))


def attention(q, k, v, mask, scale):
    """Softmax attention with grouped queries. q [T, H, D], k and v [T, KV, D], mask [T, T] -> out [T, H, D], lse [T, H]."""
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = (scale * torch.einsum("ihd,jhd->hij", q, k)).masked_fill(~mask, -torch.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v), scores.logsumexp(-1).T


def inv_freq(head_dim, theta):
    return theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)


def rope(x, frequencies, pos0=0):
    """Half-split rotation of x [T, H, D] (transformers' rotate_half)."""
    angles = (pos0 + torch.arange(x.shape[0], dtype=torch.float64))[:, None, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def rms_norm(x, weight, eps):
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def l2_norm(x, eps):
    return x * (x.square().sum(-1, keepdim=True) + eps).rsqrt()
