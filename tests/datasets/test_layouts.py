"""Every layout from its listing alone, and which one a source has."""

import json

import pytest
from meddiff.contracts.problems import Fault
from meddiff.layouts import Listing, RawCase, detect, relevant


def read(*paths: str, **contents: bytes) -> tuple[str | None, Listing]:
    layout, listing = detect(dict.fromkeys(relevant(paths), b"") | contents)
    return (layout.name if layout else None), listing


PH2 = ("IMD003/IMD003_Dermoscopic_Image/IMD003.bmp", "IMD003/IMD003_lesion/IMD003_lesion.bmp")
DDTI = ("cropped/101_1(2).png", "mask/101_1(2).gif")
ISIC_2017 = (
    "ISIC-2017_Training_Data/ISIC_0000003.jpg",
    "ISIC-2017_Training_Part1_GroundTruth/ISIC_0000003_segmentation.png",
)
ISIC_2018 = (
    "ISIC2018_Task1-2_Training_Input/ISIC_0000003.jpg",
    "ISIC2018_Task1_Training_GroundTruth/ISIC_0000003_segmentation.png",
)
PAIRS = ("images/x.jpg", "masks/x.png")


@pytest.mark.parametrize("parent", ["", "PH2 Dataset images/", "a/b/"])
@pytest.mark.parametrize(
    ("name", "paths", "patient"),
    [
        ("ph2", PH2, None),
        ("busi", ("benign/benign (1).png", "benign/benign (1)_mask.png"), None),
        ("ddti", DDTI, "101"),
        ("isic", ISIC_2017, None),
        ("isic", ISIC_2018, None),
        ("pairs", PAIRS, None),
    ],
)
def test_a_layout_is_detected_below_any_parent(
    parent: str, name: str, paths: tuple[str, str], patient: str | None
) -> None:
    image, mask = (parent + path for path in paths)
    assert read(image, mask) == (name, Listing((RawCase(image, (mask,), "pair", patient),)))


def test_busi_merges_masks_and_takes_normal_as_background() -> None:
    _, listing = read(
        "benign/benign (4).png",
        "benign/benign (4)_mask.png",
        "benign/benign (4)_mask_1.png",
        "normal/normal (4).png",
        "normal/normal (4)_mask.png",
    )
    assert listing.cases == (
        RawCase("benign/benign (4).png", ("benign/benign (4)_mask.png", "benign/benign (4)_mask_1.png"), "pair"),
        RawCase("normal/normal (4).png", ("normal/normal (4)_mask.png",), "background"),
    )


def test_isic_reads_both_splits_side_by_side_and_ignores_superpixels() -> None:
    paths = [*ISIC_2017, *(path.replace("Training", "Validation") for path in ISIC_2017)]
    _, listing = read(*paths, "ISIC-2017_Training_Data/ISIC_0000003_superpixels.png")
    assert len(listing.cases) == 2
    assert listing.faults == ()


def test_pairs_take_backgrounds_unlabelled_and_several_masks() -> None:
    name, listing = read(
        "top/images/a.png",
        "top/images/b_mask.png",
        "top/masks/a_mask.png",
        "top/masks/a_mask_1.png",
        "top/masks/b_mask.gif",
        "top/backgrounds/n.jpg",
        "top/unlabelled/u.tiff",
    )
    assert name == "pairs"
    assert listing.cases == (
        RawCase("top/images/a.png", ("top/masks/a_mask.png", "top/masks/a_mask_1.png")),
        RawCase("top/images/b_mask.png", ("top/masks/b_mask.gif",)),
        RawCase("top/backgrounds/n.jpg", role="background"),
        RawCase("top/unlabelled/u.tiff", role="unlabelled"),
    )


def test_what_lacks_its_counterpart_is_named_all_at_once() -> None:
    _, listing = read("images/a.png", "images/b.png", "images/b.jpg", "masks/b.png", "masks/c.png")
    assert {fault.pointer for fault in listing.faults} == {"images/a.png", "images/b.png", "masks/c.png"}


def test_junk_is_not_looked_at() -> None:
    junk = ("__MACOSX/images/._x.jpg", "images/.DS_Store", "images/Thumbs.db", ".git/images/y.png")
    assert read(*PAIRS, *junk) == read(*PAIRS)


def test_no_known_layout_says_which_are_known() -> None:
    name, listing = read("pictures/a.png", "labels/a.png")
    assert name is None
    (fault,) = listing.faults
    for known in ("ph2", "busi", "ddti", "isic", "pairs", "data_json", "2 images in labels, pictures"):
        assert known in fault.detail


def test_several_datasets_in_one_source_are_a_fault() -> None:
    assert read(*PH2, *DDTI)[1].faults == (
        Fault(pointer="/", detail="files of several layouts (ph2, ddti); name one dataset"),
    )
    assert [f.pointer for f in read("a/images/x.png", "b/images/x.png")[1].faults] == ["a/", "b/"]


