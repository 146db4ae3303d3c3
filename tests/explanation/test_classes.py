"""Class names: whose they are, which class a word names, and which classes of two tables agree."""

import copy
import unicodedata

import pytest
import timm
import torch

from helpers import relative_error
from timm_coda import hub
from timm_coda.explanation import Classes, ClassesError, read_names, training_data

DIGITS = tuple("0123456789")
NAMES = ("tench, Tinca tinca", "cat", "crane", "7", "crane", "sea crane, crane")


def small(name="coda_net_xs", **kwargs):
    return timm.create_model(name, rank=2, **kwargs)


def test_names_belong_to_the_weights_of_the_classifier(tmp_path):
    trained = timm.create_model("coda_net_xs.digits", pretrained=True)
    assert Classes.of(trained).labels == Classes.of(copy.deepcopy(trained)).labels == DIGITS
    for other in (
        timm.create_model("coda_net_xs.digits"),  # random weights
        timm.create_model("coda_net_xs", num_classes=10),
        timm.create_model("coda_net_xs.digits", pretrained=True, num_classes=5),
    ):
        assert Classes.of(other) == Classes.unnamed(other.num_classes)
        other.save_pretrained(tmp_path / "other")
        again = timm.create_model(f"local-dir:{tmp_path / 'other'}", pretrained=True)
        assert Classes.of(again).labels == (), "a folder must not name what nobody named"
    for count in (20, 10):
        trained.reset_classifier(count)
        assert Classes.of(trained) == Classes.unnamed(count)
        explanation = trained.eval().explain(torch.rand(1, 3, 16, 16), target=count - 1)
        assert explanation.label_names is None and "class" in explanation._repr_html_()


@pytest.mark.parametrize(
    "name", ["bcos_resnet18", "bcos_densenet121", "bcos_v1_conv9", "vit_tiny_patch16_bcos_224", "bcos_convnext_tiny"]
)
def test_every_family_forgets_the_names_of_a_classifier_that_is_replaced(name):
    model = timm.create_model(name, device="meta")
    known = {"label_names": ["cat", "dog"], "label_descriptions": {"cat": "a cat"}, "num_classes": 2, "tag": "v2_in1k"}
    for count in (1000, 2):
        model.pretrained_cfg = {**known, "num_classes": 2}
        model.reset_classifier(count)
        assert Classes.of(model) == Classes.unnamed(count)


def test_imagenet_names_of_imagenet_weights_only():
    model = small(num_classes=1000)
    assert Classes.of(model).names[3] == "class 3", "a thousand classes need not be ImageNet's"
    model.pretrained_cfg = {"tag": "v2_in1k", "num_classes": 1000}  # as after loading the weights of such a tag
    assert Classes.of(model).names[0] == "tench, Tinca tinca" and Classes.of(model).labels[0] == "n01440764"
    assert Classes.of(timm.create_model("bcos_resnet18.v2_in1k", device="meta")).labels == ()
    plain = timm.create_model("resnet18.a1_in1k", device="meta")
    assert Classes.of(plain).names[1] == "goldfish, Carassius auratus"


def test_weights_from_a_file_may_be_of_anything(tmp_path):
    shipped = timm.create_model("coda_net_xs.digits", pretrained=True)
    assert training_data(shipped) == "handwritten digits, white on black"
    shipped.save_pretrained(tmp_path)
    assert training_data(timm.create_model(f"local-dir:{tmp_path}", pretrained=True)) == ""
    file = {"source": "file", "file": str(tmp_path / "model.safetensors")}
    assert training_data(timm.create_model("coda_net_xs.digits", pretrained=True, pretrained_cfg_overlay=file)) == ""


