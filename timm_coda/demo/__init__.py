"""A web page that explains images: the model's decision, and the contribution of each pixel to it."""

from .app import make_app
from .examples import Examples, digit_examples, folder_examples
from .server import serve
from .shelf import Shelf
from .space import export_space

__all__ = ["Examples", "Shelf", "digit_examples", "export_space", "folder_examples", "make_app", "serve"]
