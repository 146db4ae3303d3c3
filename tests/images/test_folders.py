"""Listing the files of a folder: links, hidden files, and what begins like an image."""

import os

from PIL import Image

from timm_coda.images import image_endings, is_image, walk_folder


def test_a_folder_is_walked_without_loops(tmp_path):
    for name in ("cat/1.png", "cat/deep/2.png", "cat-b/3.png", ".git/x", "cat/.hidden"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    (tmp_path / "out/sub").mkdir(parents=True)
    (tmp_path / "out/sub/4.png").touch()
    links = {
        "in/a": "../out",  # followed
        "in/again": "../out/sub",  # visited as a/sub
        "in/cat/up": "..",
        "out/sub/home": "../../in",  # around it, by the way through in/a
        "in/self": "self",
        "in/5.png": "cat/1.png",
    }
    for link, target in links.items():
        os.symlink(target, tmp_path / link)
    found = walk_folder(tmp_path / "in")
    assert [(path, kind, link) for path, kind, link in found if kind == "file" or link] == [
        ("5.png", "file", True),
        ("a", "folder", True),
        ("a/sub/4.png", "file", False),
        ("a/sub/home", "link to a folder that contains it", True),
        ("again", "link to a folder that is included already", True),
        ("cat/1.png", "file", False),
        ("cat/deep/2.png", "file", False),
        ("cat/up", "link to a folder that contains it", True),
        ("cat-b/3.png", "file", False),
        ("self", "broken link", True),
    ]
    assert [entry.path for entry in found if entry.kind == "hidden"] == [".git", "cat/.hidden"]
    assert [entry.path for entry in found if entry.kind == "folder"] == ["a", "a/sub", "cat", "cat/deep", "cat-b"]
    top = [(entry.path, entry.kind) for entry in walk_folder(tmp_path / "in", deep=False)]
    assert ("a", "folder") in top and ("cat", "folder") in top and ("5.png", "file") in top
    assert not any("/" in path for path, _ in top)


def test_a_folder_that_cannot_be_opened(tmp_path):
    assert walk_folder(tmp_path / "none")[0].kind == "cannot be opened (No such file or directory)"


def test_many_links_between_folders_are_followed_once(tmp_path):
    for one in range(12):
        (tmp_path / "all" / str(one)).mkdir(parents=True)
        (tmp_path / "all" / str(one) / "1.png").touch()
    (tmp_path / "in").mkdir()
    os.symlink("../all/0", tmp_path / "in/x")
    for one in range(12):
        for other in set(range(12)) - {one}:
            os.symlink(f"../{other}", tmp_path / f"all/{one}/to{other}")
    assert sum(entry.kind == "file" for entry in walk_folder(tmp_path / "in")) == 12


def test_images_are_found_by_their_first_bytes(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "photo", "JPEG")
    (tmp_path / "text").write_text("Python")  # like the start of a PPM file
    (tmp_path / "empty").touch()
    assert [is_image(tmp_path / name) for name in ("photo", "text", "empty", "none")] == [True, False, False, False]
    assert {".png", ".jpg", ".jpeg", ".webp", ".tif"} <= image_endings() and ".txt" not in image_endings()
