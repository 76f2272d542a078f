"""A text token by token: its loss, and what each mixture layer spent on it."""

from collections.abc import Sequence
from typing import Any

import torch

from moestro.data import Dataset, Tokenizer
from moestro.evaluate.perplexity import evaluating
from moestro.evaluate.scoring import autocast, nats
from moestro.model import Transformer

REPLACEMENT = "\ufffd"


def token_sample(
    model: Transformer, tokenizer: Tokenizer, text: str, *, precision: str = "fp32"
) -> list[dict[str, Any]]:
    """For every token of `text`: {"text", "loss", "layers": {layer: {"width", "experts"}}}.

    `loss` is -log p(token | text before it) in nats, the first token's given the document separator; `width` and
    `experts` are the active width and the number of experts when the token is read. The pieces of text join to the
    decoded text: a character split over tokens belongs to its last one.

    Raises: ValueError where the text has no tokens.
    """
    ids = tokenizer.encode(text)
    if not ids:
        raise ValueError(f"text={text!r} has no tokens")
    device = next(model.parameters()).device
    tokens = torch.tensor([[tokenizer.eos_id, *ids]], device=device)
    with evaluating(model), autocast(device, precision):
        output = model(tokens)
    losses = nats(output.logits[:, :-1], tokens[:, 1:])[0].tolist()
    names = {id(layer): name for name, layer in model.moe_layers().items()}
    usage = {
        names[id(t.layer)]: (t.active_width()[1:].tolist(), t.experts_per_token()[1:].tolist()) for t in output.traces
    }
    return [
        {
            "text": piece,
            "loss": loss,
            "layers": {
                name: {"width": width[i], "experts": round(experts[i])} for name, (width, experts) in usage.items()
            },
        }
        for i, (piece, loss) in enumerate(zip(pieces(tokenizer, ids), losses, strict=True))
    ]


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text each token adds."""
    out: list[str] = []
    told = waiting = 0
    for end in range(1, len(ids) + 1):
        # All of it, because some decoders take the space before the first token away.
        text, waiting = tokenizer.decode(ids[:end]), waiting + 1
        # Bytes of an unfinished character decode to the replacement character: wait for the rest.
        if text.endswith(REPLACEMENT) and waiting < 4 and end < len(ids):
            out.append("")
            continue
        out.append(text[told:])
        told, waiting = len(text), 0
    return out


def sample_text(dataset: Dataset, characters: int = 700) -> str:
    """The beginning of the first held-out document that is long enough to be worth reading (else of the last one), cut
    at a line's end."""
    text = ""
    for number in range(dataset.n_val_documents):
        text = dataset.val_document(number)
        if len(text) >= characters:
            break
    text = text[:characters]
    return text[: text.rfind("\n") + 1] or text
