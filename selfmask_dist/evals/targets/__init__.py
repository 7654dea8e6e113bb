"""What is measured of targets beside one class, `objective.target`: metrics, linear probes, both of a run.

`metrics` are numbers of outputs, `probe` and `patches` fit a linear head on frozen features, `measure` puts
them in the place that k-NN, probe and head have for one class.
"""