ROWS = [
    {"image": "images/a.jpg", "mask": "masks/a.png", "prompt": "An image of hta", "patient": 7},
    {"image": "images/b.jpg", "mask": ["masks/b.png", "masks/b2.png"], "prompt": "An image of hta"},
]
FILES = ("images/a.jpg", "images/b.jpg", "masks/a.png", "masks/b.png", "masks/b2.png")
CASES = (
    RawCase("images/a.jpg", ("masks/a.png",), patient="7"),
    RawCase("images/b.jpg", ("masks/b.png", "masks/b2.png")),
)


@pytest.mark.parametrize(
    "content",
    [
        "\n".join(json.dumps(row) for row in ROWS),
        json.dumps(ROWS, indent=2),
        json.dumps(
            {
                "image": ["../data/train/images/a.jpg", "../data/train/images/b.jpg"],
                "mask_1": ["../data/train/masks/a.png", "../data/train/masks/b.png"],
                "mask_2": [None, "masks/b2.png"],
                "prompt": ["An image of hta"] * 2,
                "patient": [7, None],
            }
        ),
    ],
    ids=["lines", "array", "columns, as the authors write it"],
)
def test_data_json_in_each_of_its_forms(content: str) -> None:
    name, listing = read(*FILES, **{"data.json": content.encode()})
    assert name == "data_json"
    assert listing == Listing(CASES, prompt="An image of hta")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_data_json_in_every_unicode_encoding(encoding: str) -> None:
    rows = [{"image": "images/a.jpg", "mask": "masks/a.png", "patient": " 7 "}]
    _, listing = read(*FILES, **{"data.json": json.dumps(rows).encode(encoding)})
    assert [case.patient for case in listing.cases] == ["7"]


@pytest.mark.parametrize("patient", ["null", "NaN", '""', '"  "'])
def test_a_patient_that_is_not_named_is_unknown(patient: str) -> None:
    row = f'{{"image": "images/a.jpg", "mask": "masks/a.png", "patient": {patient}}}'
    _, listing = read(*FILES, **{"data.json": row.encode()})
    assert [case.patient for case in listing.cases] == [None]


def test_a_data_json_without_pairs_does_not_hide_one_with() -> None:
    row = json.dumps({"image": "a.png", "mask": "b.png"}).encode()
    name, listing = read("set/a.png", "set/b.png", **{"data.json": b"{}", "set/data.json": row})
    assert (name, listing.cases) == ("data_json", (RawCase("set/a.png", ("set/b.png",)),))


def test_a_path_that_leads_up_is_followed_before_folders_are_dropped() -> None:
    row = json.dumps({"image": "../test/images/0.png", "mask": "masks/0.png"}).encode()
    _, listing = read("test/images/0.png", "train/images/0.png", "train/masks/0.png", **{"train/data.json": row})
    assert listing.cases == (RawCase("test/images/0.png", ("train/masks/0.png",)),)


@pytest.mark.parametrize(
    ("field", "value"), [("prompt", "cut \ud83d"), ("patient", ["a", "list"])], ids=["half a character", "a list"]
)
def test_values_of_data_json_that_are_no_text_are_faults(field: str, value: object) -> None:
    row = {"image": "images/a.jpg", "mask": "masks/a.png", field: value}
    _, listing = read(*FILES, **{"data.json": json.dumps(row).encode()})
    assert [field in fault.detail for fault in listing.faults] == [True]


def test_data_json_names_every_fault_of_every_line() -> None:
    lines = [
        json.dumps(ROWS[0]),
        "{not json",
        json.dumps({"image": "images/none.jpg", "mask": "masks/none.png"}),
        json.dumps({"image": 3}),
        json.dumps(ROWS[0]),
    ]
    _, listing = read(*FILES, **{"data.json": "\n".join(lines).encode()})
    details = " | ".join(fault.detail for fault in listing.faults)
    for expected in (
        "line 2: not a JSON object",
        "line 3: images/none.jpg is not in the dataset",
        "line 3: masks/none.png is not in the dataset",
        "line 4: no mask",
        "line 4: 3 is not a path",
        "named 2 times in data.json",
    ):
        assert expected in details
    assert len(listing.faults) == 6


def test_columns_of_unequal_length_are_a_fault() -> None:
    content = json.dumps({"image": ["images/a.jpg", "images/b.jpg"], "mask": ["masks/a.png"]}).encode()
    _, listing = read(*FILES, **{"data.json": content})
    assert [fault.detail for fault in listing.faults] == ["mask: 1 values beside 2 images"]


def test_the_most_frequent_prompt_is_kept_and_said_so() -> None:
    rows = [{"image": f"images/{n}.png", "mask": f"masks/{n}.png", "prompt": "b" if n else "a"} for n in range(3)]
    files = [path for row in rows for path in (row["image"], row["mask"])]
    _, listing = read(*files, **{"data.json": json.dumps(rows).encode()})
    assert listing.prompt == "b"
    assert listing.notes == ("2 different prompts; the most frequent is used",)
