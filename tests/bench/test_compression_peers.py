"""The script that puts our REAP beside llm-compressor's, with a peer that answers at once."""

import json

import pytest

from bench import compression_peers as peers
from bench.harness import report
from bench.summary import summary
from tests.bench.test_results import TIMING


@pytest.mark.slow
def test_both_sides_are_measured_on_one_checkpoint(tmp_path, text_file, monkeypatch) -> None:
    words = ["--peer", "python", "--text", str(text_file), "--held-out", str(text_file), "--quick"]
    options = peers.arguments(words)
    options.tokens = 512
    source = peers.trained(tmp_path / "source", options)
    asked = peers.request_of(options, source)

    def process(command, _threads):
        if "--side" in command:
            return peers.ours(asked, tmp_path / "ours")
        assert str(command[1]).endswith("llm_compressor_reap.py") and command[1].exists()
        return {"seconds": 2.0, "mebibytes": 100.0, "kept": [[0, 1, 2, 3, 4, 5]] * 3}

    monkeypatch.setattr(peers, "process", process)
    rows = {row.what: row for row in peers.compared(options, source, tmp_path)}
    options.json = tmp_path / "peers.json"
    report("bench/compression_peers.py", list(rows.values()), options)
    written = json.loads(options.json.read_text())
    assert set(written) == {"script", "commit", "machine", "seed", "rows"}
    assert len(written["rows"]) == 3 and all(set(row) == TIMING for row in written["rows"])
    assert "REAP, 25% of experts" in summary(options.json)
    quality = rows["perplexity above the whole model's"]
    assert quality.unit == "%" and -50 < quality.ours < 100 and -50 < quality.theirs < 100
    assert rows["time"].theirs == 2.0 and rows["time"].ratio == 2.0 / rows["time"].ours


def test_a_peer_is_needed(capsys) -> None:
    with pytest.raises(SystemExit):
        peers.arguments([])
    assert "which python has llmcompressor" in capsys.readouterr().err
