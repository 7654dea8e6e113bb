"""Public layouts of targets beside one class -> WebDataset tars: several labels, numbers, label maps.

`coco` reads COCO's JSON, `values` a CSV with columns of numbers, `maps` a folder of PNG maps; `rows`
writes what they read.
"""
