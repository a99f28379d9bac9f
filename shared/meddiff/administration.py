"""``meddiff admin``: what an operator does, on the object store itself. Whoever may reach the store may do it all."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from meddiff import hub
from meddiff.contracts.access import Role

if TYPE_CHECKING:
    from meddiff.settings import Settings
    from meddiff.store.objects import ObjectStore

STACK_FOLDER = Path("out/stack")
WEIGHED = ("unet", "vae", "text_encoder")

admin = typer.Typer(no_args_is_help=True, help="Keys and housekeeping, on the store that MEDDIFF_S3_… names.")
keys = typer.Typer(no_args_is_help=True, help="API keys: made, listed, revoked.")
admin.add_typer(keys, name="keys")

Json = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]


@keys.command()
def create(
    tenant: Annotated[str, typer.Option(help="Lower-case letters, digits and hyphens.")],
    role: Annotated[Role, typer.Option(help="reader looks, operator also starts jobs, admin also deletes.")],
    label: Annotated[str, typer.Option(help="Whose key it is, for the list.")] = "",
    as_json: Json = False,
) -> None:
    """Make a key and print its token, which is shown this once and stored nowhere."""
    with _store() as store:
        from meddiff import access

        made = access.create_key(store, tenant, role, label)
    typer.echo(made.model_dump_json(indent=2) if as_json else made.token)


@keys.command("list")
def list_(as_json: Json = False) -> None:
    """List every key, revoked ones too."""
    with _store() as store:
        from meddiff import access

        found = access.list_keys(store)
    if as_json:
        typer.echo(json.dumps([key.model_dump(mode="json") for key in found], indent=2))
        return
    table = Table(Column("id", no_wrap=True), "tenant", "role", "label", "created", "revoked", box=None)
    for key in found:
        revoked = f"{key.revoked_at:%Y-%m-%d %H:%M}" if key.revoked_at is not None else ""
        table.add_row(key.id, key.tenant, key.role, key.label, f"{key.created_at:%Y-%m-%d %H:%M}", revoked)
    Console(width=120).print(table)


@keys.command()
def revoke(key_id: Annotated[str, typer.Argument(metavar="ID", help="As the list shows it.")]) -> None:
    """Revoke a key; a gateway refuses it within seconds."""
    with _store() as store:
        from meddiff import access
        from meddiff.store.objects import NotFound

        try:
            access.revoke_key(store, key_id)
        except NotFound:
            typer.echo("there is no key of that id", err=True)
            raise typer.Exit(1) from None
    typer.echo(f"revoked: {key_id}")


@admin.command()
def fsck(
    repair: Annotated[bool, typer.Option("--repair", help="Remove what nothing needs.")] = False,
    as_json: Json = False,
) -> None:
    """Check every manifest against its pictures' bytes, and list what no job, model or dataset owns.

    Ends with 1 where something is missing or altered, or where orphans are left.
    """
    with _store() as store:
        from meddiff import housekeeping

        now, verified = datetime.now(UTC), housekeeping.Verified()
        found = list(housekeeping.fsck(store, now, verified))
        removed = housekeeping.tidy(store, now) if repair else 0
    counts = Counter(finding.kind for finding in found)
    if as_json:
        whole = {"manifests": verified.manifests, "pictures": verified.pictures, "removed": removed}
        typer.echo(json.dumps(whole | {"findings": [asdict(finding) for finding in found]}, indent=2))
    else:
        for finding in found:
            typer.echo(f"{finding.kind}: {finding.key} ({finding.why})")
        sums = ", ".join(f"{counts[kind]} {kind}" for kind in ("missing", "altered", "orphan", "unknown"))
        typer.echo(f"{verified.manifests} manifests, {verified.pictures} pictures: {sums}; {removed} removed")
    raise typer.Exit(1 if counts["missing"] or counts["altered"] or (counts["orphan"] and not repair) else 0)


@admin.command()
def bucket(
    access_key: Annotated[Path | None, typer.Option(help="A file: access key the service is to have.")] = None,
    secret_key: Annotated[Path | None, typer.Option(help="A file: its secret key.")] = None,
    read: Annotated[list[str] | None, typer.Option(help="Another bucket that the service may read.")] = None,
) -> None:
    """Make the service's bucket and the others named, and in MinIO a user who may use the first, read the others and no
    more. Again changes nothing.

    The credentials of the environment are those of the store's administrator.
    """
    with _store() as store:
        for one in (store, *map(store.of_bucket, read or ())):
            one.ensure_bucket()
        if access_key is not None and secret_key is not None:
            from meddiff.settings import Settings
            from meddiff.store.minio_admin import admit

            admit(Settings(), access_key.read_text().strip(), secret_key.read_text().strip(), read or ())
    typer.echo(f"the bucket {store.bucket} is there")


@admin.command()
def mirror(
    source: Annotated[str, typer.Argument(help="A folder, or the id of a model on the hub.")],
    to: Annotated[str, typer.Argument(help="s3://bucket/prefix, which recipes name then as their source.")],
) -> None:
    """Copy a foundation or an encoder into the object store, so that workers ask no hub. Weights as safetensors only.

    The bucket is made where it is missing, and has to be among the service's MEDDIFF_S3_MODELS.
    """
    bucket, _, prefix = to.removeprefix("s3://").strip("/").partition("/")
    if not to.startswith("s3://") or not prefix:
        raise typer.BadParameter("it is s3://bucket/prefix", param_hint="TO")
    folder = Path(source) if Path(source).is_dir() else _downloaded(source)
    there = (PurePosixPath(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    files = [folder / name for name in hub.used(there)]
    last = next((path for name in hub.INDICES if (path := folder / name) in files), None)
    if last is None:
        typer.echo(f"{source} holds none of {' and '.join(hub.INDICES)}", err=True)
        raise typer.Exit(1)
    parts = [folder / part for part in WEIGHED] if last.name == hub.INDICES[0] else [folder]
    weights = {path.parent for path in files if path.suffix == ".safetensors"}
    if lacking := [part.name for part in parts if part not in weights]:
        typer.echo(f"{source} holds no safetensors of: {', '.join(lacking)}", err=True)
        raise typer.Exit(1)
    with _store() as store:
        target = store.of_bucket(bucket)
        target.ensure_bucket()
        for path in sorted(files, key=lambda path: path == last):  # With it the model counts as whole.
            target.upload_file(f"{prefix}/{path.relative_to(folder).as_posix()}", path)
            typer.echo(f"{path.relative_to(folder)}: {path.stat().st_size / 2**20:.1f} MiB")
    typer.echo(f"a recipe's source is now {to.rstrip('/')}")


def _downloaded(hub_id: str) -> Path:
    try:
        return hub.download(hub_id)
    except ModuleNotFoundError:
        typer.echo(
            f"{hub_id} is no folder, and the hub's client comes with: pip install '.[worker]' in a checkout", err=True
        )
    except (OSError, ValueError) as error:
        typer.echo(f"{hub_id} cannot be had from the hub: {type(error).__name__}", err=True)
    raise typer.Exit(1)


@contextmanager
def _store() -> Iterator[ObjectStore]:
    """The service's store: that of the environment, else of the stack in ``STACK_FOLDER``. Faults end the command
    without a trace."""
    try:
        from meddiff.settings import Settings
        from meddiff.store.objects import ObjectStore, StoreError
    except ModuleNotFoundError as error:
        typer.echo(f"{error.name} is missing; it comes with: pip install '.[gateway]' in a checkout", err=True)
        raise typer.Exit(1) from None
    try:
        settings = Settings() if "MEDDIFF_S3_ENDPOINT" in os.environ else _embedded()
        yield ObjectStore.from_settings(settings or Settings())
    except (StoreError, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None


def _embedded() -> Settings | None:
    if not (STACK_FOLDER / "stack.json").exists():
        return None
    from meddiff.embedded import stack

    running = stack.read(STACK_FOLDER)
    try:
        return running.settings if running is not None else None
    except stack.StackError as error:
        raise ValueError(str(error)) from None
