"""The sub-commands of `tilewise`. What each needs is imported inside it, so that the others stay quick."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer

from tilewise.errors import UserError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def _version(wanted: bool) -> None:
    if wanted:
        from tilewise import __version__

        typer.echo(f"tilewise {__version__}")
        raise typer.Exit()


@app.callback()
def tilewise(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Long sequences for less: published methods, compared on your model and your text."""


def _names(listed: str | None) -> tuple[str, ...] | None:
    return None if listed is None else tuple(name.strip() for name in listed.split(",") if name.strip())


def _need_models(command: str) -> None:
    """Raise UserError when what holds pretrained models is not installed."""
    missing = [name for name in ("transformers", "safetensors") if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(f'{command} needs {", ".join(missing)}: pip install "tilewise[compare]"')


@app.command()
def compare(
    model: Annotated[
        str | None, typer.Argument(help="Local directory or hub id; default: the bundled model.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Text file; default: the bundled sample.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of the text to run on.")] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Comma-separated names, recipe or gates files, or all; dense always runs first."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Of perplexity,recall,passkey.")] = None,
    out: Annotated[Path | None, typer.Option(help="The page to write.")] = None,
    json: Annotated[Path | None, typer.Option(help="Everything measured, as JSON.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the retrieval tasks.")] = None,
) -> None:
    """Run several methods against the dense model: time, memory, quality, and what actually ran."""
    _need_models("compare")
    from tilewise.compare import Settings, run_compare

    given: dict[str, Any] = {
        "model": model,
        "text": text,
        "tokens": tokens,
        "methods": _names(methods),
        "device": device,
        "dtype": dtype,
        "tasks": _names(tasks),
        "out": out,
        "json": json,
        "seed": seed,
    }
    # Defaults are stated once, in Settings.
    run_compare(Settings(**{name: value for name, value in given.items() if value is not None}))


@app.command()
def tune(
    model: Annotated[
        str | None, typer.Argument(help="Local directory or hub id; default: the bundled model.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Text file; default: the bundled sample.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of the end of the text to search on.")] = None,
    cost: Annotated[str | None, typer.Option(help="What is spent: time or density.")] = None,
    budget: Annotated[
        float | None, typer.Option(help="Share of dense attention's cost; 0.5 by default.")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="Layers weigh by the model's logits or all alike: output.")
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Time to search; 300 by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="The recipe to write; recipe.json by default.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the order of the search.")] = None,
) -> None:
    """Search a method for every layer of a model; `compare --methods FILE` and `tilewise.patch` take the result."""
    _need_models("tune")
    from tilewise.tune import Settings, run_tune

    given = {
        "model": model,
        "text": text,
        "tokens": tokens,
        "cost": cost,
        "budget": budget,
        "judge": judge,
        "seconds": seconds,
        "out": out,
        "device": device,
        "dtype": dtype,
        "seed": seed,
    }
    run_tune(Settings(**{name: value for name, value in given.items() if value is not None}))  # type: ignore[arg-type]


@app.command()
def papers(
    words: Annotated[list[str] | None, typer.Argument(help="Show the papers with all these words.")] = None,
) -> None:
    """List the papers that work here, each with the object to import and the tests that show its claim."""
    from tilewise import papers as register

    found = register.search(words or [])
    if not found:
        raise UserError(f"no paper matches {' '.join(words or [])!r}; `tilewise papers` lists all of them")
    for paper in found:
        typer.echo(f"{paper.key}  {paper.title}, {paper.date} (paper {paper.id})")
        for line in (paper.object, paper.url, *paper.evidence):
            typer.echo(f"    {line}")
    typer.echo(f"{len(found)} of {len(register.load())} papers")


@app.command()
def build() -> None:
    """Compile the native engines now, rather than at their first use, and say where they lie."""
    from tilewise.kernels import building, natives

    for name, sources in natives().items():
        try:
            path = building.library(name, sources)
        except building.BuildFailed as failure:
            raise UserError(str(failure)) from failure
        typer.echo(f"{name}: {path}")


@app.command()
def doctor() -> None:
    """Show what this machine has and which engines work; test them numerically and time them."""
    from tilewise import doctor as examination

    for name, value in examination.facts().items():
        typer.echo(f"{name:<14}{value}")
    passed = True
    for check in examination.self_test():
        typer.echo(check.line())
        passed = passed and check.passed
    if not passed:
        raise typer.Exit(1)
