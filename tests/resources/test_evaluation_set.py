"""An evaluation folder gives its files, and tells of those that are passed over."""

from upath import UPath

from scalselect_assets.resources.evaluation_set import passed_over


def test_what_is_passed_over_in_an_evaluation_folder_is_counted(tmp_path):
    for name in ("a.png", "b.HEIC", ".c.png", "sub/d.svg", "annotations.json", "README.md", "texts.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "linked").symlink_to("/")

    images, texts = (passed_over(UPath(tmp_path), kind) for kind in ("images", "texts"))

    assert {kind: found["count"] for kind, found in images.items()} == {
        "hidden": 1, "linked_folder": 1, "other:.heic": 1, "other:.svg": 1,
    }  # fmt: skip
    assert {kind: found["count"] for kind, found in texts.items()} == {
        "hidden": 1, "linked_folder": 1, "other:.json": 1, "other:.csv": 1,
    }  # fmt: skip
    assert passed_over(UPath(tmp_path / "a.png"), "images") == {}
