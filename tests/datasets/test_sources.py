"""Folders, archives and buckets: what may be read, and what is refused."""

import os
import stat
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from dataset_files import TENANT, pairs, write_folder, write_zip
from meddiff.contracts.problems import ProblemError
from meddiff.importing import check_uri, open_source, validate
from meddiff.importing.sources import Folder, UnreadableFile, open_archive
from meddiff.settings import Settings
from meddiff.store.objects import ObjectStore, StoreUnavailable
from meddiff.store.retry import RetryPolicy


def refusal(uri: str, settings: Settings, store: ObjectStore) -> tuple[str, str]:
    """The slug of the problem that opening ``uri`` ends in, and what it says."""
    with pytest.raises(ProblemError) as caught, open_source(uri, settings, store, TENANT):
        pass
    problem = caught.value.problem
    return problem.type.rpartition(":")[2], " ".join(
        [problem.detail, *(f"{e.pointer} {e.detail}" for e in problem.errors)]
    )


def test_folder_archive_and_prefix_hold_the_same(
    settings: Settings, store: ObjectStore, hospital: ObjectStore, tmp_path: Path
) -> None:
    files = pairs()
    folder = write_folder(files, tmp_path / "a folder")
    archive = write_zip(files, tmp_path / "pairs.zip")
    for name, data in files.items():
        hospital.put(f"skin/pairs/{name}", data)
    hospital.put("skin/pairs2/images/other.png", b"")
    hospital.put("skin/pairs.zip", archive.read_bytes())
    for uri in (
        folder.as_uri(),
        f"file://{folder}",
        archive.as_uri(),
        "s3://hospital/skin/pairs",
        "s3://hospital/skin/pairs/",
        "s3://hospital/skin/pairs.zip",
    ):
        check_uri(uri, settings, TENANT)
        with open_source(uri, settings, store, TENANT) as source:
            assert dict(source) == files


def test_names_that_are_not_utf_8_are_named(settings: Settings, store: ObjectStore, tmp_path: Path) -> None:
    folder = write_folder(pairs(), tmp_path / "old share")
    Path(os.fsdecode(os.fsencode(folder) + b"/images/M\xfcller.png")).write_bytes(b"")
    slug, text = refusal(folder.as_uri(), settings, store)
    assert slug == "invalid-dataset"
    assert "images/M\\udcfcller.png its name is not UTF-8" in text
    text.encode()


def test_hidden_links_are_not_looked_at_and_circular_ones_are_named(
    settings: Settings, store: ObjectStore, tmp_path: Path
) -> None:
    folder = write_folder(pairs(), tmp_path / "linked")
    (folder / ".latest").symlink_to(folder / "images", target_is_directory=True)
    with open_source(folder.as_uri(), settings, store, TENANT) as source:
        assert dict(source) == pairs()
    (folder / "images" / "loop.png").symlink_to(folder / "images" / "loop.png")
    slug, text = refusal(folder.as_uri(), settings, store)
    assert slug == "source-refused"
    assert "images/loop.png a link that leads to itself" in text
    assert refusal((folder / "images" / "loop.png").as_uri(), settings, store)[0] == "invalid-request"


def test_members_below_a_dot_are_read_and_repeated_ones_named(
    settings: Settings, store: ObjectStore, tmp_path: Path
) -> None:
    archive = write_zip({f"./{name}": data for name, data in pairs().items()}, tmp_path / "dot.zip")
    with open_source(archive.as_uri(), settings, store, TENANT) as source:
        assert dict(source) == pairs()
    with zipfile.ZipFile(archive, "a") as members:
        members.writestr("images/0.png", b"")
    slug, text = refusal(archive.as_uri(), settings, store)
    assert slug == "invalid-dataset"
    assert "images/0.png 2 members of this name" in text


@pytest.mark.parametrize(
    "uri",
    [
        "http://example.org/x.zip",
        "/data/skin",
        "skin",
        "s3://",
        "file://data/skin",
        "ds_12",
        "file:///a%00b",
        "gs://b/x",
        "s3://hospital/skin/./pairs.zip",
        "s3://hospital/../x",
    ],
)
def test_a_uri_of_no_known_form_is_invalid(uri: str, settings: Settings, store: ObjectStore) -> None:
    slug, text = refusal(uri, settings, store)
    assert slug == "invalid-request"
    assert "/dataset_uri" in text


