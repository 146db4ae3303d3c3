"""The page of `timm-coda demo` in a real browser, and files that it must not serve."""

import base64
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
import uuid
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import timm
import yaml
from PIL import Image

from helpers.photos import save_turned_digits
from timm_coda import cli
from timm_coda.data.datasets import load_data
from timm_coda.explanation import Unit, figures, receptive_fields, unit_pictures
from timm_coda.hub.factory import save_model
from timm_coda.images import read_image

if importlib.util.find_spec("gradio") is None:  # not imported here, which takes seconds
    pytest.skip("the page needs the extra: pip install 'timm_coda[demo]'", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install 'timm_coda[test]'")


STRANGE = ["<script>document.title='0wned'</script>", "${1+1}", "{{value}}", "a\"b'c&amp;", *"456789"]
MINUS = "\N{MINUS SIGN}"


@contextmanager
def process(command, **environment):
    """Run a server in a separate process and yield its address. It prints only one line, when it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = os.environ | {"GRADIO_SERVER_PORT": str(port), "OMP_NUM_THREADS": "1"} | environment
    server = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables
    )
    try:
        said = server.stdout.readline()
        assert said == f"The page is at http://127.0.0.1:{port}/ (Ctrl-C ends it)\n", said + server.communicate()[0]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGINT)
        said = server.communicate(timeout=60)[0]
    refused = re.findall(
        "InvalidPathError: |ValueError: Hostname 127|gradio.exceptions.Error: .Value: .* in the list", said
    )
    assert said.count("Traceback") == len(refused), said  # only for rejected requests, not for Ctrl-C
    assert "Warning" not in said, said


@pytest.fixture(scope="module")
def model():
    return timm.create_model("coda_net_xs.digits", pretrained=True).eval()


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Image files of three digits, the second one in colour."""
    split, folder = load_data("digits").test, tmp_path_factory.mktemp("digits")
    paths = [folder / name for name in ("first.png", "second.png", "third.png")]
    for path, index in zip(paths, (3, 40, 77), strict=True):
        split.image(index).save(path)
    colours = np.asarray(Image.open(paths[1]).resize((40, 24))) // [1, 2, 4]
    Image.fromarray(colours.astype(np.uint8)).save(paths[1])
    return paths


@pytest.fixture(scope="module")
def site(model, tmp_path_factory):
    """The address of a page with the digits model, and the same model with class names that are code."""
    folder = tmp_path_factory.mktemp("models") / "strange"
    model.save_pretrained(folder, label_names=STRANGE)
    with process(["-m", "timm_coda", "demo", "--model", "coda_net_xs.digits", str(folder)]) as address:
        yield address


@pytest.fixture
def visit(browser, site):
    """A function that opens the page as a new visitor. Requests to other servers and errors fail the test."""
    visits, faults = [], []

    def open_page(width=1280, height=900, color_scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=color_scheme)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("request", lambda r: r.url.startswith((site, "data:", "blob:")) or faults.append(r.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: message.type == "error" and faults.append(message.text))
        page.goto(site)
        words(page, "Why 0?")
        visits.append(context)
        return page

    yield open_page
    for context in visits:
        context.close()
    assert not faults


def words(page, start):
    """Wait until the text of the explanation starts like this."""
    playwright.expect(page.locator(".coda-words")).to_have_text(re.compile(re.escape(start)), timeout=20_000)


def upload(page, path, name):
    page.locator("input[type=file]").set_input_files(path)
    words(page, f"Why {name}?")


def choose(page, field, option):
    page.get_by_label(field, exact=True).click()
    page.get_by_role("option", name=option, exact=True).click()
    playwright.expect(page.get_by_role("option")).to_have_count(0)  # wait until the list is closed


def point(page, row, column, rows, columns):
    """Move the mouse to the centre of a position of the signed map."""
    place = page.get_by_role("figure", name="For and against").locator(".coda-picture")
    box = place.bounding_box()
    place.hover(position={"x": box["width"] * (column + 0.5) / columns, "y": box["height"] * (row + 0.5) / rows})


def reading(page):
    """Return the region's value and its text."""
    output = page.locator(".coda-region output")
    return float(output.get_attribute("data-value")), " ".join(output.inner_text().split())


def picture(page, name):
    source = page.get_by_role("figure", name=name, exact=True).get_by_role("img").get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))


