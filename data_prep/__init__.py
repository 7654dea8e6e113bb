"""From pictures as people keep them to WebDataset tars: `image_folder`. Knows no torch, no models, no
training."""
