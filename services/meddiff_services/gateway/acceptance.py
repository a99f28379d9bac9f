"""Accepting a job: every name resolved, every fault named, and the job written where the planner finds it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

from meddiff.contracts.base import JobId, Sha256, Stored, canonical_json, sha256_hex
from meddiff.contracts.ids import created_at, model_id_of, uuid7
from meddiff.contracts.jobs import EvaluateSpec, FinetuneSpec, GenerateSpec, Spec
from meddiff.contracts.models import ModelCard
from meddiff.contracts.problems import Fault, ProblemError
from meddiff.contracts.recipes import CPU, Quality, Recipe, conflicts, override
from meddiff.contracts.requests import EvaluateRequest, FinetuneRequest, GenerateRequest, RecipeChoice
from meddiff.importing import check_uri, is_dataset_id, load_dataset
from meddiff.metrics import JOBS_ACCEPTED
from meddiff.planning.dispatch import submit
from meddiff.planning.observe import read_spec
from meddiff.store.keys import DatasetKeys, JobKeys, idempotency
from meddiff.store.objects import NotFound
from pydantic import ValidationError

from meddiff_services.gateway.backends import Backends
from meddiff_services.gateway.models import find_model
from meddiff_services.gateway.problems import faults_of

CHANGEABLE = frozenset({"inpainting", "quality", "erosion", "work"})
"""The parts of a model's recipe that a generate request may change."""

CALIBRATED = frozenset(Quality.model_fields) - {"max_shape_iou"}
"""Of ``quality``, what the model was calibrated with."""

MOST_PAIRS = 20_000
"""Of a job: its manifest is read whole."""
NO_MODEL = "there is no model of that id or name; one that is being fine-tuned is there once its job has succeeded"

R = TypeVar("R", FinetuneRequest, GenerateRequest, EvaluateRequest)


class Accepted(Stored):
    """The idempotency record: which job a key stands for, and of which request."""

    job_id: JobId
    request_sha256: Sha256


def accept(here: Backends, request: R, resolve: Callable[[Backends, R, JobId], Spec], key: str | None) -> Spec:
    """The spec of the job that ``resolve`` makes of the request, written and active.

    The same ``key`` again gives the first job again, also where the first call was cut off halfway. Raises
    ``ProblemError`` for whatever is wrong with the request, which then uses up no key, for a key that came with
    another request, and where too many jobs are unfinished.
    """
    job_id = uuid7()
    if key is None:
        return _submitted(here, _admitted(here, resolve(here, request, job_id)))
    digest = sha256_hex(canonical_json(request))
    place = idempotency(sha256_hex(canonical_json([here.tenant, type(request).__name__, key])))
    first = _first(here, place)
    if first is None:
        spec = _admitted(here, resolve(here, request, job_id))
        if here.store.create_json(place, Accepted(job_id=job_id, request_sha256=digest)):
            return _submitted(here, spec)
        first = here.store.get_json(place, Accepted)
    if first.request_sha256 != digest:
        fault = Fault(pointer="?Idempotency-Key", detail="the key was used for another request")
        raise ProblemError("invalid-request", "An idempotency key stands for one request", [fault])
    try:
        spec = read_spec(here.store, here.tenant, first.job_id)
    except NotFound:
        spec = resolve(here, request, first.job_id)
    return _submitted(here, spec)


def finetune_spec(here: Backends, request: FinetuneRequest, job_id: JobId) -> FinetuneSpec:
    """Raises ``ProblemError`` where the dataset is not there or may not be read, or a case is named twice: it would be
    its own nearest neighbour, and no copy would be told any more."""
    named = Counter(request.cases or ())
    faults = [
        Fault(pointer=f"/cases/{place}", detail="named more than once")
        for place, digest in enumerate(request.cases or ())
        if named[digest] > 1
    ]
    if is_dataset_id(request.dataset_uri):
        faults += _missing_dataset(here, "dataset_uri", request.dataset_uri)
    faults += _conflicts(request.recipe)
    _raise_if_any(faults)
    if not is_dataset_id(request.dataset_uri):
        check_uri(request.dataset_uri, here.settings, here.tenant)
    return FinetuneSpec(
        tenant=here.tenant,
        id=job_id,
        created_at=created_at(job_id),
        requested_by=here.key_id,
        trace_id=here.trace_id,
        request=request,
        recipe=request.recipe.resolve(),
        model_id=model_id_of(job_id),
    )