def expected_text(maps, row, column, name):
    """Return the page's text for one position of a map (h, w)."""
    value = maps[row, column]
    share = 100 * value / maps[maps > 0].sum() if value > 0 else 100 * value / maps[maps < 0].sum()
    number = f"{'+' if value >= 0 else MINUS}{digits3(abs(value))} logits"
    shares = (digits3(share), "0.00") if value > 0 else ("0.00", digits3(share))
    said = f"{shares[0]} % of all evidence for it, {shares[1]} % of all against it."
    return f"Row {row}, column {column}: {number} for {name}: {said}"


def digits3(number):
    """Format with three significant digits, as JavaScript's toPrecision(3)."""
    exponent = int(np.floor(np.log10(number)))
    return f"{number:.{max(0, 2 - exponent)}f}" if exponent >= -7 else f"{number:.2e}"


def test_upload_prediction_and_reading(visit, digits, model):
    page = visit()
    for path in digits[:2]:
        explanation = model.explain(read_image(path))
        maps, name = explanation.contributions[0].numpy(), str(int(explanation.prediction))
        upload(page, path, name)
        best = page.locator(".coda-bars li").first
        logit, percent = explanation.logits.max().item(), 100 * explanation.logits.sigmoid().max().item()
        playwright.expect(best.get_by_role("button")).to_have_accessible_name(
            f"Explain {name}, probability {percent:.1f} %, logit {logit:.2f}".replace("-", MINUS)
        )
        assert page.locator(".coda-bars li").count() == 5
        assert (picture(page, "For and against") == explanation.heatmap()[0]).all()
        assert (picture(page, "On the image") == explanation.overlay()[0]).all()
        assert (picture(page, "Colours for it") == np.rint(255 * explanation.rgba()[0])).all()
        assert np.abs(picture(page, "Image") / 255 - explanation.images[0].permute(1, 2, 0).numpy()).max() < 1 / 255
        strongest = np.unravel_index(np.argmax(maps), maps.shape)
        weakest = np.unravel_index(np.argmin(maps), maps.shape)
        for row, column in (strongest, weakest, (0, 0), (15, 15)):
            point(page, row, column, *maps.shape)
            value, text = reading(page)
            assert value == pytest.approx(maps[row, column], rel=1e-6)
            assert text == expected_text(maps, row, column, name)


def test_region_by_keyboard(visit, model, digits):
    page = visit()
    explanation = model.explain(read_image(digits[0]))
    maps, name = explanation.contributions[0].numpy().astype(np.float64), str(int(explanation.prediction))
    upload(page, digits[0], name)
    page.get_by_label("Row").focus()
    for key in ("9", "Tab", "1", "Tab", "Delete", "4"):
        page.keyboard.press(key)
    value, text = reading(page)
    region = maps[8:12, 0:4]  # 4 x 4, one position before the centre and two after it, clipped to the map
    assert value == pytest.approx(region.sum(), rel=1e-6)
    assert text.startswith("Rows 8–11, columns 0–3: ")  # noqa: RUF001
    share = 100 * region[region > 0].sum() / maps[maps > 0].sum()
    assert f" {digits3(share)} % of all evidence for it" in text
    point(page, 2, 2, 16, 16)
    assert reading(page) == (value, text), "the mouse does not replace a typed region"


