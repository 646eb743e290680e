"""Conversations as text: messages with roles and parts, the form of preference data and chat models."""

from collections.abc import Mapping, Sequence
from typing import Any

SPEAKERS = {"user": "Human", "assistant": "Assistant"}
Message = Mapping[str, Any]


def prompt_text(messages: Sequence[Message]) -> str:
    """Return a prompt of messages as text: one turn as it is, several in the manner of HH-RLHF."""
    text = dialogue_text(messages)
    return text if len(messages) == 1 else f"{text}\n\nAssistant:"


def dialogue_text(messages: Sequence[Message]) -> str:
    """Return what one message says, or all turns with their speakers."""
    if not messages:
        raise ValueError("messages: expected at least one, got none")
    if len(messages) == 1:
        return _content(messages[0])
    if any("role" not in one for one in messages):
        raise ValueError("messages: expected a role and content in each, got one without a role")
    return "\n\n".join(f"{SPEAKERS.get(m['role'], m['role'])}: {_content(m)}" for m in messages)


def _content(message: Message) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise ValueError(f"content: expected text or parts of type text, got {content!r:.80}")
    kinds = {str(one.get("type")) if isinstance(one, Mapping) else repr(one) for one in content}
    if kinds != {"text"}:
        got = ", ".join(sorted(kinds))
        raise ValueError(f"content: sources of this library judge text, got parts of type {got}")
    return "".join(str(one["text"]) for one in content)
