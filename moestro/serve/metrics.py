"""What the server counts, as Prometheus reads it."""

from collections import Counter
from collections.abc import Iterator, Mapping

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Histogram:
    """Counts of seconds up to each bound, and their sum."""

    def __init__(self) -> None:
        self.counts, self.sum, self.count = [0] * len(SECONDS), 0.0, 0

    def observe(self, seconds: float) -> None:
        """Count one more."""
        self.counts = [n + (seconds <= bound) for n, bound in zip(self.counts, SECONDS, strict=True)]
        self.sum, self.count = self.sum + seconds, self.count + 1

    def lines(self, name: str, about: str) -> Iterator[str]:
        """The exposition text."""
        yield from _head(name, about, "histogram")
        for bound, count in zip(SECONDS, self.counts, strict=True):
            yield f'{name}_bucket{{le="{bound}"}} {count}'
        yield f'{name}_bucket{{le="+Inf"}} {self.count}'
        yield f"{name}_sum {self.sum}"
        yield f"{name}_count {self.count}"


class Metrics:
    """Counted on the event loop's thread only."""

    def __init__(self) -> None:
        self.answers: Counter[tuple[str, int]] = Counter()
        self.prompt_tokens = self.generated_tokens = self.disconnects = 0
        self.first_token, self.whole_answer = Histogram(), Histogram()

    def retry_after(self) -> int:
        """Seconds after which a place is likely free: what an answer took on average, 1 to 60."""
        mean = self.whole_answer.sum / max(1, self.whole_answer.count)
        return int(min(60, max(1, mean + 0.5)))

    def text(self, gauges: Mapping[str, int]) -> str:
        """Everything in the exposition format, with `gauges` as they stand."""
        return "\n".join([*self._lines(gauges), ""])

    def _lines(self, gauges: Mapping[str, int]) -> Iterator[str]:
        yield from _head("moestro_answers_total", "Answers by endpoint and status.", "counter")
        for (endpoint, status), count in sorted(self.answers.items()):
            yield f'moestro_answers_total{{endpoint="{endpoint}",status="{status}"}} {count}'
        totals = {
            "moestro_prompt_tokens_total": ("Tokens of admitted prompts.", self.prompt_tokens),
            "moestro_generated_tokens_total": ("Tokens generated.", self.generated_tokens),
            "moestro_disconnects_total": ("Clients that left before their answer was whole.", self.disconnects),
        }
        for name, (about, value) in totals.items():
            yield from [*_head(name, about, "counter"), f"{name} {value}"]
        for name, value in gauges.items():
            yield from [*_head(name, "Now.", "gauge"), f"{name} {value}"]
        yield from self.first_token.lines("moestro_first_token_seconds", "From a request to its first token.")
        yield from self.whole_answer.lines("moestro_answer_seconds", "From a request to the end of its answer.")


def _head(name: str, about: str, kind: str) -> list[str]:
    return [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
