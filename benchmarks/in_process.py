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
from meddiff.science.training import TrainingState, load_weights
from meddiff.seeds import derive
from meddiff_services.cases import Loaded
from meddiff_services.mask_sampler.tasks import Ground, choose_donor, choose_ground
from meddiff_services.pictures import Mask, Pixels

from benchmarks.sources import Case

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


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


def fit(
    cases: Sequence[Case],
    healthy: Sequence[Pixels],
    recipe: Recipe,
    seed: int,
    adapt_to: Sequence[Case] = (),
    stop: int | None = None,
) -> dict[str, torch.Tensor]:
    """What a fine-tune trains: averaged weights of the inpainter (``unet.…``) and of the mask generator
    (``masks.…``). ``adapt_to``: cases that the foundation is fine-tuned on before; ``stop``: the step of the inpainter
    that is taken, the last where none is given."""
    f = foundation.load(recipe.foundation.source, torch.float32, DEVICE)
    if adapt_to:
        load_weights(f.unet, tune(f, adapt_to, [], recipe, derive(seed, "adapt")).ema)
    tuned = tune(f, cases, healthy, recipe, seed, stop)
    steps = recipe.mask_generation.steps
    masks = [case.mask for case in cases]
    drawn = mask_generator.train(
        masks, recipe, derive(seed, "mask_generator"), None, steps, lambda _: None, bool, DEVICE
    )  # fmt: skip
    return {f"unet.{k}": v for k, v in tuned.ema.items()} | {f"masks.{k}": v for k, v in drawn.ema.items()}


def tune(
    f: foundation.Foundation,
    cases: Sequence[Case],
    healthy: Sequence[Pixels],
    recipe: Recipe,
    seed: int,
    stop: int | None = None,
) -> TrainingState:
    """The inpainter, trained from the foundation's weights up to step ``stop`` or the last."""
    pairs = [(case.image, case.mask) for case in cases]
    cache = finetune.build_cache(f, pairs, healthy, recipe, derive(seed, "cache"), lambda *_: None)
    steps = recipe.finetuning.steps if stop is None else stop
    return finetune.train(f, cache, recipe, derive(seed, "finetune"), "inpainter", None, steps, lambda _: None, bool)


