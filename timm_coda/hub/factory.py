"""Create and load models by name, and save them to folders or the Hugging Face Hub.

`timm.create_model("hf-hub:USER/NAME", pretrained=True)` and `"local-dir:FOLDER"` read the files written here.
"""

import contextlib
import copy
import difflib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import timm
import torch
from huggingface_hub import CommitInfo, ModelCard, ModelHubMixin

from ..errors import wrap_errors
from ..explanation import Classes, ClassesError, forget_names, listed
from .card import make_card
from .folder import CONFIG, between_saves, check_folder, model_config, save_model
from .record import create_from_folder
from .remote import download_errors, fetch, push_folder
from .writing import HubError

__all__ = ["HubMixin", "create_model", "load_model"]

_M = TypeVar("_M", bound="HubMixin")
_logger = logging.getLogger(__name__)


def create_model(
    name: str,
    *,
    num_classes: int,
    label_names: Sequence[str] = (),
    pretrained: bool = False,
    model_args: Sequence[str] = (),
    head_only: bool = False,
    say: Callable[[str], Any] = lambda note: None,
) -> torch.nn.Module:
    """Create a model with `timm.create_model` from command-line values.

    Args:
        name: A name in timm's registry, `local-dir:FOLDER`, or `hf-hub:ID`.
        num_classes: Number of classes.
        label_names: Their names; if none are given, those of the pretrained model.
        pretrained: Load the published weights. The classifier is kept if its classes have these names, in any order
            (its outputs are then put in the order of `label_names`); otherwise it is new.
        model_args: Extra model arguments `NAME=VALUE`, such as `logit_temperature=100`; a value that is not JSON is
            passed as a string.
        head_only: Freeze everything except the classifier.
        say: Called with a sentence for the user about the pretrained classifier.

    Raises:
        HubError: The model is unknown, or cannot be created with these arguments.
    """
    _check_name(name)
    arguments = {}
    for word in model_args:
        key, equals, value = word.partition("=")
        if not equals:
            raise HubError(f"model argument {word!r}: expected NAME=VALUE, such as logit_temperature=100")
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(value)
        arguments[key] = value
    if "num_classes" in arguments:
        raise HubError(f"model argument num_classes={arguments['num_classes']}: leave it out, it is {num_classes} here")
    said = "".join(f", {key}={value!r}" for key, value in arguments.items())
    what = f"cannot create the model {name} with num_classes={num_classes}{said}"
    with wrap_errors(what, HubError), download_errors(name):
        if pretrained:
            model: Any = _create(name, pretrained=True, **arguments)
            say(_fit_classifier(model, num_classes, label_names))
        else:
            model = _create(name, num_classes=num_classes, **arguments)
    if head_only:
        model.requires_grad_(False)
        model.get_classifier().requires_grad_(True)
    return model


def load_model(name: str, *, pretrained: bool = True) -> Any:
    """Load a model in eval mode, for inference rather than training.

    Args:
        name: A name in timm's registry, a folder (with or without `local-dir:`), or `hf-hub:ID`.
        pretrained: Load the weights; otherwise they are random.

    Raises:
        HubError: The model is unknown, or its weights cannot be loaded.
    """
    if os.path.isdir(name):
        if not timm.is_model(name.split(".")[0]):
            name = f"local-dir:{name}"
        elif os.path.isfile(os.path.join(name, CONFIG)):
            _logger.warning(f"{name} is timm's registered model here; for the folder of this name, write ./{name}")
    _check_name(name)
    with wrap_errors(f"cannot load {name}", HubError), download_errors(name):
        return _create(name, pretrained=pretrained).eval()


def _create(name: str, **arguments: Any) -> Any:
    """Call `timm.create_model`; a local folder is read as it is between two saves."""
    if not name.startswith("local-dir:"):
        return timm.create_model(name, **arguments)
    return between_saves(name.removeprefix("local-dir:"), lambda: create_from_folder(name, **arguments))


@torch.no_grad()
def _fit_classifier(model: Any, num_classes: int, label_names: Sequence[str]) -> str:
    """Keep a pretrained classifier if its classes have these names, in their order here; else make a new one.

    Returns what was done, for the user.
    """
    same: tuple[int, ...] = tuple(range(num_classes))
    known = Classes.of(model)
    try:
        order = known.match(label_names) if label_names else same
    except ClassesError:
        order = ()
    if num_classes != len(known) or sorted(order) != list(same):
        model.reset_classifier(num_classes)
        forget_names(model)  # timm's own models keep them
        return f"the classifier is new: the pretrained one is for {len(known)} other classes" + (
            f", {listed(known.names)}" if known.labels else ""
        )
    if order != same:
        # The parameters with one row, or rank rows, per class are those that grow with the number of classes.
        larger = copy.deepcopy(model)
        larger.reset_classifier(num_classes + 1)
        sizes = {key: value.shape for key, value in larger.state_dict().items()}
        for key, value in model.state_dict().items():
            if sizes[key] != value.shape:
                value.copy_(value.unflatten(0, (num_classes, -1))[list(order)].flatten(0, 1))
        forget_names(model)  # they are in the old order
        return "the pretrained classifier is kept; its classes are now in the order of the dataset's"
    return "the pretrained classifier is kept: its classes are the same"


