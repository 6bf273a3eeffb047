"""A CSV: number and text columns, and one column to predict.

What is done to missing values, texts and constant columns is decided here once and written into the
task as constants of its `preprocess()`, so applications send raw values.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shoal_optimizer.scaffolding.found import (
    Found,
    Table,
    describe_classes,
    describe_items,
    shortened,
    stable_split,
)
from shoal_protos.bundle import TensorSpec
from shoal_protos.errors import InvalidInput

MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?", "-", "--", "nil"})
TARGET_NAMES = ("target", "label", "class", "y", "output")
MAX_ROWS = 2_000_000
MAX_CATEGORIES = 32  # of a text column; with more it is a name or a note
MAX_CLASSES = 20  # whole numbers; more are a quantity
NUMERIC_SHARE = 0.95  # of the values there are


@dataclass(frozen=True)
class _Column:
    """`values` [n] float64 with NaN where missing, or None for a column of texts."""

    name: str
    texts: list[str]
    values: np.ndarray | None
    odd: str = ""  # an example of what is no number in a column of numbers

    @property
    def missing(self) -> int:
        if self.values is not None:
            return int(np.isnan(self.values).sum())
        return sum(1 for text in self.texts if _is_missing(text))


def read(path: Path, *, target: str = "", output_kind: str = "") -> Found:
    """Reads a CSV.

    Args:
        target: the column to predict; "" = one named target, label, class or y, else the last.
        output_kind: "logits" or "values"; "" = chosen from the target column.

    Raises:
        InvalidInput: no table, no such column, one class only, or nothing to predict from.
    """
    header, rows, headless = _rows(path)
    columns = [_column(name, [row[i] for row in rows]) for i, name in enumerate(header)]
    wanted = _target(columns, target)
    found_warnings: list[str] = []
    if headless:
        found_warnings.append("The first line holds no names; columns are called column1, column2, ...")
    known = [not _is_missing(text) for text in wanted.texts]
    if not all(known):
        lost = known.count(False)
        found_warnings.append(f"{lost:,} rows have no '{wanted.name}' and are left out.")
        chosen = np.array(known)
        columns = [_take(column, chosen) for column in columns]
        wanted = next(c for c in columns if c.name == wanted.name)
    if not wanted.texts:
        raise InvalidInput(f"No row has a '{wanted.name}'.", "Name another column with --target.")
    targets, labels, kind = _targets(wanted, output_kind)
    features, notes = _features([c for c in columns if c.name != wanted.name])
    table, inputs, decided = _encode(features)
    # Rows that ask the same are on one side: else the model is judged by what it has learnt by heart.
    keys = [row.tobytes().hex() for row in inputs]
    found = Found(
        inputs=inputs,
        targets=targets,
        evaluation=stable_split(keys, targets if kind == "logits" else None),
        input=TensorSpec("row", "FP32", (-1, len(table.columns)), "NC"),
        input_kind="tensor",
        output_kind=kind,
        labels=labels,
        table=table,
    )
    # Constants come from the rows that train alone.
    found.table = _filled(found, features)
    describe_items(found)
    found.facts.append(("columns", f"{len(table.columns)} of {len(header)}: {shortened(table.columns)}"))
    found.facts.append(("predicts", f"{wanted.name}" + (_range(targets) if kind == "values" else "")))
    if kind == "logits":
        describe_classes(found)
    found.decided += decided + notes
    found.decided.append("A fifth of the rows judges, chosen by a hash of the row: always the same ones.")
    found.warnings += found_warnings + _oddities(features)
    return found


def _rows(path: Path) -> tuple[list[str], list[list[str]], bool]:
    """Names, rows of equal length, and whether the names were made up."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        text = path.read_text(encoding="latin-1")
    if "\0" in text[:4096]:
        raise InvalidInput(f"{path.name} is not a text file.", "Save it as CSV.")
    try:
        dialect: type[csv.Dialect] = csv.Sniffer().sniff(text[:16384], ",;\t|")
    except csv.Error:
        dialect = csv.excel
    rows: list[list[str]] = []
    try:
        reader = csv.reader(text.splitlines(), dialect)
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            if rows and len(row) != len(rows[0]):
                raise InvalidInput(
                    f"{path.name}, line {reader.line_num}: {len(row)} values where the first line has "
                    f"{len(rows[0])}.",
                    "Mend that line; values with commas need quotes.",
                )
            rows.append([cell.strip() for cell in row])
            if len(rows) > MAX_ROWS:
                raise InvalidInput(f"{path.name} has more than {MAX_ROWS:,} rows.", "Give a sample of them.")
    except csv.Error as error:
        raise InvalidInput(f"{path.name} is not a CSV: {error}.", "Save it as CSV.") from error
    if not rows:
        raise InvalidInput(f"{path.name} is empty.", "Give a CSV with a line of names and one row an item.")
    if len(rows[0]) < 2:
        raise InvalidInput(f"{path.name} has one column.", "Give columns to predict from and one to predict.")
    headless = any(_number(cell) is not None for cell in rows[0])
    header = [f"column{i + 1}" for i in range(len(rows[0]))] if headless else rows.pop(0)
    header = [name or f"column{i + 1}" for i, name in enumerate(header)]
    twice = [name for name in dict.fromkeys(header) if header.count(name) > 1]
    if twice:
        raise InvalidInput(f"{path.name} has the column '{twice[0]}' twice.", "Rename one of them.")
    if len(rows) < 2:
        raise InvalidInput(f"{path.name} has {len(rows)} rows.", "Give more of them.")
    return header, rows, headless


