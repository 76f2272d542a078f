"""Floor 12: an HTTP server that speaks OpenAI's completions and chat completions."""

from moestro.serve.app import build_app
from moestro.serve.server import run_server
from moestro.serve.settings import ServeSettings, read_api_key

__all__ = ["ServeSettings", "build_app", "read_api_key", "run_server"]
