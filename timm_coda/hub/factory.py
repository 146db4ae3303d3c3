"""Models in and out: from what a person types, from folders and the Hugging Face Hub, and back there.

`timm.create_model("hf-hub:USER/NAME", pretrained=True)` and `"local-dir:FOLDER"` read what is written here.
"""

import contextlib
import difflib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import timm
import torch
from huggingface_hub import CommitInfo, ModelCard, ModelHubMixin

from ..errors import wrap_errors
from .card import make_card
from .folder import HubError, check_folder, model_config, save_model
from .remote import fetch, push_folder

__all__ = ["HubMixin", "create_model", "load_model"]

_M = TypeVar("_M", bound="HubMixin")


def create_model(
    name: str,
    *,
    num_classes: int,
    pretrained: bool = False,
    model_args: Sequence[str] = (),
    head_only: bool = False,
) -> torch.nn.Module:
    """Make a model as `timm.create_model` does, from what a person types.

    Args:
        name: In timm's registry, or `local-dir:FOLDER`, or `hf-hub:ID`.
        num_classes: Number of classes.
        pretrained: Load its published weights.
        model_args: Further arguments, each `NAME=VALUE` with the value in JSON, such as `logit_temperature=100`.
        head_only: Freeze everything but the classifier.

    Raises:
        HubError: There is no such model, or it cannot be made with these arguments.
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
        raise HubError(f"model argument num_classes={arguments['num_classes']}: the data set says it, {num_classes}")
    said = "".join(f", {key}={value!r}" for key, value in arguments.items())
    with wrap_errors(f"cannot make the model {name} with num_classes={num_classes}{said}", HubError):
        model: Any = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **arguments)
    if head_only:
        model.requires_grad_(False)
        model.get_classifier().requires_grad_(True)
    return model


def load_model(name: str, *, pretrained: bool = True) -> Any:
    """A finished model in eval mode, to look at and not to train.

    Args:
        name: In timm's registry, or a folder (with or without `local-dir:`), or `hf-hub:ID`.
        pretrained: Load its weights; random ones otherwise.

    Raises:
        HubError: There is no such model, or its weights cannot be loaded.
    """
    if os.path.isdir(name):
        name = f"local-dir:{name}"
    _check_name(name)
    with wrap_errors(f"cannot load {name}", HubError):
        return timm.create_model(name, pretrained=pretrained).eval()


def _check_name(name: str) -> None:
    if ":" not in name and not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models()) or timm.list_models("coda*")
        raise HubError(f"timm has no model {name!r}; there is {', '.join(near)}, or local-dir:FOLDER")


class HubMixin(ModelHubMixin):
    """Adds `save_pretrained`, `push_to_hub` and `from_pretrained`, in timm's format, to a model that timm registers."""

    # ModelHubMixin would keep the constructor's arguments here if nothing were there; timm remembers them already.
    _hub_mixin_config: Mapping[str, Any] = MappingProxyType({})

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        label_names: Sequence[str] | None = None,
        data_config: dict[str, Any] | None = None,
    ) -> None:
        """Write `config.json` and `model.safetensors` into a folder, whole or not at all; arguments as `save_model`.

        Raises:
            HubError: timm did not make the model, or there are not as many names as classes.
            SaveError: It could not be written; the model that was there before still is.
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
        """Upload the model with a model card to the Hub, in one commit.

        The card says what the model's config knows. What train.py measured comes with `push_folder`, which uploads
        a run's folder.

        Args:
            repo_id: `USER/NAME`, or `NAME` for the token's own user; made if there is none.
            label_names: What the classes are called; by default what the model was loaded with.
            data_config: The image size, crop and interpolation it was trained with; by default the model's own.
            private: For a new repository; by default public, or as the organisation says.
            revision: Branch to commit to, which is there already; by default main.
            commit_message: First line of the commit.
            token: Of a user who may write there; by default HF_TOKEN or what `hf auth login` saved.
            create_pr: Open a pull request in place of committing.
            license: Of the weights, for the card, such as `"mit"`; by default what the config says of the weights that
                the model's name stands for.

        Raises:
            HubError: As `save_pretrained` and `push_folder`.
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
        """Load a model from a folder or the Hub, in eval mode, after checks that name what is wrong.

        `timm.create_model` makes the same model of the same files. Only safetensors are read, nothing is executed.

        Args:
            pretrained_model_name_or_path: A folder, or an id on the Hub.
            revision: Branch, tag or commit on the Hub; by default main.
            token: Of a user who may read it; by default HF_TOKEN or what `hf auth login` saved.
            cache_dir: Where downloads are kept; by default huggingface_hub's cache.
            force_download: Download also what is in the cache.
            local_files_only: Take what is in the cache, as HF_HUB_OFFLINE=1 does.
            model_args: Arguments of `timm.create_model`, such as `num_classes=5` for a new classifier.

        Raises:
            HubError: No such folder or model, or it is damaged, incomplete or of another class; or no connection.
        """
        source = os.fspath(pretrained_model_name_or_path)
        if os.path.isdir(source):
            folder = source
        elif source.count("/") > 1 or source.startswith((".", "~", "/")):
            raise HubError(f"{source!r}: there is no such folder, and it is no id on the Hub, which is USER/NAME")
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
        with wrap_errors(f"cannot make the {name} in {source}{said}", HubError):
            model: Any = timm.create_model(f"local-dir:{os.fspath(folder)}", pretrained=True, **model_args).eval()
        if not isinstance(model, cls):
            kind = type(model).__name__
            raise HubError(f"{source} makes a {kind}, no {cls.__name__}: load it with {kind}, or timm.create_model")
        return model

    def generate_model_card(self, *, repo_id: str) -> ModelCard:
        """The model card that `push_to_hub(repo_id)` uploads."""
        model: Any = self
        return make_card(model_config(model), repo_id=repo_id)
