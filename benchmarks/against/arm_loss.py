"""Memory of the loss alone, in a process of its own: LM heads, log-softmax and JSD of student and teacher.

    python arm_loss.py plain|ours|trl TOKENS [--vocab V] [--hidden H] [--chunk N]

`plain` holds whole log-prob tensors, as a loss written without chunks does; `ours` is `heads.token_terms`;
`trl` is the chunked divergence of TRL's DistillationTrainer (run it in TRL's environment). Counted is what
the process grows by from the first line of the loss to the end of its backward pass, gradients included.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from benchmarks.against.common import Record, resident

Weight = torch.nn.Parameter
Loss = Callable[[Weight, Weight, Weight, Weight], torch.Tensor]


def plain(chunk: int) -> Loss:
    """The mean JSD with every tensor whole."""

    def loss(student_th: Weight, ours_vh: Weight, teacher_th: Weight, theirs_vh: Weight) -> torch.Tensor:
        log_q = (student_th @ ours_vh.T).log_softmax(-1)
        with torch.no_grad():
            log_p = (teacher_th @ theirs_vh.T).log_softmax(-1)
        log_m = torch.logaddexp(log_q, log_p) - torch.tensor(2.0).log()
        per_token = (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1) / 2
        return per_token.mean()

    return loss


def ours(chunk: int) -> Loss:
    from distill.losses.heads import token_terms
    from distill.losses.signal import Head, LiveSignal

    def head(weight_vh: Weight) -> torch.nn.Linear:
        linear = torch.nn.Linear(weight_vh.shape[1], weight_vh.shape[0], bias=False, device="meta")
        linear.weight = weight_vh
        return linear

    def loss(student_th: Weight, ours_vh: Weight, teacher_th: Weight, theirs_vh: Weight) -> torch.Tensor:
        target_t = torch.zeros(len(student_th), dtype=torch.long)
        signal = LiveSignal(teacher_th, Head(head(theirs_vh)))
        terms = token_terms(
            student_th, Head(head(ours_vh)), target_t, signal, None, "jsd", chunk_tokens=chunk
        )
        assert terms.divergence_t is not None
        return terms.divergence_t.mean()

    return loss


def trl(chunk: int) -> Loss:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    def loss(student_th: Weight, ours_vh: Weight, teacher_th: Weight, theirs_vh: Weight) -> torch.Tensor:
        mask = torch.ones(1, len(student_th), dtype=torch.long)
        return _chunked_divergence_loss(
            student_th[None], teacher_th[None], ours_vh, theirs_vh, mask, beta=0.5
        )[0]

    return loss


CASES = {"plain": plain, "ours": ours, "trl": trl}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=CASES)
    parser.add_argument("tokens", type=int)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    draw = torch.Generator().manual_seed(0)

    def some(rows: int, scale: float, grad: bool) -> Weight:
        values = torch.randn(rows, options.hidden, generator=draw).mul_(scale)
        return Weight(values, requires_grad=grad)

    student_th, teacher_th = some(options.tokens, 1.0, True), some(options.tokens, 1.0, False)
    scale = 2 * options.hidden**-0.5
    student_vh, teacher_vh = some(options.vocab, scale, True), some(options.vocab, scale, False)
    loss = CASES[options.case](options.chunk)
    loss(student_th[:8], student_vh, teacher_th[:8], teacher_vh).backward()  # libraries load what they need
    student_th.grad = student_vh.grad = None
    record = Record(0)
    record.start()
    Path("/proc/self/clear_refs").write_text("5")
    started = time.perf_counter()
    value = loss(student_th, student_vh, teacher_th, teacher_vh)
    value.backward()
    record.finish(
        case=options.case,
        tokens=options.tokens,
        chunk=options.chunk,
        loss=value.item(),
        grown_mib=resident("VmHWM") - record.loaded_mib,
        loss_seconds=time.perf_counter() - started,
        gradient_norm=float(student_vh.grad.norm()),  # type: ignore[union-attr]
    )


if __name__ == "__main__":
    main()
