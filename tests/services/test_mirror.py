"""A model in the object store stands in for the hub's, and workers ask no hub."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path, PurePosixPath
from uuid import uuid4

import pytest
from hub import serving
from meddiff.cli import app
from meddiff.hub import used, variant_of
from meddiff.settings import Settings
from meddiff.store.objects import ObjectStore
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model
from typer.testing import CliRunner

sys.path.append(str(Path(__file__).parents[1] / "science"))
from tiny import write_checkpoint

LOADS = """
import sys
from meddiff.contracts.recipes import CPU, override
from meddiff.settings import Settings
from meddiff.store.objects import ObjectStore
from meddiff_services import loading

settings = Settings()
store = ObjectStore.from_settings(settings)
quality = {"encoder": "dinov2", "encoder_source": sys.argv[1] + "/dino"}
recipe = override(CPU, {"foundation": {"source": sys.argv[1] + "/sd"}, "quality": quality})
print(loading.load_foundation(recipe.foundation, settings, store).sha256)
print(type(loading.load_encoder(recipe.quality, settings, store)).__name__)
"""


@pytest.fixture
def environment(settings: Settings, store: ObjectStore) -> dict[str, str]:
    return {
        "MEDDIFF_S3_ENDPOINT": settings.s3_endpoint,
        "MEDDIFF_S3_ACCESS_KEY": settings.s3_access_key.get_secret_value(),
        "MEDDIFF_S3_SECRET_KEY": settings.s3_secret_key.get_secret_value(),
        "MEDDIFF_S3_BUCKET": settings.s3_bucket,
        "MEDDIFF_SCRATCH": str(settings.scratch),
        "HF_HUB_OFFLINE": "1",
    }


def test_mirrored_models_are_loaded_offline(environment: dict[str, str], tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=14)
    Dinov2Model(config).save_pretrained(tmp_path / "dino")
    bucket = f"models-{uuid4().hex}"
    for folder, name in ((tmp_path / "checkpoint", "sd"), (tmp_path / "dino", "dino")):
        done = CliRunner().invoke(app, ["admin", "mirror", str(folder), f"s3://{bucket}/{name}"], env=environment)
        assert done.exit_code == 0, done.output
    loaded = subprocess.run(
        [sys.executable, "-c", LOADS, f"s3://{bucket}"],
        env=os.environ | environment | {"MEDDIFF_S3_MODELS": f'["{bucket}"]'},
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(loaded.stdout.split()[0]) == 64


HUB_LOADS = """
import torch
from meddiff.science import foundation

loaded = foundation.load("somebody/inpainting", torch.float32, torch.device("cpu"))
print(loaded.unet.dtype, sum(float(p.abs().sum()) for p in loaded.unet.parameters()) > 0)
"""


def test_a_part_that_the_hub_has_in_half_precision_alone_is_taken_so(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """As Stable Diffusion 1.5 inpainting's U-Net is there. The other parts are taken in full; one file of the whole
    beside them is left; and what was downloaded once is found again without the hub."""
    write_checkpoint(tmp_path)
    repository = tmp_path / "checkpoint"
    for part in ("unet", "vae"):
        full = repository / part / "diffusion_pytorch_model.safetensors"
        halves = {name: tensor.half() for name, tensor in load_file(full).items()}
        save_file(halves, full.with_name("diffusion_pytorch_model.fp16.safetensors"))
    (repository / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (repository / "everything.safetensors").write_bytes(b"x")
    to = f"s3://models-{uuid4().hex}/sd"
    load, mirror = [sys.executable, "-c", HUB_LOADS], [sys.executable, "-m", "meddiff.cli", "admin", "mirror"]
    home = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_DISABLE_XET": "1"}

    def told(command: list[str], **more: str) -> str:
        done = subprocess.run(command, env=os.environ | environment | home | more, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    with serving({"somebody/inpainting": repository}) as address:
        online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address}
        assert told(load, **online) == "torch.float32 True\n"
    names = {path.name for path in (tmp_path / "hub").rglob("vae/*.safetensors")}
    assert names == {"diffusion_pytorch_model.safetensors"}
    offline = told([*mirror, "somebody/inpainting", to])
    assert "unet/diffusion_pytorch_model.fp16" in offline
    assert "everything" not in offline
    with serving({}) as refusing:  # Every repository: 404. What lies here has to do.
        assert told(load, HF_HUB_OFFLINE="0", HF_ENDPOINT=refusing) == "torch.float32 True\n"
    for file in (tmp_path / "hub").rglob("model_index.json"):  # As of a time that did not ask for it.
        file.unlink()
    assert told(load) == "torch.float32 True\n"
    gone = subprocess.run(
        [*mirror, "somebody/else", to], env=os.environ | environment | home, capture_output=True, text=True
    )
    assert (gone.returncode, "cannot be had from the hub" in gone.stderr) == (1, True)


def test_of_a_part_in_both_precisions_the_full_one_is_used(tmp_path: Path) -> None:
    there = ["model_index.json", "unet/a.safetensors", "unet/a.fp16.safetensors", "vae/b.fp16.safetensors"]
    others = ["sd.safetensors", "unet/a.bin", "safety_checker/c.safetensors", "vae/b.non_ema.safetensors"]
    kept = ["model_index.json", "unet/a.safetensors", "vae/b.fp16.safetensors"]
    assert used(PurePosixPath(name) for name in there + others) == [PurePosixPath(name) for name in kept]
    alone = [PurePosixPath("config.json"), PurePosixPath("model.safetensors")]
    assert used(alone) == alone
    for name in (*there, *others):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert (variant_of(tmp_path / "unet"), variant_of(tmp_path / "vae"), variant_of(tmp_path)) == (None, "fp16", None)


@pytest.mark.parametrize(
    ("source", "to", "told"),
    [
        ("{folder}", "models/x", "s3://bucket/prefix"),
        ("{folder}", "s3://models", "s3://bucket/prefix"),
        ("{folder}", "s3://models/x", "model_index.json"),
        ("somebody/something", "s3://models/x", "hub"),
    ],
)
def test_what_cannot_be_mirrored_is_said(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, to: str, told: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source = source.format(folder=tmp_path)
    done = CliRunner().invoke(app, ["admin", "mirror", source, to], env=environment)
    assert done.exit_code != 0
    assert told in done.output
