"""The verbs `bench`, `eval`, `report` and `judge-audit`.

In: arguments. Out: results on stdout, progress on stderr. Not here: any work: a verb imports its modules when
it runs, so that `--help` is instant and a missing extra is named only by who needs it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evals.command import Progress, listed, require, without_searches
from runtime.errors import InputError
from runtime.installation import program_version

if TYPE_CHECKING:
    from evals.asking.subjects import Model
    from evals.bench.bench_results import BenchResults

app = typer.Typer()


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
        str | None,
        typer.Option(
            metavar="ssh://USER@HOST|adb://SERIAL|browser://", help="Measure on that device instead."
        ),
    ] = None,
    on_dir: Annotated[
        str | None,
        typer.Option(help="Folder there, absolute or below home; default: .cache/pocketvlm/device."),
    ] = None,
    on_python: Annotated[
        str | None, typer.Option(help="An interpreter there that has the packages; default: a venv is made.")
    ] = None,
    on_wheels: Annotated[
        Path | None, typer.Option(help="Folder of wheels here to install there, without a network.")
    ] = None,
    on_runner: Annotated[
        Path | None, typer.Option(help="adb only: the runner for the phone (docs/devices.md).")
    ] = None,
    on_clean: Annotated[
        bool, typer.Option("--on-clean", help="Afterwards delete everything that was put there.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print bench.json instead of tables.")] = False,
) -> None:
    """Measure load, stages, first text, tokens a second, memory, bytes and energy, in fresh processes."""
    from evals.bench import bench as benches
    from evals.bench import bench_import, bench_results

    bundles = without_searches(bundles or ())
    there = {"dir": on_dir, "python": on_python, "wheels": on_wheels, "runner": on_runner, "clean": on_clean}
    if on is None and (odd := [f"--on-{name}" for name, value in there.items() if value]):
        raise InputError(f"{', '.join(odd)}: wanted --on, the device, too")
    if results is not None and on is not None:
        raise InputError("--import and --on: one of the two; results are read, or measured on a device")
    if results is not None:
        found = bench_import.read(results, bundles, device_name)
        if out is not None:
            bench_results.check_place(out)
            bench_results.write(found, out)
    elif on is not None:
        from evals.remote import remote

        settings = remote.Settings(on_dir or remote.FOLDER, on_python, on_wheels, on_clean)
        with Progress("bench") as progress:
            found = remote.measure(
                on,
                bundles,
                context,
                settings,
                runner=on_runner,
                tell=progress,
                out=out,
            )
    else:
        for bundle in bundles:
            _require_backend(bundle)
        options = benches.Options(
            bundles=tuple(bundles),
            image=image,
            question=question,
            images=images,
            prompts=prompts,
            rounds=rounds,
            repeats=repeats,
            warmup=warmup,
            tokens=tokens,
            threads=threads,
            providers=tuple(listed(providers) or ()),
            max_context=max_context,
            drop_cache=drop_cache,
            rest_s=rest,
            sustained=sustained,
            energy_s=energy,
            bandwidth_s=bandwidth,
            device_name=device_name,
        )
        with Progress("bench", spin=False) as progress:
            found = benches.measure(options, out, progress)
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
    require(found, {"onnx": ("onnxruntime",), "gguf": ("llama_cpp",)}.get(found, ()))


def _print_bench(found: BenchResults, *, to_stderr: bool = False) -> None:
    """With --out the path is what goes to stdout."""
    from rich.console import Console

    from evals.bench.bench import lines, tables

    console = Console(highlight=False, markup=False, stderr=to_stderr)
    for table in tables(found):
        console.print(table)
    for line in lines(found):
        console.print(line, soft_wrap=True)


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

    from evals.asking import eval_command, eval_tables
    from evals.parity import parity_table
    from evals.variants import brittleness

    if judge is not None:
        require("distill", ("openai",))  # before any question is asked
    console = Console(stderr=True, highlight=False, markup=False)
    request = eval_command.Request(
        models=without_searches(models),
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
        require("export", ("torch", "transformers"))


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
    from evals.ship import ship_command

    if pair and not compare:
        raise InputError("--pair: is for --compare, which was not given")
    if not compare or out is not None:
        require("report", ("jinja2", "matplotlib"))
    if not compare and (stored := ship_command.of_a_run(paths)) is not None:
        if gate is not None:
            raise InputError(f"{stored}: is a run's page; --gate takes bench.json, eval.json and parity.json")
        from evals.report import write_report
        from evals.results import read

        typer.echo(write_report(read(stored), out or stored.parent))
        return
    shared: dict[str, Any] = {"markdown": markdown, "as_json": as_json, "version": program_version()}
    if compare:
        done = ship_command.compare(paths, gate, out, pairs=pair or (), **shared)
    else:
        done = ship_command.ship(paths, gate, out, **shared)
    for line in done.said:
        typer.echo(line, err=True)
    for line in done.lines:
        typer.echo(line)
    raise typer.Exit(done.code)


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
