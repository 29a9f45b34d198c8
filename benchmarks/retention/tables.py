"""The retention benchmark's tables: means over seeds, each method's difference from `retention`, and
the order of the methods beside the paper's.
"""

from __future__ import annotations

import csv
import json
import math
import statistics
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jobs import sequence
from scipy.stats import kendalltau, norm, permutation_test
from statsmodels.regression.mixed_linear_model import MixedLM
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import DescrStatsW

from comfy_continual_lora.settings import LearnSettings

Row = dict[str, Any]

COLUMNS = (
    "a_mmd",
    "a_rbf",
    "second",
    "named",
    "shape",
    "pattern",
    "colors",
    "held_out",
    "held_out_second",
    "held_out_named",
    "held_out_shape",
    "held_out_pattern",
    "held_out_colors",
    "leak_own",
    "leak_listed",
    "leak_left_out",
    "leak_written",
    "drift_listed",
    "drift_left_out",
    "drift_written",
    "f_mmd",
    "f_zero",
    "bwt_mmd",
    "kid",
    "i2i",
    "t2i",
    "newest_mmd",
    "dc_accuracy",
    "both",
    "bled",
    "seconds_per_concept",
    "bytes_per_concept",
)
PAPER_COLUMNS = ("a_mmd", "f_mmd", "kid", "i2i", "t2i")
HIGHER_IS_BETTER = ("i2i", "t2i")
# Jha et al. 2025: SD1.4, CustomConcept101, six tasks, three seeds; in the order of PAPER_COLUMNS.
# Their units are not ours, so only orderings can be compared.
_PAPER_ROWS = {
    "textual_inversion": (185.74, 0, 205.69, 60.74, 22.86),
    "custom_diffusion": (121.89, 0.62, 179.4, 69.53, 22.55),
    "custom_diffusion_ewc": (121.02, 0.506, 177.99, 69.44, 22.58),
    "lora": (176.38, 0.052, 203.11, 61.30, 22.97),
    "c_lora": (117.2, 0.034, 173.8, 64.89, 23.07),
    "lora_ewc": (105.07, 0.008, 156.91, 73.19, 22.15),
    "lora_ewc_dc": (102.81, 0.00052, 154.25, 73.41, 22.97),
    "lora_dsc": (198.45, 0.049, 187.2, 73.36, 22.57),
    "lora_dsc_ewc": (98.0, 0.02, 143.92, 72.92, 22.89),
    "lora_dsc_ewc_dc": (94.1, 0.003, 140.18, 73.17, 22.84),
}
PAPER: dict[str, dict[str, float]] = {
    method: dict(zip(PAPER_COLUMNS, figures, strict=True))
    for method, figures in _PAPER_ROWS.items()
}
SIGN_FLIPS = 20_000
MARGIN = 0.2  # differences smaller than this share of the default's distance don't matter
COMPARED = {
    "a_mmd": "Distance at the end",
    "second": "Distance at the end by the second encoder",
    "held_out_second": "The same with prompts that no method protects",
}


def write(out: Path, rows: Sequence[Row]) -> None:
    """Write table.json, table.csv, table.md and matrices.json."""
    plain = [{"device": "cpu", **row} for row in rows]
    for row in plain:
        for name in ("matrix", "over", "ends", "subjects", "made_with"):
            row.pop(name, None)
    matrices = [{key: row[key] for key in ("method", "seed", "matrix")} for row in rows]
    (out / "table.json").write_text(json.dumps(plain, indent=1) + "\n")
    (out / "matrices.json").write_text(json.dumps(matrices) + "\n")
    with (out / "table.csv").open("w", newline="") as file:
        names = dict.fromkeys(name for row in plain for name in row)  # in order
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(plain)
    lines = [*means(plain), "", *differences(rows), *orders_beside_paper(plain)]
    (out / "table.md").write_text("\n".join(lines) + "\n")