def test_why_this_class_and_not_that_one(visit, model, digits):
    page = visit()
    image = read_image(digits[0])
    logits = model.explain(image).logits[0]
    first, second, third = (str(i) for i in logits.argsort(descending=True)[:3].tolist())
    upload(page, digits[0], first)
    page.get_by_role("button", name=f"Explain {second},").click()  # one click
    words(page, f"Why {second}? Its logit")
    asked = page.get_by_role("button", name=f"Why {second} and not {third}?")
    asked.focus()
    page.keyboard.press("Enter")  # the second action, by keyboard
    words(page, f"Why {second} and not {third}?")
    assert asked.get_attribute("aria-pressed") == "true"
    playwright.expect(asked).to_be_focused()
    contrast = model.explain(image, int(second), versus=int(third))
    maps = contrast.contributions[0].numpy()
    assert (picture(page, "For and against") == contrast.heatmap()[0]).all()
    point(page, 7, 7, 16, 16)
    assert reading(page)[1] == expected_text(maps, 7, 7, f"{second}, not {third}")
    assert f"{abs(contrast.value.item()):.2f} above that of {third}" in page.locator(".coda-words").inner_text()

    choose(page, "Why this class", third)
    words(page, f"Why {third}? Its logit")  # the contrast with itself is removed
    choose(page, "and not this one", first)
    words(page, f"Why {third} and not {first}? Its logit is")
    point(page, 5, 9, 16, 16)
    maps = model.explain(image, int(third), versus=int(first)).contributions[0].numpy()
    assert reading(page)[0] == pytest.approx(maps[5, 9], rel=1e-6)


def test_layers_scale_and_smoothing(visit, model, digits):
    page = visit()
    image = read_image(digits[1])
    explanation = model.explain(image)
    name = str(int(explanation.prediction))
    upload(page, digits[1], name)
    colours = page.get_by_role("figure", name="Colours for it").get_by_role("img")
    before = colours.get_attribute("src")
    page.get_by_label("number input for Smoothing").fill("3")
    page.keyboard.press("Enter")
    playwright.expect(colours).not_to_have_attribute("src", before)
    assert (picture(page, "Colours for it") == np.rint(255 * explanation.rgba(smooth=3)[0])).all()
    page.get_by_label("number input for Colour scale").fill("90")
    page.keyboard.press("Enter")
    limit = figures.color_limit(explanation.contributions, percentile=90)
    playwright.expect(page.locator(".coda-scale")).to_contain_text(f"+{limit:.2g}")
    assert (picture(page, "For and against") == explanation.heatmap(percentile=90)[0]).all()

    choose(page, "As a sum over", "layer stages.2")
    words(page, f"Why {name}? Its logit {explanation.value.item():.2f} = ".replace("-", MINUS))
    playwright.expect(page.locator(".coda-words")).to_contain_text("(sum over layer stages.2)")
    maps = model.explain(image, layer="stages.2").contributions[0].numpy()
    assert maps.shape == (4, 4)
    point(page, 2, 1, 4, 4)
    assert reading(page)[1] == expected_text(maps, 2, 1, name)
    assert page.get_by_role("figure").count() == 3, "a layer has no colours"
    assert page.get_by_label("range slider for Smoothing").is_disabled()


def test_what_a_channel_sees(visit, model, digits):
    page = visit()
    channel = page.get_by_label("What does this channel of the layer see?", exact=True)
    assert not channel.is_visible(), "only layers have channels"
    image = read_image(digits[1])
    upload(page, digits[1], str(int(model.explain(image).prediction)))
    choose(page, "As a sum over", "layer stages.1")
    playwright.expect(page.locator(".coda-words")).to_contain_text("(sum over layer stages.1)")
    choose(page, "What does this channel of the layer see?", "5")
    playwright.expect(page.get_by_role("heading", name="What channel 5 of stages.1 sees")).to_be_visible()

    split = load_data("digits").test
    examples = [split.image(split.labels.tolist().index(digit)) for digit in range(10)]
    found = model.explain([*examples, image], layer="stages.1", unit=(5, "max"))
    best = found.value.argsort(descending=True)[:6].tolist()
    names = [f"digit {index}" if index < 10 else "this image" for index in best]
    shown = page.locator(".coda-fields figure")
    captions = [f"{found.value[index].item():.4g} {name}" for index, name in zip(best, names, strict=True)]
    assert [" ".join(text.split()) for text in shown.locator("figcaption").all_inner_texts()] == captions
    boxes = receptive_fields(model, "stages.1", found.position[best], (16, 16))
    pictures, _ = unit_pictures(found[best], boxes)
    for number, picture in enumerate(pictures):
        drawn = [node.get_attribute("src") for node in shown.nth(number).get_by_role("img").all()]
        for source, pixels in zip(drawn, picture, strict=True):
            assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))) == pixels).all()
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280

    choose(page, "As a sum over", "the pixels")
    playwright.expect(page.locator(".coda-unit")).to_have_count(0)
    playwright.expect(channel).not_to_be_visible()


