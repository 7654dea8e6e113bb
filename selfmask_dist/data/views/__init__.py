"""Samples to pixels: decoding, one view or several, distortions. Knows no files and no order."""