def means(rows: Sequence[Row]) -> list[str]:
    """A Markdown table with a row for each method, and the columns that some row has."""
    columns = [c for c in COLUMNS if any(row.get(c) is not None for row in rows)]
    lines = ["| method | seeds | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for method in methods_of(rows):
        own = [row for row in rows if row["method"] == method]
        cells = [_mean_and_deviation(_values(own, column)) for column in columns]
        lines.append(f"| {method} | {len(own)} | " + " | ".join(cells) + " |")
    return lines


def methods_of(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in rows))


def _values(rows: Sequence[Row], column: str) -> list[float]:
    """What is known of a column; a GPU's seconds are not comparable and left out."""
    if column == "seconds_per_concept":
        rows = [row for row in rows if row["device"] == "cpu"]
    return [row[column] for row in rows if row.get(column) is not None]


def _mean_and_deviation(values: Sequence[float]) -> str:
    if not values:
        return "-"
    digits = 0 if abs(values[0]) >= 100 else 1 if abs(values[0]) >= 10 else 4
    text = f"{statistics.mean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def _seeds(rows: Sequence[Row]) -> dict[str, set[int]]:
    """The seeds of each method; they differ while a table is still being made."""
    return {
        method: {row["seed"] for row in rows if row["method"] == method}
        for method in methods_of(rows)
    }


def differences(rows: Sequence[Row]) -> list[str]:
    """How each method differs from the default one at the end, concept by concept at the same seeds,
    by each of COMPARED that the rows have.
    """
    lines = []
    for figure, title in COMPARED.items():
        known = [row for row in rows if _ends(row, figure)]
        lines += _compared(known, figure, title)
    return lines


def _ends(row: Row, figure: str) -> list[float]:
    """A figure at the end, of each concept; rows of the first tables have the matrix alone."""
    if figure == "a_mmd":
        return row["matrix"][-1]
    return row.get("ends", {}).get(figure, [])


def _compared(rows: Sequence[Row], figure: str, title: str) -> list[str]:
    """If the default method is there with settings only ("retention vectors=1"), the shortest such
    row is taken.
    """
    ends = {(row["method"], row["seed"]): row for row in rows}
    seeds = _seeds(rows)
    defaults = [method for method in seeds if method.split()[0] == LearnSettings().method]
    default = min(defaults, key=len, default="")
    found: dict[str, pd.DataFrame] = {}
    for method in seeds:
        shared = sorted(seeds[method] & seeds.get(default, set()))
        if method != default and shared:
            pairs = [(ends[method, seed], ends[default, seed]) for seed in shared]
            frames = [_paired(*pair, figure) for pair in pairs]
            found[method] = pd.concat(frames, ignore_index=True)
    if not found:
        return []
    tests = [sign_flip_test(by_concept(one)) for one in found.values()]
    corrected = np.asarray(multipletests(tests, method="holm")[1])
    head = (
        f"{title}: difference from `{default}` at the seeds that both have, with its 95 % interval "
        "(mixed model, concept and seed at random). p: of all ways to flip signs, a concept counted "
        f"once; corrected by Holm. Equivalent: by TOST within {MARGIN:.0%} of `{default}`'s."
    )
    lines = [head, ""]
    for (method, one), p, p_holm in zip(found.items(), tests, corrected, strict=True):
        mean, low, high = mixed_mean(one)
        margin = MARGIN * float(one["default"].mean())
        same = ", equivalent" if equivalent(mean, low, high, margin) else ""
        own = by_concept(one)
        lines.append(
            f"* `{method}`: {mean:+.4f} ({low:+.4f} to {high:+.4f}), closer in {(own < 0).sum()} of "
            f"{len(own)}, p = {p:.2g}, corrected {p_holm:.2g}{same}"
        )
    return [*lines, ""]


def _paired(row: Row, default: Row, figure: str) -> pd.DataFrame:
    """Concept by concept; rows of the first tables don't say which concepts they are of."""
    values, others = _ends(row, figure), _ends(default, figure)
    names = row.get("subjects") or [
        one.name for one in sequence("reporting", row["seed"], len(values))
    ]
    columns = {"value": values, "default": others, "concept": names, "seed": row["seed"]}
    frame = pd.DataFrame(columns)
    return frame.assign(difference=frame["value"] - frame["default"])


