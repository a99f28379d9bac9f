"""Import end to end: real datasets, every fault at once, and what lies in the store afterwards."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from dataset_files import DATA, TENANT, encoded, mask, noise, pairs, patch, photo, write_folder, write_zip
from meddiff import phantoms
from meddiff.contracts.base import sha256_hex
from meddiff.contracts.dataset import Dataset
from meddiff.contracts.problems import ProblemError
from meddiff.importing import import_dataset, load_case, load_dataset, open_source, select_cases, validate
from meddiff.importing.sources import Folder
from meddiff.layouts import Files
from meddiff.settings import Settings
from meddiff.store.keys import DatasetKeys, tenant_root
from meddiff.store.objects import ObjectStore
from PIL import Image


def imported(files: Files, store: ObjectStore, tenant: str = "local") -> Dataset:
    return import_dataset(files, store, tenant, lambda done, total: None, 2**30)


def faults(files: Files) -> list[tuple[str, str]]:
    report = validate(files)
    assert report.valid == (not report.errors) == (report.dataset_id is not None)
    return [(fault.pointer, fault.detail) for fault in report.errors]


needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data is not here")


@needs_data
@pytest.mark.parametrize(
    ("name", "layout", "roles"),
    [
        ("PH2", "ph2", {"pair": 120}),
        ("BUSI", "busi", {"pair": 60, "background": 40}),
        ("DDTI", "ddti", {"pair": 260}),
        ("ISIC-2017", "isic", {"pair": 204}),
        ("ISIC-2018", "isic", {"pair": 200}),
    ],
)
def test_a_published_dataset_is_imported_whole(
    name: str, layout: str, roles: dict[str, int], settings: Settings, store: ObjectStore
) -> None:
    with open_source((DATA / name).as_uri(), settings, store, TENANT) as source:
        dataset = imported(source, store)
    assert dataset.layout == layout
    assert Counter(case.role for case in dataset.cases) == roles
    case = dataset.cases[len(dataset.cases) // 2]
    image, stored_mask = load_case(store, "local", dataset.id, case)
    assert image.shape == (case.height, case.width, case.channels)
    assert stored_mask is not None
    assert 0 < stored_mask.mean() < 1


@needs_data
@pytest.mark.parametrize(
    ("name", "inner"),
    [
        ("PH2", "PH2 Dataset images"),
        ("BUSI", "Dataset_BUSI_with_GT"),
        ("DDTI", "."),
        pytest.param("ISIC-2017", ".", marks=pytest.mark.slow),
        pytest.param("ISIC-2018", ".", marks=pytest.mark.slow),
    ],
)
def test_a_published_dataset_is_the_same_from_wherever_it_comes(
    name: str, inner: str, settings: Settings, store: ObjectStore, hospital: ObjectStore, tmp_path: Path
) -> None:
    files = dict(Folder(DATA / name, DATA))
    for path, data in files.items():
        hospital.put(f"deep/{name}/{path}", data)
    archive = write_zip({f"top/{path}": data for path, data in files.items()}, tmp_path / "all.zip")
    ids = set()
    for uri in ((DATA / name).as_uri(), (DATA / name / inner).as_uri(), archive.as_uri(), f"s3://hospital/deep/{name}"):
        with open_source(uri, settings, store, TENANT) as source:
            ids.add(validate(source).dataset_id)
    assert len(ids) == 1
    assert None not in ids


@needs_data
def test_what_the_real_files_hold_is_what_is_stored(store: ObjectStore) -> None:
    busi = Folder(DATA / "BUSI", DATA)
    dataset = imported(busi, store)
    names = sorted(path for path in busi if "_mask" not in path)
    index = next(i for i, path in enumerate(names) if path.endswith("benign (4).png"))
    image, merged = load_case(store, "local", dataset.id, dataset.cases[index])
    stem = DATA / "BUSI" / names[index].removesuffix(".png")
    np.testing.assert_array_equal(image[..., 0], np.asarray(Image.open(f"{stem}.png")))
    parts = [np.asarray(Image.open(f"{stem}_mask{n}.png").convert("L")) > 0 for n in ("", "_1")]
    np.testing.assert_array_equal(merged, parts[0] | parts[1])
    assert all(part.any() for part in parts)


@needs_data
def test_ddti_groups_by_patient(store: ObjectStore) -> None:
    ddti = Folder(DATA / "DDTI", DATA)
    dataset = imported(ddti, store)
    names = sorted(path.removeprefix("cropped/") for path in ddti if path.startswith("cropped/"))
    groups = {(name.split("_")[0], case.patient) for name, case in zip(names, dataset.cases, strict=True)}
    assert len(groups) == len({name for name, _ in groups}) == len({patient for _, patient in groups}) < len(names)


BAD = {
    "no file at all": ({}, [("/", "no known layout (no image)")]),
    "one pair": (pairs(1), [("/", "1 pair; at least 2 are needed")]),
    "no pair": ({"unlabelled/x.png": photo()}, [("/", "0 pairs; at least 2 are needed")]),
    "missing mask": (pairs() | {"images/x.png": photo(9)}, [("images/x.png", "no mask belongs to this image")]),
    "missing image": (pairs() | {"masks/x.png": mask()}, [("masks/x.png", "no image belongs to this mask")]),
    "another size": (pairs() | {"masks/1.png": mask((64, 32))}, [("masks/1.png", "64x32 beside an image of 48x32")]),
    "empty mask": (pairs() | {"masks/1.png": encoded(patch(value=0))}, [("masks/1.png", "empty")]),
    "white mask": (
        pairs() | {"masks/1.png": encoded(Image.new("L", (48, 32), 255))},
        [("masks/1.png", "white all over")],
    ),
    "white mask of 0/1": (
        pairs() | {"masks/1.png": encoded(Image.new("L", (48, 32), 1))},
        [("masks/1.png", "white all over")],
    ),
    "photo as mask": (pairs() | {"masks/1.png": photo(5)}, [("masks/1.png", "colours beside black")]),
    "CMYK": (
        pairs() | {"images/1.png": encoded(noise().convert("CMYK"), "TIFF")},
        [("images/1.png", "its pixels are CMYK")],
    ),
    "16 bits": (
        pairs() | {"images/1.png": encoded(Image.fromarray(np.full((32, 48), 3000, np.uint16)))},
        [("images/1.png", "more than 8 bits")],
    ),
    "truncated": (pairs() | {"images/1.png": photo()[:1500]}, [("images/1.png", "truncated or damaged")]),
    "DICOM": (pairs() | {"images/x.dcm": b"x"}, [("images/x.dcm", "DICOM is not read")]),
    "NIfTI": (pairs() | {"x.nii.gz": b"x"}, [("x.nii.gz", "NIfTI is not read")]),
    "bad window": (pairs() | {"window.json": b'{"low": 9}'}, [("window.json", "expected")]),
    "a lesion-free image that is a pair's": (
        pairs(3) | {"backgrounds/9.png": pairs(3)["images/1.png"]},
        [("images/1.png", "the same picture as backgrounds/9.png: one of the two says that it shows no lesion")],
    ),
    "a lesion in normal": (
        {f"benign/benign ({n}){part}.png": data for n in (1, 2) for part, data in (("", photo(n)), ("_mask", mask()))}
        | {"normal/normal (1).png": photo(3), "normal/normal (1)_mask.png": mask()},
        [("normal/normal (1)_mask.png", "shows a lesion in a lesion-free class")],
    ),
}


@pytest.mark.parametrize(("files", "expected"), BAD.values(), ids=BAD)
def test_a_fault_is_named_with_its_file(files: dict[str, bytes], expected: list[tuple[str, str]]) -> None:
    found = faults(files)
    assert [pointer for pointer, _ in found] == [pointer for pointer, _ in expected]
    for (_, detail), (_, start) in zip(found, expected, strict=True):
        assert start in detail


def test_every_fault_is_in_one_answer_and_then_nothing_is_written(store: ObjectStore) -> None:
    files = pairs(4) | {
        "images/0.png": b"nothing",
        "masks/0.png": encoded(patch(value=0)),
        "masks/1.png": mask((64, 64)),
        "masks/2.png": b"nothing",
        "images/5.png": photo(5),
        "masks/6.png": mask(),
        "scan.dcm": b"",
    }
    expected = {"images/0.png", "masks/1.png", "masks/2.png", "images/5.png", "masks/6.png", "scan.dcm"}
    assert {pointer for pointer, _ in faults(files)} == expected | {"masks/0.png"}
    with pytest.raises(ProblemError) as caught:
        imported(files, store, "careless")
    assert caught.value.problem.type.endswith("invalid-dataset")
    assert {fault.pointer for fault in caught.value.problem.errors} == expected | {"masks/0.png"}
    assert list(store.list(tenant_root("careless", "datasets"))) == []


def test_a_mask_that_does_not_follow_the_orientation_is_told_so() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    files = pairs() | {"images/1.png": encoded(noise(1), exif=exif)}
    ((pointer, detail),) = faults(files)
    assert pointer == "masks/1.png"
    assert "EXIF orientation" in detail
    assert faults(files | {"masks/1.png": mask((32, 48))}) == []


@pytest.mark.parametrize("orientation", [2, 3, 4])
def test_an_image_turned_to_its_own_size_is_refused(orientation: int) -> None:
    """Whether the mask was drawn on the upright picture shows in nothing."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    ((pointer, detail),) = faults(pairs() | {"images/1.png": encoded(noise(1), exif=exif)})
    assert pointer == "images/1.png"
    assert "upright" in detail
    assert faults(pairs() | {"backgrounds/1.png": encoded(noise(9), exif=exif)}) == []


