"""What VLMEvalKit asks and scores, without a judge model; run by `harness_scores.py`."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator

from benchmarks.against.harness_responses import (
    LETTERED,
    WORDS,
    Row,
    case,
    lettered,
    near,
    references_of,
    some_options,
)


def vlm_mcq(draw: random.Random) -> Iterator[Row]:
    import pandas as pd
    from vlmeval.dataset.utils.multiple_choice import eval_vanilla

    for template in LETTERED * 4:
        options = some_options(draw)
        answer, response = draw.choice(list(options)), lettered(draw, options, template)
        item = pd.Series({"index": 1, "question": "what?", **options, "prediction": response, "GT": answer})
        yield case("vlmevalkit.mcq", options, answer, response, eval_vanilla(None, item)["hit"])


def vlm_circular(draw: random.Random) -> Iterator[Row]:
    """Whole files: rows of every order of the options, the harness's hit of each group."""
    import pandas as pd
    from vlmeval.dataset.utils.multiple_choice import mcq_circular_eval

    rows = []
    for group in range(40):
        texts = draw.sample(WORDS, 4)
        right = draw.random() < 0.7
        for turn in range(4):
            options = dict(zip("ABCD", texts[turn:] + texts[:turn], strict=True))
            answer = next(letter for letter, text in options.items() if text == texts[0])
            sure = draw.choice(("{}", "{}.", "The answer is {}", "({})")).format(answer)
            response = sure if right else lettered(draw, options)
            rows.append(
                {
                    "index": group + turn * 10**6, "question": "what?", "answer": answer, **options,
                    "category": draw.choice(("x", "y")), "prediction": response or " ",
                }
            )  # fmt: skip
    data = pd.DataFrame(rows)
    with tempfile.TemporaryDirectory() as folder:
        found = mcq_circular_eval(
            None, data.copy(), data[["index", "answer", "question"]], 1, f"{folder}/result.pkl", "MMBench"
        )
    hits = {str(index): int(hit) for index, hit in zip(found["index"], found["hit"], strict=True)}
    yield {"rule": "circular", "rows": rows, "hits": hits}


def vlm_mmmu(draw: random.Random) -> Iterator[Row]:
    import pandas as pd
    from vlmeval.dataset.utils.multiple_choice import mcq_vanilla_eval

    rows = []
    for index in range(200):
        options = some_options(draw) if draw.random() < 0.7 else {}
        answer = draw.choice(list(options)) if options else draw.choice(WORDS)
        response = lettered(draw, options or {"A": answer, "B": "Other Answers"})
        rows.append(
            {"index": index, "question": "q", "answer": answer, **options, "prediction": response or " "}
        )
    data = pd.DataFrame(rows)
    with tempfile.TemporaryDirectory() as folder:
        meta = data[["index", "answer", "question"]]
        found = mcq_vanilla_eval(None, data.copy(), meta, 1, f"{folder}/result.pkl", "MMMU_DEV_VAL")
    hits = {str(index): int(hit) for index, hit in zip(found["index"], found["hit"], strict=True)}
    yield {"rule": "mmmu", "rows": rows, "hits": hits}


def vlm_vqa(draw: random.Random) -> Iterator[Row]:
    from vlmeval.dataset.utils.vqa_eval import hit_calculate, process_line

    methods = {
        "vlmevalkit.relaxed": ("relaxed_accuracy", "ChartQA_TEST"),
        "vlmevalkit.accuracy": ("accuracy", "OCRVQA_TEST"),
        "vlmevalkit.anls": ("anls", "DocVQA_VAL"),
        "vlmevalkit.vqa_score": ("vqa_score", "TextVQA_VAL"),
        "vlmevalkit.vqa_match": ("", "Other"),
    }
    for rule, (method, dataset) in methods.items():
        for _ in range(70):
            references = references_of(draw)
            response = near(draw, references)
            answer = str(references) if len(references) > 1 else references[0]
            line = {"answer": answer, "prediction": response}
            found = process_line(line, method) if method else process_line(line, "other")
            score = float(hit_calculate([found], dataset)[0])
            yield {"rule": rule, "answer": answer, "response": response, "score": score}


def vlm_mathvista(draw: random.Random) -> Iterator[Row]:
    from vlmeval.dataset.utils.mathvista import post_check

    for _ in range(70):
        line = mathvista_line(draw)
        prefetched = post_check(dict(line), prefetch=True)
        line["res"] = prefetched if prefetched else line["prediction"]
        score = float(bool(post_check(dict(line), prefetch=False)))
        yield {"rule": "vlmevalkit.mathvista", "row": line, "response": line["prediction"], "score": score}


def mathvista_line(draw: random.Random) -> Row:
    kind = draw.choice(("multi_choice", "integer", "float", "text"))
    if kind == "multi_choice":
        options = some_options(draw)
        letter = draw.choice(list(options))
        return {
            "question_type": kind, "answer_type": "text", "choices": str(list(options.values())),
            "answer": options[letter], "answer_option": letter, "prediction": lettered(draw, options),
        }  # fmt: skip
    answer = {"integer": "12", "float": "1.2", "text": "[1, 2]"}[kind]
    response = draw.choice(
        (answer, "3", "12", "0", "1.2", "1.20", "12.0", "The answer is 12", "[1, 2]", "twelve")
    )
    return {
        "question_type": "free_form", "answer_type": kind, "answer": answer, "choices": "[]",
        "answer_option": "", "prediction": response,
    }  # fmt: skip


def vlm_prompts(draw: random.Random) -> Iterator[Row]:
    from vlmeval.dataset.image_mcq import ImageMCQDataset
    from vlmeval.dataset.image_vqa import ImageVQADataset

    for number in range(12):
        options = some_options(draw) if number % 4 else {}
        row = {"index": number, "question": f"which one, {number}?", "image_path": __file__, **options}
        row |= {"hint": "look closely"} if number % 3 == 0 else {}
        for kind, name in ((ImageMCQDataset, "vlmevalkit.mcq"), (ImageVQADataset, "vlmevalkit.vqa")):
            data = kind.__new__(kind)
            data.meta_only, data.img_root, data.dataset_name = True, "/", "any"
            text = data.build_prompt(dict(row))[-1]["value"]
            asked = {key: value for key, value in row.items() if key != "image_path"}
            yield {"rule": "prompt", "prompt": name, "row": asked, "text": text}


MAKERS = (vlm_mcq, vlm_circular, vlm_mmmu, vlm_vqa, vlm_mathvista, vlm_prompts)
