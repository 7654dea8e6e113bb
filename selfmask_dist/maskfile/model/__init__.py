"""What makes a mask a whole model: its head, class names, and how its backbone is built.

`part` says what it is and computes logits; `coding` writes it into a mask file, reads it, and takes it off.
"""
