"""What lmms-eval asks and scores, without a judge model; run by `harness_scores.py`."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.against.harness_responses import (
    LETTERED,
    WORDS,
    Row,
    case,
    lettered,
    near,
    references_of,
    short,
    some_options,
)


def lmms_letters(draw: random.Random) -> Iterator[Row]:
    from lmms_eval.api.metrics import exact_match_hf_evaluate
    from lmms_eval.tasks.ai2d.utils import MultiChoiceRegexFilter
    from lmms_eval.tasks.blink.utils import blink_process_results
    from lmms_eval.tasks.mmstar.utils import mmstar_process_results
    from lmms_eval.tasks.realworldqa.utils import realworldqa_process_results
    from lmms_eval.tasks.seedbench.utils import seed_aggregation_result, seed_process_result

    def ai2d(doc: Row, response: str) -> float:
        kept = MultiChoiceRegexFilter().apply([[response]], [doc])[0].strip()
        found = exact_match_hf_evaluate([kept], [doc["answer"]], ignore_case=True, ignore_punctuation=True)
        return float(found["exact_match"])

    def seed(doc: Row, response: str) -> float:
        return float(seed_aggregation_result([seed_process_result(doc, [response])["seed_all"]]))

    scorers: dict[str, Callable[[Row, str], float]] = {
        "lmms.ai2d": ai2d,
        "lmms.seedbench": seed,
        "lmms.mmstar": lambda doc, text: mmstar_process_results(doc, [text])["average"]["score"],
        "lmms.realworldqa": lambda doc, text: realworldqa_process_results(doc, [text])["exact_match"],
        "lmms.blink": lambda doc, text: float(blink_process_results(doc, [text])["blink_acc"]["is_correct"]),
    }
    for rule, scorer in scorers.items():
        for template in LETTERED * 2:
            options = some_options(draw)
            answer, response = draw.choice(list(options)), lettered(draw, options, template)
            if rule == "lmms.realworldqa" and draw.random() < 0.3:
                answer, response = (
                    draw.choice(("0", "Downhill", "Yes")),
                    draw.choice(("0", " downhill.", "yes", "no")),
                )
            doc = {
                "answer": f"({answer})" if rule == "lmms.blink" else answer,
                "choices": list(options.values()),
                "category": "c", "l2_category": "l", "index": 0, "data_type": "image", "question_id": "1",
                "idx": 0, "sub_task": "s",
            }  # fmt: skip
            yield case(rule, options, doc["answer"], response, scorer(doc, response))


def lmms_mmbench(draw: random.Random) -> Iterator[Row]:
    """Groups of one row: the hit of a group is the product of its rows'."""
    import pandas as pd
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    judge = MMBench_Evaluator()
    for template in LETTERED * 4:
        options = some_options(draw)
        answer, response = draw.choice(list(options)), lettered(draw, options, template)
        row = {"index": 0, "question": "q", **dict.fromkeys("ABCD"), **options, "prediction": response}
        hit = judge.eval_sub_data(pd.DataFrame([row]), {0: answer}, static_only=True)
        yield case("lmms.mmbench", options, answer, response, hit)


def lmms_mmmu(draw: random.Random) -> Iterator[Row]:
    from lmms_eval.tasks._task_utils import mmmu_mcq_utils
    from lmms_eval.tasks.mmmu.utils import evaluate_mmmu, mmmu_process_results

    mmmu_mcq_utils.random = type("never", (), {"choice": staticmethod(lambda letters: "?")})
    for _ in range(150):
        options = some_options(draw) if draw.random() < 0.6 else {}
        if options:
            answer, response = draw.choice(list(options)), lettered(draw, options)
        else:
            answer = draw.choice(("3", "0.5", "the cat", "x", "1,000", "New York"))
            response = draw.choice(
                ("{}", "The answer is {}.", "so we get {}", "x = {}", "It could be {} or 7\nfinal: {}",
                 "{} apples",
                 "result {}", "answer ", "is ", "= {}", "about {}00",
                 "so {} is 7", "so 7 is {}", "1000", "1000.0")
            ).format(draw.choice((answer, short(draw))), answer)  # fmt: skip
        doc = {
            "id": "validation_Math_1", "question_type": "multiple-choice" if options else "open",
            "options": str(list(options.values())), "answer": answer,
        }  # fmt: skip
        sample = mmmu_process_results(doc, [response])["mmmu_acc"]
        yield case("lmms.mmmu", options, answer, response, evaluate_mmmu([sample])[1]["acc"])


