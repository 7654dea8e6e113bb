"""Data sets made ready for runs: a folder of pictures converted once, and the paper's sets by name."""
