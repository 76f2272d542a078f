"""moestro serve"""

import sys
from argparse import Namespace
from pathlib import Path

from moestro.cli.arguments import Parser, UsageError, add_model, extra
from moestro.cli.offloading import add_memory, opened_text_model, spare_readers
from moestro.cli.values import positive


def add_arguments(parser: Parser) -> None:
    """MODEL, where and under which name it is served, and how much is taken on"""
    add_model(parser)
    parser.add_argument("--name", help="what clients call the model (default: its folder's name)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, which only this machine reaches)"
    )
    parser.add_argument(
        "--port", type=int, default=8000, metavar="N", help="port to listen on; 0 takes a free one (default: 8000)"
    )
    parser.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="ask clients for the key in this file (default: for the one in MOESTRO_API_KEY, if it is set)",
    )
    parser.add_argument("--active", type=positive, default=8, metavar="N", help="requests that take turns (default: 8)")
    parser.add_argument("--waiting", type=int, default=64, metavar="N", help="requests that may wait (default: 64)")
    parser.add_argument(
        "--max-body",
        type=positive,
        default=2**20,
        metavar="BYTES",
        help="longest request that is read (default: 1 MiB)",
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="time that running requests get when the server is stopped (default: 30)",
    )
    add_memory(parser)


def run(arguments: Namespace) -> int:
    """Serve a model to clients of OpenAI's completions and chat completions.

    examples:
      moestro serve runs/hmoe-0
      moestro serve runs/hmoe-0 --name mine --port 9000 --api-key-file key.txt
    """
    if arguments.memory is not None:
        spare_readers()
    with extra("serve"):
        from moestro.serve import ServeSettings, read_api_key, run_server

    try:
        settings = ServeSettings(
            name=arguments.name or arguments.model.resolve().name,
            host=arguments.host,
            port=arguments.port,
            api_key=read_api_key(arguments.api_key_file),
            active=arguments.active,
            waiting=arguments.waiting,
            max_body=arguments.max_body,
            grace=arguments.grace,
        )
    except ValueError as error:
        raise UsageError(f"{error}") from error

    def ready(url: str) -> None:
        if settings.is_open:
            print(
                f"moestro: {settings.host} can be reached from elsewhere and no API key is asked for", file=sys.stderr
            )
        print(f"serving {settings.name} on {url}/v1 (Ctrl-C stops)", flush=True)

    with opened_text_model(arguments) as text_model:
        run_server(text_model, settings, ready)
    print("stopped")
    return 0
