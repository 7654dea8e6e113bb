"""Backbones of transformers: `build` makes them, `encoder` pools, `images` reads how they want images."""
