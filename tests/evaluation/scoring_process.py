"""A scoring run in a separate process, for the tests that kill it.

Answers row i with a text that depends on i alone, two rows at a time. After each batch it says on
standard output how many rows the journal holds, and then takes its time: SECONDS_PER_BATCH.
"""

import pathlib
import sys
import time

from prumerge_jax.evaluation.answers import complete_row
from prumerge_jax.evaluation.journal import Journal, RowOutcome

FINGERPRINT = {"weights": "ab12", "reduction": "prumerge+", "temperature": 0.0}


def outcome(index: int) -> RowOutcome:
    if index % 7 == 3:
        return RowOutcome(index, f"q{index}", error=f"image {index} is missing")
    row = {"question_id": f"q{index}", "prompt": f"What is {index}?", "text": "é " * (index % 5)}
    answer = complete_row(row, index=index, fingerprint=FINGERPRINT, model_id="tiny")
    return RowOutcome(index, f"q{index}", answer=answer, measured={"visual_tokens": 30 + index})


SECONDS_PER_BATCH = 0.002


def score(workdir: pathlib.Path, num_rows: int, pause: float = 0.0) -> None:
    with Journal(workdir / "journal.jsonl", FINGERPRINT, num_rows) as journal:
        rows = journal.unanswered[::-1]
        for start in range(0, len(rows), 2):
            journal.append([outcome(index) for index in rows[start : start + 2]])
            print(len(journal.outcomes), flush=True)
            time.sleep(pause)
        journal.write_results(workdir)


if __name__ == "__main__":
    score(pathlib.Path(sys.argv[1]), int(sys.argv[2]), SECONDS_PER_BATCH)
