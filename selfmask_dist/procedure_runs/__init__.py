"""Procedures from one command. Each is a chain of stages: ordinary runs in folders of their own, and what
happens between them, a pure function of `procedures` from files to a file.

    packnet    for each task: train free weights -> prune, reserve -> retrain           packed.safetensors
    lottery    k steps, then for each round: train from step k -> prune                 ticket.safetensors
    evolution  for each generation: train -> keep the fit half, renew the rest          fit.safetensors
    supsup     for each task: a mask; then whose are the test images?                   supermasks.mask
    wise_ft    fine-tune or mask -> the line to the frozen weights                      chosen.safetensors
    rebasin    two trainings -> permute one of them -> average                          merged.safetensors
    ensemble   a mask for each member, a small model for each

Every stage goes on where it was when the run is started again, and is skipped when it is done. `chain` has
the stages, `measuring` the numbers of networks with heads; the others are one procedure each.
"""

from selfmask_dist.procedure_runs.command import run_procedure

__all__ = ["run_procedure"]
