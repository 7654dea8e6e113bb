"""Ways to write a mask on this machine's CPU: comparing into a float tensor against into bools, and
multiplying by each.

The reason why `masking.core.write_mask` puts zeros and ones into theta's own storage. One thread, 0.6 million
weights.

    python benchmarks/masking/kernels.py [--quick] --json
"""

import sys

import torch

from benchmarks.harness import Benchmark, interleave


def main() -> int:
    bench = Benchmark("kernels", __doc__)
    rounds = 50 if bench.parse().quick else 500
    torch.set_num_threads(1)
    num_weights = 384 * 1536
    generator = torch.Generator().manual_seed(0)
    weight, scores = torch.randn(2, num_weights, generator=generator)
    theta, mask = torch.empty_like(weight), scores > 0
    times = interleave(
        {
            "compare_to_float": lambda: torch.gt(scores, 0.0, out=theta),
            "compare_to_bool": lambda: torch.gt(scores, 0.0),
            "multiply_by_float": lambda: torch.mul(weight, scores, out=theta),
            "multiply_by_bool": lambda: torch.mul(weight, mask, out=theta),
        },
        rounds=rounds,
        warmup=20,
    )
    for name, seconds in times.items():
        bench.figure(f"{name}_microseconds", bench.median(seconds) * 1e6)
    for verb in ("compare_to", "multiply_by"):
        pairs = zip(times[f"{verb}_bool"], times[f"{verb}_float"], strict=True)
        bench.figure(f"{verb}_bool_over_float", bench.median(b / f for b, f in pairs))
    total = {
        kind: [c + m for c, m in zip(times[f"compare_to_{kind}"], times[f"multiply_by_{kind}"], strict=True)]
        for kind in ("bool", "float")
    }
    ratio = bench.median(b / f for b, f in zip(total["bool"], total["float"], strict=True))
    bench.figure("both_bool_over_float", ratio, min=1.0)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
