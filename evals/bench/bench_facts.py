"""What a bundle is, before anything is timed: parts, bytes, limits, what a token reads.

In: a bundle directory. Out: `BundleFacts`. Not here: opening it (`evals/bench/bench_child.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evals.bench import ceilings
from evals.bench.bench_results import BundlePart, BundleResult, Roofline
from runtime import bundle as bundles
from runtime import coreml_engine
from runtime.errors import InputError
from runtime.files import sha256_file
from runtime.manifest import Manifest

DECODING = ("decoder", "text_model")
"""Roles of the part that runs once for every token."""


@dataclass(frozen=True)
class BundleFacts:
    """A bundle that is to be measured. `sha256`: of its manifest."""

    path: Path
    name: str
    sha256: str
    manifest: Manifest

    def result(self) -> BundleResult:
        """As bench.json has it, without anything measured."""
        manifest = self.manifest
        download = [(ref.path, ref.bytes) for ref in self._needed()]
        manifest_bytes = (self.path / bundles.MANIFEST_NAME).stat().st_size
        total = sum(size for _, size in download) + manifest_bytes
        return BundleResult(
            name=self.name,
            sha256=self.sha256,
            source_sha256=manifest.source.sha256,
            format=manifest.format,
            precision=manifest.precision,
            target=manifest.target,
            parts=tuple(
                BundlePart(
                    role=part.role,
                    bytes=part.bytes + sum(ref.bytes for ref in part.data),
                    bits=mean_bits([(each.bits, each.parameters) for each in part.bits]),
                )
                for part in manifest.parts
            ),
            disk_bytes=sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file()),
            download_bytes=total,
            ceilings=ceilings.check(total, max((size for _, size in download), default=0)),
            points=(),
        )

    def roofline(
        self,
        context_tokens: int,
        state_bytes: int | None,
        max_context: int | None,
        last_cache_bytes: int | None,
    ) -> Roofline:
        """What decoding a token reads at the least: the weights of the decoding part once, and the state."""
        weights, counted = self._weights()
        state = 0
        if state_bytes is not None and max_context:
            # graphs of fixed shapes read their whole buffers, however short the sequence
            whole = self.manifest.static is not None or self.manifest.coreml is not None
            state = state_bytes if whole else state_bytes * context_tokens // max_context
            counted += (
                ", and the state's whole buffers" if whole else ", and the state of the sequence so far"
            )
        total = weights + state
        return Roofline(
            bytes_per_token=total,
            counted=counted,
            context_tokens=context_tokens,
            fits_cache=None if last_cache_bytes is None else total < last_cache_bytes,
        )

    def _weights(self) -> tuple[int, str]:
        """(bytes, what they are) of the part that runs once a token."""
        (part,) = (part for part in self.manifest.parts if part.role in DECODING)
        if part.role == "text_model":  # the manifest counts no scales of its blocks; the file has them
            return part.bytes, "the text model's file"
        return sum(each.bits * each.parameters for each in part.bits) // 8, "weights of the decoder as stored"

    def _needed(self) -> list[bundles.FileRef]:
        """Files that answering needs: parts with their data, and the tokenizer; each once."""
        found = {}
        for part in self.manifest.parts:
            found[part.path] = bundles.FileRef(path=part.path, sha256=part.sha256, bytes=part.bytes)
            found.update({ref.path: ref for ref in part.data})
        tokenizer = self.manifest.tokenizer.file
        return [*found.values(), tokenizer]


def read(paths: Sequence[Path], *, any_format: bool = False) -> list[BundleFacts]:
    """Facts of bundle directories; two of one name are told apart by the directory above.

    Raises BundleError when one cannot be read, InputError on none, on the same one twice, or (but for
    `any_format`) on Core ML beside another format where no Core ML is: an evaluator's times are no device's.
    """
    if not paths:
        raise InputError("bench: got no bundle; give at least one directory made by `pocketvlm export`")
    found = [(path, bundles.read(path, verify=False)) for path in paths]
    formats = {manifest.format for _, manifest in found}
    if "coreml" in formats and len(formats) > 1 and not any_format and (why := coreml_engine.unavailable()):
        odd = next(path for path, manifest in found if manifest.format == "coreml")
        raise InputError(
            f"{odd}: {why}; the times of the evaluator say nothing beside those of others: leave it out, or "
            "run the bundle's Swift benchmark on a device and give its file to --import"
        )
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [f"{path.resolve().parent.name}/{path.resolve().name}" for path in paths]
    if len(set(names)) < len(names):
        raise InputError(f"bench: two of the bundles are called alike ({', '.join(names)}); give each once")
    return [
        BundleFacts(path, name, sha256_file(path / bundles.MANIFEST_NAME), manifest)
        for (path, manifest), name in zip(found, names, strict=True)
    ]


def mean_bits(groups: Sequence[tuple[int, int]]) -> float:
    """Mean over parameters of (bits, parameters) groups; 0 without any."""
    total = sum(parameters for _, parameters in groups)
    return sum(bits * parameters for bits, parameters in groups) / total if total else 0.0
