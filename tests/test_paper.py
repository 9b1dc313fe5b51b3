"""The paper's tables as data: counts, means, disagreements, what the parameter files say."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hgadbook import paper
from hgadlib.errors import InputError

ROOT = Path(__file__).parents[1]
ROWS = {
    "table1": 288, "table2": 72, "table3a": 12, "table3b": 10, "table3c": 6, "table3d": 8, "table3e": 4,
    "table4": 18, "table5": 32, "table6": 224,
}  # fmt: skip
# Numbers that are not simply read, and those that are lost.
DOUBTFUL = {"repaired", "completed", "uncertain", "row unreadable", "unreadable"}
LOST = {"unreadable", "not reported", "not applicable"}


def disagreements(**changed: pd.DataFrame) -> pd.DataFrame:
    """Check tables against themselves: printed means against their rows, sentences against the tables.

    A printed mean disagrees when the mean of the printed rows, rounded to one decimal, is another number;
    that is no error of the paper where ``rounding`` says so: rows and mean are each rounded, by up to 0.05.
    A mean with a row that is lost is not checked.
    """
    found = []
    for name in ("table1", "table6"):
        table = changed.get(name, paper.read_table(name))
        for (method, metric), part in table.groupby(["method", "metric"], sort=False):
            values = part.set_index("category")["value"]
            if not values.isna().any():
                mean = float(values.drop("Mean").mean())
                found.append((f"{name}/Mean/{method}", metric, values["Mean"], mean))
    for claim in paper.read_table("claims").dropna(subset=["stated"]).to_dict("records"):
        better, worse = (paper.value_of(claim[side], claim["metric"]) for side in ("better", "worse"))
        where = f"{claim['source']}: {claim['better']} over {claim['worse']}"
        found.append((where, claim["metric"], claim["stated"], better - worse))
    table = pd.DataFrame(found, columns=["where", "metric", "printed", "computed"])
    table["difference"] = table["printed"] - table["computed"]
    table["rounding"] = table["difference"].abs() <= 0.1 + 1e-9
    # Half up as people round, not half to even; 1e-9 against binary fractions.
    rounded = np.floor(10 * table["computed"] + 0.5 + 1e-9) / 10
    return table[~((rounded - table["printed"]).abs() < 1e-6)].round(3).reset_index(drop=True)


@pytest.mark.parametrize("name", list(paper.TABLES))
def test_numbers_are_all_there_with_unit_status_and_source(name: str) -> None:
    table = paper.read_table(name)
    assert len(table) == ROWS[name]
    assert set(table["status"]) <= {"read", *DOUBTFUL, *LOST}
    assert table["source"].str.startswith("Tab. ").all()
    keys = [
        c for c in table if c not in ("value", "plus_minus", "unit", "status", "source", "remark", "meaning")
    ]
    assert not table.duplicated(keys).any()
    if name == "table4":
        return
    assert (table["unit"] != "").all()
    assert (table["value"].isna() == table["status"].isin(LOST)).all()
    # What is not simply read says why.
    assert (table.loc[table["status"].isin(DOUBTFUL), "remark"] != "").all()
    if name != "table5":
        assert table["value"].dropna().between(50, 100).all() and (table["unit"] == "percent").all()


def test_spot_values() -> None:
    assert paper.value_of("table1/Mean/HGAD", "image_auroc") == 98.4
    assert paper.value_of("table1/Bottle/HGAD", "pixel_auroc") == 98.6
    assert paper.value_of("table2/Union/HGAD", "image_auroc") == 93.5
    assert paper.value_of("table3c/tab3c_entropy", "pixel_auroc") == 97.0
    assert paper.value_of("table5/HGAD", "learnable_parameters") == 30.8
    assert paper.value_of("table6/Transistor/CFLOW", "image_auroc") == 99.1
    assert math.isnan(paper.value_of("table6/Transistor/PaDiM", "image_auroc"))
    assert math.isnan(paper.value_of("table3d/tab3d_1_5", "image_auroc"))


def test_printed_means_and_sentences_disagree_exactly_where_listed() -> None:
    listed = paper.read_table("disagreements")
    assert (listed["remark"] != "").all()
    found = disagreements()
    pd.testing.assert_frame_equal(found, listed[list(found)], check_dtype=False)


def test_a_wrong_digit_is_a_disagreement() -> None:
    table = paper.read_table("table1")
    table.loc[(table["category"] == "Screw") & (table["method"] == "PMAD"), "value"] += 1.5
    assert len(disagreements(table1=table)) == len(disagreements()) + 2


@pytest.mark.parametrize(
    "file", sorted((ROOT / "params" / "experiments").glob("tab3*.yaml")), ids=lambda f: f.stem
)
def test_parameter_files_expect_what_the_tables_say(file: Path) -> None:
    text = " ".join(line.lstrip("# ") for line in file.read_text().splitlines() if line.startswith("#"))
    expected = re.search(
        r"Expected on MVTec AD(?:, image / pixel AUROC in percent)?: (\S+)(?: / ([\d.]*\d))?", text
    )
    assert expected is not None
    key = f"table3{file.stem[4]}/{file.stem}"
    table = [paper.value_of(key, metric) for metric in paper.METRICS]
    if expected[1].startswith("unreadable"):
        assert all(map(math.isnan, table))
    else:
        assert table == [float(expected[1]), float(expected[2])]


@pytest.mark.parametrize("name", ["experiments/paper", "experiments/released", "mvtec"])
def test_presets_expect_the_mean_of_table_1(name: str) -> None:
    text = (ROOT / "params" / f"{name}.yaml").read_text()
    assert paper.value_of("table1/Mean/HGAD", "image_auroc") == 98.4
    assert re.search(r"percent: 98\.4 / 97\.9", text)


def test_claims_name_rows_that_exist() -> None:
    claims = paper.read_table("claims")
    for key in {*claims["better"], *claims["worse"]}:
        name, *names = key.split("/")
        assert name in paper.TABLES
        if name.startswith("table3"):
            assert (ROOT / "params" / "experiments" / f"{names[0]}.yaml").is_file()
        else:
            assert not math.isnan(paper.value_of(key, "image_auroc"))


def test_wide_table_is_the_printed_one() -> None:
    one = paper.as_printed("table1", "category")
    assert next(iter(one)) == "HGAD" and set(one) == set(paper.read_table("table1")["method"])
    assert one.shape == (16, 9) and one.loc["Zipper", "HGAD"] == "100±0.04 / 99.0±0.09"
    six = paper.as_printed("table6", "category")
    assert six.loc["Transistor", "PaDiM"] == "unreadable"
    assert six.loc["Wood", "PMAD"] == "98.0 / 93.3?" and six.loc["Wood", "UniAD"] == "97.9 / 93.4"
    two = paper.as_printed("table2", "dataset")
    assert two.loc["BTAD", "OmniAL"] == "– / –" and two.loc["BTAD", "PMAD"] == "93.8 / 97.3"


def test_main_numbers_have_the_best_other_method_of_each_metric() -> None:
    found: Any = paper.main_numbers()
    assert list(found.index) == ["mvtec", "btad", "mvtec3d", "visa", "union"]
    assert found.loc["mvtec"].to_list() == ["98.4 / 97.9", "97.2 (OmniAL) / 98.3 (OmniAL)"]
    assert found.loc["btad", "best other"] == "94.0 (UniAD) / 97.3 (PMAD)"


def test_a_folded_table_says_how_many_rows_of_what_it_hides() -> None:
    table = pd.DataFrame({"a": ["one cell", "x"]}, index=["first", "second"])
    text = paper.folded(table.style, "runs of $5 <bolts>").data
    assert text.startswith("<details><summary>2 rows: runs of $5 &lt;bolts&gt;</summary>")
    assert text.endswith("</details>") and "one cell" in text
    assert "<summary>1 row: a</summary>" in paper.folded(table[:1].style, "a").data


def test_unknown_table_is_one_line() -> None:
    with pytest.raises(InputError, match=r"one of table1, table2, .*; found 'table7'"):
        paper.read_table("table7")
