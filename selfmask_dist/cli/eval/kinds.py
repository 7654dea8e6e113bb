"""The kinds of evaluation: functions of a subject's stored embeddings. A new one is an entry of `KINDS`."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfmask_dist import data, evals
from selfmask_dist.cli.eval.masks import measure_masks
from selfmask_dist.cli.eval.results import Results, Row, UnavailableError
from selfmask_dist.cli.eval.subject import EvalSubject
from selfmask_dist.cli.eval.targets import measure_targets
from selfmask_dist.common.plots import draw_bars, draw_lines
from selfmask_dist.evals.embeddings import Embeddings
from selfmask_dist.evals.knn import KS, TEMPERATURES
from selfmask_dist.evals.low_shot import SHARES
from selfmask_dist.evals.probe_heads import EPOCHS
from selfmask_dist.evals.search import Precision


@dataclass(frozen=True)
class EvalOptions:
    """What the command line chooses.

    ks: numbers of neighbours; none stands for the usual ones. precision, memory_mib: of the search. tries, c:
    draws and strength of low-shot. epochs: of the probes by SGD.
    """

    ks: tuple[int, ...] = ()
    precision: Precision = "float32"
    memory_mib: float | None = None
    tries: int = 5
    c: float = 1.0
    epochs: int = EPOCHS


def measure_knn(subject: EvalSubject, options: EvalOptions) -> Results:
    """Classify test images by their neighbours among all training images, for every k and temperature, and
    each training image by the others.
    """
    notes = subject.require_labels("knn")
    first = options.ks[0] if options.ks else subject.config.eval.knn_k[0]
    temperature = subject.config.eval.knn_temperature
    size = int(data.count_labels(subject.sources["train"])[1:].sum())
    if size < 2:
        raise UnavailableError("k-NN needs two training images with a label")
    ks = sorted(options.ks or {*KS, *subject.config.eval.knn_k})
    if not options.ks and max(ks) >= size:  # of those asked for, the search says which is too large
        notes.append(
            f"the bank holds {size} images: k = {', '.join(str(k) for k in ks if k >= size)} left out"
        )
        ks = [k for k in ks if k < size]
        first = min(first, max(ks))
    temperatures = tuple(dict.fromkeys((temperature, *TEMPERATURES)))
    search: dict[str, Any] = {
        "num_classes": subject.num_classes,
        "ranks": subject.world,
        "memory_mib": options.memory_mib,
        "precision": options.precision,
    }
    rows, details = [], {}
    for view in subject.views:
        bank, queries = subject.rows(view, "train"), subject.rows(view, "test")
        found = evals.global_knn(bank, queries, ks=ks, temperatures=temperatures, **search)
        some = _evenly_spaced(bank, subject)
        others = min(first, size - 1)
        left_out = evals.global_knn(
            bank, some, ks=[others], temperatures=[temperature], query_ids=some.ids, **search
        )
        values: dict[str, float | None] = {f"knn{k}": found.accuracy[k, temperature] for k in ks}
        values[f"knn{first} balanced"] = found.balanced[first, temperature]
        values[f"knn{first} plain vote"] = found.accuracy[first, math.inf]
        values[f"knn{first} of train"] = left_out.accuracy[others, temperature]
        rows.append(Row(view.name, values))
        details[view.name] = {
            "accuracy": {_name(s): value for s, value in found.accuracy.items()},
            "balanced": {_name(s): value for s, value in found.balanced.items()},
            "per_class": found.per_class[first, temperature].tolist(),
        }
    series = {row.name: [row.values[f"knn{k}"] for k in ks] for row in rows}
    return Results(
        "knn",
        list(rows[0].values),
        rows,
        baseline="frozen",
        headline=f"knn{first}",
        settings={"k": ks, "temperature": temperature, "temperatures": [_number(t) for t in temperatures]},
        details={"classes": list(subject.classes), "views": details},
        notes=notes,
        plot=lambda path: draw_lines(
            path, ks, series, xlabel="neighbours", title=f"k-NN, temperature {temperature:g}"
        ),
    )


def _evenly_spaced(bank: Embeddings, subject: EvalSubject) -> Embeddings:
    """Return this rank's part of at most `eval.monitor_samples` training samples of all ranks; they are the
    same under any number of ranks.
    """
    total, limit = len(subject.sources["train"]), subject.config.eval.monitor_samples
    wanted = np.linspace(0, total - 1, min(total, limit)).round().astype(np.int64)
    chosen = torch.isin(bank.ids, torch.from_numpy(wanted).to(bank.ids.device))
    return bank.where(chosen)


def measure_probe(subject: EvalSubject, options: EvalOptions) -> Results:
    """Train linear probes: logistic regression by L-BFGS, and the best of many (rate, decay) pairs by SGD."""
    notes = subject.require_labels("probe")
    rows, details, probes = [], {}, {}
    for view in subject.views:
        bank, queries = subject.rows(view, "train"), subject.rows(view, "test")
        common: dict[str, Any] = {"seed": subject.config.seed, "ranks": subject.world}
        probe = evals.linear_probe(bank, queries, **common)
        heads = evals.probe_heads(bank, queries, epochs=options.epochs, **common)
        probes[view.name] = probe
        rows.append(Row(view.name, {"probe": probe.accuracy, "probe by SGD": heads.accuracy}))
        if not probe.is_converged:
            notes.append(f"{view.name}: the probe stopped before it converged")
        details[view.name] = {
            "l2": probe.l2,
            "validation": probe.validation,
            "lr": heads.lr,
            "weight_decay": heads.weight_decay,
            "heads": [
                {"lr": lr, "weight_decay": decay, "validation": value, "epochs": heads.epochs[lr, decay]}
                for (lr, decay), value in heads.validation.items()
            ],
        }
    for members in (view.members for view in subject.views if view.members):
        labels = subject.rows(members[0], "test").labels
        accuracy = evals.mean_logits_accuracy([probes[view.name] for view in members], labels, subject.world)
        rows.append(Row("mean of logits", {"probe": accuracy}))
    columns = ["probe", "probe by SGD"]
    return Results(
        "probe",
        columns,
        rows,
        baseline="frozen",
        settings={"epochs": options.epochs, "seed": subject.config.seed},
        details={"views": details},
        notes=notes,
        plot=_bars(columns, rows, "Linear probes"),
    )


def measure_low_shot(subject: EvalSubject, options: EvalOptions) -> Results:
    """Train a probe on few labels of each class, several times with other draws."""
    notes = subject.require_labels("lowshot")
    rows, details, columns = [], {}, {}
    for view in subject.views:
        bank, queries = subject.rows(view, "train"), subject.rows(view, "test")
        found = evals.low_shot(
            bank,
            queries,
            tries=options.tries,
            c=options.c,
            seed=subject.config.seed,
            ranks=subject.world,
        )
        columns = {share: f"{100 * share:g} %" for share in found}
        rows.append(
            Row(
                view.name,
                {name: found[share].mean for share, name in columns.items()},
                {name: found[share].spread for share, name in columns.items()},
            )
        )
        details[view.name] = {
            name: {"labels_per_class": found[share].per_class, "accuracies": list(found[share].accuracies)}
            for share, name in columns.items()
        }
    missing = [share for share in SHARES if share not in columns]
    if missing:
        shares = ", ".join(f"{100 * share:g} %" for share in missing)
        notes.append(f"left out, for less than one label per class: {shares}")
    if not columns:
        raise UnavailableError(
            f"data.train has too few labels: even {max(SHARES):.0%} is less than one per class"
        )
    names = list(columns.values())
    xs = [100 * share for share in columns]
    return Results(
        "lowshot",
        names,
        rows,
        baseline="frozen",
        settings={
            "tries": options.tries,
            "shares": list(columns),
            "seed": subject.config.seed,
            "c": options.c,
        },
        details={"views": details},
        notes=notes,
        plot=lambda path: draw_lines(
            path,
            xs,
            {row.name: [row.values[name] for name in names] for row in rows},
            spread={row.name: [row.spread[name] for name in names] for row in rows},
            xlabel="labels (%)",
            title=f"Probe on few labels, mean of {options.tries} draws",
        ),
    )


def measure_zero_shot(subject: EvalSubject, _options: EvalOptions) -> Results:
    """Give each image the class whose prompts' text embedding is nearest; for open_clip backbones."""
    notes = subject.require_labels("zeroshot")
    backbone = subject.backbone
    if backbone.text_embeddings is None:
        raise UnavailableError(
            f"{backbone.spec.name} has no text tower with weights, which zeroshot needs; an open_clip "
            "backbone with a pretrained tag or a whole CLIP model's file has one"
        )
    if not subject.classes:
        raise UnavailableError("the data names no classes, which zeroshot needs for its prompts")
    from selfmask_dist.objectives.supervised import embed_classes

    prompts = subject.config.objective.prompts
    texts: dict[str, Tensor] = {"all prompts": embed_classes(backbone, subject.classes, prompts)}
    if len(prompts) > 1:
        texts |= {prompt: embed_classes(backbone, subject.classes, [prompt]) for prompt in prompts}
    rows, details = [], {}
    for view in subject.views:
        if view.mode is not None or view.whiten:
            continue  # no longer in the space of the texts
        queries = subject.rows(view, "test")
        found = {
            name: evals.zero_shot(queries.features, queries.labels, text, ranks=subject.world)
            for name, text in texts.items()
        }
        top1, top5 = found["all prompts"]
        rows.append(Row(view.name, {"zeroshot": top1, "zeroshot top 5": top5}))
        details[view.name] = {name: accuracy for name, (accuracy, _) in found.items()}
    columns = ["zeroshot", "zeroshot top 5"]
    return Results(
        "zeroshot",
        columns,
        rows,
        baseline="frozen",
        settings={"prompts": list(prompts)},
        details={"classes": list(subject.classes), "views": details},
        notes=notes,
        plot=_bars(columns, rows, "Zero-shot"),
    )


