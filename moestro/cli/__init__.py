"""The command line: verbs, each of which calls one function below. Nothing heavy is imported before arguments are read.

A verb is a module with `add_arguments(parser)` and `run(arguments) -> exit code`, and one line in `dispatch.VERBS`.

Exit codes: 0 done (or training stopped by a signal, and saved), 1 failed while running, 2 a mistake in the command or
recipe, 130 a comparison that was interrupted.
"""

from moestro.cli.dispatch import VERBS, main

__all__ = ["VERBS", "main"]
