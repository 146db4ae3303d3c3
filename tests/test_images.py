"""Reading image files: common formats and modes, damaged files, and malicious uploads."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from timm_coda.images import MAX_PIXELS, ImageError, image_endings, is_image, read_image, to_rgb, walk_folder

RAMP = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
GREY = np.rint(RAMP / 257).astype(np.uint8)
PHOTO = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def png_that_claims(width: int, height: int) -> io.BytesIO:
    whole = encoded(Image.new("L", (4, 4)), "PNG").getvalue()
    header = struct.pack(">II", width, height) + whole[24:29]
    return io.BytesIO(whole[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + whole[33:])


def test_every_mode_becomes_rgb():
    eight = Image.fromarray(GREY)
    images = {
        "L": eight,
        "LA": eight.convert("LA"),
        "RGBA": eight.convert("RGBA"),
        "CMYK": eight.convert("RGB").convert("CMYK"),
        "P": eight.convert("P"),
        "YCbCr": eight.convert("RGB").convert("YCbCr"),
        "16 bit": Image.fromarray(RAMP),
        "32 bit": Image.fromarray(RAMP.astype(np.int32)),
        "float": Image.fromarray((RAMP / 65535).astype(np.float32)),
    }
    for name, image in images.items():
        rgb = to_rgb(image)
        assert rgb.mode == "RGB", name
        assert np.abs(np.asarray(rgb).astype(int) - GREY[..., None]).max() <= 1, name
    with pytest.raises(ImageError, match="NaN"):
        to_rgb(Image.fromarray(np.full((2, 2), np.nan, np.float32)))


def test_transparent_parts_are_white():
    pixels = np.array([[[10, 20, 30, 0], [10, 20, 30, 255], [0, 0, 0, 51]]], np.uint8)
    expected = [[[255, 255, 255], [10, 20, 30], [204, 204, 204]]]
    assert np.asarray(read_image(encoded(Image.fromarray(pixels), "PNG"))).tolist() == expected
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    assert np.asarray(read_image(encoded(palette, "PNG", transparency=0))).tolist() == [[[255] * 3, [40, 50, 60]]]


def test_16_bit_png_is_scaled_not_clipped():
    image = read_image(encoded(Image.fromarray(RAMP), "PNG"))
    assert np.array_equal(np.asarray(image), np.repeat(GREY[..., None], 3, -1))
    assert image.info == {}


def test_cmyk_jpeg():
    flat = Image.new("RGB", (16, 16), (200, 60, 20)).convert("CMYK")
    image = read_image(encoded(flat, "JPEG", quality=95))
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - [200, 60, 20]).max() <= 4


def test_upright_and_without_metadata():
    exif = Image.Exif()
    exif[0x0112] = 6  # EXIF orientation: rotated by 90 degrees
    exif[0x010F] = "a camera"
    image = read_image(encoded(Image.fromarray(PHOTO), "PNG", exif=exif))
    assert np.array_equal(np.asarray(image), np.rot90(PHOTO, -1))
    assert image.info == {} and not image.getexif()


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    image = read_image(tmp_path / "moving.gif")
    assert image.info == {"note": "first of several frames"}
    assert image.getpixel((3, 3)) == (255, 0, 0)


def test_a_large_jpeg_is_decoded_smaller():
    large = encoded(Image.new("RGB", (3000, 2000), (9, 99, 199)), "JPEG")
    assert read_image(large).size == (3000, 2000)
    for limit, size in ((5_999_999, (1500, 1000)), (1_500_000, (1500, 1000)), (1_400_000, (750, 500))):
        image = read_image(large, max_pixels=limit)
        assert image.size == size
        assert image.info["note"] == f"read at {size[0]}x{size[1]} of 3000x2000 pixels"
        assert np.abs(np.asarray(image).astype(int) - [9, 99, 199]).max() <= 4
    with pytest.raises(ImageError, match="3000x2000 pixels are 6,000,000, the limit is 90,000"):
        read_image(large, max_pixels=90_000)
    progressive = encoded(Image.new("RGB", (3000, 2000)), "JPEG", progressive=True)
    with pytest.raises(ImageError, match="the limit is 5,000,000"):  # it would be held in memory at full size
        read_image(progressive, max_pixels=5_000_000)


def test_size_is_checked_before_decoding():
    # The files lack the claimed pixels: decoding would raise "damaged" instead of the size error.
    with pytest.raises(ImageError, match=r"the image: 10000x10000 pixels are 100,000,000, the limit is 50,000,000"):
        read_image(png_that_claims(10_000, 10_000))
    with pytest.raises(ImageError, match="far more than 50,000,000 pixels"):
        read_image(png_that_claims(60_000, 60_000))
    with pytest.raises(ImageError, match=r"1x51 pixels, one side more than 50 times the other: crop it"):
        read_image(png_that_claims(1, 51))
    with pytest.raises(ImageError, match="damaged"):
        read_image(png_that_claims(8000, MAX_PIXELS // 8000))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.png", encoded(Image.fromarray(PHOTO), "PNG").getvalue()[:3000], "damaged or incomplete .*truncated"),
        ("cut.jpg", encoded(Image.fromarray(PHOTO), "JPEG").getvalue()[:900], "damaged or incomplete"),
        ("cut.gif", encoded(Image.fromarray(PHOTO), "GIF").getvalue()[:2000], "damaged or incomplete"),
        ("notes.txt", b"no image at all", "not an image in a supported format"),
        ("page.jpg", b"<html>404</html>", "not an image in a supported format"),
        ("empty.png", b"", "not an image in a supported format"),
        # Pillow would start Ghostscript for EPS.
        ("script.eps", encoded(Image.fromarray(PHOTO), "EPS").getvalue(), "not an image in a supported format"),
    ],
)
def test_what_is_no_image_is_named(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ImageError, match=rf"{file}: {message}"):
        read_image(file)
    with pytest.raises(ImageError, match=f"^the upload: {message}"):
        read_image(io.BytesIO(content), name="the upload")


def test_what_is_no_file_is_named(tmp_path):
    with pytest.raises(ImageError, match=r"none.png: cannot be opened: No such file"):
        read_image(tmp_path / "none.png")
    with pytest.raises(ImageError, match="cannot be opened: Is a directory"):
        read_image(str(tmp_path))


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
    (tmp_path / "photo").write_bytes(encoded(Image.fromarray(PHOTO), "JPEG").getvalue())
    (tmp_path / "text").write_text("Python")  # like the start of a PPM file
    (tmp_path / "empty").touch()
    assert [is_image(tmp_path / name) for name in ("photo", "text", "empty", "none")] == [True, False, False, False]
    assert {".png", ".jpg", ".jpeg", ".webp", ".tif"} <= image_endings() and ".txt" not in image_endings()
