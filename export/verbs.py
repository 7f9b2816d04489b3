"""The verb `export`.

In: arguments. Out: paths of bundles on stdout. Not here: any work: a verb imports its modules when
it runs, so that `--help` is instant and a missing extra is named only by who needs it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evals.command import Progress, require
from runtime.errors import InputError

if TYPE_CHECKING:
    from export.targets import Plan

app = typer.Typer()


@app.command(
    epilog="""Examples:

    pocketvlm export student/ --to onnx --precision int8 --out bundles

    pocketvlm export student/ --target raspberry-pi --out bundles --name student

    pocketvlm export student/ --target android --max-context 1024 --max-image-tokens 256 --out bundles

    pocketvlm export student/ --to coreml --target iphone --precision fp16,int4 --out bundles

    pocketvlm export student/ --quant auto --max-drop 0.5 --data questions.jsonl --out bundles
"""
)
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Hugging Face checkpoint directory.")],
    out: Annotated[Path, typer.Option(help="Directory that the bundles go into.")],
    to: Annotated[str, typer.Option(help="Format: onnx, gguf or coreml.")] = "onnx",
    target: Annotated[
        str | None,
        typer.Option(help="iphone, android, jetson-orin, raspberry-pi, cpu or browser: sets what follows."),
    ] = None,
    flavour: Annotated[
        str | None,
        typer.Option(
            help="ort-fused (the default; CPU, GPU) or portable-static (TensorRT, QNN, Core ML provider)."
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="One or several, by commas: fp32, fp16, int8, int4, int4-b64, qdq-int8, ..."),
    ] = None,
    quant: Annotated[
        str | None,
        typer.Option(
            help="auto: search the smallest inside --max-drop; a policy.yaml; GGUF types: q8_0,q4_k_m."
        ),
    ] = None,
    rules: Annotated[
        Path | None, typer.Option(help="GGUF: YAML with types of single tensors (docs/gguf.md).")
    ] = None,
    imatrix: Annotated[
        bool, typer.Option("--imatrix", help="GGUF: weigh columns by what prompts with pictures feed them.")
    ] = False,
    max_drop: Annotated[float, typer.Option(help="Points of accuracy that --quant auto may lose.")] = 0.5,
    data: Annotated[
        Path | None,
        typer.Option(help="JSON lines of image, question, answer: for --quant auto, -gptq, -kv8 and qdq-."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many of these questions.")] = None,
    max_context: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of a sequence; default: the model's.")
    ] = None,
    max_image_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of one picture: fewer tiles or pixels.")
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Most pictures of a conversation; default: 4.")
    ] = None,
    split: Annotated[
        bool, typer.Option("--split/--no-split", help="Cut pictures into tiles if the model does.")
    ] = True,
    name: Annotated[str | None, typer.Option(help="Name of the bundles; default: the checkpoint's.")] = None,
    image_required: Annotated[
        bool, typer.Option("--image-required", help="The bundle refuses a question without an image.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Export a checkpoint to bundles that answer as it does; their paths go to stdout, one a line."""
    from export.targets import plan_for

    plan = plan_for(
        target,
        to=to,
        flavour=flavour,
        max_context=max_context,
        max_image_tokens=max_image_tokens,
        max_images=images,
        split_images=split,
    )
    precisions = _precisions(plan, precision, quant, to)
    if to != "gguf" and (rules or imatrix):
        raise InputError(f"{'--rules' if rules else '--imatrix'}: is for --to gguf, not {to}; leave it out")
    require("export", ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime"))
    if to == "gguf":
        require("gguf", ("gguf", "llama_cpp"))
    if to == "coreml":
        require("coreml", ("coremltools",))
    shared: dict[str, Any] = {"plan": plan, "image_required": image_required}
    with Progress("export") as progress:
        if quant == "auto":
            from export.auto import auto_quantize
            from export.auto_report import table

            called = "-".join([name or checkpoint.resolve().name, to, *([target] if target else []), "auto"])
            result = auto_quantize(
                checkpoint,
                out / called,
                max_drop=max_drop,
                data=data,
                limit=limit,
                progress=progress,
                **shared,
            )
            bundles = [result.bundle]
            for line in table(result):
                typer.echo(line, err=True)
        else:
            from export import auto_data, export_all

            if data is not None:
                shared["examples"] = auto_data.examples(auto_data.read(data), limit or 32)
            if to == "gguf":
                from export.gguf_kinds import Request, read_rules

                shared["request"] = Request(read_rules(rules) if rules else (), imatrix)
            bundles = export_all(checkpoint, out, precisions, to=to, name=name, progress=progress, **shared)
    _print_bundles(bundles, as_json)


def _precisions(plan: Plan, precision: str | None, quant: str | None, to: str) -> list[str]:
    """What --precision and --quant ask for; a target has its own."""
    from export.targets import default_precision

    if quant is not None and precision is not None:
        raise InputError(f"--quant {quant}: says the precision, so leave --precision {precision} out")
    if to == "gguf":
        if quant == "auto" or str(quant).endswith((".yaml", ".yml")):
            raise InputError(f"--quant {quant}: is for --to onnx; GGUF takes types (q8_0,q4_k_m) and --rules")
        asked = quant if quant is not None else precision
        return [
            part.strip().lower() for part in ("f16" if asked is None else asked).split(",") if part.strip()
        ]
    if to == "coreml" and quant == "auto":
        raise InputError("--quant auto: is for --to onnx; with --to coreml give --precision fp16,int8,int4")
    if quant not in (None, "auto") and not str(quant).endswith((".yaml", ".yml")):
        raise InputError(f"--quant: got {quant}, expected auto or a policy file ending in .yaml")
    asked = quant or precision
    if asked is None:
        return [default_precision(plan, to)]
    found = list(dict.fromkeys(part.strip() for part in asked.split(",") if part.strip()))
    if not found:
        raise InputError("--precision: got nothing, expected fp32, int8 or int4")
    return found


def _print_bundles(bundles: Sequence[Path], as_json: bool) -> None:
    """Paths on stdout, a table of what was written on stderr."""
    from export import summary

    if as_json:
        found = [summary.facts(path) for path in bundles]
        typer.echo(json.dumps({"bundles": [str(path) for path in bundles], "facts": found}))
        return
    from rich.console import Console

    console = Console(stderr=True, highlight=False, markup=False)
    for path in bundles:
        console.print(summary.table(path))
    for path in bundles:
        typer.echo(path)
