"""A reference leads to a file below the image root or to a reason; nothing outside is ever opened."""

import os
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from upath import UPath

from scalselect_assets.method.representation.rejection import Rejection
from scalselect_assets.method.representation.rejection import RejectionReason as Reason
from scalselect_assets.resources.files import FileState, file_state
from scalselect_assets.resources.image_root import ImageRoot

HOSTILE = [
    "a b.png",
    "한국.png",
    "q\"'`.png",
    "100%25.png",
    "new\nline.png",
    "#?&;.png",
    "a::b.png",
    "-rf",
    "~",
]


@pytest.fixture
def pool(tmp_path):
    """A root with images in two folders and a secret beside it."""
    root = tmp_path / "pool"
    (root / "shards").mkdir(parents=True)
    (root / "images").mkdir()
    (root / "images" / "a.png").write_bytes(b"A")
    (root / "shards" / "b.png").write_bytes(b"BB")
    (tmp_path / "secret.png").write_bytes(b"SECRET")
    return root


def at(root, base=None) -> ImageRoot:
    return ImageRoot(UPath(root), UPath(base or root))


def reason(images: ImageRoot, reference: str):
    rejection = images.resolve(reference).rejection
    assert rejection is not None, f"{reference!r} resolved to {images.resolve(reference).path!r}"
    assert "; " in rejection.detail, "the detail names a remedy"
    return rejection.reason


def test_relative_references_start_from_the_base_and_may_climb_within_the_root(pool):
    images = at(pool, pool / "shards")

    for reference, path in {
        "b.png": "shards/b.png",
        "./b.png": "shards/b.png",
        "../images/a.png": "images/a.png",
        "..//images/./x/../a.png": "images/a.png",
        "../shards/b.png": "shards/b.png",
    }.items():
        resolved = images.resolve(reference)
        assert (resolved.path, resolved.rejection) == (path, None)
    assert images.read("images/a.png") == b"A"


def test_absolute_paths_and_file_urls_are_taken_below_the_root(pool):
    odd = pool / "images" / "a b%20.png"
    odd.write_bytes(b"C")
    images = at(pool, pool / "shards")

    assert images.resolve(str(pool / "images" / "a.png")).path == "images/a.png"
    assert images.resolve(f"//{pool}/images/../images/a.png").path == "images/a.png"
    for reference in (odd.as_uri(), odd.as_uri().replace("file://", "FILE://localhost")):
        assert images.resolve(reference).path == "images/a b%20.png"
        assert images.resolve(reference).rejection is None
    assert reason(images, str(pool.parent / "secret.png")) is Reason.OUTSIDE_IMAGE_ROOT
    assert reason(images, (pool.parent / "secret.png").as_uri()) is Reason.OUTSIDE_IMAGE_ROOT
    assert reason(images, str(pool) + "-other/a.png") is Reason.OUTSIDE_IMAGE_ROOT


@pytest.mark.parametrize(
    "reference", ["../secret.png", "images/../../secret.png", "/etc/passwd", "..", "../pool2/a"]
)
def test_what_leads_out_of_the_root_is_rejected_whether_or_not_it_exists(pool, reference):
    images = at(pool)

    assert reason(images, reference) is Reason.OUTSIDE_IMAGE_ROOT
    assert images.resolve(reference).path is None
    assert images.path_of(reference) is None
    with pytest.raises(PermissionError, match="outside the image root"):
        images.read(reference)


def test_links_are_followed_only_to_places_below_the_real_root(pool):
    (pool / "inside.png").symlink_to("images/a.png")
    (pool / "escape.png").symlink_to("../secret.png")
    (pool / "nowhere.png").symlink_to("../not-there.png")
    (pool / "gone.png").symlink_to("images/not-there.png")
    (pool / "loop.png").symlink_to("loop.png")
    (pool / "up").symlink_to("..")
    (pool / "pictures").symlink_to("images")
    images = at(pool)

    assert images.resolve("inside.png").rejection is None
    assert images.read("inside.png") == b"A"
    assert images.resolve("pictures/a.png").path == "pictures/a.png"
    assert images.read("pictures/a.png") == b"A"
    outside = {
        reason(images, name) for name in ("escape.png", "nowhere.png", "up/secret.png", "up/not-there")
    }
    assert outside == {Reason.OUTSIDE_IMAGE_ROOT}
    assert reason(images, "gone.png") is reason(images, "loop.png") is Reason.MISSING_IMAGE
    with pytest.raises(PermissionError):
        images.read("escape.png")


