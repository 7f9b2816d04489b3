from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from distill.demo.vqa import VqaData
from evals import easy_vqa
from tests.checkpoints import write_smolvlm


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Bit for bit comparisons want one order of summation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def _loaded(tiny_checkpoint: Path) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(tiny_checkpoint).eval()


@pytest.fixture
def tiny_model(_loaded: PreTrainedModel) -> PreTrainedModel:
    """A model of the test's own."""
    return copy.deepcopy(_loaded)


@pytest.fixture(scope="session")
def processor(tiny_checkpoint: Path) -> ProcessorMixin:
    return AutoProcessor.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="session")
def data(processor: ProcessorMixin) -> VqaData:
    """The questions about the first 12 training images of easy-VQA."""
    return VqaData([q for q in easy_vqa.load("train") if q.image_id < 12], processor)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another random-weight checkpoint of the same shape."""
    return write_smolvlm(tmp_path_factory.mktemp("teacher") / "teacher", seed=1)


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pools")
