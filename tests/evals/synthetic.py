"""A complete, made-up `Results` that exercises every field of the report. Test data, never measured."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
from PIL import Image, ImageDraw

from evals.results import (
    Agreement,
    Bundle,
    Comparison,
    Data,
    Device,
    Example,
    ExampleAnswer,
    Flip,
    GridPoint,
    Latency,
    LatencyRatio,
    LedgerRow,
    MaskCurve,
    MaskPoint,
    Method,
    Missing,
    Model,
    Parity,
    Part,
    Percentiles,
    Pool,
    PoolPart,
    Results,
    Run,
    Score,
    Split,
    TrainingCurve,
)

LABELS = {
    "warmup": ("Warm-up", "The shared start: supervised on the labelled part."),
    "sft": ("Labels only (SFT)", "Control: more steps on the labels, no teacher."),
    "kd": ("Pool + divergence", "Control: same pool, divergence to the masked teacher, no RL."),
    "masters": ("Masters", "Masks restored step by step, offline GRPO plus the divergence."),
}
RIGHT = {
    "S": {"warmup": 7390, "sft": 7642, "kd": 9471, "masters": 9506},
    "XS": {"warmup": 6210, "sft": 6371, "kd": 8688, "masters": 8661},
}
DEVICE = Device(
    cpu="Example CPU 9000",
    cores=2,
    memory_mib=7936.5,
    os="Exemplix 12, kernel 6.1, x86_64",
    python="3.11.9",
    governor=None,
    packages={"onnxruntime": "1.31.1", "numpy": "2.3.5"},
)


def results() -> Results:
    return Results(
        run=Run(
            name="demo",
            version="0.1.0",
            created="2026-11-21T10:00:00Z",
            seed=7,
            smoke=False,
            recipe_sha256="ab" * 32,
            command="pocketvlm demo --out runs/demo --seed 7",
            seconds=811.0,
            peak_rss_mib=1483.0,
        ),
        data=_data(),
        models=_models(),
        methods=[_method(student, method) for student in RIGHT for method in LABELS],
        comparisons=[
            _comparison(student, reference) for student in RIGHT for reference in ("warmup", "sft", "kd")
        ],
        mask_curve=_mask_curve(),
        training=[_training(student, method) for student in RIGHT for method in ("sft", "kd", "masters")],
        pool=_pool(),
        bundles=[_bundle(i) for i in range(3)],
        examples=[_example(i) for i in range(6)],
        ledger=_ledger(),
        device=DEVICE,
        missing=[
            Missing(what="GGUF bundle", why="not built yet"),
            Missing(what="Energy", why="no meter here"),
        ],
        caveats=["One seed.", "This machine is shared: timings carry other people's load."],
    )


def _data() -> Data:
    return Data(
        name="easy-VQA",
        source="PyPI package easy-vqa 1.0",
        splits=[
            Split(name="labelled", images=220, questions=2000, labelled=True, use="warm-up, SFT, rewards"),
            Split(name="unlabelled", images=3580, questions=34575, labelled=False, use="pool; labels unread"),
            Split(name="validation", images=200, questions=2000, labelled=True, use="choosing only"),
            Split(name="test", images=1000, questions=9673, labelled=True, use="this report, once"),
        ],
        note="Split by image.",
    )


def _models() -> list[Model]:
    common = {"architecture": "SmolVLM, 3 vision + 2 text layers"}
    return [
        Model(
            name="teacher",
            role="teacher",
            path="teacher",
            parameters=566_112,
            bytes=2_290_000,
            ratio=1.0,
            test=Score.of(9661, 9673),
            **common,
        ),
        Model(
            name="S", role="student", path="student", parameters=211_072, bytes=870_000, ratio=2.68, **common
        ),
        Model(
            name="XS",
            role="student",
            path="student-xs",
            parameters=61_312,
            bytes=260_000,
            ratio=9.23,
            **common,
        ),
    ]


def _method(student: str, method: str) -> Method:
    right = RIGHT[student][method]
    rates = (0.0005, 0.001, 0.002)
    grid = [
        GridPoint(
            learning_rate=rate,
            validation=Score.of(int(right / 9673 * 2000) - 20 * abs(i - 1), 2000) if i < 2 else None,
        )
        for i, rate in enumerate(rates)
    ]
    return Method(
        student=student,
        method=method,
        label=LABELS[method][0],
        description=LABELS[method][1],
        test=Score.of(right, 9673),
        validation=grid[1].validation,
        learning_rate=0.001,
        grid=grid,
        student_tokens=1_240_000,
        seconds=41.5,
    )


def _comparison(student: str, reference: str) -> Comparison:
    gain = RIGHT[student]["masters"] - RIGHT[student][reference]
    lost = 60
    difference = gain / 9673
    return Comparison(
        student=student,
        reference=reference,
        candidate="masters",
        n=9673,
        right_to_wrong=lost,
        wrong_to_right=lost + gain,
        difference=difference,
        low=difference - 0.005,
        high=difference + 0.005,
        p_value=0.21 if abs(difference) < 0.005 else 1e-12,
    )


def _mask_curve() -> MaskCurve:
    shares = {
        0.0: 1998,
        0.1: 1998,
        0.2: 1997,
        0.3: 1996,
        0.4: 1994,
        0.5: 1987,
        0.6: 1951,
        0.7: 1844,
        0.8: 1371,
    }
    return MaskCurve(
        split="validation",
        points=[
            MaskPoint(ratio=r, sparsity=max(0.0, r - 0.001), score=Score.of(n, 2000))
            for r, n in shares.items()
        ],
        r_max=0.6,
        rule="the largest r that loses at most 3 points",
        inert=True,
        note="Every r up to 0.5 loses less than 1 point: at those ratios masking is inert for this teacher.",
    )


def _training(student: str, method: str) -> TrainingCurve:
    rng = np.random.default_rng(len(student) + len(method))
    steps = list(range(5, 305, 5))

    def curve(start: float, end: float, noise: float) -> list[float | None]:
        decay = (end + (start - end) * math.exp(-s / 70) for s in steps)
        return [max(0.0, value + noise * float(rng.normal())) for value in decay]

    pooled, masters = method != "sft", method == "masters"
    return TrainingCurve(
        student=student,
        method=method,
        steps=steps,
        loss=[*curve(1.9, 0.2, 0.05)[:-1], float("nan")],
        divergence_nats=curve(0.3, 0.03, 0.01) if pooled else None,
        r_acc=curve(0.72, 0.97, 0.01) if masters else None,
        r_distill=curve(0.45, 0.55, 0.02) if masters else None,
        zero_variance_share=curve(0.2, 0.6, 0.03) if masters else None,
        grad_share_rl=curve(0.30, 0.12, 0.02) if masters else None,
        grad_share_divergence=curve(0.68, 0.85, 0.02) if masters else None,
        grad_share_reference_kl=curve(0.02, 0.03, 0.004) if masters else None,
        mask_ratio=[0.6 - 0.15 * (i // 12) for i in range(len(steps))] if masters else None,
    )


def _pool() -> Pool:
    part = {"questions": 6000, "responses": 24000, "tokens": 168_000}
    return Pool(
        questions=6000,
        responses=48000,
        distinct_per_question=2.31,
        tokens=336_000,
        seconds=96.0,
        pseudo_labelled=4000,
        parts=[
            PoolPart(
                source="teacher", ratio=0.6, distinct_per_question=1.22, score=Score.of(23650, 24000), **part
            ),
            PoolPart(
                source="teacher", ratio=0.0, distinct_per_question=1.02, score=Score.of(23990, 24000), **part
            ),
            PoolPart(
                source="student",
                student="S",
                ratio=None,
                distinct_per_question=1.94,
                score=Score.of(18300, 24000),
                **part,
            ),
        ],
    )


def _bundle(i: int) -> Bundle:
    name, precision, size = (
        ("fp32", "fp32", 1_010_000),
        ("int8", "int8", 402_000),
        ("int4", "int4", 318_000),
    )[i]
    lost = (0, 2, 39)[i]
    tie = Flip(
        id="412",
        question="is there a <b>teal</b> shape?",
        reference="no",
        checkpoint_text="gray circle: no",
        bundle_text="teal circle: yes",
        margin=4.1e-5,
        near_tie=True,
    )
    return Bundle(
        name=f"student-{name}",
        path=f"bundles/student-{name}",
        precision=precision,
        student="S",
        method="masters",
        bytes=size,
        parts=[
            Part(name=part, bits=(32, 8, 4)[i], bytes=size // 3) for part in ("vision", "embed", "decoder")
        ],
        parity=Parity(
            positions=640,
            kl_mean=10.0 ** (i * 2 - 9),
            kl_median=10.0 ** (i * 2 - 10),
            kl_p99=10.0 ** (i * 2 - 8),
            logit_max_diff=10.0 ** (i - 4),
            top1_agreement=1.0 - 0.004 * i,
            feature_max_diff=1e-5,
            pixel_max_diff=0.0,
            passed=True,
        ),
        test=Score.of(983 - lost, 1000),
        agreement=Agreement(
            n=1000,
            same=1000 - lost - i,
            right_to_wrong=lost,
            wrong_to_right=i,
            difference=(i - lost) / 1000,
            low=(i - lost - 3) / 1000,
            high=(i - lost + 3) / 1000,
            p_value=1.0 if lost < 6 else 1e-8,
            near_ties=min(i, 1),
            differing=[tie] if i else [],
        ),
        latency=_latency(1 / (1 + 0.4 * i), size),
        ratios=[]
        if i == 0
        else [
            LatencyRatio(
                metric=metric,
                reference="student-fp32",
                ratio=1 / (1 + 0.4 * i),
                low=0.9 / (1 + 0.4 * i),
                high=1.1 / (1 + 0.4 * i),
            )
            for metric in ("ttft_ms", "decode_ms")
        ],
    )


def _latency(scale: float, size: int) -> Latency:
    def around(centre: float) -> Percentiles:
        return Percentiles.of([centre * scale * (1 + 0.01 * i) for i in range(60)])

    return Latency(
        threads=2,
        rounds=3,
        warmup=3,
        repeats=20,
        prompt_tokens=41,
        image_tokens=16,
        decode_tokens=16,
        page_cache="warm",
        load_cold_ms=around(210),
        load_warm_ms=around(31),
        preprocess_ms=around(1.3),
        encode_ms=around(2.4),
        prefill_ms=around(3.3),
        ttft_ms=around(7.4),
        decode_ms=around(0.62),
        end_to_end_ms=around(17.8),
        prefill_tok_s=12_400,
        decode_tok_s=1_610,
        base_rss_mib=61.0,
        peak_rss_mib=118.4,
        disk_bytes=size + 31_000,
        device=DEVICE,
    )


def _example(i: int) -> Example:
    picture = Image.new("RGB", (64, 64), (240, 240, 240))
    colour = ("red", "teal", "black", "blue", "brown", "gray")[i]
    ImageDraw.Draw(picture).ellipse((12 + 2 * i, 10, 44, 40 + i), fill=colour)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    said = {"teacher": f"{colour} circle: {colour}", "Masters S": f"{colour} circle: {colour}"}
    return Example(
        id=str(i),
        image="data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode(),
        question="what is the color of the circle?"
        if i
        else "what color is the <script>alert(1)</script> shape?",
        reference=colour,
        answers=[ExampleAnswer(by=by, text=text, right=True) for by, text in said.items()]
        + [ExampleAnswer(by="SFT S", text="green circle: green", right=False)],
        note="int4 flips this answer" if i == 5 else "",
    )


def _ledger() -> list[LedgerRow]:
    rows = {
        "data": 2,
        "teacher": 214,
        "mask curve": 21,
        "pool": 96,
        "train": 372,
        "export": 58,
        "answer": 19,
        "measure": 29,
    }
    return [
        LedgerRow(
            stage=stage, seconds=seconds, peak_rss_mib=900.0 + seconds, resumed=stage in ("data", "teacher")
        )
        for stage, seconds in rows.items()
    ]
