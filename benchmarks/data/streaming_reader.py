"""mosaicml-streaming's part of data_throughput.py: runs in an environment of its own, knows nothing of ours.

    python streaming_reader.py TARS OUT

writes the samples of the tars as MDS shards into OUT, says so in a line, and then, for each line on stdin,
reads an epoch in its own shuffled order and answers with the number of samples that came.
"""

import sys
import tarfile
from pathlib import Path


def main(tars: str, out: str) -> None:
    from streaming import MDSWriter, StreamingDataset  # type: ignore[import-not-found]
    from streaming.base.util import clean_stale_shared_memory  # type: ignore[import-not-found]

    clean_stale_shared_memory()
    with MDSWriter(out=out, columns={"jpg": "bytes", "cls": "int"}) as writer:
        for path in sorted(Path(tars).glob("*.tar")):
            with tarfile.open(path) as tar:
                members = {info.name: info for info in tar}
                for name in [name for name in members if name.endswith(".jpg")]:
                    data, label = (
                        tar.extractfile(members[part]).read()  # type: ignore[union-attr]
                        for part in (name, name.removesuffix("jpg") + "cls")
                    )
                    writer.write({"jpg": data, "cls": int(label)})
    dataset = StreamingDataset(local=out, shuffle=True, batch_size=256, num_canonical_nodes=1)
    print("ready", flush=True)
    for _ in sys.stdin:
        print(sum(len(sample["jpg"]) > 0 for sample in dataset), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
