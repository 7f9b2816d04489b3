"""`--quant auto`: the smallest bundle whose accuracy stays inside a budget.

    auto_quantize(checkpoint: Path, out: Path, *, max_drop: float = 0.5, data: Path | None = None,
                  limit: int | None = None, name: str | None = None, image_required: bool = False,
                  sample_images: Sequence[ImageInput] = (), progress: Callable[[str], None] | None = None
                  ) -> Result

In: a checkpoint, an accuracy budget in points (percent of questions), questions with answers. Out: one bundle
at `out`, and `Result` (also `<out>.auto/frontier.json` and `.md`). Not here: rounding, the gate.
"""