@pytest.mark.parametrize(
    "uri",
    [
        "file:///etc",
        "file:///",
        "s3://elsewhere/x",
        "file:///a/../etc",
    ],
)
def test_what_the_operator_has_not_named_is_refused(uri: str, settings: Settings, store: ObjectStore) -> None:
    assert refusal(uri, settings, store)[0] == "source-refused"


@pytest.mark.parametrize("path", ["radiology", "radiology/", "radiology/2026/x.zip"])
def test_a_prefix_is_a_source_with_what_lies_below_it(path: str, settings: Settings) -> None:
    check_uri(f"s3://shared/{path}", settings, TENANT)


@pytest.mark.parametrize("uri", ["s3://shared/", "s3://shared/radiology2", "s3://shared/cardiology/radiology"])
def test_beside_a_prefix_nothing_is_a_source(uri: str, settings: Settings, store: ObjectStore) -> None:
    assert refusal(uri, settings, store)[0] == "source-refused"


@pytest.mark.parametrize("uri", ["s3://hospital/skin", "file:///"])
def test_a_source_is_its_tenants_alone(uri: str, settings: Settings, tmp_path: Path) -> None:
    named = settings.model_copy(update={"file_roots": {TENANT: (Path("/"),)}})
    check_uri(uri, named, TENANT)
    with pytest.raises(ProblemError, match="operator"):
        check_uri(uri, named, "cardiology")


@pytest.mark.parametrize("path", ["t/local/datasets", "x.zip", ""])
def test_the_own_bucket_is_refused_even_if_named(path: str, settings: Settings) -> None:
    named = settings.model_copy(update={"s3_sources": {TENANT: (settings.s3_bucket,)}})
    with pytest.raises(ProblemError, match="own bucket") as caught:
        check_uri(f"s3://{settings.s3_bucket}/{path}", named, TENANT)
    assert caught.value.problem.status == 403


def test_a_dataset_id_needs_no_right(settings: Settings) -> None:
    check_uri("ds_" + "0" * 32, settings, TENANT)


@pytest.mark.parametrize("uri", ["s3://absent/x", "s3://absent/x.zip", "s3://hospital/nothing", "s3://hospital/no.zip"])
@pytest.mark.usefixtures("hospital")
def test_what_is_not_there_is_unreachable(uri: str, settings: Settings, store: ObjectStore) -> None:
    assert refusal(uri, settings, store)[0] == "source-unreachable"


def test_a_missing_folder_is_unreachable(settings: Settings, store: ObjectStore, tmp_path: Path) -> None:
    assert refusal((tmp_path / "none").as_uri(), settings, store)[0] == "source-unreachable"


def test_a_name_too_long_for_any_folder_is_unreachable(settings: Settings, store: ObjectStore, tmp_path: Path) -> None:
    assert refusal((tmp_path / ("x" * 300)).as_uri(), settings, store)[0] == "source-unreachable"