def test_one_picture_with_its_masks_in_several_pairs_is_refused() -> None:
    """The second lesion would be trained as healthy tissue; another drawing of the same one is told alone."""
    elsewhere = np.zeros((32, 48), np.uint8)
    elsewhere[28:31, 40:46] = 255
    assert not (np.asarray(patch()).astype(bool) & elsewhere.astype(bool)).any()
    files = pairs() | {"images/1.png": photo(0)}
    assert faults(files) == []
    ((pointer, detail),) = faults(files | {"masks/1.png": encoded(Image.fromarray(elsewhere))})
    assert pointer == "images/1.png"
    assert "images/0.png" in detail
    larger = np.maximum(np.asarray(patch()), elsewhere)
    report = validate(files | {"masks/1.png": encoded(Image.fromarray(larger))})
    assert report.valid
    assert any("with another mask" in note for note in report.notes)


def test_two_masks_of_one_name_are_refused() -> None:
    ((pointer, detail),) = faults(pairs() | {"masks/1.tif": encoded(patch(), "TIFF")})
    assert pointer == "masks/1.tif"
    assert "masks/1.png" in detail


def test_backgrounds_alone_are_a_dataset_but_none_to_train_on(store: ObjectStore) -> None:
    dataset = imported({f"backgrounds/{n}.png": photo(n) for n in range(2)}, store)
    assert [case.role for case in dataset.cases] == ["background", "background"]
    with pytest.raises(ProblemError, match="fine-tuning needs 2"):
        select_cases(dataset, None, 0)