def test_names_by_number_are_read_in_the_order_of_the_numbers(tmp_path):
    model = small(num_classes=11)
    names = {str(number): f"name {number}" for number in sorted(range(11), key=str)}  # 0, 1, 10, 2, ...
    model.save_pretrained(tmp_path, label_names=names)
    expected = tuple(f"name {number}" for number in range(11))
    config = (tmp_path / "config.json").read_text()
    mapping = str(names).replace("'", '"')
    start, end = config.index("[", config.index('"label_names"')), config.index("]", config.index('"label_names"')) + 1
    (tmp_path / "config.json").write_text(config[:start] + mapping + config[end:])  # as timm allows it
    hub.check_folder(tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert Classes.of(again).labels == expected
    assert again.explain(torch.rand(1, 3, 16, 16)).label_names == expected
    again.save_pretrained(tmp_path / "again")
    assert Classes.of(timm.create_model(f"local-dir:{tmp_path}/again", pretrained=True)).labels == expected
    assert read_names({1: "b", 0: "a"}, 2) == ("a", "b")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a"], "1 label names for 2 classes: give one per class, or none"),
        ("ab", "'ab' as label names for 2 classes"),
        (3, "3 as label names for 2 classes"),
        ({"0": "a", "2": "b"}, "label names by number are 0, 2, but the 2 classes are numbered 0 to 1"),
        ({"a": 0, "b": 1}, "label names by number are a, b, but"),
        ({0: "a", 1: "b", 2: "c"}, "label names by number are 0, 1, 2, but"),
    ],
)
def test_names_that_are_not_one_per_class(names, message):
    with pytest.raises(ClassesError, match=message):
        read_names(names, 2)


@pytest.mark.parametrize(
    ("labels", "numbers"),
    [
        (("ant", "bee", "n3"), (0, 1, 2)),
        (("n3", "ant", "bee"), (2, 0, 1)),
        (("Cow",), (2,)),
        (("BEE", "ant"), (1, 0)),
        ((), ()),
    ],
    ids=["same", "permutation", "description", "subset", "none"],
)
def test_tables_are_matched_by_name(labels, numbers):
    assert Classes.named(("ant", "bee", "n3"), {"n3": "cow"}).match(labels) == numbers


def test_unicode_spellings_of_a_name_are_one():
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    assert composed != decomposed and Classes.named((composed, "tea")).match(("tea", decomposed)) == (1, 0)
    with pytest.raises(ClassesError, match=r"'caf\\xe9', 'cafe\\u0301' are one class of the model"):
        Classes.named((composed, "tea")).match((composed, decomposed))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("ant", "eel"), "eel is not among the model's 3 classes: ant, bee, crane"),
        (("1", "2"), "1, 2 are not among the model's 3 classes"),
        (("ant", "ANT"), "'ant', 'ANT' are one class of the model: give them one name"),
    ],
)
def test_tables_that_do_not_fit(labels, message):
    with pytest.raises(ClassesError, match=message):
        Classes.named(("ant", "bee", "crane")).match(labels)


def test_a_name_that_two_classes_have():
    twice = Classes.named(("crane", "bee", "crane"))
    assert twice.match(("crane", "bee", "crane")) == (0, 1, 2)
    with pytest.raises(ClassesError, match="crane: the model has several classes of this name"):
        twice.match(("bee", "crane"))


@pytest.mark.parametrize(
    ("word", "index"),
    [("cat", 1), (" CAT ", 1), ("tinca tinca", 0), ("tench, Tinca tinca", 0), ("7", 3), ("5", 5), ("class 0", 0)],
)
def test_a_word_means_a_class(word, index):
    assert Classes.named(NAMES).find(word) == index


def test_a_label_means_its_class():
    assert Classes.named(("n1", "n2"), {"n2": "goldfish"}).find("n2") == 1


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("cats", "no class is named 'cats'; similar: cat: give a name, or a number from 0 to 5"),
        ("crane", r"class 'crane': 2 classes have this name, give a number: \[2, 4\]"),
        ("6", "class 6: the model's classes are 0 to 5"),
        ("-1", "no class is named '-1'"),
        ("", "no class is named ''"),
    ],
)
def test_a_word_that_means_none(word, message):
    with pytest.raises(ClassesError, match=message):
        Classes.named(NAMES).find(word)


def test_names_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    small(num_classes=10).save_pretrained(tmp_path)
    kwargs = {"num_labels": 2, "id2label": {0: "round", 1: "straight"}, "ignore_mismatched_sizes": True}
    wrapper = transformers.AutoModelForImageClassification.from_pretrained(tmp_path, **kwargs).eval()
    assert Classes.of(wrapper).labels == ("round", "straight")
    wrapper.timm_model.head.reset_parameters()
    import timm_coda

    images = torch.rand(2, 3, 16, 16)
    found = timm_coda.explain(wrapper, images)
    assert found.label_names == ("round", "straight")
    assert relative_error(found.logits, wrapper(images).logits) < 1e-5
    wrapper.save_pretrained(tmp_path / "tuned")
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "tuned").eval()
    assert timm_coda.explain(again, images, target=1).label_names == ("round", "straight")