def lmms_open(draw: random.Random) -> Iterator[Row]:
    from lmms_eval.api.metrics import anls, exact_match_hf_evaluate
    from lmms_eval.tasks.chartqa.utils import chartqa_process_results
    from lmms_eval.tasks.textvqa.utils import textvqa_process_results
    from lmms_eval.tasks.vqav2.utils import vqav2_process_results

    def vqav2(references: list[str], response: str) -> float:
        answers = [{"answer": one, "answer_id": place} for place, one in enumerate(references)]
        return float(vqav2_process_results({"answers": answers, "question_id": 1}, [response])["exact_match"])

    def chartqa(references: list[str], response: str) -> float:
        return chartqa_process_results({"answer": references[0], "type": "human_test"}, [response])[
            "relaxed_overall"
        ]

    def exact(references: list[str], response: str) -> float:
        found = exact_match_hf_evaluate([response], references[:1], ignore_case=True, ignore_punctuation=True)
        return float(found["exact_match"])

    scorers: dict[str, Callable[[list[str], str], float]] = {
        "lmms.chartqa": chartqa,
        "lmms.exact_match": exact,
        "lmms.anls": lambda refs, text: float(anls(refs, [text])["anls"]),
        "lmms.vqav2": vqav2,
        "lmms.textvqa": lambda refs, text: float(
            textvqa_process_results({"answers": list(refs), "question_id": 1}, [text])["exact_match"]
        ),
    }
    for rule, scorer in scorers.items():
        for _ in range(70):
            references = references_of(draw)
            if rule in ("lmms.chartqa", "lmms.exact_match"):
                references = references[:1]
            response = near(draw, references)
            score = scorer(list(references), response)
            yield {"rule": rule, "references": references, "response": response, "score": score}


def lmms_mathvista(draw: random.Random) -> Iterator[Row]:
    """The model that extracts an answer is replaced by one that returns the response."""
    from lmms_eval.tasks.mathvista import utils

    judge = utils.mathvista_evaluator
    judge.create_test_prompt = lambda demo, query, response: response
    judge.get_chat_response = lambda prompt, **options: prompt
    for _ in range(150):
        kind = draw.choice(("multi_choice", "integer", "float", "list"))
        options = some_options(draw) if kind == "multi_choice" else {}
        doc = {
            "question_type": "multi_choice" if options else "free_form", "query": "q", "pid": "1",
            "metadata": {},
            "answer_type": "text" if options else kind, "choices": list(options.values()), "precision": 2,
            "answer": {"integer": "12", "float": "1.25", "list": "[1, 2]"}.get(kind),
        }  # fmt: skip
        if options:
            doc["answer"], response = draw.choice(list(options.values())), lettered(draw, options)
        else:
            response = draw.choice(
                ("12", "12.0", "1.25", "1.254", "1.2", "[1, 2]", "[1,2]", "about 12", " 12\n", "-3")
            )
        result = utils.mathvista_process_results(dict(doc), [response])["llm_as_judge_eval"]
        yield {
            "rule": "lmms.mathvista", "row": doc, "options": options, "answer": doc["answer"],
            "response": response, "score": float(result["true_false"]),
        }  # fmt: skip


