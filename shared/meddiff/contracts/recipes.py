"""Named recipes: every number of the method in one place.

``paper`` holds the paper's values and its literal reading, ``gpu`` is Stable Diffusion 1.5 at 512 px in bfloat16 with
what the design adds to the paper, ``cpu`` is the built-in foundation at 128 px.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from meddiff.contracts.base import Contract

Positive = Annotated[int, Field(ge=1)]
Width = Annotated[int, Field(ge=8, multiple_of=8)]
Unit = Annotated[float, Field(ge=0.0, le=1.0)]


class FoundationChoice(Contract):
    """Where the pretrained Stable Diffusion checkpoint comes from and in which number format it works.

    ``source``: ``builtin``, a hub id, a folder under the operator's model root, or ``s3://bucket/prefix``. A folder
    there that is named like a hub id stands in for it.
    """

    source: str = Field("builtin", max_length=512)
    dtype: Literal["float32", "bfloat16"] = "float32"
    resolution: Annotated[int, Field(ge=64, le=1024, multiple_of=64)] = 128


class Finetuning(Contract):
    """Eq. 1. ``variants``: augmented versions of each pair whose latents are cached; ``repair_share``: share of
    training examples that are holes in healthy tissue; in as many again there is one beside the lesion;
    ``guide_margin``: range of the guide's margin around the shape, as a share of the shape's equivalent diameter;
    ``separate_repair``: the paper's second U-Net on inverted masks; ``outside_weight``: what the loss weighs outside
    the guide; ``edge_weight``: what is added to it along the shape's edge."""

    prompt: str = Field("An image of hta", min_length=1, max_length=200)
    steps: Annotated[int, Field(ge=1, le=100_000)]
    batch_size: Annotated[int, Field(ge=1, le=64)]
    learning_rate: Annotated[float, Field(gt=0, le=1)]
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    variants: Annotated[int, Field(ge=1, le=256)] = 16
    guide_margin: tuple[Unit, Unit] = (0.05, 0.3)
    repair_share: Unit = 0.25
    separate_repair: bool = False
    schedule: Literal["constant", "cosine"] = "constant"
    outside_weight: Unit = 0.0
    edge_weight: Annotated[float, Field(ge=0, le=100)] = 0.0
    gradient_checkpointing: bool = False
    segment_steps: Positive
    preview_pairs: Annotated[int, Field(ge=0, le=16)] = 4

    @property
    def lesions_alone(self) -> bool:
        """Whether all that is painted in training is lesion: the guide is the shape."""
        return self.guide_margin == (0.0, 0.0) and self.repair_share == 0


class MaskGeneration(Contract):
    """The DDPM on binary masks. ``area_conditioned``: it is told the share of the image that a shape is to cover;
    ``min_masks``: below it shapes come from a geometric family fitted to the masks."""

    resolution: Annotated[int, Field(ge=16, le=256, multiple_of=16)] = 64
    widths: Annotated[tuple[Width, ...], Field(min_length=1, max_length=5)] = (64, 128, 256, 512)
    steps: Annotated[int, Field(ge=1, le=100_000)]
    batch_size: Annotated[int, Field(ge=1, le=256)]
    learning_rate: Annotated[float, Field(gt=0, le=1)]
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.995
    segment_steps: Positive
    sampling_steps: Annotated[int, Field(ge=1, le=1000)]
    area_conditioned: bool = False
    min_masks: Annotated[int, Field(ge=1)] = 8


class Inpainting(Contract):
    """Eq. 2. ``strength`` 1 starts from noise, below 1 from a composite that is re-noised; ``ring_strength`` is that of
    the guide outside the shape, where it is lower: the composite's healthy surroundings are held in place until then.
    ``adaptive_guide``: M wide and soft early, exact late. ``context``: side of the window the network works in over the
    larger side of the guide's box, the whole image where that is smaller. ``background``: let the guide cover the old
    lesion, or repair it away first. ``kept_detail``: width, as a share of the window's side, below which the
    composite's structure is kept and of the painting only its coarser differences from the composite count."""

    solver_steps: Annotated[int, Field(ge=1, le=1000)]
    guidance_scale: Annotated[float, Field(ge=1, le=20)] = 1.0
    strength: Annotated[float, Field(gt=0, le=1)] = 1.0
    ring_strength: Annotated[float, Field(gt=0, le=1)] = 1.0
    adaptive_guide: bool = True
    guide_margin: Unit = 0.15
    context: Annotated[float, Field(ge=1, le=1000)] = 1.6
    background: Literal["cover", "repair"] = "cover"
    kept_detail: Annotated[float, Field(ge=0, le=0.25)] = 0.0
    batch_size: Annotated[int, Field(ge=1, le=64)]


