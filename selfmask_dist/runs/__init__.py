"""A run's folder and its process, training aside: checkpoints, metrics, status, preemption, exit status."""
