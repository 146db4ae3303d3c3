"""Create, load and save models: registry names, local folders, the Hugging Face Hub, published checkpoints."""

from .card import make_card
from .checkpoints import ConvertError, check_fit, convert_checkpoint, from_bcos_v2, resolve_weights, unwrap
from .environment import __version__, environment
from .factory import HubMixin, create_model, load_model
from .folder import SAVED, between_saves, check_folder, model_config, read_config, save_model
from .labels import class_names, find_class
from .remote import card_of_folder, check_access, check_repo_id, fetch, files_to_push, push_folder
from .writing import RUNNING, HubError, SaveError, claimed, replacing, temporary_folder, write_text

__all__ = [
    "RUNNING",
    "SAVED",
    "ConvertError",
    "HubError",
    "HubMixin",
    "SaveError",
    "__version__",
    "between_saves",
    "card_of_folder",
    "check_access",
    "check_fit",
    "check_folder",
    "check_repo_id",
    "claimed",
    "class_names",
    "convert_checkpoint",
    "create_model",
    "environment",
    "fetch",
    "files_to_push",
    "find_class",
    "from_bcos_v2",
    "load_model",
    "make_card",
    "model_config",
    "push_folder",
    "read_config",
    "replacing",
    "resolve_weights",
    "save_model",
    "temporary_folder",
    "unwrap",
    "write_text",
]
