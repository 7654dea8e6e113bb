"""What a plan assumes of machines, storage and data."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """What is assumed of the machines, and of the data.

    pictures: in data.train. memory_gib: of a GPU. tflops: what training reaches on one; float32_tflops: what
    an evaluation in float32 reaches, which has no tensor cores (TF32 is never switched on). The bandwidths
    between GPUs are what one of them can send, in GB/s; those of storage what a node, and all nodes together,
    read and write.
    """

    pictures: int = 1_000_000
    nodes: int = 1
    gpus_per_node: int = 1
    memory_gib: float = 80.0
    tflops: float = 300.0  # that training reaches, not the data sheet's peak
    float32_tflops: float = 40.0
    within_node_gbs: float = 300.0
    between_nodes_gbs: float = 25.0
    node_storage_gbs: float = 2.0
    storage_gbs: float = 20.0

    @property
    def world_size(self) -> int:
        """The number of processes, one for each GPU."""
        return self.nodes * self.gpus_per_node

    @property
    def bandwidth(self) -> float:
        """Bytes per second over the slowest link that a rank sends on."""
        return self.bandwidth_among(self.world_size)

    def bandwidth_among(self, group_size: int) -> float:
        """Bytes per second that a rank sends in a group of so many neighbouring ranks."""
        is_within = group_size <= self.gpus_per_node
        return 1e9 * (self.within_node_gbs if is_within else self.between_nodes_gbs)

    def file_seconds(self, num_bytes: float) -> float:
        """Return how long the nodes take to write or read so many bytes together, each an equal share."""
        return max(num_bytes / self.nodes / self.node_storage_gbs, num_bytes / self.storage_gbs) / 1e9
