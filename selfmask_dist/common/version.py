"""The version, which `selfmask_dist.__version__` gives and files that this package writes may name."""

VERSION = "0.1.0"
