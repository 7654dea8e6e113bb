"""The rows of `benchmarks/methods.py`, a file for each group of methods."""

from benchmarks.methods import baselines, families, latent, objectives, procedures
from benchmarks.methods.row import Row

ROWS: tuple[Row, ...] = (
    *baselines.ROWS,
    *families.ROWS,
    *latent.ROWS,
    *procedures.ROWS,
    *objectives.ROWS,
)
