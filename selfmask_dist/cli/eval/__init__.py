"""`selfmask eval`: what masks are worth, from embeddings made once.

command   words of the command line -> subject, kinds, table, files
subject   a run, mask file or cascade -> its data, and embeddings in stores
views     the ways to embed that its masks and fine-tuned weights are
kinds     KINDS: name -> function(subject, options) -> Results; a new kind is an entry
results   one JSON format for all kinds, and a table; pictures are drawn by `common.plots`
"""

from selfmask_dist.cli.eval.command import add_command

__all__ = ["add_command"]
