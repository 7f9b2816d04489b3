"""The front door: `pocketvlm VERB`, the same as `python -m pocketvlm VERB`.

In: arguments. Out: the result (an answer, a path) on stdout, progress and timings on stderr.
Not here: any work. A verb imports its package when it runs, so that `--help` is instant and a missing extra
is named only by who needs it. A `PocketError` is one line on stderr and exit code 2; Ctrl-C is 130.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from evals.command import is_main, listed, require
from runtime.errors import InputError, PocketError
from runtime.installation import program_version

if TYPE_CHECKING:
    from runtime.generation import GenerationOptions


class FrontDoor(TyperGroup):
    """Turns an error that a user can act on, and Ctrl-C, into one line and an exit code.

    Under a launcher each process says which one it is: an error may be one process's own.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PocketError as error:
            which = "" if is_main() else f" (process {os.environ['RANK']})"
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
        typer.echo(f"pocketvlm {program_version()}")
        raise typer.Exit


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
    require("distill", ("torch", "torchvision", "transformers", "accelerate", "easy_vqa", "psutil", "yaml"))
    require("export", ("onnx", "onnx_ir", "onnxscript", "onnxruntime"))
    require("report", ("jinja2", "matplotlib"))
    from rich.console import Console

    from distill.demo import demo_recipe, demo_run
    from export import export_all

    settings = demo_recipe.read(demo_recipe.RECIPES / "demo.yaml", smoke=smoke, seed=seed)
    command = " ".join(["pocketvlm", *sys.argv[1:]])
    console = Console(stderr=True)
    typer.echo(demo_run.run(out, settings, export_all, command=command, smoke=smoke, console=console))


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
        int | None,
        typer.Option(min=1, help="Tokens of the whole conversation; default: the bundle's, up to 4,096."),
    ] = None,
    providers: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Execution providers, preferred first; default: the bundle's."),
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
        providers=listed(providers),
        max_context=max_context,
    )
    with session:
        for report in session.providers:
            if report.reason and not verbose:
                typer.echo(report.line(), err=True)
        for line in console.facts(session) if verbose else ():
            typer.echo(line, err=True)
        if chat:
            console.converse(session, image or (), console.typed(question), options, listed(choices), as_json)
        else:
            console.answer(session, image or (), question or "", options, listed(choices), as_json)


def _generation_options(**values: Any) -> GenerationOptions:
    from pydantic import ValidationError

    from runtime.generation import GenerationOptions

    try:
        return GenerationOptions(**values)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        name = str(fault["loc"][0]).replace("_", "-")
        raise InputError(f"--{name}: got {fault['input']}; {fault['msg'].lower()}") from None


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

    facts = {"pocketvlm": program_version(), **describe()}
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


for _package in ("distill", "export", "evals"):  # a device has the last one alone
    if importlib.util.find_spec(_package) is not None:
        app.add_typer(importlib.import_module(f"{_package}.verbs").app)


if __name__ == "__main__":
    main()
