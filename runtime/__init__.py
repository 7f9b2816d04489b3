"""The device runtime: opens a bundle and answers a question about an image. Never imports torch.

import runtime
session = runtime.open_bundle("bundles/student-onnx-int8")
print(session.ask("photo.png", "what color is the circle?").text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from runtime.errors import PocketError

if TYPE_CHECKING:
    from runtime.answer import Answer, ChoiceScores, GenerationStats, Turn
    from runtime.chat import Chat
    from runtime.generation import GenerationOptions
    from runtime.session import Session, open_bundle

__all__ = [
    "Answer",
    "Chat",
    "ChoiceScores",
    "GenerationOptions",
    "GenerationStats",
    "PocketError",
    "Session",
    "Turn",
    "open_bundle",
]

_HOMES = {
    "Answer": "runtime.answer",
    "Chat": "runtime.chat",
    "ChoiceScores": "runtime.answer",
    "GenerationOptions": "runtime.generation",
    "GenerationStats": "runtime.answer",
    "Session": "runtime.session",
    "Turn": "runtime.answer",
    "open_bundle": "runtime.session",
}


def __getattr__(name: str) -> Any:
    """Load numpy, pillow and the rest at first use, so that importing the package costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'runtime' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
