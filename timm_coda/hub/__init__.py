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
from .folder import (
    HubError,
    SaveError,
    check_folder,
    model_config,
    read_config,
    save_model,
    temporary_folder,
    write_text,
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

__all__ = [
    "PICTURE_KEY",
    "ConvertError",
    "HubError",
    "HubMixin",
    "SaveError",
    "__version__",
    "card_of_folder",
    "check_access",
    "check_fit",
    "check_folder",
    "check_repo_id",
    "convert_checkpoint",
    "create_model",
    "download_errors",
    "environment",
    "fetch",
    "files_to_push",
    "from_bcos_v2",
    "is_cached",
    "load_model",
    "make_card",
    "model_config",
    "push_folder",
    "read_config",
    "resolve_weights",
    "save_model",
    "temporary_folder",
    "unwrap",
    "weights_fingerprint",
    "write_text",
]
