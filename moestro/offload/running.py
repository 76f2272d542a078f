"""Generating and measuring with a session: tokens, speed, perplexity, a line that says how it goes."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moestro.offload.counts import Counts
from moestro.offload.session import Session


@dataclass(frozen=True)
class Generated:
    """Tokens [n] after the prompt; seconds of the prompt's pass (with the first token) and of those after it."""

    tokens: Tensor
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float
    prefill: Counts
    decode: Counts

    def as_json(self) -> dict[str, Any]:
        """For reports."""
        after = len(self.tokens) - 1
        speed = after / self.decode_seconds if after > 0 and self.decode_seconds > 0 else None
        return {
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": len(self.tokens),
            "prefill_seconds": self.prefill_seconds,
            "prefill_tokens_per_second": self.prompt_tokens / max(1e-9, self.prefill_seconds),
            "decode_tokens_per_second": speed,
            "prefill_bytes": self.prefill.moved,
            "decode_bytes_per_token": self.decode.moved / after if after > 0 else None,
            "decode": self.decode.as_json(),
        }


class Meter:
    """A streamer of transformers' `generate`: times every token and shows a line for it."""

    def __init__(self, session: Session, show: Callable[[str], None]) -> None:
        self.session, self.show = session, show
        self.start = time.perf_counter()
        self.times: list[float] = []
        self.counts: list[Counts] = []
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        """The prompt first, then token after token."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.times.append(time.perf_counter() - self.start)
        self.counts.append(self.session.counts)
        self.show(self.line())

    def end(self) -> None:
        """Nothing to do."""

    def line(self) -> str:
        """tokens/s, hit rate of each precision, bytes per token; those of the tokens after the first, where there are
        some."""
        since = self.counts[-1] - self.counts[0] if len(self.counts) > 1 else self.counts[-1]
        seconds = self.times[-1] - (self.times[0] if len(self.times) > 1 else 0.0)
        tokens, rates = max(1, len(self.times) - 1), since.rates()
        by_name = {name: rates[f"hit_rate_{name}"] for name in ("high", "low")}
        hits = [f"{name} {rate:.0%}" for name, rate in by_name.items() if rate is not None]
        return (
            f"{len(self.times)} tokens, {tokens / max(1e-9, seconds):.2f} tokens/s, hits {', '.join(hits) or 'none'}, "
            f"{since.moved / tokens / 2**20:.1f} MiB a token"
        )


def generate(
    session: Session, prompt: Tensor, new_tokens: int, show: Callable[[str], None] = lambda text: None, **options: Any
) -> Generated:
    """Continue a prompt [n] by `new_tokens` at most (transformers' `generate`; greedy unless `options` say so)."""
    ids = prompt[None].to(session.device)
    before, meter = session.counts, Meter(session, show)
    session.engine.start_sequence()
    with session.running():
        out = session.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            streamer=meter,
            **{"do_sample": False, **options},
        )
    first, last = meter.counts[0], meter.counts[-1]
    decode = meter.times[-1] - meter.times[0]
    return Generated(out[0, len(prompt) :].cpu(), len(prompt), meter.times[0], decode, first - before, last - first)


def decoded_perplexity(session: Session, tokens: Tensor, window: int = 128) -> float:
    """Perplexity of text [n], each token predicted after the ones before it in its window, one at a time as in
    generation: what every single token asks of its experts decides, as it does there.

    Raises: ValueError for fewer than two tokens.
    """
    if len(tokens) < 2:
        raise ValueError(f"{len(tokens)} tokens have no perplexity, allowed: at least 2")
    total, count = 0.0, 0
    with session.running():
        for part in tokens.to(session.device).split(window):
            session.engine.start_sequence()
            cache = None
            for i in range(len(part) - 1):
                out = session.model(part[None, i : i + 1], past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                total += float(F.cross_entropy(out.logits[0, -1:].float(), part[i + 1 : i + 2]))
                count += 1
    return math.exp(total / count)


def quality(session: Session, tokens: Tensor, window: int = 128) -> dict[str, float]:
    """Perplexity as planned and then exact, on the same text; the session counts what was asked as planned."""
    planned = exact = decoded_perplexity(session, tokens, window)
    if session.host.experts and not session.plan.thresholds.exact:
        with session.exactly():
            exact = decoded_perplexity(session, tokens, window)
    return {
        "tokens": len(tokens),
        "perplexity_exact": exact,
        "perplexity": planned,
        "perplexity_change": planned / exact - 1,
    }