def test_the_store_holds_plain_pngs_under_opaque_ids_and_no_file_name(store: ObjectStore) -> None:
    secret = {
        name.replace("images/", "images/Jane Doe ").replace("masks/", "masks/Jane Doe "): d
        for name, d in pairs().items()
    }
    dataset = imported(secret | {"images/Jane Doe 3.png": photo(0), "masks/Jane Doe 3.png": mask()}, store, "private")
    assert [case.id for case in dataset.cases] == ["00000", "00001", "00002", "00003"]
    assert dataset.notes == ("the same picture as another of the dataset: 1 files",)
    keys = DatasetKeys("private", dataset.id)
    assert b"Jane" not in store.get(keys.dataset)
    for case in dataset.cases:
        assert sha256_hex(store.get(keys.image(case.id))) == case.image_sha256
        assert sha256_hex(store.get(keys.mask(case.id))) == case.mask_sha256
    assert load_dataset(store, "private", dataset.id) == dataset
    with pytest.raises(ProblemError, match="no dataset"):
        load_dataset(store, "local", dataset.id)


def test_importing_twice_is_the_same_dataset_and_the_first_stays(store: ObjectStore, tmp_path: Path) -> None:
    first = imported(pairs(), store, "twice")
    other_names = {
        name.replace("images/", "top/images/").replace("masks/", "top/masks/"): d for name, d in pairs().items()
    }
    assert imported(Folder(write_folder(other_names, tmp_path), tmp_path), store, "twice") == first
    assert list(store.children(tenant_root("twice", "datasets"))) == [first.id]