def generate_spec(here: Backends, request: GenerateRequest, job_id: JobId) -> GenerateSpec:
    """Raises ``ProblemError`` with every fault: no such model or dataset, values that the recipe cannot take."""
    card = find_model(here, request.model)
    faults = [
        *_no_masks(here, request.masks),
        *_missing_dataset(here, "backgrounds", request.backgrounds),
        *_lesions_to_cover(here, card, request.backgrounds),
        *_recipe_faults(card.recipe if card is not None else CPU, request.recipe),
    ]
    if request.count > MOST_PAIRS:
        detail = f"at most {MOST_PAIRS}; a further job with start_index goes on from there"
        faults.append(Fault(pointer="/count", detail=detail))
    if card is None:
        faults.insert(0, Fault(pointer="/model", detail=NO_MODEL))
    _raise_if_any(faults)
    assert card is not None
    return GenerateSpec(
        tenant=here.tenant,
        id=job_id,
        created_at=created_at(job_id),
        requested_by=here.key_id,
        trace_id=here.trace_id,
        request=request,
        recipe=override(card.recipe, request.recipe),
        model_id=card.id,
        dataset_id=card.dataset_id,
    )


def evaluate_spec(here: Backends, request: EvaluateRequest, job_id: JobId) -> EvaluateSpec:
    """Raises ``ProblemError`` with every fault: no such dataset, model or job, no manifest yet, values that the recipe
    cannot take; and where a dataset may not be read."""
    faults: list[Fault] = []
    for field, uri in (("dataset_uri", request.dataset_uri), ("test_uri", request.test_uri)):
        if uri is not None and is_dataset_id(uri):
            faults += _missing_dataset(here, field, uri)
    if request.splits * request.seeds < 2:
        detail = "at least 2 where the cases are split once: of one training nobody knows how much of it is luck"
        faults.append(Fault(pointer="/seeds", detail=detail))
    recipe = request.recipe.resolve()
    card: ModelCard | None = None
    if not request.fits_generators:
        card, found = _maker(here, request)
        faults += found
        detail = "the pairs are there or their model is: only the evaluation part can be changed"
        changed = sorted(set(request.recipe.override) - {"evaluation"})
        faults += [Fault(pointer=f"/recipe/override/{part}", detail=detail) for part in changed]
        if card is not None:
            recipe = card.recipe.model_copy(update={"evaluation": recipe.evaluation})
    else:
        faults += _conflicts(request.recipe)
    _raise_if_any(faults)
    for uri in (request.dataset_uri, request.test_uri):
        if uri is not None and not is_dataset_id(uri):
            check_uri(uri, here.settings, here.tenant)
    return EvaluateSpec(
        tenant=here.tenant,
        id=job_id,
        created_at=created_at(job_id),
        requested_by=here.key_id,
        trace_id=here.trace_id,
        request=request,
        recipe=recipe,
        model_id=card.id if card is not None else None,
        model_dataset_id=card.dataset_id if card is not None else None,
        synthetic_job=request.synthetic_job,
    )


def _maker(here: Backends, request: EvaluateRequest) -> tuple[ModelCard | None, list[Fault]]:
    """The card of the model that made the pairs, or is to make them."""
    if request.model is not None:
        card = find_model(here, request.model)
        return card, [] if card is not None else [Fault(pointer="/model", detail=NO_MODEL)]
    assert request.synthetic_job is not None
    try:
        made = read_spec(here.store, here.tenant, request.synthetic_job)
    except NotFound:
        return None, [Fault(pointer="/synthetic_job", detail="there is no job of that id")]
    if not isinstance(made, GenerateSpec):
        return None, [Fault(pointer="/synthetic_job", detail="it is no generate job")]
    if not here.store.exists(JobKeys(here.tenant, made.id).manifest):
        return None, [Fault(pointer="/synthetic_job", detail="the job has no manifest, or none yet")]
    card = find_model(here, made.model_id)
    return card, [] if card is not None else [Fault(pointer="/synthetic_job", detail="its model is no longer there")]