def _check_name(name: str) -> None:
    if ":" not in name and not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models()) or timm.list_models("coda*")
        raise HubError(f"timm has no model {name!r}: did you mean {', '.join(near)}, or local-dir:FOLDER?")


class HubMixin(ModelHubMixin):
    """Add `save_pretrained`, `push_to_hub` and `from_pretrained`, in timm's format, to models registered in timm."""

    # If this were missing, ModelHubMixin would store the constructor's arguments here; timm already records them.
    _hub_mixin_config: Mapping[str, Any] = MappingProxyType({})

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        label_names: Sequence[str] | None = None,
        data_config: dict[str, Any] | None = None,
    ) -> None:
        """Write `config.json` and `model.safetensors` to a folder atomically. Arguments as for `save_model`.

        Raises:
            HubError: The model was not created by timm, or there is not one label name per class.
            SaveError: Writing failed; a model that was in the folder before is unchanged.
        """
        model: Any = self
        save_model(model, save_directory, label_names=label_names, data_config=data_config)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        label_names: Sequence[str] | None = None,
        data_config: dict[str, Any] | None = None,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload model",
        token: str | None = None,
        create_pr: bool = False,
        license: str | None = None,
    ) -> CommitInfo:
        """Upload the model with a model card to the Hub in one commit.

        The card is made from the model's config. To include the results of train.py, upload the run's folder with
        `push_folder` instead.

        Args:
            repo_id: `USER/NAME`, or `NAME` for the token's own user; created if missing.
            label_names: Class names; by default those the model was loaded with.
            data_config: Image size, crop and interpolation used in training; by default the model's own.
            private: Visibility of a new repository; by default public, or the organisation's default.
            revision: Existing branch to commit to; by default main.
            commit_message: First line of the commit message.
            token: Token of a user with write access; by default HF_TOKEN or the one saved by `hf auth login`.
            create_pr: Open a pull request instead of committing.
            license: Licence of the weights, for the card, such as `"mit"`; by default the one in the config of the
                model's pretrained tag.

        Raises:
            HubError: As for `save_pretrained` and `push_folder`.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, label_names=label_names, data_config=data_config)
            return push_folder(
                folder,
                repo_id,
                private=private,
                revision=revision,
                commit_message=commit_message,
                token=token,
                create_pr=create_pr,
                license=license,
            )

    @classmethod
    def from_pretrained(
        cls: type[_M],
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **model_args: Any,
    ) -> _M:
        """Check a model in a folder or on the Hub, and load it in eval mode.

        `timm.create_model` creates the same model from the same files. Weights are read only from safetensors files,
        so no code in the files is executed.

        Args:
            pretrained_model_name_or_path: A folder, or a repository id on the Hub.
            revision: Branch, tag or commit on the Hub; by default main.
            token: Token of a user with read access; by default HF_TOKEN or the one saved by `hf auth login`.
            cache_dir: Download cache; by default huggingface_hub's.
            force_download: Download the files even if they are cached.
            local_files_only: Use only cached files, as with HF_HUB_OFFLINE=1.
            model_args: Arguments of `timm.create_model`, such as `num_classes=5` for a new classifier.

        Raises:
            HubError: The model is missing, damaged, incomplete or of another class, or the Hub cannot be reached. The
                message names what is wrong.
        """
        source = os.fspath(pretrained_model_name_or_path)
        if os.path.isdir(source):
            folder = source
        elif source.count("/") > 1 or source.startswith((".", "~", "/")):
            raise HubError(f"{source!r} is neither a folder nor a repository id on the Hub: give a folder or USER/NAME")
        else:
            folder = fetch(
                source,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
            )
        name = check_folder(folder)["architecture"]
        said = "".join(f", {key}={value!r}" for key, value in model_args.items())
        with wrap_errors(f"cannot create the {name} in {source}{said}", HubError):
            model: Any = _create(f"local-dir:{os.fspath(folder)}", pretrained=True, **model_args).eval()
        if not isinstance(model, cls):
            kind = type(model).__name__
            raise HubError(f"{source} is a {kind}, not a {cls.__name__}: load it with {kind} or timm.create_model")
        return model

    def generate_model_card(self, *, repo_id: str) -> ModelCard:
        """Return the model card that `push_to_hub(repo_id)` uploads."""
        model: Any = self
        return make_card(model_config(model), repo_id=repo_id)
