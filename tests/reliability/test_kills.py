"""The counting of kills: that it sees what is lost, different or half-written. One kill a second is in tests/train."""

import json
import random
import shutil
from collections import Counter

import pytest
import torch

from bench.reliability import kills
from bench.reliability.contents import contents, half_written
from bench.reliability.kills import Killing
from bench.reliability.victims import Victim
from moestro.ops.whole_files import record_hashes
from moestro.train.checkpoint import write_checkpoint


@pytest.fixture
def folder(tmp_path):
    """A folder with a file of every kind, all whole."""
    write_checkpoint(tmp_path / "checkpoints", 3, {"model": {"w": torch.ones(3)}}, {"counters": {"seconds": 2.0}})
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": {"seconds": 2}}\n{"st')
    (tmp_path / "done.json").write_text(json.dumps({"step": 3, "time": {"seconds": 1}}))
    (tmp_path / "recipe.yaml").write_text("model: {d_model: 3}\n")
    (tmp_path / "report.html").write_text("<html></html>\n")
    (tmp_path / ".writing-x.json").write_text("{")
    return tmp_path


def test_whole_files_are_whole_and_torn_metrics_are_cut_later(folder):
    assert half_written(folder) == []


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("checkpoints/step-00000003/model.safetensors", lambda content: content[:-4]),
        ("checkpoints/step-00000003/state.json", lambda content: content[:30]),
        ("done.json", lambda content: content[:4]),
        ("metrics.jsonl", lambda content: b"{\n" + content),
        ("recipe.yaml", lambda content: content[:-2]),
        ("report.html", lambda content: content[:8]),
    ],
)
def test_what_is_half_written_under_its_own_name_is_found(folder, name, damage):
    file = folder / name
    file.write_bytes(damage(file.read_bytes()))
    found = half_written(folder)
    # a damaged file of a checkpoint is found by its header, its hash or both
    assert found and all(line.split("/")[0].split(":")[0] == name.split("/")[0] for line in found)


def test_a_file_without_the_hash_beside_it_is_found(folder):
    record_hashes(folder, ["done.json"])
    assert half_written(folder) == []
    (folder / "done.json").write_text(json.dumps({"step": 4}))
    (found,) = half_written(folder)
    assert found.startswith("hashes.json: ") and "done.json is damaged" in found


def test_only_clocks_are_left_out_of_contents(folder, tmp_path):
    (folder / "metrics.jsonl").write_text('{"step": 1, "time": {"seconds": 2}}\n')
    before = contents(folder)
    (folder / "metrics.jsonl").write_text('{"step": 1, "time": {"seconds": 9}}\n')
    (folder / "lock").write_text("17")
    assert contents(folder) == before
    (folder / "metrics.jsonl").write_text('{"step": 2, "time": {"seconds": 2}}\n')
    assert {name for name in before if contents(folder)[name] != before[name]} == {"metrics.jsonl"}


class Fake:
    """Stands for the forking process: a command that writes two numbers, and ends as `statuses` says."""

    def __init__(self, out, statuses, wrong_after=99):
        self.out, self.statuses, self.starts, self.wrong_after = out, list(statuses), 0, wrong_after

    def start(self, **asked):
        self.starts += 1
        self.out.mkdir(exist_ok=True)
        number = self.starts if self.starts > self.wrong_after else 1
        (self.out / "done.json").write_text(json.dumps({"step": number}))
        (self.out.parents[1] / "mark").write_text("in a save")
        return 1

    def kill(self, pid, seconds):
        pass

    def status(self):
        return self.statuses.pop(0) if self.statuses else 0


def killing(tmp_path, statuses, **changes) -> Killing:
    made = Killing(Victim("it", lambda out: [str(out)], 1.0), tmp_path / "work", tmp_path, None, random.Random(1))
    made.forks = Fake(made.out, statuses, **changes)
    return made


def test_kills_are_counted_and_a_run_that_ends_is_compared(tmp_path):
    made = killing(tmp_path, [0, 0, -9, -9, -9])
    made.run(3)
    assert made.phases == Counter({"in a save, before the first save": 3}) and made.episodes >= 1 and not made.broken
    figures = {figure.what: figure for figure in made.figures()}
    assert figures["kills"].value == 3 and figures["lost, different or half-written"].holds


def test_a_difference_and_an_error_are_told(tmp_path):
    made = killing(tmp_path, [0, 0, -9], wrong_after=2)
    made.run(1)
    assert made.broken == ["episode 0: out/done.json differs"]
    shutil.rmtree(tmp_path / "work")
    (tmp_path / "work").mkdir()
    made = Killing(made.victim, tmp_path / "again", tmp_path, None, random.Random(1))
    made.forks = Fake(made.out, [0, 0, 1, -9])
    made.log.write_text("no room")
    made.run(1)
    assert any("it ended with 1: no room" in line for line in made.broken)
    assert made.figures()[-1].holds is False


@pytest.mark.parametrize("asked", [1, 6, 14, 200])
def test_every_victim_has_its_share_and_none_of_the_kills_is_rounded_away(asked):
    chosen = [Victim(str(share), list, share) for share in (0.35, 0.1, 0.15, 0.15, 0.1, 0.05, 0.1)]
    found = kills.shared(asked, chosen)
    assert sum(found) >= asked and min(found) >= 1
    assert asked < 200 or found == [70, 20, 30, 30, 20, 10, 20]


@pytest.mark.slow
def test_a_dozen_kills_of_every_command_lose_nothing(tmp_path, capsys):
    kills.main(["--kills", "14", "--json", str(tmp_path / "kills.json")])
    figures = json.loads((tmp_path / "kills.json").read_text())["figures"]
    assert figures[-1]["value"] >= 14 and all(figure["holds"] is not False for figure in figures)
