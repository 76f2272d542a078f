"""The launch recipes: they are well-formed, and what they run is what the launcher and the command line understand."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from moestro.cli import VERBS
from moestro.cli.arguments import Parser
from moestro.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
TORCHRUN, AGENT = ["torchrun"], ["python", "-m", "moestro.parallel.agent"]
PAGE = (ROOT / "docs" / "parallel.md").read_text(encoding="utf-8")


def kubernetes() -> list[str]:
    """The words of the container's command."""
    job = next(d for d in yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text()) if d["kind"] == "Job")
    container = job["spec"]["template"]["spec"]["containers"][0]
    return [*container["command"], *container["args"]]


def slurm() -> list[str]:
    """The words that srun runs, with the shell's variables filled in."""
    text = (LAUNCH / "slurm.sh").read_text().replace("\\\n", " ")
    line = next(line for line in text.splitlines() if line.startswith("srun "))
    filled = line.replace("$SLURM_JOB_NUM_NODES", "4").replace("$head", "host").replace('"$@"', "optim.lr=1e-3")
    filled = filled.replace("$recipe", "recipes/hmoe.yaml").replace("$out", "runs/hmoe")
    words = shlex.split(re.sub(r"\$\{?SLURM_\w+(:-0)?\}?", "7", filled))
    return words[words.index("python") :]


def on_the_page() -> list[str]:
    """The words that start torchrun in docs/parallel.md."""
    found = re.search(r"^torchrun .*", PAGE.replace("\\\n", " "), re.MULTILINE)
    assert found
    return shlex.split(found[0])


@pytest.mark.parametrize("words", [kubernetes(), slurm(), on_the_page()], ids=["kubernetes", "slurm", "page"])
def test_torchrun_and_moestro_understand_what_is_launched(words: list[str]):
    rest = words[len(TORCHRUN) if words[0] == "torchrun" else len(AGENT) :]
    assert words[: -len(rest)] in (TORCHRUN, AGENT)
    launched = get_args_parser().parse_args(rest)
    assert launched.module and launched.training_script == "moestro"
    verb, *arguments = launched.training_script_args
    parser = Parser()
    VERBS[verb].add_arguments(parser)
    parsed = parser.parse_intermixed_args(arguments)
    assert verb == "train" and parsed.out is not None
    load_recipe(ROOT / parsed.recipe, parsed.overrides)


@pytest.mark.parametrize("words", [kubernetes(), slurm()], ids=["kubernetes", "slurm"])
def test_a_lost_host_leaves_the_others_to_go_on(words: list[str]):
    assert words[: len(AGENT)] == AGENT
    launched = get_args_parser().parse_args(words[len(AGENT) :])
    assert re.fullmatch(r"1:\d+", launched.nnodes) and launched.max_restarts > 0
    assert launched.rdzv_backend == "c10d" and launched.rdzv_endpoint.endswith(":29500")


def test_slurm_s_script_is_a_shell_script():
    subprocess.run(["bash", "-n", str(LAUNCH / "slurm.sh")], check=True)
    options = re.findall(r"^#SBATCH --([a-z-]+)", (LAUNCH / "slurm.sh").read_text(), re.MULTILINE)
    assert {"nodes", "requeue", "no-kill", "signal"} <= set(options)


def test_pods_of_the_job_find_one_another():
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    spec = job["spec"]
    pod = spec["template"]["spec"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert service["spec"]["clusterIP"] == "None"
    assert pod["subdomain"] == service["metadata"]["name"] and pod["restartPolicy"] == "Never"
    first = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    endpoint = next(word for word in kubernetes() if word.startswith("--rdzv-endpoint="))
    assert endpoint == f"--rdzv-endpoint={first}:29500"
    assert f"--nnodes=1:{spec['parallelism']}" in kubernetes() and spec["parallelism"] == spec["completions"]
    mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
