"""Reading image files: common formats and modes, damaged files, and malicious uploads."""

import io
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from helpers.photos import STORED, turned
from timm_coda.images import MAX_PIXELS, ImageError, read_image, to_rgb

RAMP = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
GREY = np.rint(RAMP / 257).astype(np.uint8)
SMOOTH = np.stack(np.broadcast_arrays(np.arange(48)[:, None] * 5, np.arange(64) * 3, 90), -1).astype(np.uint8)
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
    for mode in ("1", "La", "LAB", "HSV", "RGBa", "PA", "I;16", "I;16B", "I;16L"):
        assert to_rgb(Image.new(mode, (2, 2))).mode == "RGB", mode
    black_and_white = Image.fromarray(GREY > 99)
    assert black_and_white.mode == "1"
    assert np.array_equal(np.asarray(to_rgb(black_and_white))[..., 0], 255 * (GREY > 99))


# By the largest value of a float image, and of one of 32-bit integers: what is white, or None where it is refused.
FLOATS = {0: 1, 0.999: 1, 1: 1, 1.001: 1, 1.09: 1, 1.2: None, 2: None, 15: None}
FLOATS |= {16.5: 255, 254: 255, 255: 255, 256: 255, 280: 255, 281: None, 4095: None, 4097: 65535}
FLOATS |= {65535: 65535, 65536: 65535, 70000: 65535, 80000: None, 1e30: None}
INTEGERS = {0: 255, 1: 255, 15: 255, 255: 255, 256: 255, 281: None, 4095: None, 65535: 65535, 80000: None}


@pytest.mark.parametrize(
    ("dtype", "top", "white"),
    [(np.float32, *case) for case in FLOATS.items()] + [(np.int32, *case) for case in INTEGERS.items()],
)
def test_scale(dtype, top, white):
    values = (np.linspace(0, 1, 11) * top).astype(dtype)
    file = encoded(Image.fromarray(values[None]), "TIFF")
    if white is None:
        with pytest.raises(
            ImageError, match=r"^the image: its pixel values from 0 to .* 0 to 255 or 0 to 65535: scale"
        ):
            read_image(file)
        return
    image = read_image(file)
    expected = (values.astype(float) / white).clip(0, 1) * 255
    assert np.abs(np.asarray(image)[0, :, 0] - expected).max() <= 0.5001
    assert image.info == {"note": f"values from 0 to {values[-1]:.6g} read as 0 to {white}"}


def test_values_below_black():
    for low, top in ((-0.05, 1), (-20, 255), (-5000, 65535)):
        image = to_rgb(Image.fromarray(np.array([[low, 0, top]], np.float32)))
        assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 255]
    for low, top in ((-0.5, 0.5), (-2.1, 2.6), (-100, 255), (-32768, 32767), (-9999, 255), (-1, -0.5)):
        with pytest.raises(ImageError, match=f"from {low:g} to {top:g} fit none of the scales 0 to 1 or 0 to 255"):
            to_rgb(Image.fromarray(np.array([[low, 0 if top > 0 else low, top]], np.float32)))


def tiff(width: int, bits: int, content: bytes, *, white_is_zero: bool = False) -> io.BytesIO:
    """A TIFF of one row of integers."""
    entries = [(256, width), (257, 1), (258, bits), (259, 1), (262, int(not white_is_zero)), (273, 122)]
    entries += [(277, 1), (278, 1), (279, len(content))]
    head = b"II*\0" + struct.pack("<IH", 8, len(entries))
    return io.BytesIO(head + b"".join(struct.pack("<HHII", tag, 4, 1, it) for tag, it in entries) + bytes(4) + content)


def test_dark_16_bit_and_12_bit():
    dark = np.array([[0, 100, 128, 129, 200]], np.uint16)
    pgm = io.BytesIO(b"P5 5 1 65535\n" + dark.astype(">u2").tobytes())  # a format that Pillow opens with 32 bits
    for file in (encoded(Image.fromarray(dark), "PNG"), encoded(Image.fromarray(dark), "TIFF"), pgm):
        image = read_image(file)
        assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 0, 1, 1]
        assert image.info == {}
    packed = bytes.fromhex("0003e8800fff")  # 0, 1000, 2048, 4095
    assert np.asarray(read_image(tiff(4, 12, packed)))[0, :, 0].tolist() == [0, 62, 128, 255]
    inverted = tiff(3, 16, np.array([0, 257, 65535], "<u2").tobytes(), white_is_zero=True)
    assert np.asarray(read_image(inverted))[0, :, 0].tolist() == [255, 254, 0]


def test_transparent_parts_are_white():
    pixels = np.array([[[10, 20, 30, 0], [10, 20, 30, 255], [0, 0, 0, 51]]], np.uint8)
    expected = [[[255, 255, 255], [10, 20, 30], [204, 204, 204]]]
    assert np.asarray(read_image(encoded(Image.fromarray(pixels), "PNG"))).tolist() == expected
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    assert np.asarray(read_image(encoded(palette, "PNG", transparency=0))).tolist() == [[[255] * 3, [40, 50, 60]]]


