"""The command line against a real gateway: answers, JSON, faults and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import pytest
from gateways import Gateway, started, variables
from meddiff.cli import app
from meddiff.client import Client
from meddiff.contracts.ids import created_at, uuid7
from meddiff.contracts.jobs import End, EndStatus, Job, Progress
from meddiff.contracts.problems import problem
from meddiff.contracts.recipes import CPU
from meddiff.store.keys import JobKeys
from meddiff.store.objects import ObjectStore
from meddiff.watching import describe
from stored import archive, put_dataset, put_generated, put_model
from typer.testing import CliRunner, Result


@pytest.fixture
def meddiff(gateway: Gateway) -> Command:
    return Command(gateway)


class Command:
    """``meddiff`` with the gateway's address in its environment."""

    def __init__(self, gateway: Gateway) -> None:
        self._environment = {"MEDDIFF_URL": gateway.url, "COLUMNS": "200"}

    def __call__(self, *arguments: str) -> Result:
        result = CliRunner().invoke(app, list(arguments), env=self._environment)
        assert "Traceback" not in result.output
        return result


def dataset_of(gateway: Gateway) -> str:
    return put_dataset(gateway.store, gateway.tenant).id


def test_finetune_detached_prints_the_job(meddiff: Command, gateway: Gateway) -> None:
    changes = ["--set", "finetuning.steps=9", "--set", "finetuning.prompt=a spot", "--set", "work.shard_size=4"]
    result = meddiff("finetune", dataset_of(gateway), *changes, "--detach", "--json")
    assert result.exit_code == 0
    recipe = json.loads(result.stdout)["recipe"]
    assert (recipe["finetuning"]["steps"], recipe["finetuning"]["prompt"]) == (9, "a spot")
    assert recipe["work"]["shard_size"] == 4


def test_finetune_imports_a_local_folder_first(meddiff: Command, tmp_path: Path) -> None:
    (tmp_path / "dataset.zip").write_bytes(archive())
    zipfile.ZipFile(tmp_path / "dataset.zip").extractall(tmp_path / "dataset")
    result = meddiff("finetune", str(tmp_path / "dataset"), "--detach", "--json")
    assert json.loads(result.stdout)["request"]["dataset_uri"].startswith("ds_")


def test_generate_imports_a_local_dataset_to_take_masks_from(
    meddiff: Command, gateway: Gateway, tmp_path: Path
) -> None:
    (tmp_path / "masks.zip").write_bytes(archive())
    card = put_model(gateway.store, gateway.tenant, put_dataset(gateway.store, gateway.tenant))
    result = meddiff("generate", card.id, "--masks", str(tmp_path / "masks.zip"), "--detach", "--json")
    assert json.loads(result.stdout)["request"]["masks"].startswith("ds_")


def test_every_fault_is_listed_and_the_exit_code_says_so(meddiff: Command, gateway: Gateway) -> None:
    result = meddiff("finetune", dataset_of(gateway), "--max-pairs", "1", "--set", "work.shard_size=0", "--name", "a b")
    assert result.exit_code == 1
    for pointer in ("/max_pairs", "/recipe/override/work/shard_size", "/name"):
        assert pointer in result.stderr


def test_an_evaluation_s_faults_are_listed_before_anything_is_imported(meddiff: Command, tmp_path: Path) -> None:
    (tmp_path / "dataset.zip").write_bytes(archive())
    dataset = str(tmp_path / "dataset.zip")
    for options, told in (
        (("--folds", "1"), "folds: "),
        (("--folds", "2", "--draws", "2"), "request: draws and train"),
    ):
        result = meddiff("evaluate", dataset, *options)
        assert result.exit_code == 1
        assert told in result.stderr
        assert "importing" not in result.stderr


@pytest.mark.parametrize("command", ["finetune", "evaluate", "validate"])
def test_a_folder_that_is_not_there_is_named(meddiff: Command, command: str) -> None:
    result = meddiff(command, "out/no-such-folder")
    assert result.exit_code == 1
    assert "no folder or archive of that name is here: out/no-such-folder" in result.stderr


def test_a_change_of_no_form_is_a_usage_error(meddiff: Command, gateway: Gateway) -> None:
    result = meddiff("finetune", dataset_of(gateway), "--set", "steps")
    assert result.exit_code == 2
    assert "PART.FIELD=VALUE" in result.stderr
    twice = meddiff("finetune", dataset_of(gateway), "--set", "finetuning=5", "--set", "finetuning.steps=3")
    assert twice.exit_code == 2
    assert "a value of its own" in twice.stderr


