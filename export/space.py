"""Room on the disk: asked for before anything costly, and a full disk told in one line.

In: a loaded checkpoint, precisions, where they go. Out: nothing, or a StateError. Not here: cleaning up
(`target.py`; what was written stands in temporary directories).
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from export.quantize_policy import Policy
from runtime.errors import StateError

if TYPE_CHECKING:
    from export.checkpoint import Checkpoint

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_OTHERS = 32 * 2**20
"""Bytes of a bundle beside its weights: graphs, tokenizer, conformance vectors."""


def stored_parameters(checkpoint: Checkpoint) -> int:
    """Parameters as the parts store them: a head that is tied to the embedding counts twice."""
    model = checkpoint.model
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and head.weight.data_ptr() == table.weight.data_ptr()
    return checkpoint.parameters + (int(table.weight.numel()) if tied else 0)


def bytes_of(policy: Policy, parameters: int) -> int:
    """About how many bytes a bundle of this policy takes; an upper bound for usual shapes."""
    schemes = {rule.scheme for rule in policy.rules}
    each = 4.0 if schemes == {"keep"} else 2.1 if "fp16" in schemes else 1.25
    return int(parameters * (each + (1.1 if policy.prefill else 0.0))) + _OTHERS


def check(checkpoint: Checkpoint, targets: Mapping[Path, Policy]) -> None:
    """Raises StateError when bundles and what is needed on the way do not fit on their disks.

    `targets`: where each bundle goes. Float parts and float twins stand in the temporary directory meanwhile.
    """
    parameters = stored_parameters(checkpoint)
    wanted = [(path, bytes_of(policy, parameters)) for path, policy in targets.items()]
    exact = [{rule.scheme for rule in policy.rules} == {"keep"} for policy in targets.values()]
    copies = 1 + int(not all(exact))
    wanted.append((Path(tempfile.gettempdir()), copies * (4 * parameters + _OTHERS)))
    ask(wanted)


def ask(wanted: Iterable[tuple[Path, int]]) -> None:
    """Raises StateError when so many bytes in these places do not fit on their disks together."""
    needed: dict[int, tuple[Path, int]] = {}
    for path, size in wanted:
        place = _existing(path)
        device = place.stat().st_dev
        needed[device] = place, needed.get(device, (place, 0))[1] + size
    for place, size in needed.values():
        free = shutil.disk_usage(place).free
        if free < size:
            raise StateError(
                f"{place}: the export needs about {_mib(size)} MiB, {_mib(free)} MiB are free; "
                "free some space, choose another output directory or fewer precisions"
            )


def _existing(path: Path) -> Path:
    """The nearest directory above that exists."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.is_dir())


def _mib(size: int) -> int:
    return -(-size // 2**20)


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """A full disk in this block becomes a StateError that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise StateError(
            f"{error.filename or path}: the disk is full ({error.strerror}); nothing was left behind, "
            "free some space and export again"
        ) from error
