"""Which cases of an evaluation train and which test. No test case meets a pair that it had a part in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from meddiff.contracts.dataset import Case
from meddiff.contracts.evaluation import REAL, Split
from meddiff.contracts.jobs import EvaluateSpec, GenerateSpec
from meddiff.contracts.models import ModelCard
from meddiff.contracts.problems import Fault, ProblemError
from meddiff.importing import first_of_each_picture, load_dataset
from meddiff.planning import evaluation
from meddiff.planning.observe import read_spec
from meddiff.science.evaluation import splits
from meddiff.seeds import derive
from meddiff.store.keys import ModelKeys

from meddiff_services.cases import load
from meddiff_services.loading import load_encoder
from meddiff_services.pictures import Pixels
from meddiff_services.trials import pairs_manifest
from meddiff_services.worker import Outcome, Work

LEAST_TRAINED, MOST_TRAINED = 4, 10_000
LEAST_TESTED = 6
"""Groups of cases that are left to test, before more real cases are given to the oracle; and the fewest: of five that
all say the same the two-sided p-value is above 5 %."""


def split(work: Work) -> Outcome:
    """The splits: by patient, near-duplicates on one side. Raises ``ProblemError`` ``leak`` naming every test case that
    had a part in making the pairs, and ``invalid-dataset`` where too few cases are left."""
    torch.set_num_threads(work.spec.recipe.work.inference_threads)
    spec: EvaluateSpec = work.spec
    output = work.marker("import", 0).output
    dataset = load_dataset(work.store, work.tenant, output["dataset_id"])
    cases = _shuffled(spec, first_of_each_picture(dataset).values())
    here = [Seen(dataset.id, case) for case in cases]
    vectors = _embeddings(work, here)
    patients = [case.patient for case in cases]
    group_of = splits.groups(patients, vectors, spec.recipe.evaluation.near_duplicate)
    try:
        found = _drawn(spec, cases, group_of) if spec.request.fits_generators else _given(work, cases, group_of)
    except ValueError as error:
        raise ProblemError("invalid-dataset", f"The dataset cannot be split: {error}") from None
    _judge(spec, found)
    if spec.request.fits_generators and dataset.backgrounds:
        digests = {digest for one in found for digest in one.test}
        tested = [place for place, case in enumerate(cases) if case.image_sha256 in digests]
        grounds = [Seen(dataset.id, case, "lesions are painted on it") for case in dataset.backgrounds]
        _refuse_leaks(work, [here[place] for place in tested], vectors[tested], grounds)
    notes = [f"{len(set(group_of))} groups of cases (a patient, or nearly the same picture) among {len(cases)}"]
    if len(found) == 1:
        notes.append(
            "one split: what is said holds for these training cases and this generator; others may do otherwise"
        )
    if len(found) * spec.request.seeds == 2:
        notes.append("two trainings an arm: how much of a gain is luck shows roughly; three or four seeds tell more")
    if output["test_dataset_id"] not in (None, dataset.id):
        notes.append("patients of the two datasets were told apart by their pictures alone")
    if "oracle" in spec.request.arms and not any(arm.share > 1 for arm in evaluation.arms(spec.request, found)):
        notes.append("no oracle: too few further cases, or none that the generator has not seen")
    group = dict(zip((case.image_sha256 for case in cases), group_of, strict=True))
    output = {
        "splits": [one.model_dump(mode="json") for one in found],
        "real_groups": [[group[digest] for digest in (*one.train, *one.extra)] for one in found],
        "notes": notes,
    }
    return Outcome(len(cases), output)


def _judge(spec: EvaluateSpec, found: Sequence[Split]) -> None:
    """Raises ``ProblemError`` ``invalid-dataset`` for splits that train or test on too few cases."""
    fewest, most = (choose(len(split.train) for split in found) for choose in (min, max))
    if fewest < LEAST_TRAINED or most > MOST_TRAINED:
        detail = f"A split would train on {fewest if fewest < LEAST_TRAINED else most} cases"
        raise ProblemError("invalid-dataset", f"{detail}; {LEAST_TRAINED} to {MOST_TRAINED} can be")
    tested = len({digest for split in found for digest in split.test})
    if tested < LEAST_TESTED:
        detail = f"{tested} case(s) would be left to test on; at least {LEAST_TESTED} are needed"
        raise ProblemError("invalid-dataset", detail)
    groups = len({group for split in found for group in split.groups})
    if groups < LEAST_TESTED:
        detail = f"The test cases are of {groups} patient(s), or nearly the same picture; {LEAST_TESTED} are needed"
        raise ProblemError("invalid-dataset", detail)
    if all(arm.name == REAL or arm.share < 1 for arm in evaluation.arms(spec.request, found)):
        raise ProblemError("invalid-dataset", "There are too few further cases for an oracle, and no other arm")


def _shuffled(spec: EvaluateSpec, cases: Iterable[Case]) -> list[Case]:
    """In an order drawn from the seed: in a dataset's own the benign cases may come first, and half of it be all
    benign."""
    return sorted(cases, key=lambda case: derive(spec.request.seed, "order", case.image_sha256))


@dataclass(frozen=True)
class Seen:
    """A picture, and the part that it had in making the pairs, if any."""

    dataset_id: str
    case: Case
    role: str = ""


def _embeddings(work: Work, pictures: Sequence[Seen]) -> np.ndarray:
    """Unit vectors (n, d), one picture in memory at a time."""
    encoder = load_encoder(work.spec.recipe.quality, work.settings, work.store)

    def images() -> Iterator[Pixels]:
        for done, one in enumerate(pictures):
            work.progress(done, len(pictures), "pictures")
            yield load(work, one.dataset_id, one.case).image

    return splits.whole_image_embeddings(encoder, images())


def _drawn(spec: EvaluateSpec, cases: Sequence[Case], group_of: Sequence[int]) -> list[Split]:
    """Splits whose generators are still to be fitted: k folds, or draws. Raises ``ValueError``: too few groups."""
    request, tested = spec.request, spec.recipe.evaluation.tested

    def named(places: Sequence[int]) -> tuple[str, ...]:
        return tuple(cases[place].image_sha256 for place in places)

    def one_split(train: Sequence[int], extra: Sequence[int], test: Sequence[int]) -> Split:
        groups = tuple(group_of[place] for place in test)
        return Split(train=named(train), extra=named(extra), test=named(test), groups=groups)

    if request.folds is not None:
        parts = splits.folds(group_of, request.folds, request.seed)
        rest = [[place for place in range(len(cases)) if place not in part] for part in parts]
        return [one_split(others, (), part[:tested]) for part, others in zip(parts, rest, strict=True)]
    train = request.train or spec.recipe.max_pairs
    extra = max(0, min(train, len(set(group_of)) - train - LEAST_TESTED))
    draws = [splits.draw(group_of, train, extra, tested, request.seed + number) for number in range(request.splits)]
    return [one_split(one.train, one.extra, one.test) for one in draws]


# ----------------------------------------------------------------------------------------------------- given pairs


def _given(work: Work, cases: Sequence[Case], group_of: Sequence[int]) -> list[Split]:
    """The one split of pairs that are there, or that a model makes: its own cases train, others test."""
    spec: EvaluateSpec = work.spec
    card = work.store.get_json(ModelKeys(work.tenant, spec.model_id or "").card, ModelCard)
    own = set(card.cases)
    train = [place for place, case in enumerate(cases) if case.image_sha256 in own]
    if len(train) < len(own):
        detail = (
            f"{len(own) - len(train)} of the model's {len(own)} cases are not in this dataset, and all of them are to "
            "train beside the pairs: give the dataset it was made from, and test_uri"
        )
        raise ProblemError("invalid-dataset", detail)
    imported = work.marker("import", 0).output
    test_dataset = imported["test_dataset_id"]
    if test_dataset in (None, imported["dataset_id"]):
        taken = {group_of[place] for place in train}
        tests = [(imported["dataset_id"], cases[place]) for place in _apart(group_of, taken)]
    else:
        found = _shuffled(spec, first_of_each_picture(load_dataset(work.store, work.tenant, test_dataset)).values())
        tests = [(test_dataset, case) for case in found]
    if not tests:
        detail = "No case is left to test on: give others as test_uri, or ask for folds"
        raise ProblemError("invalid-dataset", detail)
    tests = tests[: spec.recipe.evaluation.tested]
    pictures = [Seen(*test) for test in tests]
    vectors = _embeddings(work, pictures)
    _refuse_leaks(work, pictures, vectors, list(_parts(work, card)))
    patients = [case.patient for _, case in tests]
    return [
        Split(
            train=tuple(cases[place].image_sha256 for place in train),
            test=tuple(case.image_sha256 for _, case in tests),
            groups=tuple(splits.groups(patients, vectors, spec.recipe.evaluation.near_duplicate)),
        )
    ]


def _apart(group_of: Sequence[int], taken: set[int]) -> list[int]:
    return [place for place, group in enumerate(group_of) if group not in taken]


def _parts(work: Work, card: ModelCard) -> Iterator[Seen]:
    """Every picture that had a part in making the pairs: the model's cases, and the backgrounds and masks that a
    generate job took from elsewhere."""
    dataset = load_dataset(work.store, work.tenant, card.dataset_id)
    by_digest = first_of_each_picture(dataset)
    for case in (*(by_digest[digest] for digest in card.cases), *dataset.backgrounds):
        yield Seen(card.dataset_id, case, "the model was made from it")
    if work.spec.synthetic_job is None:
        return
    made = read_spec(work.store, work.tenant, work.spec.synthetic_job)
    assert isinstance(made, GenerateSpec)
    manifest = pairs_manifest(work.store, work.tenant, made.id)
    behind = {pair.background.sha256: pair.index for pair in reversed(manifest.pairs)}
    for role, dataset_id in (("background", made.request.backgrounds), ("mask", made.request.masks)):
        if dataset_id is None:
            continue
        for case in load_dataset(work.store, work.tenant, dataset_id).cases:
            if role == "mask" and case.role == "pair":
                yield Seen(dataset_id, case, "its mask was there to be a shape")
            if role == "background" and case.image_sha256 in behind:
                pair = behind[case.image_sha256]
                yield Seen(dataset_id, case, f"it is the background of pair {pair}")


def _refuse_leaks(work: Work, tests: Sequence[Seen], vectors: np.ndarray, parts: Sequence[Seen]) -> None:
    """Raises ``ProblemError`` ``leak`` for test cases, ``vectors`` (n, d) of them, that are or nearly are a part."""
    threshold = work.spec.recipe.evaluation.near_duplicate
    roles = {part.case.image_sha256: part.role for part in reversed(parts)}
    alike = vectors @ _embeddings(work, parts).T
    faults = []
    for test, row in zip(tests, alike, strict=True):
        digest, nearest = test.case.image_sha256, int(row.argmax())
        reason = roles.get(digest)
        if reason is None and row[nearest] >= threshold:
            other = parts[nearest]
            reason = (
                f"nearly the same picture (cosine similarity {row[nearest]:.3f}, at least {threshold:g}) as image "
                f"{other.case.image_sha256}: {other.role}"
            )
        if reason is not None:
            faults.append(Fault(pointer=f"cases/{test.case.id}", detail=f"image {digest}: {reason}"))
    if faults:
        detail = f"{len(faults)} test case(s) had a part in making the synthetic pairs; test on others"
        raise ProblemError("leak", detail, faults)
