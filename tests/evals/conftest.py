from __future__ import annotations

from pathlib import Path

import pytest

from tests.evals import made_up_phone


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a phone behind an `adb` that is made up."""
    return made_up_phone.make(tmp_path, monkeypatch)
