"""Serve the page on a port of this machine."""

import contextlib
import tempfile
import threading
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import gradio as gr

from .app import make_app
from .examples import digit_examples, folder_examples
from .shelf import Shelf, is_shipped, our_pretrained

__all__ = ["serve"]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_UPLOAD = "10mb"
_SESSIONS = 200  # visitors whose last explanation is in memory, at most about 2 MB each; older ones start again
_STYLE = Path(__file__).parent / "page.css"


def serve(
    models: Sequence[str] = (),
    *,
    examples: Path | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    any_model: bool | None = None,
) -> None:
    """Serve the page until Ctrl-C.

    Args:
        models: models to choose from, as in `hub.load_model`, the first one selected; by default those whose weights
            ship with the package and, with `any_model`, those that can be downloaded
        examples: folder of example images; by default handwritten digits, for models that know these classes
        host: address to listen on; 0.0.0.0 allows other machines
        port: by default the environment variable GRADIO_SERVER_PORT, or the first free port from 7860
        any_model: let visitors load any folder of this machine and any model of the Hub; by default only if `host` is
            this machine

    Raises:
        ValueError: the first model cannot be used, or there is no example image.
        OSError: the port is in use.
    """
    any_model = host in LOOPBACK if any_model is None else any_model
    offered = [*models] or [name for name in our_pretrained() if any_model or is_shipped(name)]
    shelf = Shelf(offered, any_model=any_model)
    shelf[shelf.names[0]]  # fail now, with a message, and not at the first visit
    with tempfile.TemporaryDirectory(prefix="timm-coda-") as folder:
        images = digit_examples(Path(folder)) if examples is None else folder_examples(examples, Path(folder))
        app = make_app(shelf, images)
        url = _launch(app, host, port)
        try:
            with contextlib.suppress(KeyboardInterrupt):  # also right after the message
                print(f"The page is at {url} (Ctrl-C ends it)", flush=True)
                threading.Event().wait()
        finally:
            app.close()


def _launch(app: gr.Blocks, host: str, port: int | None) -> str:
    """Start the server, without any contact to other machines; return the page's address."""
    # Older gradio keeps no history.
    private: Any = {"run_history": False} if "run_history" in signature(app.launch).parameters else {}
    try:
        return app.launch(
            server_name=host,
            server_port=port,
            max_file_size=MAX_UPLOAD,
            state_session_capacity=_SESSIONS,
            theme=_theme(),
            css_paths=_STYLE,
            footer_links=[],
            share=False,
            enable_monitoring=False,
            mcp_server=False,
            ssr_mode=False,
            pwa=False,
            quiet=True,
            prevent_thread_lock=True,
            **private,
        )[1]
    except OSError as error:
        where = "from 7860 on" if port is None else port
        raise OSError(f"cannot listen on {host} port {where}: is it in use? Choose another with --port") from error


def _theme() -> gr.themes.Base:
    """Return a theme with fonts that need no network, and small text dark enough to read."""
    fonts = ["system-ui", "sans-serif"]
    return gr.themes.Base(primary_hue="blue", neutral_hue="slate", font=fonts, font_mono=["monospace"]).set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
    )