def test_transparency_of_16_bit_values():
    plain = encoded(Image.fromarray(np.array([[0, 200, 201, 65535]], np.uint16)), "PNG").getvalue()
    place, content = plain.index(b"IDAT") - 4, b"tRNS" + struct.pack(">H", 200)
    chunk = struct.pack(">I", 2) + content + struct.pack(">I", zlib.crc32(content))
    image = read_image(io.BytesIO(plain[:place] + chunk + plain[place:]))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 255, 1, 255]


def test_16_bit_png_is_scaled_not_clipped():
    image = read_image(encoded(Image.fromarray(RAMP), "PNG"))
    assert np.array_equal(np.asarray(image), np.repeat(GREY[..., None], 3, -1))
    assert image.info == {}


def test_cmyk_jpeg():
    flat = Image.new("RGB", (16, 16), (200, 60, 20)).convert("CMYK")
    image = read_image(encoded(flat, "JPEG", quality=95))
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - [200, 60, 20]).max() <= 4


def test_ycck_jpeg():
    """Adobe's other kind of CMYK JPEG: inverted CMY stored as YCbCr."""
    flat = Image.new("RGB", (16, 16), (200, 60, 20))
    bands = ImageOps.invert(flat).convert("YCbCr").split()
    inverted = [ImageOps.invert(band) for band in bands]  # Pillow inverts what it saves
    content = bytearray(encoded(Image.merge("CMYK", [*inverted, Image.new("L", (16, 16))]), "JPEG").getvalue())
    content[content.index(b"Adobe") + 11] = 2  # the transform: YCCK
    image = read_image(io.BytesIO(content))
    assert np.abs(np.asarray(image).astype(int) - [200, 60, 20]).max() <= 4


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG", "WEBP", "AVIF", "TIFF"])
def test_every_orientation(kind):
    if kind == "AVIF" and ".avif" not in Image.registered_extensions():
        pytest.skip("this Pillow has no AVIF")
    options = {"lossless": True} if kind == "WEBP" else {}
    for orientation in STORED:
        stored, exif = turned(Image.fromarray(SMOOTH), orientation)
        file = encoded(stored, kind, exif=exif, **options)
        upright = read_image(file)
        assert np.abs(np.asarray(upright).astype(int) - SMOOTH).max() <= 12, orientation
        for image in (
            Image.open(file),
            Image.open(file).convert("RGB"),
            ImageOps.exif_transpose(Image.open(file)),  # turned already
            to_rgb(Image.open(file).convert("RGBA")),
            upright,
        ):
            size = image.size
            assert np.array_equal(to_rgb(image), upright), (orientation, type(image))
            assert image.size == size, "the caller's image is as it was"


def test_turned_by_hand():
    stored, exif = turned(Image.fromarray(PHOTO), 6)
    exif.get_ifd(0x8769).update({0xA002: stored.width, 0xA003: stored.height})  # as every camera writes
    with Image.open(encoded(stored, "PNG", exif=exif)) as image:
        by_hand = image.rotate(270, expand=True)
        assert by_hand.getexif()[0x0112] == 6, "Pillow says that it is still to be turned"
        for one in (image, image.copy(), image.convert("RGBA"), by_hand):
            assert np.array_equal(to_rgb(one), PHOTO)


def test_damaged_exif():
    file = encoded(Image.fromarray(PHOTO), "PNG", exif=b"Exif\0\0no such thing")
    assert np.array_equal(read_image(file), PHOTO)


def test_heic(tmp_path, monkeypatch):
    path = tmp_path / "IMG_1.HEIC"
    path.write_bytes(b"\0\0\0\x1cftypheic\0\0\0\0mif1heic" + bytes(99))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for source in (path, io.BytesIO(path.read_bytes())):
        with pytest.raises(ImageError, match=r"^one: reading a HEIC photo needs pillow-heif: pip install pillow-heif$"):
            read_image(source, name="one")
    monkeypatch.undo()
    pillow_heif = pytest.importorskip("pillow_heif", reason="needs the heic extra: pip install 'timm_coda[heic]'")
    with pytest.raises(ImageError, match="not an image"):
        read_image(path)
    pillow_heif.register_heif_opener()
    stored, exif = turned(Image.new("RGB", (64, 32), (200, 60, 20)), 6)
    stored.save(path, "HEIF", exif=exif.tobytes())
    assert read_image(path).size == to_rgb(Image.open(path)).size == (64, 32)
    assert np.abs(np.asarray(read_image(path)).astype(int) - [200, 60, 20]).max() <= 4


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
    assert read_image(large, max_pixels=None).size == (3000, 2000)
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
    assert read_image(encoded(Image.new("L", (1, 51)), "PNG"), max_pixels=None).size == (1, 51)
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
