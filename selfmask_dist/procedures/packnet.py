"""PackNet as a run: tasks 1 to `procedure.tasks`, trained one after the other into one network."""

import math
from typing import Any

from safetensors.torch import load_file

from selfmask_dist.procedures import packnet_math as packnet
from selfmask_dist.training.build import build_backbone, open_data
from selfmask_dist.training.chain import Chain, class_tasks, mean_of, share_of
from selfmask_dist.training.finetune import WHOLE

_OWNERS, _CODES = "owners.safetensors", "codes.safetensors"


def run_packnet(chain: Chain) -> dict[str, Any]:
    """Train, prune and retrain every task; `packed.safetensors` holds weights and owners."""
    section, config = chain.config.procedure, chain.config
    train, test = open_data(config)
    tasks = class_tasks(chain, train, test)
    encoder = build_backbone(config).encoder
    names = packnet.packable(encoder, section.include)
    owners = packnet.nobodys({name: encoder.get_parameter(name) for name in names})
    weights_path, results, shares = config.backbone.weights, [], []
    for number, task in enumerate(tasks, start=1):
        common: dict[str, Any] = {
            "data": task.data,
            # statistics are the first task's
            "backbone": {"weights": weights_path, **({"batchnorm": "frozen"} if number > 1 else {})},
        }
        codes = chain.once(f"{task.name}/train-{_CODES}", packnet.train_codes, encoder, owners, number)
        chain.train(f"{task.name}-train", **common, procedure={"hold": str(codes)})
        trained = load_file(chain.folder / f"{task.name}-train" / WHOLE)
        owners = load_file(
            chain.once(f"{task.name}/{_OWNERS}", packnet.reserve, trained, owners, number, keep=section.keep)
        )
        codes = chain.once(f"{task.name}/{_CODES}", packnet.retrain_codes, encoder, owners, number)
        result = chain.train(
            f"{task.name}-retrain",
            **common,
            mask={"init_from": str(chain.folder / f"{task.name}-train")},
            procedure={"hold": str(codes)},
            train={"epochs": config.train.epochs * section.retrain},
            # the head has learned by now
            optim={"warmup_epochs": config.optim.warmup_epochs * section.retrain, "head_first_epochs": 0.0},
        )
        weights_path = str(chain.folder / f"{task.name}-retrain" / WHOLE)
        results.append(result["adapted"])
        shares.append(share_of({name: owner != packnet.NOBODY for name, owner in owners.items()}))
    last = load_file(str(weights_path))
    packed = chain.once(
        "packed.safetensors", dict, {**last, **{f"owners/{name}": owner for name, owner in owners.items()}}
    )
    bits = packnet.stored_bits(owners, section.tasks)
    return {
        "tasks": [
            {"classes": [train.classes[c] for c in task.classes], "active": share, **result}
            for task, share, result in zip(tasks, shares, results, strict=True)
        ],
        "adapted": mean_of(results),
        "active": shares[-1],
        "owner_bits": bits,
        "stored_bytes": math.ceil(bits / 8) + sum(t.numel() * t.element_size() for t in last.values()),
        "packed_bytes": packed.stat().st_size,
    }
