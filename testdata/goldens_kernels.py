"""Inputs, outputs, final states and gradients of every kernel, from PyTorch's autograd in f64.

Tensors are named `<case>.<tensor>`; gradients `<case>.grad.<input>`, for the cotangents `<case>.cot.<output>`."""

from pathlib import Path

import torch
import torch.nn.functional as F

import goldens_recurrences as rec
from goldens_common import generator, save_tensors

T, G, N, P = 70, 3, 8, 6  # tokens (past one chunk of 64), query heads, key and value widths: all different
D_INNER, SCAN_STATE = 10, 5
EPS = 1e-5


class Recorder:
    """Draws inputs of one case and records everything about it."""

    def __init__(self, case: str, seed: int, out: dict):
        self.case, self.gen, self.out, self.inputs = case, generator(seed), out, {}

    def draw(self, *shape: int) -> torch.Tensor:
        # Rounded to f32 first, so that a reader of the file starts from exactly these values.
        return torch.randn(shape, generator=self.gen).double()

    def input(self, name: str, value: torch.Tensor) -> torch.Tensor:
        leaf = value.detach().float().double().requires_grad_()
        self.inputs[name] = leaf
        self.out[f"{self.case}.{name}"] = leaf
        return leaf

    def finish(self, outputs: dict[str, torch.Tensor]) -> None:
        """Records the outputs and the inputs' gradients for random cotangents of all of them."""
        total = 0.0
        for name, value in outputs.items():
            cotangent = self.draw(*value.shape)
            self.out[f"{self.case}.{name}"] = value
            self.out[f"{self.case}.cot.{name}"] = cotangent
            total = total + (value * cotangent).sum()
        for name, grad in zip(self.inputs, torch.autograd.grad(total, list(self.inputs.values()))):
            self.out[f"{self.case}.grad.{name}"] = grad


def make_ssd(out: dict) -> None:
    r = Recorder("ssd", 1, out)
    q = r.input("q", rec.l2_norm(r.draw(T, G, N), 0.0))
    k = r.input("k", rec.l2_norm(r.draw(T, N), 0.0))
    v = r.input("v", r.draw(T, P))
    # Decays from nearly none to nearly total within one chunk.
    log_a = r.input("log_a", -F.softplus(2.0 * r.draw(T, G) - 1.0))
    b = r.input("b", F.softplus(r.draw(T, G)))
    d_skip = r.input("d_skip", r.draw(G))
    state = r.input("state", r.draw(G, N, P))
    y, final = rec.ssd(q, k, v, log_a, b, d_skip, state)
    r.finish({"y": y, "final_state": final})


def make_gated_delta(out: dict) -> None:
    r = Recorder("gated_delta", 2, out)
    q = r.input("q", rec.l2_norm(r.draw(T, G, N), 0.0))
    k = r.input("k", rec.l2_norm(r.draw(T, N), 0.0))
    v = r.input("v", r.draw(T, P))
    log_a = r.input("log_a", -F.softplus(2.0 * r.draw(T) - 2.0))
    beta = r.input("beta", torch.sigmoid(1.5 * r.draw(T)))
    state = r.input("state", r.draw(N, P))
    y, final = rec.gated_delta(q, k, v, log_a, beta, state)
    r.finish({"y": y, "final_state": final})


def make_selective_scan(out: dict) -> None:
    r = Recorder("selective_scan", 3, out)
    u = r.input("u", r.draw(T, D_INNER))
    delta = r.input("delta", F.softplus(r.draw(T, D_INNER) - 1.0))
    a = r.input("a", -(0.5 * r.draw(D_INNER, SCAN_STATE)).exp())
    b = r.input("b", r.draw(T, SCAN_STATE))
    c = r.input("c", r.draw(T, SCAN_STATE))
    d = r.input("d", r.draw(D_INNER))
    state = r.input("state", r.draw(D_INNER, SCAN_STATE))
    y, final = rec.selective_scan(u, delta, a, b, c, d, state)
    r.finish({"y": y, "final_state": final})


def make_short_conv(out: dict) -> None:
    channels, taps = 7, 4
    r = Recorder("short_conv", 4, out)
    x = r.input("x", r.draw(T, channels))
    weight = r.input("weight", r.draw(channels, taps))
    bias = r.input("bias", r.draw(channels))
    tail = r.draw(taps - 1, channels)
    r.finish({"out": rec.short_conv(x, weight, bias)})
    out["short_conv.tail"] = tail
    out["short_conv.out_after_tail"] = rec.short_conv(x, weight, bias, tail)


