"""The command line: the Python client, and the embedded stack to run it against."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Column, Table

from meddiff.administration import admin
from meddiff.client import Client, ServiceError
from meddiff.contracts.base import Contract
from meddiff.contracts.jobs import ENDED, Job, Kind, Status
from meddiff.contracts.problems import Fault, Problem
from meddiff.contracts.requests import DEFAULT_RECIPE, EvaluateRequest
from meddiff.watching import describe, watch

STACK_FOLDER = Path("out/stack")
DEFAULT_URL = "http://127.0.0.1:8080"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Synthetic image-mask pairs from about thirty annotated images.",
)
app.add_typer(admin, name="admin")
out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)

Url = Annotated[
    str | None,
    typer.Option(envvar="MEDDIFF_URL", help=f"The service; else the stack in {STACK_FOLDER}, else {DEFAULT_URL}."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]
Detach = Annotated[bool, typer.Option("--detach", help="Do not wait for the job to end.")]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PART.FIELD=VALUE", help="Change a value of the recipe; repeatable."),
]
Folder = Annotated[Path, typer.Option(help="The stack's state, logs and data.")]


@app.command()
def up(
    folder: Folder = STACK_FOLDER,
    inpainters: Annotated[int, typer.Option(min=1, help="Inpainter processes.")] = 2,
    data: Annotated[Path | None, typer.Option(help="Where the objects lie; else in the stack's folder.")] = None,
    file_root: Annotated[
        list[Path] | None, typer.Option(help="A folder that file:// URIs may read; repeatable.")
    ] = None,
    port: Annotated[int, typer.Option(help="The gateway's port; 0: 8080 or, where it is taken, any free one.")] = 0,
) -> None:
    """Start Redis, S3 and the five services in the background."""
    with _all_installed():
        from meddiff.embedded import stack

    running = stack.read(folder)
    if running is not None and len(running.dead) == len(running.members):  # After a restart of the machine, say.
        stack.down(folder)
        running = None
    if running is not None:
        out.print(f"already up: {running.address}")
        for member in running.dead:
            err.print(f"{member.name} has ended; the end of {member.log}:\n{member.log_tail()}", markup=False)
        if running.dead:
            err.print("take the rest down with: meddiff down")
        raise typer.Exit(1 if running.dead else 0)
    try:
        started = stack.up(folder, inpainters=inpainters, data=data, file_roots=file_root or (), port=port)
    except stack.StackError as error:
        err.print(str(error), markup=False)
        raise typer.Exit(1) from None
    out.print(f"up: {started.address} (logs in {folder / 'logs'}; stop it with: meddiff down)")


@app.command()
def down(folder: Folder = STACK_FOLDER) -> None:
    """Stop everything that `up` started."""
    with _all_installed():
        from meddiff.embedded import stack

    ended = stack.down(folder)
    out.print(f"stopped: {', '.join(member.name for member in ended)}" if ended else "nothing was up")


@app.command()
def finetune(
    dataset: Annotated[
        str, typer.Argument(help="A dataset id, an s3:// or file:// URI, a local folder or zip archive.")
    ],
    name: Annotated[str | None, typer.Option(help="A name for the model.")] = None,
    recipe: Annotated[str, typer.Option(help="paper, gpu or cpu.")] = DEFAULT_RECIPE.name,
    changes: Changes = None,
    max_pairs: Annotated[int | None, typer.Option(help="Pairs to learn from; else the recipe's.")] = None,
    split_seed: Annotated[int, typer.Option(help="Which pairs are drawn, where there are more.")] = 0,
    detach: Detach = False,
    as_json: Json = False,
    url: Url = None,
) -> None:
    """Make a model from a dataset of image-mask pairs."""
    with _client(url) as client:
        job = client.finetune(
            _imported(client, dataset),
            name=name,
            recipe=recipe,
            override=_override(changes),
            max_pairs=max_pairs,
            split_seed=split_seed,
        )
        _follow(client, job, detach=detach, as_json=as_json)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A model's id or name.")],
    count: Annotated[int, typer.Option(help="Accepted pairs to deliver.")] = 32,
    seed: int = 0,
    start_index: Annotated[int, typer.Option(help="Go on from an earlier job's next_start_index.")] = 0,
    masks: Annotated[str | None, typer.Option(help="Take the masks of this dataset: an id, a folder or a zip.")] = None,
    backgrounds: Annotated[str | None, typer.Option(help="Take the backgrounds of this dataset: likewise.")] = None,
    changes: Changes = None,
    detach: Detach = False,
    as_json: Json = False,
    url: Url = None,
) -> None:
    """Make synthetic image-mask pairs with a model."""
    with _client(url) as client:
        job = client.generate(
            model,
            count,
            seed=seed,
            start_index=start_index,
            masks=_imported(client, masks) if masks else None,
            backgrounds=_imported(client, backgrounds) if backgrounds else None,
            override=_override(changes),
        )
        _follow(client, job, detach=detach, as_json=as_json)


@app.command()
def evaluate(
    dataset: Annotated[
        str, typer.Argument(help="A dataset id, an s3:// or file:// URI, a local folder or zip archive.")
    ],
    model: Annotated[str | None, typer.Option(help="Judge pairs that this model makes.")] = None,
    synthetic_job: Annotated[str | None, typer.Option(help="Judge the pairs of this generate job.")] = None,
    folds: Annotated[int | None, typer.Option(help="Fit a generator for each of so many folds.")] = None,
    draws: Annotated[int | None, typer.Option(help="Fit a generator for each of so many draws.")] = None,
    train: Annotated[int | None, typer.Option(help="Cases that train in each draw; else the recipe's.")] = None,
    test: Annotated[str | None, typer.Option(help="A dataset to test on, where the pairs are given.")] = None,
    pairs: Annotated[list[int] | None, typer.Option(help="Synthetic pairs to train with; repeatable.")] = None,
    arms: Annotated[
        list[str] | None, typer.Option("--arm", help="synthetic, copy-paste or oracle; repeatable, else all.")
    ] = None,
    mixing: Annotated[list[str] | None, typer.Option(help="joint, falling or pretrain; repeatable.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Segmenters of each arm and split.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Of splits, pairs and segmenters.")] = 0,
    recipe: Annotated[str, typer.Option(help="paper, gpu or cpu.")] = DEFAULT_RECIPE.name,
    changes: Changes = None,
    page: Annotated[Path | None, typer.Option(help="Write the report there, as one HTML page.")] = None,
    detach: Detach = False,
    as_json: Json = False,
    url: Url = None,
) -> None:
    """Find out what synthetic pairs are worth: Dice with and without them, on cases that had no part in making them."""
    choices: dict[str, Any] = {
        "model": model, "synthetic_job": synthetic_job, "folds": folds, "draws": draws,
        "train": train, "seeds": seeds, "seed": seed, "recipe": {"name": recipe, "override": _override(changes)},
    }  # fmt: skip
    choices |= {name: given for name, given in (("synthetic", pairs), ("arms", arms), ("mixing", mixing)) if given}
    with _client(url) as client:
        EvaluateRequest(dataset_uri=dataset, test_uri=test, **choices)  # Its faults, before anything is imported.
        named = [one for one in (dataset, test) if one is not None]
        for one in named:
            _refuse_absent(one)
        imported, *tested = [_imported(client, one) for one in named]
        job = client.evaluate(imported, test_uri=tested[0] if tested else None, **choices)
        _follow(client, job, detach=detach, as_json=as_json, on_success=lambda: _keep_page(client, job, page))


def _keep_page(client: Client, job: Job, page: Path | None) -> None:
    if page is not None:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_bytes(client.report_page(job.id))
        err.print(f"the report is in {page}")


@app.command()
def jobs(
    job: Annotated[str | None, typer.Argument(help="One job, in full.")] = None,
    kind: Annotated[Kind | None, typer.Option(help="Only of this kind.")] = None,
    status: Annotated[Status | None, typer.Option(help="Only of this status.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most as many.")] = 20,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the one job until it has ended.")] = False,
    as_json: Json = False,
    url: Url = None,
) -> None:
    """List jobs, newest first, or show one."""
    with _client(url) as client:
        if job is not None:
            _follow(client, client.job(job), detach=not wait, as_json=as_json)
            return
        found = [one for one, _ in zip(client.jobs(kind=kind, status=status), range(limit), strict=False)]
    if as_json:
        _print_json(found)
        return
    table = Table(Column("id", no_wrap=True), "kind", "status", "stage", "progress", "created", box=None)
    for one in found:
        progress = f"{one.progress.done}/{one.progress.total} {one.progress.unit}" if one.progress else ""
        created = f"{one.created_at:%m-%d %H:%M} UTC"
        table.add_row(one.id, one.kind, one.status, "" if one.status in ENDED else one.stage or "", progress, created)
    _print_table(table)


@app.command()
def cancel(job: str, as_json: Json = False, url: Url = None) -> None:
    """Ask a job to stop."""
    with _client(url) as client:
        _print_job(client.cancel(job), as_json=as_json)


@app.command()
def pull(
    job: str,
    folder: Annotated[Path | None, typer.Argument(help="Where to; else out/JOB.")] = None,
    as_json: Json = False,
    url: Url = None,
) -> None:
    """Fetch a job's manifest, pairs and contact sheet; an interrupted pull goes on where it was."""
    target = folder or Path("out") / job
    with _client(url) as client, err.status("fetching") as shown:
        manifest = client.pull(job, target, lambda done, total: shown.update(f"fetching {done}/{total} pictures"))
    if as_json:
        _print_json(manifest)
    else:
        out.print(f"{len(manifest.pairs)} pairs in {target}, every SHA-256 right")


