"""k-NN with a shared bank: exact, within its memory, what it sends, and how fast it is.

Worlds of 1, 2 and 4 processes search a bank of 50,000 x 512 with 10,000 queries (k = 200). Neighbours and
predictions of 1,000 of them are held against a full sort; memory is each process's own high-water mark, bytes
are counted where they are sent. Times are one thread's processor time, in turns with faiss and scikit-learn,
on 2,048 of the queries.

    python -m benchmarks.evals.knn --json [--quick]
"""

import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from benchmarks.harness import Benchmark, _high_water, interleave
from selfmask_dist.evals import Embeddings, Plan, global_knn, knn_vote, search
from selfmask_dist.evals.search import MEMORY_MIB
from selfmask_dist.parallel import World

CLASSES, TEMPERATURE = 100, 0.1
WORLDS = (1, 2, 4)
MIB = 2**20
# beyond `memory_mib`, bank and queries: the labels of the bank, buffers of gloo, the allocator's slack
SLACK_MIB = 96


class CountingWorld:
    """A world that counts what this process sends to others."""

    def __init__(self, world: World) -> None:
        self.rank, self.size, self._world = world.rank, world.size, world
        self.sent = 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        # a ring: twice the tensor, less this rank's part
        self.sent += 2 * tensor.nbytes * (self.size - 1) // self.size
        return self._world.sum(tensor)

    def all_to_all(self, tensor: torch.Tensor) -> torch.Tensor:
        self.sent += tensor.nbytes * (self.size - 1) // self.size
        return self._world.all_to_all(tensor)


