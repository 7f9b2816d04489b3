"""The front door: `pocketvlm VERB`, the same as `python -m pocketvlm VERB`.

In: arguments. Out: the result (an answer, a path) on stdout, progress and timings on stderr.
Not here: any work. A verb imports its package when it runs, so that `--help` is instant and a missing extra
is named only by who needs it. A `PocketError` is one line on stderr and exit code 2; Ctrl-C is 130.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from runtime.errors import InputError, MissingExtra, PocketError

if TYPE_CHECKING:
    from distill.recipe import Recipe
    from evals.bench_results import BenchResults
    from evals.subjects import Model
    from export.targets import Plan
    from runtime.generation import GenerationOptions


class FrontDoor(TyperGroup):
    """Turns an error that a user can act on, and Ctrl-C, into one line and an exit code.

    Under a launcher each process says which one it is: an error may be one process's own.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PocketError as error:
            which = "" if _is_main() else f" (process {os.environ['RANK']})"
            typer.echo(f"pocketvlm{which}: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("pocketvlm: interrupted", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    name="pocketvlm",
    cls=FrontDoor,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Distil a vision-language model, export it, run it on a device, and prove what it costs.",
    epilog="Each verb has its own examples: `pocketvlm run --help`.",
)


def main() -> None:
    """Entry point of the `pocketvlm` command."""
    app(prog_name="pocketvlm")


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"pocketvlm {_version()}")
        raise typer.Exit


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("pocketvlm")
    except PackageNotFoundError:
        return "(not installed, run from its source)"


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


# --- demo -------------------------------------------------------------


@app.command(
    epilog="""Examples:

    pocketvlm demo

    pocketvlm demo --smoke --out /tmp/smoke
"""
)
def demo(
    out: Annotated[Path, typer.Option(help="Where everything goes; the same directory resumes.")] = Path(
        "demo-out"
    ),
    smoke: Annotated[bool, typer.Option("--smoke", help="The same stages, too short to learn much.")] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="Another draw of everything random.")] = None,
) -> None:
    """Distil, export, answer and measure on real data, from nothing to a report; resumes when interrupted."""
    _require("distill", ("torch", "torchvision", "transformers", "accelerate", "easy_vqa", "psutil", "yaml"))
    _require("export", ("onnx", "onnx_ir", "onnxscript", "onnxruntime"))
    _require("report", ("jinja2", "matplotlib"))
    from rich.console import Console

    from distill.demo import demo_recipe, demo_run
    from export import export_all

    settings = demo_recipe.read(demo_recipe.RECIPES / "demo.yaml", smoke=smoke, seed=seed)
    command = " ".join(["pocketvlm", *sys.argv[1:]])
    console = Console(stderr=True)
    typer.echo(demo_run.run(out, settings, export_all, command=command, smoke=smoke, console=console))


# --- distill, plan, ablate --------------------------------------------

DISTILL_NEEDS = ("torch", "torchvision", "transformers", "accelerate", "psutil", "yaml")
RecipeArgument = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="YAML file, or the name of a recipe that ships.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key: train.lr=1e-6; may be repeated."),
]


