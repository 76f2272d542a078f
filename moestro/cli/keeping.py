"""How `moestro offload` keeps and reads experts: its largest group of options."""

import argparse
from pathlib import Path

from moestro.cli.arguments import Parser


def add_keeping(parser: Parser) -> None:
    """Precisions, policy, prefetching, and where experts and their copies lie."""
    plan = parser.add_argument_group("with --memory: how experts are kept and read")
    plan.add_argument(
        "--exact", action="store_true", help="no LOW copies, nothing skipped: the same result as in memory"
    )
    plan.add_argument(
        "--low", default="int4", metavar="CODEC", help="precision of LOW copies: int8, int4 (default), int2, bf16"
    )
    plan.add_argument(
        "--low-share",
        type=float,
        default=0.25,
        metavar="SHARE",
        help="share of the memory for experts that LOW copies get (default: 0.25)",
    )
    plan.add_argument(
        "--t1",
        type=float,
        default=0.6,
        help="an expert whose gates before it add up to at most T1 is read as it is (default: 0.6)",
    )
    plan.add_argument(
        "--t2", type=float, default=0.9, help="up to T2 as a LOW copy, and beyond it not at all (default: 0.9)"
    )
    _add_reading(plan)


def _add_reading(plan: argparse._ArgumentGroup) -> None:
    plan.add_argument(
        "--policy",
        action="append",
        default=[],
        metavar="NAME",
        help="which expert leaves a full memory: lru (default), lfu, lhu, fld, lcu, mix or mix:W,W,W,W with the "
        "weights of the first four; replay takes several",
    )
    plan.add_argument(
        "--prefetch",
        type=int,
        default=0,
        metavar="DEPTH",
        help="read ahead of time what the routers of so many layers will ask for (default: 0)",
    )
    plan.add_argument(
        "--hold",
        choices=("files", "host"),
        default="files",
        help="where experts wait: in their files (default), or in memory of the host",
    )
    plan.add_argument(
        "--cooperative", action="store_true", help="with --hold host: compute there what is not in fast memory"
    )
    plan.add_argument(
        "--renormalise",
        action="store_true",
        help="where experts are skipped, scale the gates of the others to make up for them",
    )
    plan.add_argument(
        "--store",
        type=Path,
        metavar="DIR",
        help="where LOW copies are kept (default: beside the model, NAME.offload-CODEC)",
    )
    plan.add_argument(
        "--calibrate",
        type=Path,
        metavar="FILE",
        help="of moestro offload: text by which LOW copies are calibrated when they are made",
    )
