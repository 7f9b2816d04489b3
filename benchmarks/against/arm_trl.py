"""TRL's arm of `benchmarks/distill.py`: `DistillationTrainer.train()` on completions that are there already.

    .venv-trl/bin/python arm_trl.py WORK [--steps N] [--batch SEQUENCES] [--gradient FILE]

Only `_generate_and_score_completions` is replaced: it hands back prepared tensors, so that neither
generation nor image preprocessing is timed. Its loss is the generalised JSD at beta 0.5, the mean over
completion tokens: the plain Jensen-Shannon divergence. Settings, and why:

    gradient_checkpointing off   on by default; it trades time for memory that is not short here
    bf16 off                     on by default; float32 is what the CPU is fast in, and ours uses
    use_liger_kernel off         Triton kernels: no CPU
    attention                    SDPA, as ours; the trainer has no padding-free mode, and nothing is padded
                                 (all prompts and all completions of a batch have one length)
    batch size                   tuned by the driver; gradient accumulation makes up the step
    logging, saving, evaluation  off
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from datasets import Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from benchmarks.against import common
from benchmarks.against.common import Asked, Record


class Pregenerated(DistillationTrainer):
    """The trainer with the answer of its generation step at hand."""

    prepared: dict[str, Any]

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        return dict(self.prepared)


class Watch(TrainerCallback):
    """Tells when a step is over; keeps the gradient of the first one where that is asked for."""

    def __init__(self, record: Record, gradient: Path | None) -> None:
        self.record, self.gradient = record, gradient

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if self.gradient is not None:
            common.save_gradient(self.gradient, rest["model"].named_parameters())

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.record.step(0.0)


def prepared(batch: list[Asked], image_token: int) -> dict[str, Any]:
    """A step's sequences as the trainer's own generation would leave them."""
    flat = [(asked, response) for asked in batch for response in asked.responses]
    prompt = torch.tensor([asked.ids for asked, _ in flat])
    completion = torch.tensor([response for _, response in flat])
    ids = torch.cat([prompt, completion], 1)
    return {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": completion,
        "completion_mask": torch.ones_like(completion),
        "num_items_in_batch": torch.tensor(completion.numel()),
        "pixel_values": torch.cat([asked.pixel_values for asked, _ in flat]),
        "image_grid_thw": torch.cat([asked.image_grid_thw for asked, _ in flat]),
        "mm_token_type_ids": (ids == image_token).long(),
        "num_images": [1] * len(flat),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--gradient", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    batch = common.read(options.work)
    student, teacher = (
        AutoModelForImageTextToText.from_pretrained(options.work / name, dtype=torch.float32)
        for name in (common.STUDENT, common.TEACHER)
    )
    processor = AutoProcessor.from_pretrained(options.work / common.STUDENT, padding_side="left")
    sequences = sum(len(asked.responses) for asked in batch)
    size = min(options.batch, sequences)
    if sequences % size:
        raise SystemExit(f"{sequences} sequences are no multiple of the batch size {size}")
    total = 1 if options.gradient else options.warmup + options.steps
    record = Record(options.warmup)
    with tempfile.TemporaryDirectory() as directory:
        config = DistillationConfig(
            directory,
            beta=0.5,
            learning_rate=common.LR,
            lr_scheduler_type="constant",
            max_grad_norm=0.0 if options.gradient else common.CLIP,
            optim="adamw_torch_fused",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=sequences // size,
            max_steps=total,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        rows = [{"prompt": [{"role": "user", "content": "question"}]}] * sequences * total
        trainer = Pregenerated(
            model=student,
            teacher_model=teacher,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=processor,
            callbacks=[Watch(record, options.gradient)],
        )
        trainer.prepared = prepared(batch, student.config.image_token_id)
        record.start()
        trainer.train()
    record.finish(arm="trl", batch=size)


if __name__ == "__main__":
    main()
