"""The misuses that `benchmarks.faults.misuse` tries, by where they happen; each module has its `CASES`."""

GROUPS = {
    "python: loops": "python_loops",
    "python: models, banks, files": "python_models",
    "settings": "settings",
    "commands": "commands",
    "folders of pictures": "folders",
    "pictures and shards": "images_and_shards",
    "mask files": "mask_files",
    "service": "service",
}