@app.command()
def validate(
    dataset: Annotated[
        str, typer.Argument(help="A dataset id, an s3:// or file:// URI, a local folder or zip archive.")
    ],
    as_json: Json = False,
    url: Url = None,
) -> None:
    """Judge a dataset, naming every fault."""
    with _client(url) as client:
        _refuse_absent(dataset)
        report = client.validate(Path(dataset) if Path(dataset).exists() else dataset)
    if as_json:
        _print_json(report)
    else:
        counts = f"{report.pairs} pairs, {report.backgrounds} backgrounds, {report.unlabelled} unlabelled"
        out.print(f"{'valid' if report.valid else 'not valid'}: layout {report.layout or 'unknown'}, {counts}")
        for note in report.notes:
            out.print(f"  {note}", markup=False)
        _print_faults(report.errors)
    raise typer.Exit(0 if report.valid else 1)


@app.command()
def models(
    model: Annotated[str | None, typer.Argument(help="One model's card, in full.")] = None,
    as_json: Json = False,
    url: Url = None,
) -> None:
    """List models, newest first, or show one's card."""
    with _client(url) as client:
        if model is not None:
            _print_json(client.model(model))
            return
        found = client.models()
    if as_json:
        _print_json(found)
        return
    table = Table(Column("id", no_wrap=True), "name", "recipe", "cases", "created", box=None)
    for card in found:
        created = f"{card.created_at:%m-%d %H:%M} UTC"
        table.add_row(card.id, card.name or "", card.recipe.name, str(len(card.cases)), created)
    _print_table(table)


