"""Chains of runs over masks and weights: several tasks in one network, pruning and rewinding, mixing models.

    packnet    for each task: train free weights -> prune, reserve -> retrain           packed.safetensors
    lottery    k steps, then for each round: train from step k -> prune                 ticket.safetensors
    evolution  for each generation: train -> keep the fit half, renew the rest          fit.safetensors
    supsup     for each task: a mask; then whose are the test images?                   supermasks.mask
    wise_ft    fine-tune or mask -> the line to the frozen weights                      chosen.safetensors
    rebasin    two trainings -> permute one of them -> average                          merged.safetensors
    ensemble   a mask for each member, a small model for each

Each file has the equations of a procedure as pure functions of tensors, and under them the run: ordinary runs
in folders of their own, and what happens between them. Every stage goes on where it was when the run is
started again, and is skipped when it is done.
"""

from selfmask_dist.procedures.run import run_procedure

__all__ = ["run_procedure"]