@app.command(
    epilog="""Examples:

    pocketvlm distill easy-vqa --limit 200

    pocketvlm distill recipe.yaml --set train.lr=2e-6 --set teachers.0.mask.r_max=0.4 --out runs/a

    accelerate launch --num_processes 8 -m pocketvlm distill recipe.yaml
"""
)
def distill(
    recipe: RecipeArgument,
    out: Annotated[
        Path | None,
        typer.Option(help="Where everything goes; the same directory resumes. Default: the recipe's name."),
    ] = None,
    settings: SetOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many questions: a dry run.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Distil teachers into a student by a recipe; the checkpoint's path goes to stdout. Resumes."""
    _require("distill", DISTILL_NEEDS)
    plan = _recipe(recipe, settings)
    from rich.console import Console

    from distill import run

    target = out or Path("runs") / (plan.name if limit is None else f"{plan.name}-{limit}")
    found = run.run(plan, target, console=Console(stderr=True, quiet=not _is_main()), limit=limit)
    if _is_main():
        typer.echo(json.dumps({"checkpoint": str(found), "out": str(target)}) if as_json else found)


@app.command(
    epilog="""Examples:

    pocketvlm plan qwen3-vl

    pocketvlm plan recipe.yaml --processes 8 --strategy fsdp --set train.gradient_checkpointing=true --json
"""
)
def plan(
    recipe: RecipeArgument,
    settings: SetOption = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes, one a device; default: throughput.devices.")
    ] = None,
    strategy: Annotated[str, typer.Option(help="ddp: whole models; fsdp: FSDP2 shards.")] = "ddp",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Say what a recipe will take, before anything runs: parameters, memory, disk, tokens, time."""
    if strategy not in ("ddp", "fsdp"):
        raise InputError(f"--strategy: got {strategy}, expected ddp or fsdp")
    _require("distill", DISTILL_NEEDS)
    found = _recipe(recipe, settings)
    from distill.planning import plan_tables
    from distill.planning.plan import plan as reckon

    with _progress("plan") as progress:
        result = reckon(found, processes=processes, strategy=strategy, progress=progress)
    if as_json:
        typer.echo(result.model_dump_json(indent=2))
        return
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    for table in plan_tables.tables(result):
        console.print(table)
    for note in result.notes:
        console.print(f"- {note}", soft_wrap=True)


@app.command(
    epilog="""Examples:

    pocketvlm ablate digits --out runs/ablation

    pocketvlm ablate digits --experiment masking --experiment rewards --seeds 3 --json
"""
)
def ablate(
    recipe: RecipeArgument,
    out: Annotated[
        Path | None, typer.Option(help="Where runs and report go; the same directory resumes.")
    ] = None,
    settings: SetOption = None,
    experiment: Annotated[
        list[str] | None, typer.Option(help="Only this experiment; may be repeated. Default: all.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=2, help="Seeds of the main comparisons.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Runs side by side; default: cores.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Run the method's first experiments from one recipe, over seeds; the report's path goes to stdout."""
    _require("distill", DISTILL_NEEDS)
    plan = _recipe(recipe, settings)
    from rich.console import Console

    from distill.ablation import ablate as experiments

    wanted = tuple(experiment or experiments.EXPERIMENTS)
    for name in wanted:
        if name not in experiments.EXPERIMENTS:
            raise InputError(f"--experiment {name}: expected {', '.join(experiments.EXPERIMENTS)}")
    target = out or Path("runs") / f"{plan.name}-ablation"
    console = Console(stderr=True)
    found = experiments.run(plan, target, console=console, experiments=wanted, seeds=seeds, workers=workers)
    typer.echo(json.dumps({"report": str(found), "out": str(target)}) if as_json else found)


def _recipe(path: Path, settings: Sequence[str] | None) -> Recipe:
    """The recipe with its overrides. Under a launcher every process reads it, and one of them complains."""
    from distill.recipe import read

    try:
        return read(path, settings or ())
    except PocketError:
        if _is_main():
            raise
        raise typer.Exit(2) from None


def _is_main() -> bool:
    """Whether this is the process that prints: the first of those that `accelerate launch` started."""
    return os.environ.get("RANK", "0") == "0"


# --- run --------------------------------------------------------------


@app.command(
    epilog="""Examples:

    pocketvlm run bundles/student-onnx-int8 --image photo.png "what color is the circle?"

    pocketvlm run bundles/student-onnx-int8 --image photo.png "describe it" --temperature 0.7 --seed 1 --json

    pocketvlm run bundles/student-onnx-int8 --image photo.png "is it red?" --choices yes,no

    pocketvlm run bundles/student-onnx-int8 --image before.png --image after.png --chat -v
"""
)
def run(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory, made by `pocketvlm export`.")],
    question: Annotated[
        str | None, typer.Argument(help="What to ask; with --chat the first question, if any.")
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="Image file: PNG, JPEG, WebP, ...; may be repeated.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Go on with the lines of stdin, in one conversation.")
    ] = False,
    choices: Annotated[
        str | None, typer.Option(metavar="A,B,C", help="Only these answers, each with its probability.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy; above it samples.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample among so many tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among the tokens of this total probability.")] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Sample tokens of at least this share of the best one's probability.")
    ] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: tokens seen are less likely.")] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End the answer before this text; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Repeats a sampled answer.")] = 0,
    max_context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the whole conversation; their state is allocated.")
    ] = None,
    providers: Annotated[
        str | None, typer.Option(metavar="A,B", help="onnxruntime's execution providers, preferred first.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: physical cores.")] = None,
    inter_threads: Annotated[int, typer.Option(min=1, help="Threads over independent nodes.")] = 1,
    spin: Annotated[
        bool | None,
        typer.Option("--spin/--no-spin", help="Waiting threads spin; default: with ONNX, not with GGUF."),
    ] = None,
    verify: Annotated[bool, typer.Option(help="Check the hash of every file of the bundle.")] = True,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also: context, bytes of its state, providers.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object for each answer.")] = False,
) -> None:
    """Answer a question about images with an exported bundle, without torch."""
    if question is None and not chat:
        raise InputError("question: got none; give one, or --chat to read questions from stdin")
    options = _generation_options(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=tuple(stop or ()),
        seed=seed,
    )
    import runtime
    from runtime import console

    session = runtime.open_bundle(
        bundle,
        threads=threads,
        inter_threads=inter_threads,
        verify=verify,
        spin=spin,
        providers=_listed(providers),
        max_context=max_context,
    )
    with session:
        for report in session.providers:
            if report.reason and not verbose:
                typer.echo(report.line(), err=True)
        for line in console.facts(session) if verbose else ():
            typer.echo(line, err=True)
        if chat:
            console.converse(
                session, image or (), console.typed(question), options, _listed(choices), as_json
            )
        else:
            console.answer(session, image or (), question or "", options, _listed(choices), as_json)


