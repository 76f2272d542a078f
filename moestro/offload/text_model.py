"""A session as a model that continues texts: for generation token by token, and for serving."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moestro.generation import TextModel
from moestro.offload.session import Session


@contextmanager
def text_model(session: Session) -> Iterator[TextModel]:
    """Inside, the session's model with its tokenizer. Records of uses begin anew with every prompt; those of several
    texts that take turns are of all together."""

    def begins(_model: Any, _arguments: Any, keywords: dict[str, Any]) -> None:
        cache = keywords.get("past_key_values")
        if cache is None or not cache.get_seq_length():
            session.engine.start_sequence()

    handle = session.model.register_forward_pre_hook(begins, with_kwargs=True)
    try:
        with session.running():
            yield TextModel(session.model, session.host.tokenizer())
    finally:
        handle.remove()