def _is_missing(text: str) -> bool:
    return text.lower() in MISSING


def _number(text: str) -> float | None:
    """The finite number that a text is; also with a decimal comma. None for any other text."""
    try:
        value = float(text)
    except ValueError:
        try:
            value = float(text.replace(",", ".", 1))
        except ValueError:
            return None
    return value if math.isfinite(value) else None


def _column(name: str, texts: list[str]) -> _Column:
    parsed = [None if _is_missing(text) else _number(text) for text in texts]
    there = sum(1 for text in texts if not _is_missing(text))
    right = sum(1 for value in parsed if value is not None)
    if not there or right < NUMERIC_SHARE * there:
        return _Column(name, texts, None)
    values = np.array([math.nan if value is None else value for value in parsed])
    odd = next((t for t, v in zip(texts, parsed, strict=True) if v is None and not _is_missing(t)), "")
    return _Column(name, texts, values, odd)


def _take(column: _Column, chosen: np.ndarray) -> _Column:
    texts = [text for text, keep in zip(column.texts, chosen, strict=True) if keep]
    return _Column(column.name, texts, None if column.values is None else column.values[chosen], column.odd)


def _target(columns: Sequence[_Column], name: str) -> _Column:
    by_name = {column.name: column for column in columns}
    if name:
        if name not in by_name:
            raise InvalidInput(f"There is no column '{name}'.", f"Columns: {shortened(list(by_name), 30)}.")
        return by_name[name]
    lower = {column.name.lower(): column for column in columns}
    return next((lower[known] for known in TARGET_NAMES if known in lower), columns[-1])


