"""The checkpoint that ships with the package, and the drawings it was made from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionInpaintPipeline, UNet2DConditionModel
from meddiff import drawing
from meddiff.pretraining import autoencoder, prompts
from meddiff.science import foundation
from PIL import Image
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

MEGABYTE = 2**20


@pytest.fixture(scope="module")
def built_in() -> foundation.Foundation:
    return foundation.load("builtin", torch.float32, torch.device("cpu"))


def test_it_is_small_and_of_the_classes_of_stable_diffusion(built_in: foundation.Foundation) -> None:
    size = sum(path.stat().st_size for path in foundation.BUILTIN.rglob("*") if path.is_file())
    assert size <= 20 * MEGABYTE
    assert isinstance(built_in.unet, UNet2DConditionModel)
    assert isinstance(built_in.vae, AutoencoderKL)
    assert isinstance(built_in.text_encoder, CLIPTextModel)
    assert isinstance(built_in.tokenizer, CLIPTokenizer)
    assert (built_in.unet.config.in_channels, built_in.unet.config.out_channels) == (9, 4)
    assert foundation.vae_factor(built_in) == 2


def test_every_prompt_has_tokens(built_in: foundation.Foundation) -> None:
    embeddings = [foundation.embed_prompt(built_in, text) for text in ("An image of hta", "", "Läsion ☃ 皮肤")]
    assert all(e.shape == (1, prompts.LENGTH, built_in.unet.config.cross_attention_dim) for e in embeddings)
    assert not torch.equal(embeddings[0], embeddings[1])


def test_unseen_drawings_come_back_through_the_autoencoder(built_in: foundation.Foundation) -> None:
    unseen = torch.from_numpy(autoencoder.draw(5 * 10**6, 8, held_out=True)).permute(0, 3, 1, 2)
    assert autoencoder.psnr(built_in.vae, unseen).mean() > 26


def test_plain_diffusers_paints_with_it() -> None:
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(foundation.BUILTIN, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    picture = Image.fromarray(autoencoder.draw(0, 1)[0])
    mask = np.zeros((128, 128), np.uint8)
    mask[40:90, 40:90] = 255
    painted = pipeline(
        "a lesion", picture, Image.fromarray(mask), height=128, width=128, num_inference_steps=2, guidance_scale=1.0
    ).images[0]
    assert painted.size == (128, 128)
    assert np.std(np.asarray(painted)[50:80, 50:80]) > 0


def test_a_saved_model_does_not_tell_where_its_foundation_lay(built_in: foundation.Foundation, tmp_path: Path) -> None:
    foundation.save(built_in, tmp_path)
    told = [path.name for path in tmp_path.rglob("*.json") if str(foundation.BUILTIN) in path.read_text()]
    assert told == []


def test_drawings_follow_from_their_seed_and_stay_in_range() -> None:
    for seed in range(12):
        one, two = (drawing.texture(np.random.default_rng(seed), (64, 48)) for _ in range(2))
        assert np.array_equal(one, two)
        assert one.shape == (64, 48, 3)
        assert one.dtype == np.float32
        assert one.min() >= 0
        assert one.max() <= 1
        mask = drawing.shape(np.random.default_rng(seed), (64, 48))
        assert np.array_equal(mask, drawing.shape(np.random.default_rng(seed), (64, 48)))
        assert mask.any()
        assert not mask.all()


@pytest.mark.parametrize(
    ("more", "layout"), [(0, torch.channels_last), (foundation.LARGE_PARAMETERS, torch.contiguous_format)]
)
def test_a_large_network_stays_contiguous_on_a_cpu(more: int, layout: torch.memory_format) -> None:
    network = nn.ModuleList([nn.Conv2d(4, 8, 3), nn.ParameterList([torch.empty(more)])])
    foundation.laid_out(network)
    weights = next(network.parameters())
    assert weights.is_contiguous(memory_format=layout)