class Quality(Contract):
    """The similarity band on lesion crops and the gates around it.

    ``far_quantile``: a candidate less similar to its nearest real crop than this quantile of real-to-real similarity
    is too far; ``copy_quantile``: share of slightly changed real crops that may pass for new where the ratio of the
    distances to the nearest and second nearest lesion is set, below which a candidate is a copy: higher lets more
    copies pass; ``max_shape_iou``: two shapes of a manifest may not overlap more, unless the caller gave
    them."""

    encoder: Literal["dinov2", "efficientnet-lite0"] = "efficientnet-lite0"
    encoder_source: str = Field("builtin", max_length=512)
    crop_px: Annotated[int, Field(ge=64, le=518)] = 224
    context: Annotated[float, Field(ge=1, le=4)] = 1.3
    far_quantile: Unit = 0.01
    copy_quantile: Unit = 0.05
    max_shape_iou: Unit = 0.85


class Erosion(Contract):
    """Mask corrosion (section 2.2 of the paper): radius as a share of the shape's equivalent diameter."""

    share: Annotated[float, Field(ge=0, le=0.2)] = 0.01


class Work(Contract):
    """How work is cut and run. Batch shapes and the thread count change bytes, so they are part of the recipe.

    ``attempts``: candidates that may be made for each requested pair before a job ends ``incomplete``.
    """

    shard_size: Annotated[int, Field(ge=1, le=256)] = 8
    attempts: Annotated[float, Field(ge=1, le=100)] = 4.0
    training_threads: Positive = 2
    inference_threads: Positive = 1


class Evaluation(Contract):
    """How segmenters are trained and compared. ``size``: side of the square that images are stretched to; ``steps``:
    the longest training, of which every ``every``-th step may be where an arm stops; ``batch_size``: real pairs of a
    step, with at most as many synthetic ones beside them; ``inner_folds``: parts of the training cases held aside in
    turn to choose the stop; ``pretrain_steps``: steps on synthetic pairs alone where they come first;
    ``near_duplicate``: cosine similarity of whole images from which two count as one; ``tested``: test cases of a split
    at most."""

    segmenter: Literal["unet", "efficientnet-unet", "dynunet"] = "efficientnet-unet"
    size: Annotated[int, Field(ge=64, le=512, multiple_of=32)] = 96
    steps: Annotated[int, Field(ge=1, le=100_000)] = 480
    every: Positive = 80
    batch_size: Annotated[int, Field(ge=1, le=64)] = 6
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-3
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    pretrain_steps: Annotated[int, Field(ge=1, le=100_000)] = 120
    inner_folds: Annotated[int, Field(ge=2, le=10)] = 3
    near_duplicate: Annotated[float, Field(gt=0, le=1)] = 0.95
    tested: Annotated[int, Field(ge=1, le=10_000)] = 100


class Recipe(Contract):
    """Every value a job needs besides its data and its seed."""

    name: str = Field(max_length=64)
    max_pairs: Annotated[int, Field(ge=2, le=10_000)] = 30
    foundation: FoundationChoice = FoundationChoice()
    finetuning: Finetuning
    mask_generation: MaskGeneration
    inpainting: Inpainting
    quality: Quality = Quality()
    erosion: Erosion = Erosion()
    evaluation: Evaluation = Evaluation()
    work: Work = Work()

    def has_second_unet(self, backgrounds: int) -> bool:
        """Whether a second U-Net is trained: where it repairs, for ``backgrounds`` lesion-free images spare it."""
        return self.finetuning.separate_repair and self.inpainting.background == "repair" and not backgrounds


SD15_INPAINTING = "stable-diffusion-v1-5/stable-diffusion-inpainting"
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"

PAPER = Recipe(
    name="paper",
    foundation=FoundationChoice(source=SD15, dtype="bfloat16", resolution=512),
    finetuning=Finetuning(
        steps=2000,
        batch_size=2,
        learning_rate=5e-6,
        variants=1,
        guide_margin=(0.0, 0.0),
        repair_share=0.0,
        separate_repair=True,
        ema_decay=0.0,
        segment_steps=500,
    ),
    mask_generation=MaskGeneration(
        steps=10_000, batch_size=16, learning_rate=1e-4, segment_steps=2000, sampling_steps=250
    ),
    inpainting=Inpainting(
        solver_steps=50, guidance_scale=7.5, guide_margin=0.0, context=1000, background="repair", batch_size=8
    ),
    quality=Quality(encoder="dinov2", encoder_source="facebook/dinov2-base"),
    work=Work(shard_size=8),
)