@app.command()
def demo(
    dataset: Annotated[
        Path | None,
        typer.Option(help="A folder in a known layout; else phantoms are drawn.", exists=True, file_okay=False),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Pairs to make.")] = 32,
    to: Annotated[Path, typer.Option("--out", help="Where the results go.")] = Path("out/demo"),
) -> None:
    """Run the main job on a stack of its own: fine-tune, generate, pull, and take the stack down again."""
    with _all_installed():
        from meddiff.demo import run

    with _faults_printed():
        succeeded = run(dataset, count, to, out)
    raise typer.Exit(0 if succeeded else 1)


# ------------------------------------------------------------------------------------------------------------- parts


@contextmanager
def _client(url: str | None) -> Iterator[Client]:
    with _faults_printed(), Client(url or _address()) as client:
        yield client


def _imported(client: Client, dataset: str) -> str:
    """The id of a dataset that lies on this machine, once it is imported; else what was given. Raises as
    ``_refuse_absent`` does."""
    _refuse_absent(dataset)
    if Path(dataset).exists():
        err.print("importing the dataset")
        return client.upload(Path(dataset)).id
    return dataset


def _refuse_absent(dataset: str) -> None:
    """Raises ``ValueError`` for what is neither on this machine nor of the form of an address or an id."""
    if not (Path(dataset).exists() or "://" in dataset or dataset.startswith("ds_")):
        raise ValueError(f"no folder or archive of that name is here: {dataset}")


def _address() -> str:
    """Of the stack in ``STACK_FOLDER``, where one is up."""
    state = STACK_FOLDER / "stack.json"
    return str(json.loads(state.read_bytes())["address"]) if state.exists() else DEFAULT_URL


@contextmanager
def _all_installed() -> Iterator[None]:
    """The client installs without what the embedded stack needs."""
    try:
        yield
    except ModuleNotFoundError as error:
        err.print(
            f"{error.name} is missing; the embedded stack comes with: pip install '.[all]' in a checkout", markup=False
        )
        raise typer.Exit(1) from None


@contextmanager
def _faults_printed() -> Iterator[None]:
    """Ends the command with the problem's faults, not with a trace."""
    try:
        yield
    except ServiceError as error:
        _print_problem(error.problem)
        raise typer.Exit(1) from None
    except ValidationError as error:
        for one in error.errors():
            field = ".".join(map(str, one["loc"])) or "request"
            err.print(f"  {field}: {one['msg'].removeprefix('Value error, ')}", markup=False, highlight=False)
        raise typer.Exit(1) from None
    except httpx.TransportError as error:
        err.print(f"the service does not answer ({error}); is it up? Start one with: meddiff up", markup=False)
        raise typer.Exit(1) from None
    except (ValueError, OSError, httpx.InvalidURL) as error:  # What was given, or this machine's disk.
        err.print(str(error), markup=False)
        raise typer.Exit(1) from None


def _follow(
    client: Client, job: Job, *, detach: bool, as_json: bool, on_success: Callable[[], None] = lambda: None
) -> None:  # fmt: skip
    if detach:
        _print_job(job, as_json=as_json)
        return
    err.print(f"{job.kind} {job.id}")
    try:
        job = watch(client, job.id, err)
    except KeyboardInterrupt:
        err.print(f"the job goes on; stop it with: meddiff cancel {job.id}")
        raise typer.Exit(130) from None
    except (httpx.TransportError, ServiceError) as error:
        if isinstance(error, ServiceError) and error.problem.status < 500:
            raise
        err.print(f"follow the job again with: meddiff jobs {job.id} --wait")
        raise
    _print_job(job, as_json=as_json)
    if job.status == "succeeded":
        on_success()
    raise typer.Exit(0 if job.status == "succeeded" else 1)


def _override(changes: list[str] | None) -> dict[str, Any]:
    """``["finetuning.steps=50"]`` as ``{"finetuning": {"steps": 50}}``; a value that is not JSON is a string."""
    found: dict[str, Any] = {}
    for change in changes or ():
        path, equals, text = change.partition("=")
        if not equals:
            raise typer.BadParameter(f"not of the form PART.FIELD=VALUE: {change}", param_hint="--set")
        *parents, field = path.split(".")
        part = found
        for parent in parents:
            part = part.setdefault(parent, {})
            if not isinstance(part, dict):
                raise typer.BadParameter(f"{parent} is given a value of its own: {change}", param_hint="--set")
        try:
            part[field] = json.loads(text)
        except ValueError:
            part[field] = text
    return found


def _print_json(answer: Contract | list[Job] | tuple[Contract, ...]) -> None:
    value = (
        answer.model_dump(mode="json") if isinstance(answer, Contract) else [a.model_dump(mode="json") for a in answer]
    )
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def _print_table(table: Table) -> None:
    """A line a row, however narrow the terminal: ids are there to be copied."""
    Console(width=max(out.width, 120)).print(table)


def _print_job(job: Job, *, as_json: bool) -> None:
    if as_json:
        _print_json(job)
        return
    out.print(f"{job.kind} {job.id}: {describe(job) if job.status not in ENDED else job.status}", highlight=False)
    for key, value in (job.result or {}).items():
        out.print(f"  {key}: {value}", markup=False, highlight=False)
    if job.problem is not None:
        _print_problem(job.problem)


def _print_problem(problem: Problem) -> None:
    err.print(f"{problem.title}: {problem.detail}", markup=False, highlight=False)
    if problem.status == 401:
        err.print("the key is taken from MEDDIFF_API_KEY", markup=False)
    _print_faults(problem.errors)


def _print_faults(faults: tuple[Fault, ...]) -> None:
    for fault in faults:
        err.print(f"  {fault.pointer}: {fault.detail}", markup=False, highlight=False)


if __name__ == "__main__":
    app()