def test_a_channel_that_never_fires(model):
    from timm_coda.demo.views import unit_html

    split = load_data("digits").test
    found = model.explain([split.image(index) for index in range(20)], layer="head", unit=(8, 2, 2))
    found = found[found.value.argsort(descending=True)]
    boxes = receptive_fields(model, "head", found.position, (16, 16))
    fires = int((found.value > 0).sum())
    assert 0 < fires < 20
    page = unit_html(Unit("head", 8), found, boxes, ["<b>"] * 20, searched=20)
    assert page.count("<figure") == fires and "<b>" not in page, "only images in which it fires; names are no code"
    page = " ".join(unit_html(Unit("head", 8), found[fires:], boxes[fires:], ["x"] * (20 - fires), searched=1).split())
    assert f"It never fires: its largest activation in 1 image is {found.value[fires].item():.3g}." in page
    assert "<figure" not in page


def test_files_to_take_along(visit, model, digits, tmp_path):
    page = visit()
    explanation = model.explain(read_image(digits[2]), versus=8)
    name = str(int(explanation.prediction))
    upload(page, digits[2], name)
    choose(page, "and not this one", "8")
    words(page, f"Why {name} and not 8?")
    files = {}
    for button, file in (("Save figure (PNG)", "explanation.png"), ("Save arrays (NPZ)", "explanation.npz")):
        with page.expect_download() as download:
            page.get_by_role("button", name=button).click()
        assert download.value.suggested_filename == file
        files[file] = tmp_path / file
        download.value.save_as(files[file])
    with page.expect_download() as download:
        page.get_by_role("link", name="Save the picture: For and against").click()
    assert download.value.suggested_filename == "for-and-against.png"
    assert (np.asarray(Image.open(download.value.path())) == explanation.heatmap()[0]).all()
    with Image.open(files["explanation.png"]) as figure:
        assert figure.width > 500
    with np.load(files["explanation.npz"]) as arrays:
        for field in ("images", "logits", "contributions", "weights", "value", "target", "versus"):
            assert arrays[field].ravel() == pytest.approx(getattr(explanation, field).numpy().ravel()), field


def test_two_visitors_see_their_own(visit, model, digits):
    pages = [visit(), visit()]
    images = [read_image(path) for path in digits[:2]]
    names = [str(int(model.explain(image).prediction)) for image in images]
    for page, path, name in zip(pages, digits, names, strict=False):
        upload(page, path, name)
    for target in ("7", "2"):  # both visitors at the same time
        for page in pages:
            choose(page, "Why this class", target)
        for page, image in zip(pages, images, strict=True):
            words(page, f"Why {target}?")
            maps = model.explain(image, int(target)).contributions[0].numpy()
            point(page, 6, 6, 16, 16)
            assert reading(page)[0] == pytest.approx(maps[6, 6], rel=1e-6)
    for page in pages:  # redrawn from the explanation in each visitor's session
        page.get_by_label("number input for Colour scale").fill("80")
        page.keyboard.press("Enter")
    for page, image in zip(pages, images, strict=True):
        expected = model.explain(image, 2).heatmap(percentile=80)[0]
        limit = figures.color_limit(model.explain(image, 2).contributions, percentile=80)
        playwright.expect(page.locator(".coda-scale")).to_contain_text(f"+{limit:.2g}")
        assert (picture(page, "For and against") == expected).all()