def _targets(column: _Column, wanted: str) -> tuple[np.ndarray, tuple[str, ...], str]:
    """Targets, labels and the output's kind."""
    values = column.values
    if values is not None and np.isnan(values).any():
        raise InvalidInput(
            f"'{column.name}' is a column of numbers, but holds '{column.odd}'.", "Mend or remove those rows."
        )
    whole = values is not None and bool((values == np.round(values)).all())
    few = values is not None and len(np.unique(values)) <= min(MAX_CLASSES, max(2, len(values) // 5))
    kind = wanted or ("logits" if values is None or (whole and few) else "values")
    if kind == "values":
        if values is None:
            raise InvalidInput(f"'{column.name}' holds texts, not quantities.", "Leave --output away.")
        return values.astype(np.float32)[:, None], (), "values"
    texts = column.texts if values is None else [f"{value:g}" for value in values]
    labels = tuple(sorted(set(texts), key=lambda t: (_number(t) is None, _number(t) or 0.0, t)))
    if len(labels) > 1000:
        raise InvalidInput(
            f"'{column.name}' has {len(labels):,} different texts.",
            "Name the column to predict with --target.",
        )
    index = {label: number for number, label in enumerate(labels)}
    return np.array([index[text] for text in texts], np.int64), labels, "logits"


def _features(columns: Sequence[_Column]) -> tuple[list[_Column], list[str]]:
    """Columns worth sending, and a sentence for each that is left out."""
    kept: list[_Column] = []
    notes: list[str] = []
    for column in columns:
        there = {text for text in column.texts if not _is_missing(text)}
        if len(there) <= 1:
            value = next(iter(there), "nothing")
            notes.append(f"'{column.name}' is left out: it is always {value}.")
        elif column.values is None and len(there) > MAX_CATEGORIES:
            notes.append(f"'{column.name}' is left out: {len(there):,} different texts.")
        elif column.values is not None and _counts_rows(column.values):
            notes.append(f"'{column.name}' is left out: it numbers the rows.")
        else:
            kept.append(column)
    if not kept:
        raise InvalidInput("No column is left to predict from.", " ".join(notes))
    return kept, notes


def _counts_rows(values: np.ndarray) -> bool:
    return len(values) > 10 and values[0] in (0, 1) and bool((np.diff(values) == 1).all())


def _encode(columns: Sequence[_Column]) -> tuple[Table, np.ndarray, list[str]]:
    """Rows as numbers, NaN where a value is missing, and what was decided."""
    parts: list[np.ndarray] = []
    categories: dict[int, tuple[str, ...]] = {}
    for number, column in enumerate(columns):
        if column.values is not None:
            parts.append(column.values)
            continue
        texts = tuple(sorted({text for text in column.texts if not _is_missing(text)}))
        codes = {text: float(code) for code, text in enumerate(texts)}
        parts.append(np.array([codes.get(text, math.nan) for text in column.texts]))
        categories[number] = texts
    table = Table(tuple(c.name for c in columns), (0.0,) * len(columns), categories)
    codes_of = {i: shortened([f"{c} {t}" for c, t in enumerate(texts)], 6) for i, texts in categories.items()}
    decided = [f"'{table.columns[i]}' is sent as a number: {codes}." for i, codes in codes_of.items()]
    return table, np.stack(parts, axis=1).astype(np.float32), decided


def _filled(found: Found, columns: Sequence[_Column]) -> Table:
    """The table with what stands for missing values: the median, -1 (no category) for texts."""
    assert found.table is not None
    rows = found.training_inputs
    fill = []
    missing = []
    for i, column in enumerate(columns):
        values = rows[:, i][~np.isnan(rows[:, i])]
        median = float(np.median(values)) if len(values) else 0.0
        fill.append(-1.0 if i in found.table.categories else float(f"{median:.6g}"))
        if column.missing:
            missing.append(f"{column.name} {column.missing:,}")
    if missing:
        found.facts.append(("missing", shortened(missing)))
        found.decided.append(
            "Applications send NaN for a missing value; preprocess() puts the training median in its place "
            "(no category for texts)."
        )
    return Table(found.table.columns, tuple(fill), found.table.categories)


def _oddities(columns: Sequence[_Column]) -> list[str]:
    return [
        f"'{c.name}' holds texts among its numbers, e.g. '{c.odd}': they count as missing."
        for c in columns
        if c.odd
    ]


def _range(targets: np.ndarray) -> str:
    return f", {targets.min():.4g} to {targets.max():.4g}, mean {targets.mean():.4g}"