def _admitted(here: Backends, spec: Spec) -> Spec:
    """The spec of one job more, if it may be. A replay needs no admission: its job was counted."""
    here.bounds.admit(here.tenant)
    JOBS_ACCEPTED.labels(spec.kind).inc()
    return spec


def _submitted(here: Backends, spec: Spec) -> Spec:
    submit(here.store, spec)
    return spec


def _first(here: Backends, place: str) -> Accepted | None:
    try:
        return here.store.get_json(place, Accepted)
    except NotFound:
        return None


def _missing_dataset(here: Backends, field: str, dataset_id: str | None) -> list[Fault]:
    try:
        there = dataset_id is None or here.store.exists(DatasetKeys(here.tenant, dataset_id).dataset)
    except ValueError:
        there = False
    return [] if there else [Fault(pointer=f"/{field}", detail="there is no dataset of that id")]


def _lesions_to_cover(here: Backends, card: ModelCard | None, dataset_id: str | None) -> list[Fault]:
    """A model that paints lesions alone covers no old one."""
    if dataset_id is None or card is None or not card.recipe.finetuning.lesions_alone:
        return []
    if (
        _missing_dataset(here, "backgrounds", dataset_id)
        or load_dataset(here.store, here.tenant, dataset_id).backgrounds
    ):
        return []
    detail = "the dataset has no lesion-free images, and this model was fine-tuned to paint lesions alone"
    return [Fault(pointer="/backgrounds", detail=detail)]


def _recipe_faults(recipe: Recipe, changes: dict[str, Any]) -> list[Fault]:
    fixed = f"a model's recipe can be changed in {', '.join(sorted(CHANGEABLE))} only"
    faults = [Fault(pointer=f"/recipe/{part}", detail=fixed) for part in changes if part not in CHANGEABLE]
    calibrated = "the model was calibrated with it; fine-tune again to change it"
    touched = sorted(CALIBRATED & set(_part(changes, "quality")))
    faults += [Fault(pointer=f"/recipe/quality/{field}", detail=calibrated) for field in touched]
    wanted, had = _part(changes, "inpainting").get("background"), recipe.inpainting.background
    if wanted == "repair" and had != "repair":
        detail = "the model has no repaired backgrounds; fine-tune again to have them"
        faults.append(Fault(pointer="/recipe/inpainting/background", detail=detail))
    possible = {part: value for part, value in changes.items() if part in CHANGEABLE}
    if touched:
        possible["quality"] = {name: value for name, value in changes["quality"].items() if name not in touched}
    try:
        new = conflicts(override(recipe, possible)).items() - conflicts(recipe).items()
        faults += [Fault(pointer=f"/recipe/{field}", detail=detail) for field, detail in sorted(new)]
    except ValidationError as error:
        faults += faults_of(error.errors(), ("body", "recipe"))
    return faults


def _conflicts(choice: RecipeChoice) -> list[Fault]:
    found = conflicts(choice.resolve())
    return [Fault(pointer=f"/recipe/override/{field}", detail=detail) for field, detail in found.items()]


def _part(changes: dict[str, Any], name: str) -> dict[str, Any]:
    part = changes.get(name)
    return part if isinstance(part, dict) else {}


def _no_masks(here: Backends, dataset_id: str | None) -> list[Fault]:
    if faults := _missing_dataset(here, "masks", dataset_id):
        return faults
    if dataset_id is None or load_dataset(here.store, here.tenant, dataset_id).pairs:
        return []
    return [Fault(pointer="/masks", detail="the dataset has no masks")]


def _raise_if_any(faults: list[Fault]) -> None:
    if faults:
        raise ProblemError("invalid-request", f"{len(faults)} fault(s) in the request", faults)