def make(kind: str, count: int, dim: int, *, rank: int = 0, size: int = 1) -> tuple[Any, Any, Any]:
    """Features, labels and ids of this rank's part: every size-th sample. Any world gets the same samples."""
    seed = {"bank": 1, "queries": 2}[kind]
    centers = torch.randn(CLASSES, dim, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    ids = torch.arange(rank, count, size)
    features = torch.empty(len(ids), dim)
    for start in range(0, count, 5000):  # all ranks draw the same numbers and keep their own
        block = torch.randn(min(5000, count - start), dim, generator=generator)
        mine = (ids >= start) & (ids < start + len(block))
        features[mine] = 0.35 * centers[labels[ids[mine]]] + block[ids[mine] - start]
    if kind == "bank":  # each tenth sample is a copy of the one before, with a label of its own: ties by id
        original = torch.Generator().manual_seed(9)
        shared = torch.randn(count // 10 + 1, dim, generator=original)
        for place in (8, 9):
            chosen = ids % 10 == place
            features[chosen] = shared[ids[chosen] // 10] + 0.35 * centers[ids[chosen] // 10 % CLASSES]
    return F.normalize(features), labels[ids], ids


def _rank(store: str, rank: int, size: int, sizes: tuple[int, int, int, int], out: Any) -> None:
    torch.set_num_threads(1)
    if size > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    num_bank, num_queries, dim, k = sizes
    world = CountingWorld(World(rank, size))
    bank, labels, ids = make("bank", num_bank, dim, rank=rank, size=size)
    queries, query_labels, query_ids = make("queries", num_queries, dim, rank=rank, size=size)
    torch.mm(queries[:64], bank[:64].T)  # what the first product allocates is not the search's
    world.sum(torch.zeros(1))
    Path("/proc/self/clear_refs").write_text("5")
    before, world.sent = _high_water(), 0
    result = global_knn(
        Embeddings(bank, labels, ids),
        Embeddings(queries, query_labels, query_ids),
        num_classes=CLASSES,
        ks=(k,),
        temperatures=(TEMPERATURE,),
        ranks=world,
    )
    grown, sent = _high_water() - before, world.sent
    _, neighbours = search(bank, queries, k=k, bank_ids=ids, ranks=world)
    own = bank.nbytes
    out.put((rank, grown, sent, own, result.accuracy[k, TEMPERATURE], query_ids.numpy(), neighbours.numpy()))
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()


def run_world(size: int, sizes: tuple[int, int, int, int]) -> list[Any]:
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/store"
        ranks = [context.Process(target=_rank, args=(store, r, size, sizes, out)) for r in range(size)]
        for process in ranks:
            process.start()
        found = sorted((out.get(timeout=200) for _ in ranks), key=lambda item: item[0])
        for process in ranks:
            process.join()
    return found


def brute_force(sizes: tuple[int, int, int, int], chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Neighbours (by a full stable sort) and predictions of the chosen queries."""
    num_bank, num_queries, dim, k = sizes
    (bank, labels, _), (queries, _, _) = make("bank", num_bank, dim), make("queries", num_queries, dim)
    ids, classes = [], []
    for block in queries[chosen].split(200):
        sims, order = (block @ bank.T).sort(dim=1, descending=True, stable=True)
        sims, order = sims[:, :k], order[:, :k]
        ids.append(order)
        classes.append(knn_vote(sims, labels[order], temperature=TEMPERATURE, num_classes=CLASSES))
    return torch.cat(ids), torch.cat(classes)


def measure_worlds(bench: Benchmark, sizes: tuple[int, int, int, int]) -> None:
    num_bank, num_queries, dim, k = sizes
    chosen = torch.arange(0, num_queries, max(1, num_queries // 1000))
    expected_ids, expected_classes = brute_force(sizes, chosen)
    bank, labels, _ = make("bank", num_bank, dim)
    queries, _, _ = make("queries", num_queries, dim)
    accuracies = []
    for size in WORLDS:
        found = run_world(size, sizes)
        neighbours = torch.empty(num_queries, k, dtype=torch.int64)
        for _, _, _, _, _, query_ids, part in found:
            neighbours[torch.from_numpy(query_ids)] = torch.from_numpy(part)
        mine = neighbours[chosen]
        sims = torch.einsum("qd,qkd->qk", queries[chosen], bank[mine])
        classes = knn_vote(sims, labels[mine], temperature=TEMPERATURE, num_classes=CLASSES)
        bench.figure(
            f"world {size}: predictions unlike brute force", int((classes != expected_classes).sum()), max=0
        )
        bench.figure(
            f"world {size}: neighbours like brute force",
            float((mine == expected_ids).double().mean()),
            min=0.999,
        )
        worst = max((grown, own) for _, grown, _, own, *_ in found)
        bench.figure(f"world {size}: bank MiB per rank", worst[1] / MIB)
        bench.figure(
            f"world {size}: peak beyond bank and queries MiB",
            worst[0] / MIB,
            max=MEMORY_MIB + SLACK_MIB,
        )
        if size > 1:
            sent = sum(item[2] for item in found)
            gathering = num_bank * dim * 4 * (size - 1)
            bench.figure(f"world {size}: MiB sent", sent / MIB)
            bench.figure(f"world {size}: sent / gathering the bank", sent / gathering, max=0.4, quick=False)
        accuracies.append(found[0][4])
    bench.figure("accuracy", accuracies[0])
    bench.figure("accuracies of the worlds differ by", max(accuracies) - min(accuracies), max=0.0)


def measure_times(bench: Benchmark, sizes: tuple[int, int, int, int], rounds: int) -> None:
    num_bank, num_queries, dim, k = sizes
    torch.set_num_threads(1)
    bank, queries = make("bank", num_bank, dim)[0], make("queries", num_queries, dim)[0][:2048]
    fns: dict[str, Any] = {}
    try:
        import faiss

        faiss.omp_set_num_threads(1)
        index = faiss.IndexFlatIP(dim)
        index.add(bank.numpy())
        fns["faiss"] = lambda: index.search(queries.numpy(), k)
        bench.figure("faiss version", faiss.__version__)
    except ImportError:
        bench.figure("faiss", "skipped: faiss-cpu is not installed (pip install faiss-cpu)")
    fns["float32"] = lambda: search(bank, queries, k=k)
    fns["bf16"] = lambda: search(bank, queries, k=k, precision="bf16")
    from sklearn.neighbors import NearestNeighbors
    from threadpoolctl import threadpool_limits

    other = NearestNeighbors(n_neighbors=k, algorithm="brute", metric="cosine", n_jobs=1).fit(bank.numpy())
    fns["scikit-learn"] = lambda: other.kneighbors(queries.numpy())
    with threadpool_limits(1):
        seconds = interleave(fns, rounds=rounds, clock=time.thread_time)
    medians = {name: bench.median(times) for name, times in seconds.items()}
    for name, value in medians.items():
        bench.figure(f"{name} seconds", value)
    ratios = {
        name: bench.median(
            a / b for a, b in zip(seconds[name], seconds.get("faiss", seconds[name]), strict=True)
        )
        for name in medians
    }
    if "faiss" in fns:
        promised = not bench.args.busy
        bench.figure("float32 / faiss", ratios["float32"], max=1.3 if promised else None, quick=False)
        bench.figure("bf16 / faiss", ratios["bf16"], max=1.0 if promised else None, quick=False)
        bench.figure("scikit-learn / faiss", ratios["scikit-learn"])
    bench.figure(
        "bf16 / float32",
        bench.median(a / b for a, b in zip(seconds["bf16"], seconds["float32"], strict=True)),
    )
    same = fns["float32"]()[1] == fns["bf16"]()[1]
    bench.figure("bf16 neighbours like float32's", float(same.double().mean()), min=1.0)
    bench.figure("processor knows bf16", _knows_bf16())
    product = interleave({"product": lambda: torch.mm(queries, bank.T)}, rounds=2, clock=time.thread_time)[
        "product"
    ]
    bench.figure("the matrix product alone, seconds", bench.median(product))


def _knows_bf16() -> list[str]:
    try:
        flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[1].splitlines()[0].split()
    except (OSError, IndexError):
        return []
    return [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags]


def main() -> int:
    bench = Benchmark("knn", __doc__)
    bench.parser.add_argument(
        "--busy", action="store_true", help="the machine has other work: times are noted and promise nothing"
    )
    options = bench.parse()
    bench.figure("times are of a busy machine", options.busy)
    sizes = (5000, 1000, 128, 50) if options.quick else (50_000, 10_000, 512, 200)
    bench.figure("bank, queries, dim, k", list(sizes))
    measure_worlds(bench, sizes)
    measure_times(bench, sizes, rounds=2 if options.quick else 7)
    plan = Plan.make(2_700_000, 100_000, 768, k=200, num_ranks=8, memory_mib=1024, element_size=2)
    bench.figure(
        "plan of 2.7 M x 100 k, dim 768, float16, on 8 ranks with 1 GiB",
        {
            "bank MiB per rank": round(plan.bank_bytes / MIB),
            "work MiB per rank": round(plan.work_bytes / MIB),
            "rounds": plan.rounds,
            "sent MiB per rank": round(plan.sent_bytes / MIB),
            "gathering the bank, MiB per rank": round(2_700_000 * 768 * 2 * 7 / 8 / MIB),
            "TFLOP per rank": round(2 * 2_700_000 * 100_000 * 768 / 8 / 1e12),
        },
    )
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