def test_another_model_and_names_that_are_code(visit, digits, model):
    page = visit()
    assert "trained on handwritten digits, white on black" in page.locator("#coda-examples").inner_text()
    page.get_by_label("Model", exact=True).click()
    assert page.get_by_role("option", name="coda_net_xs.digits (included)").is_visible()
    page.get_by_role("option", name=re.compile("strange$")).click()
    playwright.expect(page.locator(".coda-empty")).to_contain_text("This image is an example for another model")
    assert not page.locator(".coda-examples").count() and "trained" not in page.locator("#coda-examples").inner_text()
    first = int(model.explain(read_image(digits[1])).prediction)
    upload(page, digits[1], STRANGE[first])
    for name in STRANGE[1:4]:
        choose(page, "Why this class", name)
        words(page, f"Why {name}?")
    point(page, 3, 3, 16, 16)
    assert f"logits for {STRANGE[3]}:" in reading(page)[1]
    assert page.title() != "0wned"
    field = page.get_by_label("Model", exact=True)
    field.fill("coda_net_xxs")
    field.press("Enter")
    alert = page.get_by_role("alert")
    playwright.expect(alert).to_have_text(re.compile("timm has no model 'coda_net_xxs'.*did you mean coda_net_xs"))
    field.fill("coda_net_xs.digits")
    field.press("Enter")
    words(page, f"Why {first}?")
    assert page.get_by_role("alert").count() == 0
    page.get_by_role("button", name="Example: digit 4").click()
    words(page, "Why 4?")


def test_bad_files_are_refused_in_words(visit, tmp_path):
    page = visit()
    text, large, bomb = tmp_path / "text.png", tmp_path / "large.png", tmp_path / "bomb.png"
    text.write_text("no picture")
    bomb.write_bytes(png_that_claims(50_000, 50_000))
    large.write_bytes(png_that_claims(8, 8) + bytes(11_000_000))
    upload_field = page.locator("input[type=file]")
    for path, said in ((text, "The image: not an image in a supported format"), (bomb, "more than 50,000,000 pixels")):
        upload_field.set_input_files(path)
        playwright.expect(page.get_by_role("alert").first).to_contain_text(said)
        page.get_by_role("button", name="Remove Image").click()
        playwright.expect(page.locator(".coda-empty")).to_be_visible()
    upload_field.set_input_files(large)
    playwright.expect(page.get_by_text("exceed the maximum allowed size of 10.0 Mb")).to_be_visible()
    page.get_by_role("button", name="Save arrays").click()
    playwright.expect(page.get_by_text("There is nothing to save yet: choose an image first.")).to_be_visible()
    page.get_by_role("button", name="Example: digit 4").click()
    words(page, "Why 4?")


def png_that_claims(width, height):
    def chunk(name, data):
        return len(data).to_bytes(4) + name + data + zlib.crc32(name + data).to_bytes(4)

    header = width.to_bytes(4) + height.to_bytes(4) + bytes([8, 2, 0, 0, 0])
    body = zlib.compress(bytes(100_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("color_scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_fits_the_screen(visit, width, color_scheme):
    page = visit(width, 844, color_scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every((c) => +c < 60)")
    assert dark == (color_scheme == "dark")
    nameless = [node for node in page.get_by_role("button").all() if not accessible_name(node)]
    assert not nameless
    assert all(image.get_attribute("alt") for image in page.locator(".coda-picture img").all())


def accessible_name(node):
    return node.get_attribute("aria-label") or node.get_attribute("title") or node.inner_text().strip()


def by_hand(site, event, *fields):
    """Return the page's answer to a handcrafted request, which a browser would not send."""
    config = json.loads(fetch(f"{site}/config"))
    number = next(f["id"] for f in config["dependencies"] if [event] == [target[1] for target in f["targets"]])
    session = uuid.uuid4().hex
    body = json.dumps({"data": fields, "fn_index": number, "session_hash": session, "event_data": None}).encode()
    request = urllib.request.Request(f"{site}/gradio_api/queue/join", body, {"Content-Type": "application/json"})
    fetch(request)
    return fetch(f"{site}/gradio_api/queue/data?session_hash={session}")


def fetch(request):
    with urllib.request.urlopen(request, timeout=20) as answer:
        return answer.read().decode()


def test_turned_photos(site, model, tmp_path):
    for path in save_turned_digits(tmp_path)[::5]:  # each orientation once
        boundary = uuid.uuid4().hex
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="photo.jpg"\r\n\r\n'
        body = head.encode() + path.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
        kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        (place,) = json.loads(fetch(urllib.request.Request(f"{site}/gradio_api/upload", body, kind)))
        file = {"path": place, "meta": {"_type": "gradio.FileData"}, "orig_name": "photo.jpg"}
        answer = by_hand(site, "change", file, "coda_net_xs.digits", None, -1, "", None, 1, 99.5, None)
        seen, _, _ = answer.partition("data:image/png;base64,")[2].partition("\\")
        expected = model.explain(Image.open(path))
        assert int(expected.prediction) == int(path.parent.name)
        pixels = np.rint(255 * np.moveaxis(expected.images[0].numpy(), 0, -1))
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(seen)))), pixels), path