def lmms_prompts(draw: random.Random) -> Iterator[Row]:
    from lmms_eval.tasks.ai2d.utils import ai2d_doc_to_text
    from lmms_eval.tasks.blink.utils import blink_doc_to_text
    from lmms_eval.tasks.chartqa.utils import chartqa_doc_to_text
    from lmms_eval.tasks.mathvista.utils import mathvista_doc_to_text
    from lmms_eval.tasks.mmbench.en_utils import mmbench_doc_to_text
    from lmms_eval.tasks.mmmu.utils import mmmu_doc_to_text
    from lmms_eval.tasks.mmstar.utils import mmstar_doc_to_text
    from lmms_eval.tasks.realworldqa.utils import realworldqa_doc_to_text
    from lmms_eval.tasks.seedbench.utils import seed_doc_to_text
    from lmms_eval.tasks.textvqa.utils import textvqa_doc_to_text
    from lmms_eval.tasks.vqav2.utils import vqav2_doc_to_text

    directly = "Answer with the option's letter from the given choices directly."
    phrase = {"pre_prompt": "", "post_prompt": "\nAnswer the question using a single word or phrase."}
    letter = {"pre_prompt": "", "post_prompt": f"\n{directly}"}
    only = "Note: You only need to respond with {} without providing any additional information.\n"
    wordings: dict[str, tuple[Callable[..., str], tuple[Any, ...]]] = {
        "lmms.ai2d": (ai2d_doc_to_text, ({"prompt_format": "mcq", **letter},)),
        "lmms.chartqa": (
            chartqa_doc_to_text,
            ({"pre_prompt": "", "post_prompt": "\nAnswer the question with a single word."},),
        ),
        "lmms.mmbench": (mmbench_doc_to_text, (letter,)),
        "lmms.mmmu": (
            mmmu_doc_to_text,
            (
                {
                    "prompt_type": "format",
                    "multiple_choice_prompt": directly,
                    "open_ended_prompt": "Answer the question using a single word or phrase.",
                },
            ),
        ),
        "lmms.mmstar": (mmstar_doc_to_text, ({"pre_prompt": "", "post_prompt": f"\n{directly[:-1]}"},)),
        "lmms.realworldqa": (realworldqa_doc_to_text, ({"pre_prompt": "", "post_prompt": ""},)),
        "lmms.seedbench": (seed_doc_to_text, ()),
        "lmms.textvqa": (textvqa_doc_to_text, ({**phrase, "ocr": False},)),
        "lmms.phrase": (vqav2_doc_to_text, (phrase,)),
        "lmms.blink": (
            blink_doc_to_text,
            ({"pre_prompt": only},),
        ),
        "lmms.mathvista": (
            mathvista_doc_to_text,
            ({"shot_type": "format-prompt", "shot": 0, "use_caption": False, "use_ocr": False},),
        ),
    }  # fmt: skip
    for name, (build, more) in wordings.items():
        for number in range(4):
            options = dict(zip("ABCD", draw.sample(WORDS, 4), strict=True))
            free = number % 2 == 1 and name in ("lmms.mmmu", "lmms.mathvista")
            doc: Row = {
                "question": f" which one, {number}? Please answer yes or no.",
                "options": list(options.values()),
                "choices": list(options.values()), "hint": "look" if number else None, "category": "c",
                "L2-category": "l", "index": number, "source": "s", "split": "dev",
                "prompt": f"own prompt {number}",
                "question_type": "multi_choice", "answer_type": "text", "unit": "cm" if number > 1 else "",
                "precision": 2, "caption": "", "ocr": "", **options,
                **{f"choice_{one.lower()}": text for one, text in options.items()},
            }  # fmt: skip
            if name == "lmms.mmmu":
                doc |= {
                    "options": str(doc["options"]),
                    "question_type": "open" if free else "multiple-choice",
                }
            elif free:
                doc |= {
                    "question_type": "free_form",
                    "answer_type": ("float", "integer")[number // 2],
                    "choices": [],
                }
            text = build(doc, *more)
            kept = ("question", "hint", "prompt", "question_type", "answer_type", "unit", "precision")
            asked = {key: doc[key] for key in kept}
            shown = [] if free else list(options.values())
            yield {"rule": "prompt", "prompt": name, "row": asked, "options": shown, "text": text}


MAKERS = (lmms_letters, lmms_mmbench, lmms_mmmu, lmms_open, lmms_mathvista, lmms_prompts)
