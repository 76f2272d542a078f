"""From a conversation to a prompt."""

from collections.abc import Sequence
from typing import Any

ROLES = {"system": "System", "user": "User", "assistant": "Assistant"}
# a model without a template writes the next turn itself if nothing ends it
PLAIN_STOPS = ("\nUser:", "\nSystem:", "\nAssistant:")


def render(tokenizer: Any, messages: Sequence[dict[str, str]]) -> tuple[str, tuple[str, ...], bool]:
    """(prompt, stop sequences that belong to it, whether its special tokens are written out).

    With the tokenizer's own chat template where it has one. Else every message is a paragraph `Role: content`, the
    last one is `Assistant:`, and the answer ends where another message would begin.

    Raises: ValueError where the template refuses the conversation.
    """
    if not getattr(tokenizer, "chat_template", None):
        turns = [f"{ROLES[message['role']]}: {message['content']}\n" for message in messages]
        return "".join([*turns, "Assistant:"]), PLAIN_STOPS, False
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates are programs of the model's authors
        raise ValueError(f"the model's chat template refuses these messages: {error}") from error
    return text, (), True