@contextmanager
def unprivileged() -> Iterator[None]:
    """As a user to whom permissions apply."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


def test_what_may_not_be_read_is_named_and_never_left_out(settings: Settings, store: ObjectStore) -> None:
    """A dataset without one of its folders would be another dataset."""
    with TemporaryDirectory(ignore_cleanup_errors=True) as name:
        root = Path(name)
        root.chmod(0o755)
        (root / "skin" / "malignant").mkdir(parents=True)
        (root / "skin" / "a.png").write_bytes(b"x")
        (root / "skin.zip").write_bytes(b"x")
        (root / "skin" / "malignant").chmod(0)
        (root / "skin.zip").chmod(0)
        named = settings.model_copy(update={"file_roots": {TENANT: (root,)}})
        with unprivileged():
            folder, archive = (refusal((root / one).as_uri(), named, store) for one in ("skin", "skin.zip"))
        (root / "skin" / "malignant").chmod(0o755)
    assert folder[0] == archive[0] == "source-unreachable"
    assert "malignant" in folder[1]


def test_a_store_that_does_not_answer_is_no_fault_of_the_dataset(settings: Settings) -> None:
    """A job waits until it answers again."""
    nowhere = settings.model_copy(update={"s3_endpoint": "127.0.0.1:9"})
    with pytest.raises(StoreUnavailable):
        refusal("s3://hospital/x", nowhere, ObjectStore.from_settings(nowhere, RetryPolicy(deadline=0)))


def test_an_archive_above_the_limit_is_too_large(
    settings: Settings, store: ObjectStore, hospital: ObjectStore, tmp_path: Path
) -> None:
    hospital.put("large.zip", write_zip(pairs(), tmp_path / "x.zip").read_bytes())
    small = settings.model_copy(update={"max_upload_bytes": 100})
    assert refusal("s3://hospital/large.zip", small, store)[0] == "too-large"


def test_links_out_of_the_root_and_to_folders_are_refused_by_name(
    settings: Settings, store: ObjectStore, tmp_path: Path
) -> None:
    folder = write_folder(pairs(), tmp_path / "data")
    (folder / "images/passwd.png").symlink_to("/etc/passwd")
    (folder / "more").symlink_to(folder / "images")
    slug, text = refusal(folder.as_uri(), settings, store)
    assert slug == "source-refused"
    assert "images/passwd.png" in text
    assert "more a link to a folder" in text


def test_a_root_reached_through_a_link_is_judged_by_where_it_leads(
    settings: Settings, store: ObjectStore, tmp_path: Path
) -> None:
    (tmp_path / "way").symlink_to("/etc")
    assert refusal((tmp_path / "way").as_uri(), settings, store)[0] == "source-refused"


def test_links_within_the_root_are_followed(tmp_path: Path) -> None:
    folder = write_folder(pairs(), tmp_path / "data")
    (folder / "images/linked.png").symlink_to(folder / "images/0.png")
    assert Folder(folder, tmp_path)["images/linked.png"] == pairs()["images/0.png"]


def test_a_link_swapped_in_after_the_listing_is_not_read(tmp_path: Path) -> None:
    folder = write_folder(pairs(), tmp_path / "data")
    source = Folder(folder, folder)
    (folder / "images/0.png").unlink()
    (folder / "images/0.png").symlink_to("/etc/passwd")
    with pytest.raises(UnreadableFile):
        source["images/0.png"]


def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    folder = write_folder(pairs(), tmp_path / "data")
    os.mkfifo(folder / "images/pipe.png")
    with pytest.raises(UnreadableFile, match="not a regular file"):
        Folder(folder, folder)["images/pipe.png"]


def archive_problem(path: Path) -> list[tuple[str, str]]:
    with pytest.raises(ProblemError) as caught, open_archive(path):
        pass
    assert caught.value.problem.type.endswith("invalid-dataset")
    return [(fault.pointer, fault.detail) for fault in caught.value.problem.errors]


def test_every_unsafe_member_is_named(tmp_path: Path) -> None:
    names = ["../escape.png", "a/../../escape.png", "/etc/escape.png", "C:\\escape.png", "..\\other.png"]
    path = write_zip(dict.fromkeys(names, b"x") | pairs(), tmp_path / "x.zip")
    faults = archive_problem(path)
    assert sorted(pointer for pointer, _ in faults) == sorted(names)
    assert {detail for _, detail in faults} == {"its path leaves the archive"}


def test_a_symbolic_link_in_an_archive_is_refused(tmp_path: Path) -> None:
    path = write_zip(pairs(), tmp_path / "x.zip")
    with zipfile.ZipFile(path, "a") as archive:
        link = zipfile.ZipInfo("images/link.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    assert archive_problem(path) == [("images/link.png", "a symbolic link")]


def test_an_encrypted_member_is_refused(tmp_path: Path) -> None:
    path = write_zip({"images/x.png": b"x"}, tmp_path / "x.zip")
    data = bytearray(path.read_bytes())
    directory = data.index(b"PK\x01\x02")
    data[directory + 8 : directory + 10] = struct.pack("<H", 1)
    path.write_bytes(data)
    assert archive_problem(path) == [("images/x.png", "encrypted")]


def test_an_archive_bomb_is_refused_unread(tmp_path: Path) -> None:
    ((pointer, detail),) = archive_problem(write_zip({"images/x.png": bytes(70 * 2**20)}, tmp_path / "x.zip"))
    assert pointer == "/"
    assert "archive bomb" in detail


@pytest.mark.parametrize("cut", [0, 10, 500])
def test_what_is_no_archive_is_said_to_be_none(cut: int, tmp_path: Path) -> None:
    path = write_zip(pairs(), tmp_path / "x.zip")
    path.write_bytes(path.read_bytes()[:cut])
    assert archive_problem(path) == []


def test_one_damaged_member_is_one_fault(tmp_path: Path) -> None:
    path = write_zip(pairs(), tmp_path / "x.zip")
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("images/1.png").header_offset + 200
    data = bytearray(path.read_bytes())
    data[start : start + 50] = bytes(50)
    path.write_bytes(data)
    with open_archive(path) as source:
        assert [(e.pointer, e.detail) for e in validate(source).errors] == [
            ("images/1.png", "damaged within the archive")
        ]
