"""The rows of `benchmarks/methods.py`, a file for each group of methods."""

from benchmarks.method_rows import baselines, families, latent, objectives, procedures
from benchmarks.method_rows.row import Row

ROWS: tuple[Row, ...] = (
    *baselines.ROWS,
    *families.ROWS,
    *latent.ROWS,
    *procedures.ROWS,
    *objectives.ROWS,
)
