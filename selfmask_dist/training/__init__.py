"""One run: built, prepared, trained, saved. `chain` makes a run out of runs."""
