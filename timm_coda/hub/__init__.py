"""Create, load and save models: registry names, local folders, the Hugging Face Hub, published checkpoints."""

from .card import make_card
from .checkpoints import (
    ConvertError,
    check_fit,
    convert_checkpoint,
    from_bcos_v2,
    is_cached,
    resolve_weights,
    unwrap,
)
from .environment import __version__, environment
from .factory import HubMixin, create_model, load_model
from .fingerprint import PICTURE_KEY, weights_fingerprint
from .folder import SAVED, between_saves, check_folder, model_config, read_config, save_model
from .processes import ALONE, ProcessError, Processes, join_launch
from .record import (
    create_recorded,
    get_model_args,
    get_model_input_config,
    loadable,
    register_model,
    resolve_input_data_config,
)
from .remote import (
    card_of_folder,
    check_access,
    check_repo_id,
    download_errors,
    fetch,
    files_to_push,
    push_folder,
)
from .writing import RUNNING, HubError, SaveError, claimed, replacing, temporary_folder, write_text

__all__ = [
    "ALONE",
    "PICTURE_KEY",
    "RUNNING",
    "SAVED",
    "ConvertError",
    "HubError",
    "HubMixin",
    "ProcessError",
    "Processes",
    "SaveError",
    "__version__",
    "between_saves",
    "card_of_folder",
    "check_access",
    "check_fit",
    "check_folder",
    "check_repo_id",
    "claimed",
    "convert_checkpoint",
    "create_model",
    "create_recorded",
    "download_errors",
    "environment",
    "fetch",
    "files_to_push",
    "from_bcos_v2",
    "get_model_args",
    "get_model_input_config",
    "is_cached",
    "join_launch",
    "load_model",
    "loadable",
    "make_card",
    "model_config",
    "push_folder",
    "read_config",
    "register_model",
    "replacing",
    "resolve_input_data_config",
    "resolve_weights",
    "save_model",
    "temporary_folder",
    "unwrap",
    "weights_fingerprint",
    "write_text",
]