def test_the_root_itself_may_be_a_link_and_be_named_either_way(pool, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(pool)

    for root, named in ((link, link), (link, pool), (pool, link)):
        resolved = at(root).resolve(str(named / "images" / "a.png"))
        assert (resolved.path, resolved.rejection) == ("images/a.png", None)
    assert at(link).read("images/a.png") == b"A"


def test_a_link_that_changes_its_target_is_noticed_when_the_image_is_opened(pool):
    (pool / "a.png").symlink_to("images/a.png")
    assert at(pool).resolve("a.png").rejection is None

    (pool / "a.png").unlink()
    (pool / "a.png").symlink_to("../secret.png")

    with pytest.raises(PermissionError):
        at(pool).read("a.png")


def test_what_is_no_regular_file_is_a_missing_image(pool):
    os.mkfifo(pool / "pipe.png")
    images = at(pool)

    for reference in ("images", ".", "images/", "pipe.png", "nope.png", "images/a.png/x", "nope/a.png"):
        assert reason(images, reference) is Reason.MISSING_IMAGE
    with pytest.raises(FileNotFoundError, match=r"nope\.png"):
        images.read("nope.png")


@pytest.mark.parametrize("reference", ["a\0b.png", "x" * 5000, "d/" * 5000 + "a.png", "\0", "file:///%00"])
def test_impossible_names_are_missing_images(pool, reference):
    rejection = at(pool).resolve(reference).rejection

    assert rejection.reason is Reason.MISSING_IMAGE
    assert len(rejection.detail) < 600


@pytest.mark.parametrize(
    ("reference", "remedy"),
    [
        ("http://x.org/a.png", "remote images are not fetched; download it"),
        ("HTTPS://x.org/a.png?b=/../c", "remote images are not fetched; download it"),
        ("s3://bucket/a.png", "remote images are not fetched; download it"),
        ("file://host/a.png", "remote images are not fetched; download it"),
        ("data:image/png," + "A" * 10_000, "not Base64; write it again, or to a file"),
    ],
)
def test_remote_and_embedded_images_are_missing_with_a_remedy(pool, reference, remedy):
    rejection = at(pool).resolve(reference).rejection

    assert rejection.reason is Reason.MISSING_IMAGE
    assert remedy in rejection.detail
    assert len(rejection.detail) < 500


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_names(pool, name):
    (pool / "images" / name).write_bytes(name.encode())
    images = at(pool)

    assert images.resolve(f"images/{name}").path == f"images/{name}"
    assert images.read(f"images/{name}") == name.encode()


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.sampled_from(["..", ".", "", "a", "images", "a.png", "up", "/"]), max_size=8).map("/".join)
)
def test_no_reference_reads_what_is_outside(tmp_path_factory, reference):
    root = tmp_path_factory.getbasetemp() / "fuzz" / "pool"
    if not root.exists():
        (root / "images").mkdir(parents=True)
        (root / "images" / "a.png").write_bytes(b"inside")
        (root.parent / "a.png").write_bytes(b"outside")
        (root / "up").symlink_to("..")
    images = at(root, root / "images")

    resolved = images.resolve(reference)

    if resolved.rejection is None:
        assert images.read(resolved.path) == b"inside"
    else:
        with pytest.raises((FileNotFoundError, PermissionError)):
            images.read(resolved.path or reference)


def test_the_state_is_size_and_time_and_follows_links(pool):
    (pool / "link.png").symlink_to("images/a.png")
    os.utime(pool / "images" / "a.png", ns=(1, 123_456_789))

    assert at(pool).state("images/a.png") == FileState(1, "123456789") == at(pool).state("link.png")
    assert file_state(UPath(pool / "link.png")) == FileState(1, "123456789")
    missing = at(pool).state("nope.png")
    assert isinstance(missing, Rejection)
    assert missing.reason is Reason.MISSING_IMAGE
    with pytest.raises(FileNotFoundError):
        file_state(UPath(pool / "nope.png"))


