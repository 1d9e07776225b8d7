import base64
import csv
import sys

import pytest

from prumerge_jax.evaluation.answers import Answers
from prumerge_jax.evaluation.benchmarks.mmbench import MMBENCH, MMBENCH_CN, is_missing, parse_option

COLUMNS = [
    *("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"),
    *("source", "l2-category", "comment", "split"),
]
IMAGE = b"\xff\xd8 not a real picture " * 10_000


def table_row(index: int, options: list[str], answer: str, **cells: str) -> dict[str, str]:
    padded = dict(zip("ABCD", [*options, "", "", ""], strict=False))
    image = base64.b64encode(IMAGE).decode()
    row = {"index": str(index), "question": "Which?", "hint": "nan", "answer": answer}
    return {name: "" for name in COLUMNS} | row | padded | {"image": image} | cells


def write_table(path, rows, columns=COLUMNS):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def table(tmp_path):
    """Question 1 has three options and rotations, question 2 two, question 3 one row."""
    return write_table(
        tmp_path / "mmbench_dev.tsv",
        [
            table_row(1, ["cat", "dog", "cow"], "A", hint='A "hint"\nin two lines', split="dev"),
            table_row(1_000_001, ["dog", "cow", "cat"], "C"),
            table_row(2_000_001, ["cow", "cat", "dog"], "B"),
            table_row(2, ["up", "down"], "B"),
            table_row(1_000_002, ["down", "up"], "A", image="2"),
            table_row(3, ["1", "2", "NaN", "4"], "A"),
        ],
    )


def answered(questions, texts) -> Answers:
    rows = [MMBENCH.answer_row(*pair) for pair in zip(questions, texts, strict=True)]
    return Answers("a", rows)


def test_prompts_options_and_images(table) -> None:
    questions = MMBENCH.read_questions(table)
    assert [question.question_id for question in questions] == [
        *(1, 1_000_001, 2_000_001, 2, 1_000_002, 3)
    ]
    assert all(question.image == IMAGE for question in questions)
    prompt = 'A "hint"\nin two lines\nWhich?\nA. cat\nB. dog\nC. cow'
    instruction = "Answer with the option's letter from the given choices directly."
    assert questions[0].text == f"{prompt}\n{instruction}"
    assert questions[3].text == f"Which?\nA. up\nB. down\n{instruction}"
    # Options stop at the first missing one.
    assert questions[5].text == f"Which?\nA. 1\nB. 2\n{instruction}"
    assert MMBENCH.answer_row(questions[0], "B") == {
        "question_id": 1,
        "round_id": 0,
        "prompt": prompt,
        "text": "B",
        "options": ["cat", "dog", "cow"],
        "option_char": ["A", "B", "C"],
    }
    assert list(MMBENCH.answer_row(questions[0], "B"))[-2:] == ["options", "option_char"]
    chinese = MMBENCH_CN.read_questions(table)
    assert chinese[3].text == "Which?\nA. up\nB. down\n请直接回答选项字母。"


def test_circular_vanilla_and_row_wise(table) -> None:
    questions = MMBENCH.read_questions(table)
    # Question 1: all rotations right. 2: the first right, the second wrong. 3: wrong.
    answers = answered(questions, ["A", "C. cat", "B", "down", "B", "I cannot tell"])
    assert MMBENCH.score(questions, answers, None) == pytest.approx(
        {
            "accuracy_circular": 100 * 1 / 3,
            "accuracy_vanilla": 100 * 2 / 3,
            "accuracy_row_wise": 100 * 4 / 6,
        }
    )
    values = MMBENCH.per_question(questions, answers, None)
    assert values["accuracy_circular"].tolist() == [1, 0, 0]
    assert values["accuracy_vanilla"].tolist() == [1, 1, 0]
    assert values["accuracy_row_wise"].tolist() == [1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(C)", "C"),
        ("Answer: B.", "B"),
        ("D", None),
        ("A or B", None),
        ("A dog of some kind", "B"),
        ("It is a CAT", "A"),
        ("cat and dog", None),
        ("b", None),
    ],
)
def test_reading_an_option(text: str, letter: str | None) -> None:
    assert parse_option(text, ["cat", "dog", "cow"]) == letter


def test_missing_cells_are_those_of_pandas_and_of_the_script() -> None:
    assert all(map(is_missing, ["", "nan", "NaN", "None", "NONE", "N/A", "null"]))
    assert not any(map(is_missing, ["none of these", "0", "na", " "]))


def test_a_test_split_without_answers_has_no_score(table, tmp_path) -> None:
    rows = [table_row(1, ["x", "y"], ""), table_row(2, ["x", "y"], "")]
    path = write_table(tmp_path / "test.tsv", rows, [name for name in COLUMNS if name != "answer"])
    questions = MMBENCH.read_questions(path)
    assert MMBENCH.score(questions, answered(questions, ["A", "B"]), None) == {}
    write_table(path, [rows[0], rows[1] | {"answer": "A"}])
    questions = MMBENCH.read_questions(path)
    with pytest.raises(ValueError, match="no answer in the row of index 1"):
        MMBENCH.score(questions, answered(questions, ["A", "B"]), None)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"image": "99"}, "line 3: no image, nor the index of a row with one: '99'|not base64"),
        ({"image": "@@"}, "line 3: the image is not base64"),
        ({"index": "x"}, "line 3: index 'x' is not an integer"),
        ({"A": "none"}, r"line 3 \(index 2\) has no options"),
        ({"index": "1"}, "row 2 repeats row 1: 1"),
    ],
)
def test_bad_rows_are_named(tmp_path, cells, message: str) -> None:
    path = tmp_path / "dev.tsv"
    write_table(path, [table_row(1, ["x"], "A"), table_row(2, ["x"], "A") | cells])
    with pytest.raises(ValueError, match=message):
        MMBENCH.read_questions(path)


def test_bad_tables_are_named_and_the_field_limit_is_restored(tmp_path) -> None:
    limit = csv.field_size_limit()
    path = write_table(tmp_path / "dev.tsv", [table_row(1, ["x"], "A")], ["index", "question"])
    with pytest.raises(ValueError, match=r"dev.tsv has no columns \['A', 'B', 'C', 'D', 'hint'"):
        MMBENCH.read_questions(path)
    assert csv.field_size_limit() == limit


def test_upload_needs_openpyxl(table, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    questions = MMBENCH.read_questions(table)
    with pytest.raises(ModuleNotFoundError, match="pip install openpyxl"):
        MMBENCH.upload(questions, answered(questions, "ABBBBA"), None, tmp_path)


def test_upload(table, tmp_path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    questions = MMBENCH.read_questions(table)
    answers = answered(questions, ["A", "=1+1", "B", "B", "A", "A"])
    (path,) = MMBENCH.upload(questions, answers, None, tmp_path)
    rows = list(openpyxl.load_workbook(path).active.iter_rows(values_only=True))
    assert rows[0] == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    assert rows[1] == (1, "Which?", "cat", "dog", "cow", None, "A", "A", "dev")
    assert rows[2] == (1_000_001, "Which?", "dog", "cow", "cat", None, "=1+1", "C", None)
    assert openpyxl.load_workbook(path).active["G3"].data_type == "s"
    assert len(rows) == 7
