"""What VLMEvalKit and lmms-eval ask and score: the fixtures that our rules are compared with.

In: both harnesses installed (an environment of their own: docs/tasks.md). Out: JSON lines on stdout: a rule
of ours, the data as the harness has it, a response, the harness's prompt or score.
Responses are drawn from templates; nothing of the harnesses' code or data is copied.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ.setdefault("OPENAI_API_KEY", "none")  # lmms-eval wants one at import; nothing is sent

from benchmarks.against import harness_lmms, harness_vlmevalkit


def main() -> None:
    """`harness_scores.py [SEED]`; the committed fixtures have seed 7."""
    draw = random.Random(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
    stdout, sys.stdout = sys.stdout, sys.stderr  # the harnesses print
    for maker in (*harness_vlmevalkit.MAKERS, *harness_lmms.MAKERS):
        for row in maker(draw):
            print(json.dumps(row, ensure_ascii=False, sort_keys=True), file=stdout)


if __name__ == "__main__":
    main()