GPU = Recipe(
    name="gpu",
    foundation=FoundationChoice(source=SD15_INPAINTING, dtype="bfloat16", resolution=512),
    finetuning=Finetuning(
        steps=2000,
        batch_size=2,
        learning_rate=1e-5,
        warmup_steps=100,
        ema_decay=0.998,
        gradient_checkpointing=True,
        segment_steps=500,
    ),
    mask_generation=MaskGeneration(
        steps=10_000,
        batch_size=32,
        learning_rate=1e-4,
        segment_steps=2000,
        sampling_steps=100,
        area_conditioned=True,
    ),
    inpainting=Inpainting(solver_steps=25, guidance_scale=2.0, strength=0.9, batch_size=8),
    quality=Quality(encoder="dinov2", encoder_source="facebook/dinov2-base"),
    work=Work(shard_size=16),
)

CPU = Recipe(
    name="cpu",
    finetuning=Finetuning(
        steps=480,
        batch_size=4,
        learning_rate=2e-4,
        warmup_steps=20,
        schedule="cosine",
        ema_decay=0.98,
        variants=8,
        segment_steps=60,
    ),
    mask_generation=MaskGeneration(
        resolution=32,
        widths=(16, 32, 64),
        steps=600,
        batch_size=16,
        learning_rate=1e-3,
        segment_steps=200,
        sampling_steps=20,
        area_conditioned=True,
    ),
    inpainting=Inpainting(solver_steps=20, strength=0.2, ring_strength=0.2, kept_detail=1 / 32, batch_size=4),
    work=Work(shard_size=8),
)

MOST_THREADS, MOST_WIDTH = 256, 1024

RECIPES: dict[str, Recipe] = {r.name: r for r in (PAPER, GPU, CPU)}


def override(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """``recipe`` with nested ``changes`` (``{"finetuning": {"steps": 50}}``), validated as a whole.

    Raises pydantic ``ValidationError`` naming every field at fault.
    """

    def merge(base: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
        return base | {
            k: merge(base[k], v) if isinstance(v, dict) and isinstance(base.get(k), dict) else v
            for k, v in patch.items()
        }

    return Recipe.model_validate(merge(recipe.model_dump(mode="json"), changes))


def conflicts(recipe: Recipe) -> dict[str, str]:
    """Values that do not go together, or that no worker bears: what is wrong, by ``part/field``. Not the contract's to
    refuse, for what was stored under older rules is read on."""
    found = {}
    builtin = recipe.quality.encoder_source == "builtin"
    if builtin and recipe.quality.encoder == "dinov2":
        found["quality/encoder_source"] = "dinov2 is not built in: name a folder, an s3:// prefix or a hub id"
    if not builtin and recipe.quality.encoder == "efficientnet-lite0":
        found["quality/encoder_source"] = "efficientnet-lite0 comes as builtin alone"
    if recipe.finetuning.repair_share > 0.5:
        found["finetuning/repair_share"] = "above 0.5 fewer than half of the examples would show a lesion"
    for field in ("training_threads", "inference_threads"):
        if getattr(recipe.work, field) > MOST_THREADS:
            found[f"work/{field}"] = f"at most {MOST_THREADS}"
    if max(recipe.mask_generation.widths) > MOST_WIDTH:
        found["mask_generation/widths"] = f"at most {MOST_WIDTH} each"
    if recipe.finetuning.lesions_alone:
        why = "for finetuning.guide_margin and repair_share are 0: a lesion is painted wherever the guide is"
        if recipe.inpainting.background == "cover":
            found["inpainting/background"] = f"it has to be repair, {why}"
        if recipe.inpainting.guide_margin > 0:
            found["inpainting/guide_margin"] = f"it has to be 0, {why}"
    return found


def with_prompt(recipe: Recipe, changes: Mapping[str, Any], prompt: str | None) -> Recipe:
    """``recipe`` with the prompt that came with a dataset, unless the request's ``changes`` name one."""
    if prompt is None or "prompt" in changes.get("finetuning", {}):
        return recipe
    return override(recipe, {"finetuning": {"prompt": prompt}})