def make_attention(out: dict) -> None:
    q_heads, kv_heads, head_dim = 4, 2, 6
    scale = head_dim ** -0.5
    cases = {"causal": (T, 0), "local": (16, 1), "local_no_sink": (5, 0), "local_many_sinks": (9, 3)}
    for index, (case, (window, sinks)) in enumerate(cases.items()):
        r = Recorder(f"attention_{case}", 10 + index, out)
        q = r.input("q", 1.5 * r.draw(T, q_heads, head_dim))
        k = r.input("k", 1.5 * r.draw(T, kv_heads, head_dim))
        v = r.input("v", r.draw(T, kv_heads, head_dim))
        y, lse = rec.attention(q, k, v, rec.local_mask(T, window, sinks), scale)
        r.finish({"out": y})
        out[f"attention_{case}.lse"] = lse


def make_elementwise(out: dict) -> None:
    rows, width = 9, 13
    r = Recorder("rms_norm", 20, out)
    x, weight = r.input("x", r.draw(rows, width)), r.input("weight", 1.0 + 0.3 * r.draw(width))
    r.finish({"out": rec.rms_norm(x, weight, EPS)})

    r = Recorder("l2_norm", 21, out)
    r.finish({"out": rec.l2_norm(r.input("x", 0.1 * r.draw(rows, width)), EPS)})

    r = Recorder("swiglu", 22, out)
    gate, up = r.input("gate", 4.0 * r.draw(rows, width)), r.input("up", r.draw(rows, width))
    r.finish({"out": F.silu(gate) * up})

    heads, head_dim, pos0 = 3, 10, 1000
    r = Recorder("rope", 23, out)
    frequencies = rec.inv_freq(head_dim, 10000.0)
    r.finish({"out": rec.rope(r.input("x", r.draw(rows, heads, head_dim)), frequencies, pos0)})


def make_losses(out: dict) -> None:
    rows, vocab, weight = 11, 37, 0.25
    r = Recorder("cross_entropy", 30, out)
    logits = r.input("logits", 3.0 * r.draw(rows, vocab))
    targets = torch.randint(0, vocab, (rows,), generator=r.gen)
    ignored = torch.tensor([2, 7])
    nll = F.cross_entropy(logits, targets.clone().index_fill(0, ignored, -100), reduction="none", ignore_index=-100)
    (grad,) = torch.autograd.grad(weight * nll.sum(), logits)
    out.update({"cross_entropy.nll": nll, "cross_entropy.grad.logits": grad,
                "cross_entropy.targets": targets.index_fill(0, ignored, -1)})

    r = Recorder("kl", 31, out)
    teacher, student = r.draw(rows, vocab) * 3.0, r.input("student", 3.0 * r.draw(rows, vocab))
    teacher = teacher.float().double()
    kl = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    (grad,) = torch.autograd.grad(weight * kl.sum(), student)
    out.update({"kl.teacher": teacher, "kl.kl": kl, "kl.grad.student": grad})


def make_adamw(out: dict) -> None:
    """Three steps with the gradient multiplied by 0.5, as after clipping."""
    size, steps, grad_scale = 23, 3, 0.5
    gen = generator(40)
    parameter = torch.nn.Parameter(torch.randn(size, generator=gen).double())
    optimizer = torch.optim.AdamW([parameter], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    out["adamw.param0"] = parameter.clone()
    for step in range(1, steps + 1):
        grad = torch.randn(size, generator=gen).double()
        out[f"adamw.grad{step}"] = grad
        parameter.grad = grad_scale * grad
        optimizer.step()
        out[f"adamw.param{step}"] = parameter.clone()
    moments = optimizer.state[parameter]
    out["adamw.m"], out["adamw.v"] = moments["exp_avg"], moments["exp_avg_sq"]


def make(root: Path) -> None:
    data = root / "crates/kernels/tests/data"
    mixers, others = {}, {}
    for maker in (make_ssd, make_gated_delta, make_selective_scan):
        maker(mixers)
    for maker in (make_short_conv, make_attention, make_elementwise, make_losses, make_adamw):
        maker(others)
    save_tensors(data / "recurrences.safetensors", mixers)
    save_tensors(data / "kernels.safetensors", others)