def _listed(given: str | None) -> list[str] | None:
    """The parts of a list with commas."""
    return None if given is None else [part.strip() for part in given.split(",")]


def _generation_options(**values: Any) -> GenerationOptions:
    from pydantic import ValidationError

    from runtime.generation import GenerationOptions

    try:
        return GenerationOptions(**values)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        name = str(fault["loc"][0]).replace("_", "-")
        raise InputError(f"--{name}: got {fault['input']}; {fault['msg'].lower()}") from None


# --- export -----------------------------------------------------------


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
        typer.Option(help="ort-fused (CPU, GPU), or portable-static (TensorRT, QNN, Core ML provider)."),
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
        typer.Option(help="JSON lines of image, question, answer: for --quant auto, -gptq and -kv8."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many of these questions.")] = None,
    max_context: Annotated[int | None, typer.Option(min=1, help="Most tokens of a sequence.")] = None,
    max_image_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of one picture: fewer tiles or pixels.")
    ] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Most pictures of a conversation.")] = None,
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
    _require("export", ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime"))
    if to == "gguf":
        _require("gguf", ("gguf", "llama_cpp"))
    if to == "coreml":
        _require("coreml", ("coremltools",))
    shared: dict[str, Any] = {"plan": plan, "image_required": image_required}
    with _progress("export") as progress:
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
        return [part.strip().lower() for part in (quant or precision or "f16").split(",") if part.strip()]
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


def _require(extra: str, modules: Sequence[str]) -> None:
    """Raise MissingExtra for the first module that is not installed; nothing is imported."""
    from importlib.util import find_spec

    for module in modules:
        if find_spec(module) is None:
            raise MissingExtra(module.replace("_", "-"), extra)


# --- bench ------------------------------------------------------------


@app.command(
    epilog="""Examples:

    pocketvlm bench bundles/student-onnx-fp32 bundles/student-onnx-int8 --out bench.json

    pocketvlm bench bundles/student-onnx-int8 --image photo.jpg --images 224,1024x768 --prompts 16,128

    pocketvlm bench bundles/student-onnx-int8 --sustained 10m --threads 1 --json

    pocketvlm bench bundles/student-coreml-int8 --import phone-results.json --out bench.json

    pocketvlm bench bundles/student-onnx-int4 --on ssh://pi@raspberrypi.local --out pi.json
"""
)
def bench(
    context: typer.Context,
    bundles: Annotated[
        list[Path] | None, typer.Argument(help="Bundle directories; ratios are to the first one.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Image file; default: the first bundle's own.")] = None,
    question: Annotated[
        str | None, typer.Option(help="What to ask; default: the first bundle's own.")
    ] = None,
    images: Annotated[
        str | None, typer.Option(metavar="SIZES", help="Scale the image to each: 224,1024x768.")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="TOKENS", help="Lengthen the question to each: 16,128,512.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Fresh processes per bundle and point, in turns.")] = 5,
    repeats: Annotated[int, typer.Option(min=1, help="Measured answers in each process.")] = 10,
    warmup: Annotated[int, typer.Option(min=0, help="Answers before them that do not count.")] = 3,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode per answer, stop or not.")] = 16,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: physical cores.")] = None,
    providers: Annotated[
        str | None, typer.Option(metavar="A,B", help="onnxruntime's execution providers, preferred first.")
    ] = None,
    max_context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a conversation; their state is allocated.")
    ] = None,
    drop_cache: Annotated[bool, typer.Option("--drop-cache", help="Forget cached files first.")] = False,
    rest: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="Wait before each process, to cool down.")
    ] = 0.0,
    sustained: Annotated[
        str | None, typer.Option(metavar="TIME", help="Also answer on end for 90s, 10m, 1h: drift.")
    ] = None,
    energy: Annotated[
        float,
        typer.Option(min=0, metavar="SECONDS", help="Energy of answers, where there is a meter; 0: no."),
    ] = 20.0,
    bandwidth: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="Memory bandwidth, before and after; 0: no.")
    ] = 2.0,
    device_name: Annotated[
        str | None, typer.Option(help="What to call this device; default: its model, or its processor.")
    ] = None,
    results: Annotated[
        Path | None, typer.Option("--import", help="Check and complete results measured elsewhere.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write bench.json there; the same command goes on if interrupted.")
    ] = None,
    on: Annotated[
        str | None, typer.Option(metavar="ssh://USER@HOST[:PORT]", help="Measure on that device instead.")
    ] = None,
    on_dir: Annotated[
        str | None, typer.Option(help="Folder there, absolute or below home; default: .cache/pocketvlm.")
    ] = None,
    on_python: Annotated[
        str | None, typer.Option(help="An interpreter there that has the packages; default: a venv is made.")
    ] = None,
    on_wheels: Annotated[
        Path | None, typer.Option(help="Folder of wheels here to install there, without a network.")
    ] = None,
    on_clean: Annotated[
        bool, typer.Option("--on-clean", help="Afterwards delete everything that was put there.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print bench.json instead of tables.")] = False,
) -> None:
    """Measure load, stages, first text, tokens a second, memory, bytes and energy, in fresh processes."""
    from evals import bench as benches
    from evals import bench_import, bench_results

    if results is not None and on is not None:
        raise InputError("--import and --on: one of the two; results are read, or measured on a device")
    if results is not None:
        found = bench_import.read(results, bundles or ())
    elif on is not None:
        from evals import remote

        settings = remote.Settings(on_dir or remote.FOLDER, on_python, on_wheels, on_clean)
        request = remote.Request(tuple(bundles or ()), remote.passed_on(context))
        with _progress("bench") as progress:
            samples = out and out.with_suffix(".telemetry.jsonl")
            found = remote.bench(on, request, settings, progress, samples)
    else:
        for bundle in bundles or ():
            _require_backend(bundle)
        options = benches.Options(
            bundles=tuple(bundles or ()),
            image=image,
            question=question,
            images=images,
            prompts=prompts,
            rounds=rounds,
            repeats=repeats,
            warmup=warmup,
            tokens=tokens,
            threads=threads,
            providers=tuple(_listed(providers) or ()),
            max_context=max_context,
            drop_cache=drop_cache,
            rest_s=rest,
            sustained=sustained,
            energy_s=energy,
            bandwidth_s=bandwidth,
            device_name=device_name,
        )
        with _progress("bench", spin=False) as progress:
            found = benches.measure(options, out, progress)
    if out is not None:
        bench_results.write(found, out)
    if as_json:
        typer.echo(bench_results.dumps(found))
    elif out is not None:
        _print_bench(found, to_stderr=True)
        typer.echo(out)
    else:
        _print_bench(found)