@pytest.mark.parametrize(("status", "code"), [("succeeded", 0), ("incomplete", 1), ("failed", 1), ("cancelled", 1)])
def test_generate_is_watched_to_its_end(meddiff: Command, gateway: Gateway, status: EndStatus, code: int) -> None:
    card = put_model(gateway.store, gateway.tenant, put_dataset(gateway.store, gateway.tenant))
    ending = threading.Thread(target=end_soon, args=(gateway, card.id, status))
    ending.start()
    result = meddiff("generate", card.id, "--count", "3", "--seed", "4")
    ending.join()
    assert result.exit_code == code
    assert f": {status}" in result.stdout
    assert f"  {status}" in result.stderr
    assert ("too few" in result.stderr) == (status == "incomplete")


def end_soon(gateway: Gateway, model_id: str, status: EndStatus) -> None:
    """Ends the model's job once there is one."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for job in gateway.http.get("/jobs", params={"kind": "generate"}).json()["jobs"]:
            if job["request"]["model"] == model_id:
                trouble = problem("attempts-exhausted", "too few") if status == "incomplete" else None
                end = End(status=status, finished_at=datetime.now(UTC), result={"accepted": 1}, problem=trouble)
                gateway.store.create_json(JobKeys(gateway.tenant, job["id"]).end, end)
                return
        time.sleep(0.05)


def test_jobs_are_listed_shown_and_cancelled(meddiff: Command, gateway: Gateway) -> None:
    job_id = json.loads(meddiff("finetune", dataset_of(gateway), "--detach", "--json").stdout)["id"]
    assert job_id in meddiff("jobs").stdout
    assert job_id not in meddiff("jobs", "--kind", "generate").stdout
    assert job_id in meddiff("cancel", job_id).stdout
    assert json.loads(meddiff("jobs", job_id, "--json").stdout)["status"] in ("cancelling", "cancelled")
    listed = json.loads(meddiff("jobs", "--limit", "2", "--json").stdout)
    assert listed[0]["id"] == job_id
    missing = meddiff("cancel", "nonsense")
    assert (missing.exit_code, "no job" in missing.stderr) == (1, True)


def test_pull(meddiff: Command, gateway: Gateway, tmp_path: Path) -> None:
    made = put_generated(gateway.store, gateway.tenant)
    result = meddiff("pull", made.spec.id, str(tmp_path / "here"))
    assert (result.exit_code, "2 pairs" in result.stdout) == (0, True)
    assert len(list((tmp_path / "here" / "pairs").glob("*.png"))) == 8
    gateway.store.put(JobKeys(gateway.tenant, made.spec.id).candidate(0, "image"), b"another")
    result = meddiff("pull", made.spec.id, str(tmp_path / "there"))
    assert (result.exit_code, "SHA-256" in result.stderr) == (1, True)


def test_what_this_machine_refuses_is_said(meddiff: Command, gateway: Gateway, tmp_path: Path) -> None:
    made = put_generated(gateway.store, gateway.tenant)
    (tmp_path / "file").write_bytes(b"x")
    result = meddiff("pull", made.spec.id, str(tmp_path / "file" / "there"))
    assert (result.exit_code, "Not a directory" in result.stderr) == (1, True)


def test_a_stack_that_has_ended_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = tmp_path / "out" / "stack"
    stack.mkdir(parents=True)
    (stack / "stack.json").write_text('{"address": "http://127.0.0.1:1", "members": []}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEDDIFF_S3_ENDPOINT", raising=False)
    result = CliRunner().invoke(app, ["admin", "keys", "list"])
    assert (result.exit_code, "gateway has ended" in result.stderr) == (1, True)


def test_a_demo_removes_no_manifest_that_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("mine")
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)])
    assert (result.exit_code, "manifest.json is no demo's" in result.stderr) == (1, True)
    assert (tmp_path / "manifest.json").read_text() == "mine"


@pytest.mark.parametrize("dataset", ["phantoms", "pairs/of a patient", ".", "elsewhere"])
def test_a_demo_removes_no_dataset(tmp_path: Path, dataset: str) -> None:
    """A folder that it would clear: as the dataset, or because no demo has left it."""
    kept = [tmp_path / "phantoms" / "a.png", tmp_path / "pairs" / "of a patient" / "b.png"]
    for file in (*kept, tmp_path / "elsewhere" / "c.png"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")
    if dataset != "elsewhere":
        (tmp_path / ".demo").touch()
    told = CliRunner().invoke(app, ["demo", "--dataset", str(tmp_path / dataset), "--out", str(tmp_path)])
    assert told.exit_code == 1
    assert "remove" in told.output
    assert all(file.exists() for file in kept)


def test_validate_names_every_fault(meddiff: Command, tmp_path: Path) -> None:
    (tmp_path / "good.zip").write_bytes(archive())
    (tmp_path / "bad.zip").write_bytes(archive(mask_size=(9, 9)))
    good = meddiff("validate", str(tmp_path / "good.zip"))
    assert (good.exit_code, "valid" in good.stdout, "3 pairs" in good.stdout) == (0, True, True)
    bad = meddiff("validate", str(tmp_path / "bad.zip"))
    assert (bad.exit_code, "not valid" in bad.stdout) == (1, True)
    for n in range(3):
        assert f"masks/{n}.png" in bad.stderr
    refused = meddiff("validate", "s3://elsewhere/pairs")
    assert (refused.exit_code, "/dataset_uri" in refused.stderr) == (1, True)


def test_models(meddiff: Command, gateway: Gateway) -> None:
    card = put_model(gateway.store, gateway.tenant, put_dataset(gateway.store, gateway.tenant), "shown")
    assert card.id in meddiff("models").stdout
    assert json.loads(meddiff("models", "shown").stdout)["id"] == card.id
    assert card.id in {model["id"] for model in json.loads(meddiff("models", "--json").stdout)}


def test_without_a_service_it_says_how_to_start_one(tmp_path: Path) -> None:
    for url, words in (("http://127.0.0.1:9", "meddiff up"), ("http://host:abc", "Invalid port")):
        command = [sys.executable, "-m", "meddiff.cli", "models", "--url", url]
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert (ended.returncode, ended.stdout) == (1, "")
        assert words in ended.stderr
        assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("command", ["up", "demo"])
def test_without_the_stack_installed_it_says_what_to_install(command: str, tmp_path: Path) -> None:
    script = f"import sys; sys.modules['psutil'] = None; from meddiff.cli import app; app([{command!r}])"
    ended = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ".[all]" in ended.stderr) == (1, True)
    assert "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_progress_reads_plainly() -> None:
    job = Job(
        id=uuid7(),
        kind="finetune",
        status="running",
        stage="inpainter",
        progress=Progress(done=60, total=360, unit="steps"),
        eta_seconds=75.2,
        created_at=created_at(uuid7()),
        request={},
        recipe=CPU,
    )
    assert describe(job) == "inpainter, 60/360 steps, about 1 min 15 s left"
    waiting = job.model_copy(update={"status": "queued", "progress": None, "eta_seconds": None, "queue_position": 2})
    assert describe(waiting) == "queued, place 2 in the queue"


def test_keys_are_made_used_listed_and_revoked(gateway: Gateway, tmp_path: Path) -> None:
    with started(gateway.settings.model_copy(update={"require_keys": True}), tmp_path) as guarded:
        environment = variables(guarded.settings) | {"MEDDIFF_URL": guarded.url}

        def run(*arguments: str, **more: str) -> Result:
            result = CliRunner().invoke(app, list(arguments), env=environment | more)
            assert "Traceback" not in result.output
            return result

        refused = run("jobs")
        assert (refused.exit_code, "API key" in refused.stderr) == (1, True)
        made = json.loads(run("admin", "keys", "create", "--tenant", "eye", "--role", "reader", "--json").stdout)
        assert made["key"]["tenant"] == "eye"
        assert run("jobs", MEDDIFF_API_KEY=made["token"]).exit_code == 0
        with Client(guarded.url, key=made["token"]) as client:
            assert list(client.jobs()) == []
        assert made["key"]["id"] in run("admin", "keys", "list").stdout
        assert run("admin", "keys", "revoke", made["key"]["id"]).exit_code == 0
        listed = json.loads(run("admin", "keys", "list", "--json").stdout)
        assert [key["revoked_at"] is not None for key in listed if key["id"] == made["key"]["id"]] == [True]
        assert run("admin", "keys", "revoke", "0" * 16).exit_code == 1
        assert run("admin", "keys", "create", "--tenant", "A/B", "--role", "reader").exit_code == 1


def test_fsck_names_what_is_wrong_and_repairs_what_is_left_over(gateway: Gateway) -> None:
    settings = gateway.settings.model_copy(update={"s3_bucket": f"fsck-{uuid7()}"})
    store = ObjectStore.from_settings(settings)
    store.ensure_bucket()
    made = put_generated(store, "local")
    surplus = JobKeys("local", made.spec.id).candidate(99, "image")
    store.put(surplus, b"x")

    def fsck(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["admin", "fsck", *arguments], env=variables(settings))

    told = fsck()
    assert (told.exit_code, f"orphan: {surplus}" in told.stdout) == (1, True)
    assert fsck("--repair").exit_code == 0
    told = fsck("--json")
    assert (told.exit_code, json.loads(told.stdout)["findings"]) == (0, [])
    store.put(made.manifest.pairs[0].label.key, b"other")
    told = fsck()
    assert (told.exit_code, "altered: " in told.stdout) == (1, True)