def measure_label_free(subject: EvalSubject, options: EvalOptions) -> Results:
    """Measure what needs no label: dimensions used, collapse, and how many frozen neighbours are kept."""
    size = len(subject.sources["train"])
    k = min(subject.config.eval.knn_k[0], size)
    rows, spectra = [], {}
    reference: Tensor | None = None
    for view in subject.views:
        bank = subject.rows(view, "train", labelled=False)
        queries = subject.rows(view, "test", labelled=False)
        shape = evals.measure_shape(bank.features, subject.world)
        near = evals.neighbours(
            bank.features,
            queries.features,
            k=k,
            bank_ids=bank.ids,
            ranks=subject.world,
            memory_mib=options.memory_mib,
            precision=options.precision,
        )
        reference = near if reference is None else reference
        values: dict[str, float | None] = {
            "effective rank": shape.effective_rank,
            "mean cosine": shape.mean_cosine,
            f"frozen's {k} neighbours kept": evals.kept(near, reference, subject.world),
        }
        rows.append(Row(view.name, values))
        spectra[view.name] = shape.spectrum.tolist()
    length = min(map(len, spectra.values()))
    return Results(
        "labelfree",
        list(rows[0].values),
        rows,
        baseline="frozen",
        settings={"k": k},
        details={"spectra": spectra},
        plot=lambda path: draw_lines(
            path,
            range(1, length + 1),
            {name: spectrum[:length] for name, spectrum in spectra.items()},
            xlabel="principal direction",
            title="Share of the variance",
            ylabel="share",
        ),
    )


KINDS: dict[str, Callable[[EvalSubject, EvalOptions], Results]] = {
    "knn": measure_knn,
    "probe": measure_probe,
    "lowshot": measure_low_shot,
    "zeroshot": measure_zero_shot,
    "labelfree": measure_label_free,
    "masks": measure_masks,
    "targets": measure_targets,
}


def _bars(columns: list[str], rows: list[Row], title: str) -> Callable[[Any], None]:
    values = {row.name: [row.values.get(column) for column in columns] for row in rows}
    return lambda path: draw_bars(path, columns, values, title)


def _name(setting: tuple[int, float]) -> str:
    k, temperature = setting
    return f"k={k} T={_number(temperature)}"


def _number(temperature: float) -> float | str:
    return "plain" if math.isinf(temperature) else temperature
