"""Pretrained vision backbones: a name and perhaps a local file in, a frozen encoder and its spec out.

`load` is the way in, `from_timm`, `from_open_clip` and `hugging_face` build models, `weights` reads files
strictly and fingerprints tensors, `structure` finds repeated blocks and sets modes. Knows nothing of masks,
data or process groups; importing it imports none of the libraries of models.
"""

from selfmask_dist.backbones.load import load_backbone
from selfmask_dist.backbones.spec import Backbone, BackboneSpec, TextParts
from selfmask_dist.backbones.structure import find_blocks, set_train_mode
from selfmask_dist.backbones.weights import fingerprint, sample_of

__all__ = [
    "Backbone",
    "BackboneSpec",
    "TextParts",
    "find_blocks",
    "fingerprint",
    "load_backbone",
    "sample_of",
    "set_train_mode",
]
