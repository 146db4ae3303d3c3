"""Class names of models, and finding the class that a word names."""

import pytest
import timm

from timm_coda.hub.labels import class_names, find_class

NAMES = ("tench, Tinca tinca", "cat", "crane", "7", "crane", "sea crane, crane")


def test_names_of_models():
    assert class_names(timm.create_model("coda_net_xs.digits")) == tuple("0123456789")
    assert class_names(timm.create_model("coda_net_xs", num_classes=2)) == ("class 0", "class 1")
    model = timm.create_model("coda_net_xs", num_classes=1000)
    assert class_names(model)[3] == "class 3", "a thousand classes need not be ImageNet's"
    model.pretrained_cfg |= {"tag": "v2_in1k", "label_names": None}
    assert class_names(model)[0] == "tench, Tinca tinca"
    model.pretrained_cfg["label_names"] = [f"n{index}" for index in range(1000)]
    model.pretrained_cfg["label_descriptions"] = {"n1": "goldfish"}
    assert class_names(model)[:2] == ("n0", "goldfish")


@pytest.mark.parametrize(
    ("word", "index"),
    [("cat", 1), (" CAT ", 1), ("tinca tinca", 0), ("tench, Tinca tinca", 0), ("7", 3), ("5", 5), ("class 0", 0)],
)
def test_a_word_means_a_class(word, index):
    assert find_class(NAMES, word) == index


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
    with pytest.raises(ValueError, match=message):
        find_class(NAMES, word)
