"""The trials of an evaluation, from the store: its splits and runs, and what an arm's segmenters are trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from meddiff.contracts.dataset import Case
from meddiff.contracts.evaluation import Arm, Split
from meddiff.contracts.jobs import GenerateSpec
from meddiff.contracts.manifest import Manifest, Pair
from meddiff.contracts.problems import ProblemError
from meddiff.importing import first_of_each_picture, load_dataset
from meddiff.planning import evaluation
from meddiff.planning.observe import read_marker, read_spec
from meddiff.science.evaluation import trials
from meddiff.science.evaluation.trials import Material
from meddiff.store.keys import JobKeys
from meddiff.store.objects import ObjectStore

from meddiff_services.candidates import Candidate, composite, ground_of
from meddiff_services.cases import Loaded, OtherJob, Stored, load
from meddiff_services.pictures import decode_mask, decode_png
from meddiff_services.worker import Work


def splits(work: Work) -> tuple[Split, ...]:
    """The evaluation's splits, as its ``split`` task drew them."""
    return tuple(Split.model_validate(one) for one in work.marker("split", 0).output["splits"])


def cases_by_digest(work: Work) -> dict[str, tuple[str, Case]]:
    """Every pair that trains or tests, with the dataset it lies in: for a picture in both, that in which it tests, or
    else trains."""
    output = work.marker("import", 0).output
    tested = {digest for split in splits(work) for digest in split.test}
    found: dict[str, tuple[str, Case]] = {}
    for dataset_id in (output["dataset_id"], output["test_dataset_id"]):
        if dataset_id is not None:
            pairs = first_of_each_picture(load_dataset(work.store, work.tenant, dataset_id))
            of_both = found.keys() - tested
            found |= {digest: (dataset_id, case) for digest, case in pairs.items() if digest not in of_both}
    return found


def load_cases(work: Work, digests: Sequence[str]) -> Iterator[Loaded]:
    """Cases by the digests of their images, one in memory at a time."""
    known = cases_by_digest(work)
    return (load(work, *known[digest]) for digest in digests)


def material(work: Work, number: int, arm: Arm) -> Material:
    """What an arm trains on in split ``number``."""
    split = splits(work)[number]
    wanted = [*split.train, *split.extra][: max(1, round(arm.share * len(split.train)))]
    known = cases_by_digest(work)
    cases = [known[digest] for digest in wanted]
    real = Stored(work, [partial(_real, work, *case) for case in cases])
    group_of = work.marker("split", 0).output.get("real_groups")
    groups = group_of[number][: len(cases)] if group_of else ()
    if arm.source is None:
        return Material(real, groups=groups)
    pairs = made(work, number)[: arm.pairs]
    if not pairs:
        raise ProblemError("child-failed", f"Job {_makers(work, number).spec.id} made no pair that was accepted")
    places = {digest: place for place, digest in enumerate(split.train)}
    shown = [{candidate.donor.image_sha256, candidate.background.image_sha256} for _, candidate in pairs]
    origins = [frozenset(places[digest] for digest in digests & places.keys()) for digests in shown]
    synthetic = Stored(work, [partial(_synthetic, work, number, arm, *one) for one in pairs])
    return Material(real, synthetic, origins, arm.mixing, groups)


def _real(work: Work, dataset_id: str, case: Case) -> trials.Pair:
    found = load(work, dataset_id, case)
    return found.image, found.mask


def _synthetic(work: Work, number: int, arm: Arm, pair: Pair, candidate: Candidate) -> trials.Pair:
    if arm.source == "synthetic":
        return decode_png(work.store.get(pair.image.key)), decode_mask(work.store.get(pair.label.key))
    shape, guide = (decode_mask(work.store.get(picture.key)) for picture in (pair.shape, pair.guide))
    makers = _makers(work, number)
    return composite(makers, candidate, ground_of(makers, candidate), shape, guide), shape


def made(work: Work, number: int) -> list[tuple[Pair, Candidate]]:
    """The synthetic pairs of split ``number`` and what each was made from."""
    job = _makers(work, number)
    spec: GenerateSpec = job.spec
    manifest = pairs_manifest(work.store, spec.tenant, spec.id)
    size = spec.recipe.work.shard_size
    shards = sorted({(pair.index - spec.request.start_index) // size for pair in manifest.pairs})
    candidates = [
        Candidate.model_validate(one)
        for shard in shards
        for one in read_marker(work.store, spec.tenant, spec.id, "masks", shard).output["candidates"]
    ]
    by_index = {candidate.index: candidate for candidate in candidates}
    return [(pair, by_index[pair.index]) for pair in manifest.pairs]


def _makers(work: Work, number: int) -> OtherJob:
    job_id = evaluation.pairs_job(work.spec, number)
    return OtherJob(work.store, work.tenant, read_spec(work.store, work.tenant, job_id))


def pairs_manifest(store: ObjectStore, tenant: str, job_id: str) -> Manifest:
    """Raises ``NotFound``: the job has no manifest, or none yet."""
    return store.get_json(JobKeys(tenant, job_id).manifest, Manifest)
