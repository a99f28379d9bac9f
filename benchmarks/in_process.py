"""The main job in one process: the functions that the services call, without services, queues and store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from meddiff import signatures
from meddiff.contracts.base import sha256_hex
from meddiff.contracts.dataset import Case as StoredCase
from meddiff.contracts.recipes import Recipe
from meddiff.importing.pixels import encode_png
from meddiff.science import encoders, erosion, finetune, foundation, geometry, inpainting, mask_generator, quality
from meddiff.seeds import derive
from meddiff_services.cases import Loaded
from meddiff_services.mask_sampler.tasks import Ground, choose_donor, choose_ground
from meddiff_services.pictures import Mask, Pixels

from benchmarks.sources import Case

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Made:
    """An accepted pair: image (H, W, C), shape, label and guide (H, W), the composite it was started from, and the
    places, among the cases it was made from, of its donor and of its background (None: a lesion-free image)."""

    image: Pixels
    start: Pixels
    shape: Mask
    label: Mask
    guide: Mask
    donor: int
    background: int | None


class Generator:
    """What ``finetune`` leaves: the fine-tuned U-Net, the mask generator and the calibrated reference."""

    def __init__(self, cases: Sequence[Case], healthy: Sequence[Pixels], recipe: Recipe, seed: int) -> None:
        torch.set_num_threads(recipe.work.training_threads)
        self.recipe, self.cases = recipe, cases
        self._pairs = [_loaded(n, "pair", case.image, case.mask) for n, case in enumerate(cases)]
        self._grounds = [Ground("", pair.case, False, pair.mask) for pair in self._pairs]
        self._images = {pair.case.id: pair.image for pair in self._pairs}
        if healthy:
            clear = [
                _loaded(len(cases) + n, "background", i, np.zeros(i.shape[:2], bool)) for n, i in enumerate(healthy)
            ]
            self._grounds = [Ground("", one.case, False, one.mask) for one in clear]
            self._images |= {one.case.id: one.image for one in clear}
        self.foundation = foundation.load(recipe.foundation.source, torch.float32, CPU)
        masks = [case.mask for case in cases]
        cache = finetune.build_cache(
            self.foundation, [(c.image, c.mask) for c in cases], healthy, recipe, derive(seed, "cache"), lambda *_: None
        )
        steps = recipe.finetuning.steps
        tuned = finetune.train(
            self.foundation, cache, recipe, derive(seed, "finetune"), "inpainter", None, steps, lambda _: None, bool
        )
        self.foundation.unet.load_state_dict(tuned.ema)
        self.foundation.unet.eval()
        drawn = mask_generator.train(
            masks, recipe, derive(seed, "mask_generator"), None, recipe.mask_generation.steps, lambda _: None, bool, CPU
        )
        self._masks = mask_generator.build(recipe.mask_generation)
        self._masks.load_state_dict(drawn.ema)
        self._masks.eval()
        settings = recipe.quality
        self._encoder = encoders.load_encoder(settings.encoder, settings.encoder_source, CPU)
        crops = [quality.lesion_crop(c.image, c.mask, settings.context, settings.crop_px) for c in cases]
        self._reference = quality.calibrate(self._encoder, crops, [pair.case.id for pair in self._pairs], settings)

    def generate(self, count: int, seed: int) -> list[Made]:
        """At most ``count`` accepted pairs, from the candidates that the recipe's attempts allow, in index order."""
        made: list[Made] = []
        known = bytearray()
        size = self.recipe.work.shard_size
        for first in range(0, int(self.recipe.work.attempts * count), size):
            for one in self._shard(range(first, first + size), seed):
                signature = bytes.fromhex(signatures.of(one.shape))
                if signatures.max_iou(signature, bytes(known)) <= self.recipe.quality.max_shape_iou:
                    known += signature
                    made.append(one)
            if len(made) >= count:
                break
        return made[:count]

    @torch.no_grad()
    def _shard(self, indices: Sequence[int], seed: int) -> list[Made]:
        """What the quality gate leaves of a shard of candidates."""
        recipe = self.recipe
        seeds = [derive(seed, "candidate", index) for index in indices]
        real = [case.mask for case in self.cases]
        lows = mask_generator.sample(self._masks, recipe, [derive(one, "shape") for one in seeds], real)
        canvases: list[inpainting.Canvas] = []
        origins: list[tuple[int, int | None]] = []
        for one, low in zip(seeds, lows, strict=True):
            ground = choose_ground(low, self._grounds, derive(one, "background"))
            shape = mask_generator.place(low, (ground.case.height, ground.case.width))
            old = ground.lesion if ground.lesion.any() else None
            guide = geometry.guide_of(shape, recipe.inpainting.guide_margin, old)
            donor = int(choose_donor(shape, self._pairs, derive(one, "donor")).id)
            below, case = self._images[ground.case.id], self.cases[donor]
            start = inpainting.fit_lesion(below, shape, guide, case.image, case.mask, cover=ground.lesion)
            canvases.append(inpainting.Canvas(below, shape, guide, start, derive(one, "noise")))
            origins.append((donor, int(ground.case.id) if ground.lesion.any() else None))
        images = inpainting.inpaint(self.foundation, canvases, recipe)
        accepted: list[Made] = []
        for image, canvas, (donor, background) in zip(images, canvases, origins, strict=True):
            verdict = quality.judge(self._reference, self._encoder, image, canvas.shape, recipe.quality)
            if verdict.reason is None and canvas.start is not None:
                label = erosion.erode(canvas.shape, recipe.erosion.share)[0]
                accepted.append(Made(image, canvas.start, canvas.shape, label, canvas.guide, donor, background))
        return accepted


def _loaded(number: int, role: str, image: Pixels, mask: Mask) -> Loaded:
    height, width, channels = image.shape
    case = StoredCase(
        id=f"{number:05d}",
        role=role,
        width=width,
        height=height,
        channels=channels,
        image_sha256=sha256_hex(encode_png(image)),
    )
    return Loaded("", case, image, mask)
