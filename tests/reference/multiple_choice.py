"""Scores of choices and of text under a language model, written out in loops, with a function for its logits.

Length-normalised choices: Brown 2020, arXiv:2005.14165, section 2.4; bits per byte: nats / (ln 2 * bytes).
"""

import math
from collections.abc import Callable

import torch

# logits [s, v] of the next token after each token of a sequence
Logits = Callable[[list[int]], torch.Tensor]


def log_probability(logits: Logits, context: list[int], continuation: list[int], longest: int) -> tuple[float, bool]:
    """(sum of log p of the continuation's tokens, whether each is the likeliest); contexts are cut from the left."""
    total, likeliest = 0.0, True
    whole = (context + continuation)[-(longest + 1) :]
    for place in range(len(whole) - len(continuation), len(whole)):
        row = logits(whole[:place])[-1].double()
        log_p = row[whole[place]] - torch.log(sum(torch.exp(value - row.max()) for value in row)) - row.max()
        total += float(log_p)
        likeliest = likeliest and int(row.argmax()) == whole[place]
    return total, likeliest


def chosen(logits: Logits, encode: Callable[[str], list[int]], context: str, choices: list[str], longest: int):
    """(the choice of the highest log probability, that of the highest log probability a character)."""
    scores = [log_probability(logits, encode(context), encode(" " + choice), longest)[0] for choice in choices]
    by_length = [score / len(choice) for score, choice in zip(scores, choices, strict=True)]
    return scores.index(max(scores)), by_length.index(max(by_length))


def chosen_context(logits: Logits, encode: Callable[[str], list[int]], contexts: list[str], text: str, longest: int):
    """The context under which the same text has the highest log probability."""
    scores = [log_probability(logits, encode(context), encode(" " + text), longest)[0] for context in contexts]
    return scores.index(max(scores))


def nats(logits: Logits, tokens: list[int], first: int, longest: int) -> float:
    """-log p of all tokens, in windows of `longest` of them: each window begins with the token before it, the text
    with `first`; the last window reaches back as far as it can."""
    total, before = 0.0, [first, *tokens]
    for start in range(0, len(tokens), longest):
        end = min(start + longest, len(tokens))
        for place in range(start, end):
            row = logits(before[max(0, end - longest) : place + 1])[-1].double()
            total -= float(torch.log_softmax(row, dim=0)[tokens[place]])
    return total


def bits_per_byte(total_nats: float, text: str) -> float:
    """Bits of information a byte of UTF-8."""
    return total_nats / (math.log(2) * len(text.encode()))
