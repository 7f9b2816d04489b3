"""A bundle as a model of lmms-eval, the harness (PyPI `lmms-eval`, tested with 0.7.3).

    lmms-eval --model pocketvlm --model_args bundle=bundles/student-onnx-int8 --tasks mmstar --batch_size 1

In: the harness's requests. Out: answers with their token counts. Not here: tasks, prompts and scores, which
are the harness's own. Imported by the harness only, through the entry point `lmms_eval.models`; where the
package is not installed but lies in the working directory, `python -m evals.asking.lmms_eval_model` takes the
same arguments.

Two classes, as the harness has two kinds of models: `PocketChat` answers messages and is the default;
`PocketSimple` (`--force_simple`) also takes the tasks that compare losses of given answers. A picture comes
before its turn's text, as the bundle's chat template has it. Videos, sounds, system turns and several rounds
are refused, not approximated. Every request is answered afresh: nothing depends on the order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from loguru import logger
from tqdm import tqdm

from evals.asking.lmms_eval_requests import generation_options, pictures_of, turns
from evals.parity.parity import forced_logits, log_softmax
from runtime import Turn, open_bundle
from runtime.errors import InputError

MAX_NEW_TOKENS = 256
"""Where a task does not say."""


def manifest() -> ModelManifest:
    """What the harness's registry is told."""
    return ModelManifest(
        model_id="pocketvlm",
        simple_class_path=f"{PocketSimple.__module__}.PocketSimple",
        chat_class_path=f"{PocketChat.__module__}.PocketChat",
    )


class _Pocket(lmms):
    """A bundle's session behind the harness's interface."""

    def __init__(
        self,
        bundle: str = "",
        pretrained: str = "",
        threads: int | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        providers: str = "",
        batch_size: int | str = 1,
        device: str | None = None,
        **unknown: Any,
    ) -> None:
        """`bundle` (or `pretrained`): its directory. `providers`: execution providers separated by `+`,
        because the harness separates its arguments by commas. `device` is the harness's and not read."""
        super().__init__()
        unknown.pop("max_batch_size", None)
        if unknown:
            raise InputError(
                f"model_args: {', '.join(sorted(unknown))} unknown; wanted bundle, threads, providers or "
                "max_new_tokens"
            )
        if not (bundle or pretrained):
            raise InputError("model_args: no bundle; wanted --model_args bundle=DIRECTORY")
        if str(batch_size) not in ("1", "auto"):
            logger.warning(
                f"pocketvlm answers one request at a time; batch_size {batch_size} changes nothing"
            )
        self.max_new_tokens = int(max_new_tokens)
        self.session = open_bundle(
            bundle or pretrained,
            threads=None if threads is None else int(threads),
            providers=providers.split("+") if providers else None,
            reuse=False,
        )
        self._told: set[str] = set()

    @property
    def tokenizer(self) -> Any:
        """The bundle's, for tasks that count tokens."""
        return self.session.tokenizer

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """An answer to every request, in order."""
        found = []
        for request in tqdm(requests, desc="pocketvlm", disable=self.rank != 0):
            seen, question, history, wanted = self._asked(request.args)
            options = generation_options(wanted, self.max_new_tokens, self._tell)
            answer = self.session.ask(seen, question, options, history=history)
            counts = TokenCounts(
                input_tokens=answer.stats.prompt_tokens, output_tokens=answer.stats.new_tokens
            )
            found.append(GenerationResult(answer.text, counts))
            self.cache_hook.add_partial("generate_until", (request.args[0], wanted), answer.text)
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refused: a round's question depends on the answer before it, by rules of each task."""
        raise NotImplementedError("pocketvlm: tasks of several rounds are not supported")

    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Refused for messages, as in the harness itself."""
        raise NotImplementedError("pocketvlm: tasks that compare given answers need --force_simple")

    def _asked(self, args: tuple[Any, ...]) -> tuple[list[Any], str, list[Turn], Mapping[str, Any]]:
        """Pictures, question, earlier turns and generation arguments of a request."""
        raise NotImplementedError

    def _document(self, task: str, split: str, number: Any) -> Any:
        return self.task_dict[task][split][number]

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            logger.warning(f"pocketvlm: {text}")


class PocketChat(_Pocket):
    """Requests as messages: pictures, texts, earlier turns (few-shot examples)."""

    is_simple = False

    def _asked(self, args: tuple[Any, ...]) -> tuple[list[Any], str, list[Turn], Mapping[str, Any]]:
        _, to_messages, wanted, number, task, split = args
        messages = to_messages(self._document(task, split, number))
        seen, question, earlier = turns(messages, self._tell)
        prepare = self.session.prepare
        history = [Turn(asked, said, tuple(map(prepare, old))) for old, asked, said in earlier]
        return seen, question, history, wanted


class PocketSimple(_Pocket):
    """Requests as a text with pictures before it."""

    is_simple = True

    def _asked(self, args: tuple[Any, ...]) -> tuple[list[Any], str, list[Turn], Mapping[str, Any]]:
        context, wanted, to_pictures, number, task, split = args
        return (
            pictures_of(to_pictures(self._document(task, split, number))),
            context,
            [],
            wanted,
        )

    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """(loss, greedy) of each given answer: the mean negative log-likelihood of its tokens, which the
        harness's own models return under this name, and whether each was the likeliest.

        Wrapped, because the evaluator of 0.7.3 turns a bare pair into a text that its tasks cannot read.
        """
        found = []
        for request in tqdm(requests, desc="pocketvlm", disable=self.rank != 0):
            context, answer, *more = request.args
            pictures = []
            if more:
                to_pictures, number, task, split = more
                document = self._document(task, split, number)
                pictures = pictures_of(to_pictures(document))
                answer = answer(document) if callable(answer) else answer
            found.append(GenerationResult(self._loss(context, str(answer), pictures)))
        return found

    def _loss(self, context: str, answer: str, pictures: Sequence[Any]) -> tuple[float, bool]:
        tokens = self.session.tokenizer.encode(answer, add_special_tokens=False).ids
        if not tokens:
            raise InputError(f"loglikelihood: the answer {answer!r} has no tokens")
        prepared = [self.session.prepare(one) for one in pictures]
        ids = self.session.prompt_ids(context, prepared)
        features = [self.session.encode_image(one) for one in prepared]
        logits = forced_logits(self.session, ids, features, tokens[:-1])
        scores = log_softmax(np.asarray(logits, np.float64))
        loss = -float(np.mean(scores[np.arange(len(tokens)), tokens]))
        return loss, bool((logits.argmax(axis=1) == tokens).all())


def main() -> None:
    """The harness's command line, with `pocketvlm` among its models."""
    from lmms_eval.__main__ import cli_evaluate
    from lmms_eval.models import MODEL_REGISTRY_V2

    from evals.asking.lmms_eval_model import (
        manifest as registered,  # not of `__main__`, whose classes are others
    )

    MODEL_REGISTRY_V2.register_manifest(registered(), overwrite=True)
    cli_evaluate()


if __name__ == "__main__":
    main()