def test_only_uploads_can_be_read(site, tmp_path, digits):
    secret = tmp_path / "secret.png"
    shutil.copy(digits[0], secret)
    for path in ("/etc/passwd", "../../../etc/passwd", "%2Fetc%2Fpasswd", __file__, secret):
        with pytest.raises(urllib.error.HTTPError) as refused:
            fetch(f"{site}/gradio_api/file={path}")
        with refused.value as answer:
            assert answer.code in (403, 404)
    for place in (str(secret), f"{site}/theme.css"):
        file = {"path": place, "meta": {"_type": "gradio.FileData"}, "orig_name": "x.png"}
        answer = by_hand(site, "change", file, "coda_net_xs.digits", None, -1, "", None, 1, 99.5, None)
        assert '"success":false' in answer, place
        assert "coda-result" not in answer


@pytest.fixture(scope="module")
def space(digits, model, tmp_path_factory):
    """An exported folder with its own model and examples."""
    base = tmp_path_factory.mktemp("space")
    model.save_pretrained(base / "mine", label_names=[f"digit {i}" for i in range(10)])
    (base / "photos").mkdir()
    shutil.copy(digits[1], base / "photos" / "colours.png")
    (base / "photos" / "notes.txt").write_text("no image")
    words = ["--model", str(base / "mine"), "--examples", str(base / "photos"), "--export", str(base / "exported")]
    assert cli.main(["demo", *words]) == 0
    return base / "exported"


def test_exported_space_runs(space, browser, model, digits):
    app = space / "timm_coda" / "demo" / "app.py"
    app.write_text(app.read_text().replace("Why did the model decide that?", "A copy of the page"))
    name = f"digit {int(model.explain(read_image(digits[1])).prediction)}"
    with process([str(space / "app.py")], PYTHONPATH="") as address:
        page = browser.new_page()
        page.goto(address)
        words(page, f"Why {name}?")
        assert page.get_by_role("heading", level=1).inner_text() == "A copy of the page", "its own package"
        assert page.locator(".coda-examples button").count() == 1
        page.close()
        answer = by_hand(address, "change", None, "coda_net_xs.digits", None, -1, "", None, 1, 99.5, None)
        assert '"success":false' in answer and "not in the list of choices" in answer, (
            "visitors can use only its own models"
        )


