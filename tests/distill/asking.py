"""Questions about easy-VQA's pictures for tests of packing and drawing."""

from __future__ import annotations

from distill.demo.vqa import VqaData
from distill.forward.tree import Group
from distill.inputs.encoding import Prompt

QUESTIONS = ("what color is the circle?", "is there a red circle in the image?", "what is it")


def ask(data: VqaData, image: int, question: str, *responses: tuple[int, ...]) -> Group:
    pixels = data.pixels([image])[:, None]
    return Group(Prompt(data.prompt(question), {"pixel_values": pixels}, str(image)), responses)