def test_what_a_deletion_beside_the_import_took_comes_back_with_the_next(store: ObjectStore) -> None:
    first = imported(pairs(), store, "mended")
    keys = DatasetKeys("mended", first.id)
    pictures = [keys.image("00000"), keys.mask("00001")]
    before = [store.get(key) for key in pictures]
    store.delete(pictures)
    assert imported(pairs(), store, "mended") == first
    assert [store.get(key) for key in pictures] == before


def test_the_prompt_of_data_json_is_part_of_the_dataset(store: ObjectStore) -> None:
    def with_prompt(prompt: str) -> dict[str, bytes]:
        rows = [{"image": f"images/{n}.png", "mask": f"masks/{n}.png", "prompt": prompt} for n in range(3)]
        return pairs() | {"data.json": json.dumps(rows).encode()}

    first, second = imported(with_prompt("a"), store), imported(with_prompt("b"), store)
    assert (first.prompt, second.prompt) == ("a", "b")
    assert first.cases == second.cases
    assert first.id != second.id


def test_a_recorded_window_lets_deep_grey_in_and_is_noted(store: ObjectStore) -> None:
    deep = encoded(Image.fromarray(np.linspace(0, 4095, 32 * 48).reshape(32, 48).astype(np.uint16)))
    dataset = imported(pairs() | {"images/1.png": deep, "window.json": b'{"low": 0, "high": 4095}'}, store)
    image, _ = load_case(store, "local", dataset.id, dataset.cases[1])
    np.testing.assert_array_equal(image.reshape(-1)[[0, -1]], [0, 255])
    assert dataset.notes == ("more than 8 bits, through the window 0 to 4095: 1 files",)


def test_what_is_left_out_is_noted_by_name() -> None:
    report = validate(pairs() | {"extra/figure.png": photo()})
    assert report.valid
    assert report.notes == ("images outside the layout, left out: extra/figure.png",)


def test_progress_counts_cases(store: ObjectStore) -> None:
    seen: list[tuple[int, int]] = []
    import_dataset(pairs(), store, "local", lambda done, total: seen.append((done, total)), 2**30)
    assert seen == [(1, 3), (2, 3), (3, 3)]


def ddti_like(views: dict[int, int]) -> dict[str, bytes]:
    stems = [f"{patient}_{view}" for patient, count in views.items() for view in range(count)]
    files = {f"cropped/{stem}.png": photo(n) for n, stem in enumerate(stems)}
    return files | {f"mask/{stem}.gif": encoded(patch(), "GIF") for stem in stems}


def test_selection_is_drawn_from_the_seed_and_spread_over_patients(store: ObjectStore) -> None:
    dataset = imported(ddti_like({11: 6, 22: 2, 33: 1, 44: 3}), store)
    assert {case.patient for case in dataset.cases} == {"00000", "00001", "00002", "00003"}
    chosen = select_cases(dataset, 4, seed=1)
    assert chosen == select_cases(dataset, 4, seed=1)
    assert len({case.patient for case in chosen}) == 4
    assert sorted(Counter(case.patient for case in select_cases(dataset, 7, seed=1)).values()) == [1, 2, 2, 2]
    assert {select_cases(dataset, 4, seed) for seed in range(5)} != {chosen}
    assert sorted(case.id for case in select_cases(dataset, None, 0)) == [case.id for case in dataset.cases]


def test_phantoms_are_a_valid_dataset_and_equal_for_equal_seeds(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        phantoms.write(tmp_path / name, pairs=3, backgrounds=2, seed=seed)
    a, b, c = (dict(Folder(tmp_path / name, tmp_path)) for name in "abc")
    assert a == b
    assert all(a[path] != c[path] for path in a if path.startswith("images/"))
    assert a["README.txt"].startswith(b"These are phantoms")
    report = validate(a)
    assert (report.valid, report.pairs, report.backgrounds, report.notes) == (True, 3, 2, ())


def test_a_dataset_of_more_bytes_than_one_may_have_is_refused_and_nothing_is_written(store: ObjectStore) -> None:
    with pytest.raises(ProblemError) as refused:
        import_dataset(pairs(), store, "vast", lambda done, total: None, 1000)
    assert refused.value.problem.type == "urn:meddiff:problem:too-large"
    assert list(store.list("t/vast/")) == []
