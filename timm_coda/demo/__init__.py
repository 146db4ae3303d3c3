"""A web page that explains images: choose one, see what the model decides and where that comes from."""

from .app import make_app
from .examples import digit_examples, folder_examples
from .server import serve
from .shelf import Shelf
from .space import export_space

__all__ = ["Shelf", "digit_examples", "export_space", "folder_examples", "make_app", "serve"]
