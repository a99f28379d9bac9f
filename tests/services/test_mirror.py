"""A model in the object store stands in for the hub's, and workers ask no hub."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest
from hub import serving
from meddiff.administration import mirrored
from meddiff.cli import app
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
    """As Stable Diffusion 1.5 inpainting's U-Net is there; and one file of the whole beside it is left."""
    write_checkpoint(tmp_path)
    repository = tmp_path / "checkpoint"
    whole = repository / "unet" / "diffusion_pytorch_model.safetensors"
    halves = {name: tensor.half() for name, tensor in load_file(whole).items()}
    save_file(halves, whole.with_name("diffusion_pytorch_model.fp16.safetensors"))
    whole.unlink()
    (repository / "everything.safetensors").write_bytes(b"x")
    bucket = f"models-{uuid4().hex}"
    mirror = [sys.executable, "-m", "meddiff.cli", "admin", "mirror", "somebody/inpainting", f"s3://{bucket}/sd"]
    with serving({"somebody/inpainting": repository}) as address:
        online = os.environ | environment | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1"}
        for name, command in (("loaded", [sys.executable, "-c", HUB_LOADS]), ("mirrored", mirror)):
            hub_home = {"HF_HOME": str(tmp_path / name)}
            done = subprocess.run(command, env=online | hub_home, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-2000:]
            assert {"loaded": "torch.float32 True", "mirrored": "diffusion_pytorch_model.fp16"}[name] in done.stdout
    assert "everything" not in done.stdout


def test_of_a_part_in_both_precisions_the_full_one_is_mirrored() -> None:
    there = [
        "model_index.json",
        "unet/a.safetensors",
        "unet/a.fp16.safetensors",
        "vae/b.fp16.safetensors",
        "sd.safetensors",
    ]
    others = ["unet/a.bin", "safety_checker/c.safetensors", "unet/a.non_ema.safetensors"]
    kept = ["model_index.json", "unet/a.safetensors", "vae/b.fp16.safetensors"]
    assert mirrored([Path(name) for name in there + others]) == [Path(name) for name in kept]
    assert mirrored([Path("config.json"), Path("model.safetensors")]) == [
        Path("config.json"),
        Path("model.safetensors"),
    ]


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