def test_an_image_that_cannot_be_asked_about_is_an_error_and_no_rejection(pool, monkeypatch):
    def failing(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.stat", failing)

    with pytest.raises(OSError, match="Input/output"):
        at(pool).resolve("images/a.png")


def test_a_reference_is_looked_up_once(pool, monkeypatch):
    images = at(pool)
    first = images.resolve("images/a.png")
    monkeypatch.setattr("os.stat", lambda *_, **__: pytest.fail("asked again"))

    assert images.resolve("images/a.png") is first


def test_the_base_must_lie_below_the_root(pool):
    with pytest.raises(ValueError, match="not below the image root"):
        at(pool / "images", pool / "shards")


def test_a_path_is_known_before_its_file_is(pool):
    images = at(pool, pool / "shards")

    assert (
        images.path_of("../images/late.png") == "images/late.png" == images.resolve("../images/late.png").path
    )
    assert images.path_of("https://x.org/a.png") is None


def test_an_object_store_serves_images_by_lexical_paths():
    root = UPath("memory:///image-root/pool")
    (root / "sub").mkdir(parents=True, exist_ok=True)
    for name in HOSTILE[:-1]:
        (root / "sub" / name).write_bytes(name.encode())
    (root.parent / "secret.png").write_bytes(b"SECRET")
    images = ImageRoot(root, root / "sub")

    for name in HOSTILE[:-1]:
        assert images.resolve(name).path == f"sub/{name}"
        assert images.resolve(name).rejection is None
        assert images.read(f"sub/{name}") == name.encode()
    assert images.resolve("memory://image-root/pool/sub/a b.png").path == "sub/a b.png"
    assert reason(images, "memory://image-root/secret.png") is Reason.OUTSIDE_IMAGE_ROOT
    assert reason(images, "../../secret.png") is Reason.OUTSIDE_IMAGE_ROOT
    assert reason(images, "../sub") is reason(images, "no.png") is Reason.MISSING_IMAGE
    assert reason(images, "file:///etc/passwd") is Reason.MISSING_IMAGE
    assert images.state("sub/a b.png").size == 7


def test_an_object_store_without_times_is_told_by_its_etag(monkeypatch):
    root = UPath("memory:///image-root-etag")
    info = {"name": "/image-root-etag/a.png", "size": 3, "type": "file", "ETag": '"abc"', "LastModified": "x"}
    monkeypatch.setattr(type(root.fs), "info", lambda _, __: info)

    assert ImageRoot(root, root).state("a.png") == FileState(3, '"abc"') == file_state(root / "a.png")


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
@pytest.mark.parametrize("in_row", ["NFC", "NFD"])
def test_a_name_in_another_normal_form_is_found_and_known_as_it_is_on_disk(tmp_path, on_disk, in_row):
    written = unicodedata.normalize(on_disk, "Fotografías/niño.png")
    (tmp_path / written).parent.mkdir()
    (tmp_path / written).write_bytes(b"image")
    images = ImageRoot(UPath(tmp_path), UPath(tmp_path))
    reference = unicodedata.normalize(in_row, "Fotografías/niño.png")

    found = images.resolve(reference)

    assert (found.path, found.rejection) == (written, None)
    assert images.read(reference) == b"image"
    assert not isinstance(images.state(reference), Rejection)
    assert images.resolve("Fotografías/gone.png").rejection.reason is Reason.MISSING_IMAGE


def test_a_name_of_mixed_normal_forms_is_found_part_by_part(tmp_path):
    folder, name = unicodedata.normalize("NFD", "é"), unicodedata.normalize("NFC", "é.png")
    (tmp_path / folder).mkdir()
    (tmp_path / folder / name).touch()
    images = ImageRoot(UPath(tmp_path), UPath(tmp_path))

    for form in ("NFC", "NFD"):
        assert images.resolve(unicodedata.normalize(form, "é/é.png")).path == f"{folder}/{name}"


def test_a_path_of_another_machine_is_the_file_that_its_longest_end_names(tmp_path):
    for name in ("a.png", "images/a.png", "media/images/b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    moved = ImageRoot(UPath(tmp_path), UPath(tmp_path), moved=True)
    plain = ImageRoot(UPath(tmp_path), UPath(tmp_path))

    assert moved.resolve("/mnt/pool/images/a.png").path == "images/a.png"
    assert moved.resolve("/mnt/pool/media/images/b.png").path == "media/images/b.png"
    assert moved.resolve("/mnt/other/a.png").path == "a.png"
    assert moved.resolve("/mnt/other/gone.png").rejection.reason is Reason.MISSING_IMAGE
    assert moved.resolve("/mnt/else/gone.png").rejection.reason is Reason.OUTSIDE_IMAGE_ROOT
    assert plain.resolve("/mnt/pool/images/a.png").rejection.reason is Reason.OUTSIDE_IMAGE_ROOT