def by_concept(pairs: pd.DataFrame) -> np.ndarray:
    """The differences; a concept that several seeds have is one."""
    return np.asarray(pairs.groupby("concept")["difference"].mean())


def sign_flip_test(values: np.ndarray) -> float:
    """p: of all ways to flip the signs of the differences, the share with so large a mean
    (two-sided); of more than 16 differences SIGN_FLIPS ways are drawn.
    """
    result = permutation_test(
        (values,),
        np.mean,
        permutation_type="samples",
        n_resamples=2**16 if len(values) <= 16 else SIGN_FLIPS,
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)


def mixed_mean(pairs: pd.DataFrame) -> tuple[float, float, float]:
    """The mean difference and its 95 % interval, with random effects of concept and seed where each
    occurs more than once; if neither does, Student's.
    """
    repeated = [name for name in ("concept", "seed") if 1 < pairs[name].nunique() < len(pairs)]
    if not repeated:
        return _students(np.asarray(pairs["difference"]))
    parts = {name: f"0 + C({name})" for name in repeated}
    data = pairs.assign(everything=1)
    model = MixedLM.from_formula(
        "difference ~ 1", data, groups="everything", vc_formula=parts, re_formula="0"
    )
    with warnings.catch_warnings():
        # a variance of 0 lies on the border of what is possible, and is what is often found
        warnings.simplefilter("ignore")
        try:
            fit = model.fit(reml=True, method=["powell"])  # others stop short of the best
            low, high = fit.conf_int().loc["Intercept"]
        except np.linalg.LinAlgError:  # nothing is left beside the effects
            return _students(by_concept(pairs))
    if not np.isfinite([low, high]).all():  # the likelihood is too flat for one
        return _students(by_concept(pairs))
    return float(fit.params["Intercept"]), float(low), float(high)


def _students(values: np.ndarray) -> tuple[float, float, float]:
    mean = float(values.mean())
    if len(values) < 2:
        return mean, -math.inf, math.inf
    low, high = DescrStatsW(values).tconfint_mean()
    return mean, float(low), float(high)


def equivalent(mean: float, low: float, high: float, margin: float) -> bool:
    """Two one-sided tests at 5 %: whether the 90 % interval lies within the margin. Source:
    Schuirmann 1987.
    """
    half = (high - low) / 2 * norm.ppf(0.95) / norm.ppf(0.975)
    return bool(abs(mean) + half < margin)


def orders_beside_paper(rows: Sequence[Row]) -> list[str]:
    """For each figure the paper has too: the methods in order, here (at the seeds that all of them
    have) and there.
    """
    seeds = {method: own for method, own in _seeds(rows).items() if method in PAPER}
    shared = set.intersection(*seeds.values()) if seeds else set()
    if not shared or len(seeds) < 2:
        return []
    ours: dict[str, dict[str, float]] = {}
    for method in seeds:
        own = [row for row in rows if row["method"] == method and row["seed"] in shared]
        ours[method] = {c: sum(row[c] for row in own) / len(own) for c in PAPER_COLUMNS}
    title = (
        f"The paper's methods from best to worst at seed {', '.join(map(str, sorted(shared)))}; "
        "Kendall's tau of the two orders, and its exact p:"
    )
    lines = [title, ""]
    for column in PAPER_COLUMNS:
        tau, p = kendalltau(*([figures[m][column] for m in ours] for figures in (ours, PAPER)))
        here, there = (_ranking(ours, figures, column) for figures in (ours, PAPER))
        lines.append(f"* {column} (tau {tau:.2f}, p = {p:.2g}): here {here}; in the paper {there}")
    return lines


def _ranking(methods: Iterable[str], figures: dict[str, dict[str, float]], column: str) -> str:
    """The methods from best to worst."""
    reverse = column in HIGHER_IS_BETTER
    return ", ".join(sorted(methods, key=lambda m: figures[m][column], reverse=reverse))