def _require_backend(bundle: Path) -> None:
    """Raise MissingExtra when what runs a bundle is not installed, BundleError when it is no bundle."""
    from runtime import bundle as bundles

    found = bundles.read(bundle, verify=False).format
    _require(found, {"onnx": ("onnxruntime",), "gguf": ("llama_cpp",)}.get(found, ()))


def _print_bench(found: BenchResults, *, to_stderr: bool = False) -> None:
    """With --out the path is what goes to stdout."""
    from rich.console import Console

    from evals.bench import lines, tables

    console = Console(highlight=False, markup=False, stderr=to_stderr)
    for table in tables(found):
        console.print(table)
    for line in lines(found):
        console.print(line, soft_wrap=True)


# --- eval -------------------------------------------------------------


@app.command(
    name="eval",
    epilog="""Examples:

    pocketvlm eval student/ bundles/student-onnx-int8 bundles/student-onnx-int4 --task easy-vqa

    pocketvlm eval student/ bundles/student-onnx-int8 --task MMBench_DEV_EN.tsv --limit 200 --out runs/mmbench

    pocketvlm eval student/ bundles/student-onnx-int8 --teacher teacher/ --task digits --variants all --parity
""",
)
def evaluate(
    models: Annotated[
        list[Path], typer.Argument(help="Checkpoints and bundles; all are compared with the first one.")
    ],
    task: Annotated[
        str, typer.Option(help="easy-vqa, digits, or a file: VLMEvalKit's .tsv, .jsonl, .parquet.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Where everything goes; the same directory resumes. Default: eval-TASK."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many questions.")] = None,
    split: Annotated[str | None, typer.Option(help="Of the task; default: test, or all of a file.")] = None,
    kind: Annotated[
        str | None,
        typer.Option(help="What a file is, where its name does not tell: MMBench, ChartQA, mmmu, ..."),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Where a file's image paths begin.")] = None,
    scorer: Annotated[
        str | None, typer.Option(help="Another rule: exact, choice, numeric, vqa, anls, relaxed, judge, ...")
    ] = None,
    teacher: Annotated[
        list[Path] | None, typer.Option(help="A checkpoint to show beside them; may be repeated.")
    ] = None,
    variants: Annotated[
        str | None,
        typer.Option(help="all, quick, or some by commas: blur, noise-3, wording, rotation-5, ..."),
    ] = None,
    parity: Annotated[
        bool, typer.Option("--parity", help="Also hold every model against the first, token by token.")
    ] = False,
    judge: Annotated[
        str | None, typer.Option(metavar="URL", help="OpenAI-compatible server that judges.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="What the server calls its model.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer; default: the task's.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: physical cores.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Ask models a task's questions: scores with intervals, flips, parity; paths of the results on stdout."""
    from rich.console import Console

    from evals import brittleness, eval_command, eval_tables, parity_table

    console = Console(stderr=True, highlight=False, markup=False)
    request = eval_command.Request(
        models=models,
        task=task,
        teachers=teacher or (),
        split=split,
        kind=kind,
        limit=limit,
        scorer=scorer,
        max_new_tokens=max_new_tokens,
        images=images,
        variants=variants,
        parity=parity,
        judge=judge,
        judge_model=judge_model,
        threads=threads,
        command=" ".join(["pocketvlm", *sys.argv[1:]]),
    )
    done = eval_command.run(request, out, console, _require_model)
    parity_table_found = parity_table.table(done.parity) if done.parity else None
    shown = (eval_tables.scores, eval_tables.changes, brittleness.table)
    for table in (*(each(done.evaluation) for each in shown), parity_table_found):
        if table is not None:
            console.print(table)
    lines = [*eval_tables.lines(done.evaluation), *brittleness.lines(done.evaluation)]
    for line in [*lines, *(parity_table.lines(done.parity) if done.parity else ())]:
        console.print(f"- {line}", soft_wrap=True)
    if as_json:
        typer.echo(json.dumps(eval_command.summary(done)))
        return
    for path in done.printed:
        typer.echo(path)


def _require_model(model: Model) -> None:
    """Raise MissingExtra when what runs a model is not installed."""
    if model.is_bundle:
        _require_backend(model.path)
    else:
        _require("export", ("torch", "transformers"))


# --- judge-audit ------------------------------------------------------


@app.command(
    name="judge-audit",
    epilog="""Examples:

    pocketvlm judge-audit verdicts.jsonl

    pocketvlm judge-audit verdicts.jsonl --json
""",
)
def judge_audit(
    rows: Annotated[Path, typer.Argument(help="JSON lines: question, reference, response, verdict, label.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Compare a judge's verdicts with labels: agreement, kappa, bias by length, option letter and source.

    Exit code 2 when something is flagged.
    """
    from evals import judge_audit as auditing

    result = auditing.audit(auditing.read(rows))
    if as_json:
        typer.echo(result.model_dump_json(indent=2))
    else:
        from rich.console import Console

        console = Console(highlight=False, markup=False)
        console.print(auditing.table(result))
        for line in result.flags or ("nothing is flagged",):
            console.print(line, soft_wrap=True)
    if result.flagged:
        raise typer.Exit(2)


# --- report -----------------------------------------------------------


@app.command(
    epilog="""Examples:

    pocketvlm report results/ --gate gate.yaml --markdown

    pocketvlm report bench.json eval.json parity.json --out report

    pocketvlm report --compare old/report.json new/report.json

    pocketvlm report demo-out/report/results.json
"""
)
def report(
    paths: Annotated[
        list[Path],
        typer.Argument(help="bench.json, eval.json, parity.json, directories of them; a run's results.json."),
    ],
    gate: Annotated[Path | None, typer.Option(help="gate.yaml: the limits that a bundle must keep.")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Two paths, old and new: find what became worse.")
    ] = False,
    pair: Annotated[
        list[str] | None, typer.Option(metavar="OLD=NEW", help="--compare: a bundle's name in both.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory to write; default: DIRECTORY/report, or ./report.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Also Markdown, for a pull request.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Decide whether to ship, and show why: a page, JSON, Markdown. Or compare two reports.

    Exit code 0: ship, or nothing became worse; 1: do not ship, or something did; 2: an error.
    """
    from evals import ship_command

    if pair and not compare:
        raise InputError("--pair: is for --compare, which was not given")
    if not compare or out is not None:
        _require("report", ("jinja2", "matplotlib"))
    if not compare and (stored := ship_command.of_a_run(paths)) is not None:
        if gate is not None:
            raise InputError(f"{stored}: is a run's page; --gate takes bench.json, eval.json and parity.json")
        from evals.report import write_report
        from evals.results import read

        typer.echo(write_report(read(stored), out or stored.parent))
        return
    shared: dict[str, Any] = {"markdown": markdown, "as_json": as_json, "version": _version()}
    if compare:
        done = ship_command.compare(paths, gate, out, pairs=pair or (), **shared)
    else:
        done = ship_command.ship(paths, gate, out, **shared)
    for line in done.said:
        typer.echo(line, err=True)
    for line in done.lines:
        typer.echo(line)
    raise typer.Exit(done.code)


# --- doctor -----------------------------------------------------------


@app.command(
    epilog="""Examples:

    pocketvlm doctor

    pocketvlm doctor bundles/student-onnx-int8
"""
)
def doctor(
    bundle: Annotated[
        Path | None, typer.Argument(help="Also check this bundle: hashes and conformance vectors.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Say what is installed, what is missing and how to get it; check a bundle if one is given."""
    from runtime.installation import describe

    facts = {"pocketvlm": _version(), **describe()}
    if bundle is not None:
        facts["bundle"] = {"path": str(bundle), **_conformance(bundle)}
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        _print_installation(facts)
    if bundle is not None and facts["bundle"]["differences"]:
        raise typer.Exit(2)


def _print_installation(facts: dict[str, Any]) -> None:
    typer.echo(f"pocketvlm {facts['pocketvlm']}, Python {facts['python']}, {facts['system']}")
    typer.echo(f"threads used by default: {facts['threads']}")
    typer.echo("core: " + ", ".join(f"{name} {found or 'MISSING'}" for name, found in facts["core"].items()))
    for extra in facts["extras"]:
        have = ", ".join(f"{name} {found}" for name, found in extra["packages"].items() if found)
        lack = ", ".join(name for name, found in extra["packages"].items() if not found)
        state = "ok" if extra["complete"] else f"missing {lack}: {extra['install']}"
        typer.echo(f"[{extra['extra']}] {state}" + (f" (have {have})" if have else ""))
    for line in facts.get("bundle", {}).get("facts", ()):
        typer.echo(f"bundle: {line}")
    for line in facts.get("bundle", {}).get("differences", ()):
        typer.echo(f"bundle: {line}")
    if "bundle" in facts and not facts["bundle"]["differences"]:
        typer.echo(f"bundle: {facts['bundle']['path']} conforms")


def _conformance(bundle: Path) -> dict[str, Any]:
    import runtime
    from runtime import conformance, console

    with runtime.open_bundle(bundle) as session:
        return {
            "name": session.manifest.name,
            "facts": console.facts(session),
            "differences": conformance.check(session, bundle),
        }


class _progress:
    """A rich spinner on stderr whose text is the step; call it with each step's name.

    Without `spin` each step is a line: a spinner takes time from what is measured meanwhile.
    """

    def __init__(self, verb: str, *, spin: bool = True) -> None:
        from rich.console import Console

        self._verb = verb
        self._console = Console(stderr=True)
        self._spin = spin and self._console.is_terminal
        self._status = self._console.status(verb)

    def __call__(self, step: str) -> None:
        if self._spin:
            self._status.update(f"{self._verb}: {step}")
        else:
            self._console.print(f"{self._verb}: {step}", highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> _progress:
        if self._spin:
            self._status.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._status.stop()


if __name__ == "__main__":
    main()
