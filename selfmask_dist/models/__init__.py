"""Whole models: a mask file, a run's folder, a cascade or a hub's name in, something that answers out.

`whole` is the model, `building` makes its backbone, `load` brings them together, `pictures` finds and reads
pictures, and `hub` pushes and pulls. Knows no optimizers, process groups, command line or HTTP.
"""