def test_exported_space_says_what_it_needs(space):
    _, front, text = (space / "README.md").read_text().split("---\n")
    card = yaml.safe_load(front)
    assert card["sdk"] == "gradio" and card["app_file"] == "app.py" and len(card["short_description"]) <= 60
    assert card["sdk_version"] == importlib.metadata.version("gradio")
    assert "timm_coda" in text
    pinned = dict(line.split("==") for line in (space / "requirements.txt").read_text().split())
    assert {"torch", "timm", "gradio", "matplotlib"} <= set(pinned) and "timm_coda" not in pinned
    assert all(importlib.metadata.version(name).split("+")[0] == version for name, version in pinned.items())
    assert not list(space.rglob("__pycache__"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--export", "."], "not an empty folder: give a new one"),
        (["--export", "new", "--port", "80"], "a Space sets its own"),
        (["--examples", "none"], "none: the folder of example images does not exist"),
        (["--examples", "."], "no readable image in this folder"),
        (["--model", "coda_net_xxs"], "timm has no model 'coda_net_xxs'"),
    ],
)
def test_wrong_commands(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    Path("mine.txt").write_text("kept")
    assert cli.main(["demo", *words]) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_help_and_what_is_missing(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        cli.main(["demo", "--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    for name in [name for name in sys.modules if name.startswith("timm_coda.demo")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main(["demo"]) == 2
    assert "pip install 'timm_coda[demo]'" in capsys.readouterr().err


def test_port_in_use():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "timm_coda", "demo", "--port", port]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        f"timm-coda: error: cannot listen on 127.0.0.1 port {port}: is it in use? Choose another with --port\n"
    )


def test_examples_and_notes_belong_to_the_model(tmp_path, model):
    from timm_coda.demo.examples import Examples, digit_examples
    from timm_coda.explanation import Classes, training_data

    offered = digit_examples(tmp_path)
    photos = timm.create_model("coda_net_xs.cifar10", pretrained=True)
    assert len(offered.fitting(Classes.of(model).names)) == 10 and not offered.fitting(Classes.of(photos).names)
    assert Examples([tmp_path]).fitting(Classes.of(photos).names) == [tmp_path], "one's own fit every model"
    assert training_data(model) == "handwritten digits, white on black"
    assert training_data(photos).startswith("CIFAR-10: photographs")
    assert training_data(timm.create_model("bcos_resnet18", device="meta")) == "", "it has not been trained"
    model.save_pretrained(tmp_path / "saved")  # it may have been trained further, on anything
    assert training_data(timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True)) == ""


def test_the_list_says_where_weights_are(tmp_path, monkeypatch):
    import torch

    from timm_coda.demo.shelf import described, our_pretrained

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    names = our_pretrained()
    assert names[:2] == ["coda_net_xs.digits", "coda_net_xs.cifar10"] and len(names) > 40
    assert [described(name) for name in names[:2]] == [f"{name} (included)" for name in names[:2]]
    assert all(described(name).endswith(" (to download)") for name in names[2:])
    assert described("runs/mine") == "runs/mine" and described("hf-hub:me/mine") == "hf-hub:me/mine"
    (tmp_path / "checkpoints").mkdir()
    for name in ("vit_tiny_patch16_bcos_224.v2_in1k", "coda_net_s.mpi_t10_cifar10"):  # a plain link, and a pair
        url = timm.get_pretrained_cfg_value(name, "url")
        file = url.rsplit("/", 1)[1] if isinstance(url, str) else url[1]
        (tmp_path / "checkpoints" / file).write_bytes(b"weights")
        assert described(name) == f"{name} (downloaded)"
    assert our_pretrained()[2:4] == ["coda_net_s.mpi_t10_cifar10", "vit_tiny_patch16_bcos_224.v2_in1k"]


def test_where_nothing_is_recognised_the_page_says_so(model):
    from PIL import ImageOps

    from timm_coda.demo.views import Shown, result_html

    split = load_data("digits").test
    seven = split.image(split.labels.tolist().index(7))
    for image, unknown in ((seven, False), (ImageOps.invert(seven), True)):  # white on black, and black on white
        shown = Shown("m", model.explain(image), tuple("0123456789"), "handwritten digits, white on black")
        page = " ".join(result_html(shown, smooth=1, percentile=99.5).split())
        said = "recognises nothing here: no class reaches 50 %. It was trained on handwritten digits, white on black."
        assert (said in page) == unknown == bool(shown.explanation.logits.max() < 0)


def test_models_on_the_shelf(tmp_path, model):
    folders = [str(tmp_path / name) for name in "abcd"]
    for folder in folders:
        model.save_pretrained(folder)
    save_model(timm.create_model("test_efficientnet"), tmp_path / "plain")
    from timm_coda.demo import Shelf

    shelf = Shelf(folders)
    with pytest.raises(ValueError, match="plain is a EfficientNet, which cannot explain itself"):
        Shelf([str(tmp_path / "plain")])[str(tmp_path / "plain")]
    with pytest.raises(ValueError, match=r"'coda_net_xs.digits' is not available here: choose .*a, .*b"):
        shelf["coda_net_xs.digits"]
    first = shelf[folders[0]]
    assert shelf[folders[0]] is first
    for folder in folders[1:]:
        shelf[folder]
    assert shelf[folders[0]] is not first, "only the last few stay in memory"
    assert Shelf(folders, any_model=True)["coda_net_xs.digits"].num_classes == 10
