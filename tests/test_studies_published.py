"The shipped numbers are the paper's: lines and sentences of its text, copied here as they stand there."
import json
import re
from importlib.resources import files

import pytest

from simclr_nb.studies.published import PAPER_TABLES, paper_table

LINES = {  # label in the first column: the values that follow in the paper, tabs as spaces
    "Table 1": ["SimCLR 59.6 61.0 62.6 63.2 64.5 61.1", "Supervised 77.0 76.7 76.5 75.7 75.4 77.1"],
    "Table 3": ["Rotation 25 67.6 25.6", "Orig. vs corrupted 50 99.5 59.6"],
    "Table 4": ["ResNet-50 50.9 51.6 57.5 57.9 63.9"],
    "Table 6": ["CMC ResNet-50 (2x) 188 68.4 88.2", "MoCo ResNet-50 (4x) 375 68.6 -",
                "SimCLR (ours) ResNet-50 (4x) 375 76.5 93.2"],
    "Table 7": ["Supervised baseline ResNet-50 48.4 80.4", "PIRL ResNet-50 57.2 83.8",
                "SimCLR (ours) ResNet-50 (2x) 83.0 91.2"],
    "Table B.2": ["SimCLR ResNet-50 (2x) 59.4 83.7 71.8 91.2 79.1 94.8"],
    "Table B.3": ["ResNet-50 90 76.5 75.6 75.3", "ResNet-50 (4x) 1000 77.9 78.2 78.3"],
    "Table B.4": ["SimCLR (ours) ResNet-50 48.3 65.6"],
}
BATCHES = """256 57.5 / 62.8 61.9 / 64.3 64.7 / 65.7 66.6 / 66.5
4096 64.6 / 64.5 66.5 / 66.8 68.2 / 68.0 68.9 / 69.1"""  # Table B.1, four epochs each


def text(row): return " ".join("-" if value is None else str(value) for value in row)


@pytest.mark.parametrize("name", LINES)
def test_lines_of_the_paper(name):
    "With whole numbers as the table has them: 25 for 25.0."
    rows = [re.sub(r"\.0\b", "", text(row)) for row in paper_table(name).rows]
    for line in LINES[name]:
        assert sum(row.endswith(re.sub(r"\.0\b", "", line)) for row in rows) == 1, (line, rows)


def test_temperatures():
    assert [text(row) for row in paper_table("Table 5").rows] == [
        "yes 0.05 1.0 90.5 59.7", "yes 0.1 4.5 87.8 64.4", "yes 0.5 8.2 68.2 60.7",
        "yes 1 8.3 59.1 58.0", "no 10 0.5 91.7 57.2", "no 100 0.5 92.1 57.0"]


def test_batches():
    table = paper_table("Table B.1")
    for line in BATCHES.splitlines():
        batch, *values = line.replace("/ ", "").split()
        ours = [table.value(int(batch), epochs, rule) for epochs in (100, 200, 400, 800)
                for rule in ("linear", "square root")]
        assert ours == [float(v) for v in values]


def test_transfer():
    "One line of each half of Tables 8 and B.5."
    table = paper_table("Table 8")
    row = [table.value("Fine-tuned", "Random init", c) for c in table.columns]
    assert row == [88.3, 96.0, 81.9, 77.0, 53.7, 91.3, 84.8, 69.4, 64.1, 82.7, 72.5, 92.5]
    table = paper_table("Table B.5")
    row = [table.value("Linear evaluation", "SimCLR (ours)", c) for c in table.columns]
    assert row == [68.4, 90.6, 71.6, 37.4, 58.8, 50.3, 50.3, 80.5, 74.5, 83.6, 90.3, 91.2]


def test_sentences():
    "Numbers that stand in the text only: appendices A, B.2, B.8, B.9."
    assert paper_table("flip (A)").value("without flip", "top-1") == 63.4
    assert paper_table("blur (A)").value("without blur", "top-1") == 63.2
    assert [row[1:] for row in paper_table("broad policy (B.2)").rows] == [
        (70.0, 0.7), (74.4, 0.2), (76.8, 0.3)]
    assert [row[1] for row in paper_table("CIFAR-10 (B.9)").rows] == [94.0, 95.1, 91.2]
    assert [row[1] for row in paper_table("supervised (B.8)").rows] == [76.3, 78.3]


def test_one_number_in_two_tables_agrees():
    "Numbers that the paper itself repeats; the two supervised numbers that it repeats differently are noted."
    top_1, few = paper_table("Table 6"), paper_table("Table B.4")
    assert top_1.value("SimCLR (ours)", "ResNet-50 (4x)", "Top 1") == 76.5
    assert few.value("SimCLR (ours)", "ResNet-50", "1% labels") == 48.3
    blur = paper_table("Table 1").value("SimCLR", "1 (+Blur)")
    assert blur == paper_table("blur (A)").value("with blur", "top-1") == 64.5
    assert "75.7 and 75.4" in paper_table("Table B.3").note


def test_the_file_is_whole():
    raw = json.loads(files("simclr_nb.studies").joinpath("paper_tables.json").read_text("utf-8"))
    assert tuple(raw) == PAPER_TABLES and len(PAPER_TABLES) == 31
    for name in PAPER_TABLES:
        table = paper_table(name)
        assert all(len(row) == len(table.labels) + len(table.columns) for row in table.rows)
        assert len({row[: len(table.labels)] for row in table.rows}) == len(table.rows), name