class Generator:
    """A fine-tuned model at work. ``retexture``: every shape is a real case's own mask on its own image; ``decoys``:
    a piece of healthy tissue elsewhere is repainted too."""

    def __init__(
        self,
        cases: Sequence[Case],
        healthy: Sequence[Pixels],
        recipe: Recipe,
        fitted: dict[str, torch.Tensor],
        *,
        retexture: bool = False,
        decoys: bool = False,
    ) -> None:
        self.recipe, self.cases, self.retexture, self.decoys = recipe, cases, retexture, decoys
        self.foundation = foundation.load(recipe.foundation.source, torch.float32, DEVICE)
        self.foundation.unet.load_state_dict(_part(fitted, "unet."))
        self.foundation.unet.eval()
        self._pairs = [_loaded(n, "pair", case.image, case.mask) for n, case in enumerate(cases)]
        grounds = self._pairs
        if healthy and not retexture:
            grounds = _clear(healthy, len(cases))
        elif recipe.inpainting.background == "repair" and not retexture:
            seeded = [(case.image, case.mask, derive("repair", n)) for n, case in enumerate(cases)]
            repaired = inpainting.repair(self.foundation, seeded, recipe)
            grounds = _clear(repaired, 0)
        self._donors = [(one.case, float(one.mask.mean())) for one in self._pairs]
        self._grounds = [Ground("", one.case, False, one.mask) for one in grounds]
        self._images = {one.case.id: one.image for one in grounds}
        self._masks = mask_generator.build(recipe.mask_generation).to(DEVICE)
        self._masks.load_state_dict(_part(fitted, "masks."))
        self._masks.eval()
        settings = recipe.quality
        self._encoder = encoders.load_encoder(settings.encoder, settings.encoder_source, DEVICE)
        crops = [quality.lesion_crop(c.image, c.mask, settings.context, settings.crop_px) for c in cases]
        self._reference = quality.calibrate(self._encoder, crops, [p.case.image_sha256 for p in self._pairs], settings)

    def generate(self, count: int, seed: int) -> list[Made]:
        """At most ``count`` accepted pairs, from the candidates that the recipe's attempts allow, in index order."""
        made: list[Made] = []
        known = signatures.Shapes()
        size = self.recipe.work.shard_size
        for first in range(0, int(self.recipe.work.attempts * count), size):
            for one in self._shard(range(first, first + size), seed):
                signature = bytes.fromhex(signatures.of(one.shape))
                if self.retexture or known.max_iou(signature) <= self.recipe.quality.max_shape_iou:
                    known.add(signature)
                    made.append(one)
            if len(made) >= count:
                break
        return made[:count]

    @torch.no_grad()
    def _shard(self, indices: Sequence[int], seed: int) -> list[Made]:
        """What the quality gate leaves of a shard of candidates."""
        recipe = self.recipe
        seeds = [derive(seed, "candidate", index) for index in indices]
        canvases, origins = (
            self._retextured(indices, seeds) if self.retexture else self.canvases(seeds, self.shapes(seeds))
        )
        images = inpainting.inpaint(self.foundation, canvases, recipe)
        if self.decoys:
            images = self._with_decoys(images, canvases)
        accepted: list[Made] = []
        for image, canvas, (donor, background) in zip(images, canvases, origins, strict=True):
            verdict = quality.judge(self._reference, self._encoder, image, canvas.shape, recipe.quality)
            copied = verdict.reason == "copy" and self.retexture
            if (verdict.reason is None or copied) and canvas.start is not None:
                label = erosion.erode(canvas.shape, recipe.erosion.share)[0]
                accepted.append(Made(image, canvas.start, canvas.shape, label, canvas.guide, donor, background))
        return accepted

    def shapes(self, seeds: Sequence[int]) -> list[Mask]:
        """A sampled shape for each seed, at low resolution."""
        real = [case.mask for case in self.cases]
        return mask_generator.sample(self._masks, self.recipe, [derive(one, "shape") for one in seeds], real)

    def canvases(
        self, seeds: Sequence[int], lows: Sequence[Mask]
    ) -> tuple[list[inpainting.Canvas], list[tuple[int, int | None]]]:
        """What is to be painted, a canvas for each seed and its shape; and the places of its donor and background."""
        canvases: list[inpainting.Canvas] = []
        origins: list[tuple[int, int | None]] = []
        for one, low in zip(seeds, lows, strict=True):
            ground = choose_ground(low, self._grounds, derive(one, "background"))
            shape = mask_generator.place(low, (ground.case.height, ground.case.width))
            old = ground.lesion if ground.lesion.any() else None
            guide = geometry.guide_of(shape, self.recipe.inpainting.guide_margin, old)
            donor = int(choose_donor(shape, self._donors, derive(one, "donor")).id)
            below, case = self._images[ground.case.id], self.cases[donor]
            start = inpainting.fit_lesion(below, shape, guide, case.image, case.mask, cover=ground.lesion)
            canvases.append(inpainting.Canvas(below, shape, guide, start, derive(one, "noise")))
            place = int(ground.case.id)
            origins.append((donor, place if place < len(self.cases) else None))
        return canvases, origins

    def _retextured(
        self, indices: Sequence[int], seeds: Sequence[int]
    ) -> tuple[list[inpainting.Canvas], list[tuple[int, int | None]]]:
        canvases: list[inpainting.Canvas] = []
        origins: list[tuple[int, int | None]] = []
        for index, one in zip(indices, seeds, strict=True):
            place = index % len(self.cases)
            case = self.cases[place]
            guide = geometry.guide_of(case.mask, self.recipe.inpainting.guide_margin)
            canvases.append(inpainting.Canvas(case.image, case.mask, guide, case.image, derive(one, "noise")))
            origins.append((place, place))
        return canvases, origins

    def _with_decoys(self, images: Sequence[Pixels], canvases: Sequence[inpainting.Canvas]) -> list[Pixels]:
        """Each image with a patch of its background, of another candidate's shape, repainted as healthy tissue."""
        plain: list[inpainting.Canvas] = []
        for n, (image, canvas) in enumerate(zip(images, canvases, strict=True)):
            other = geometry.resize_mask(canvases[n - 1].shape, canvas.shape.shape)
            patch = _beside(other, canvas.guide, canvas.seed)
            plain.append(
                inpainting.Canvas(image, np.zeros_like(patch), patch, image, derive(canvas.seed, "decoy"))
            )  # fmt: skip
        kept = [canvas for canvas in plain if canvas.guide.any()]
        painted = iter(inpainting.inpaint(self.foundation, kept, self.recipe))
        return [next(painted) if canvas.guide.any() else canvas.background for canvas in plain]


def _beside(shape: Mask, taken: Mask, seed: int) -> Mask:
    """``shape`` moved to where it overlaps least with ``taken``, what overlaps cut off; of eight places drawn."""
    rng = np.random.default_rng(seed)
    rows, columns = shape.shape
    places = [np.roll(shape, (int(rng.integers(rows)), int(rng.integers(columns))), (0, 1)) for _ in range(8)]
    best = min(places, key=lambda one: int((one & taken).sum()))
    return np.asarray(best & ~taken)


def _part(fitted: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in fitted.items() if name.startswith(prefix)}


def _clear(images: Sequence[Pixels], first: int) -> list[Loaded]:
    """Images without a lesion, numbered from ``first``."""
    return [_loaded(first + n, "background", image, np.zeros(image.shape[:2], bool)) for n, image in enumerate(images)]


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
