"""What is done with masks and weights beyond one training: several tasks in one network, pruning and
rewinding, mixing models. One procedure a file, pure functions on tensors by name.

Knows no configuration, no files and no training loop: what trains is handed in.
"""
