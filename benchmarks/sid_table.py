"""Every quantizer with every way to resolve collisions, on any embeddings: one Markdown table per file of embeddings.

    python -m benchmarks.sid_table --data_path a.emb-minilm-td.npy b.emb-minilm-td.npy --output_dir output/sid_table

Trains each quantizer once (seconds: the quantizer's, without imports) and makes its index four times. The RQ-VAEs are
small ones for a CPU. Codes used, perplexity and errors are those before collisions are resolved; the error after it is
shown too. `rec.` is the quantizer's own error and `fitted` that of each code's mean residual (`rq.sid_report`).
Finished runs in --output_dir are skipped, and have no seconds then.
"""

import contextlib
import io
import json
import time
from dataclasses import dataclass
from pathlib import Path

from minionerec.common.errors import UserError
from minionerec.common.options import INPUT, OUTPUT, option, run
from rq import generate_indices, rqkmeans_constrained, rqkmeans_faiss, rqkmeans_plus, rqvae
from rq.collisions import MODES

SMALL = {"batch_size": 512, "eval_step": 20, "warmup_epochs": 5}
SMALL |= {"lr_scheduler_type": "linear", "device": "cpu", "save_limit": 0, "overwrite": True}


@dataclass
class Options:
    data_path: list[str] = option([], "one or more <D>.emb-<plm>-td.npy", role=INPUT)
    output_dir: str = option("output/sid_table", "folder for checkpoints and indexes", role=OUTPUT)
    k: int = option(256, "codes per level")
    l: int = option(3, "levels")  # noqa: E741 (the published name)
    layers: list[int] = option([256], "RQ-VAE, RQ-KMeans+: hidden sizes")
    epochs: int = option(60, "RQ-VAE, RQ-KMeans+: epochs")
    seed: int = option(42, "seed of every quantizer")

    def __post_init__(self):
        if not self.data_path:
            raise UserError("--data_path is required: one or more <D>.emb-<plm>-td.npy")


def kmeans(script, method: str, name: str):
    def make(o: Options, data: str, folder: Path, **more) -> Path:
        script.main(
            script.Options(
                data_path=data, output_file=str(folder / f"{name}.index.json"), k=o.k, l=o.l, seed=o.seed,
                collision="none", overwrite=True, **more,
            )
        )  # fmt: skip
        return folder / f"{name}.codebooks_{method}.npz"

    return make


def make_rqvae(o: Options, data: str, folder: Path, balanced: bool) -> Path:
    checkpoint = folder / ("rqvae_sinkhorn" if balanced else "rqvae")
    sk = {"sk_epsilons": [0.01] * o.l, "sk_iters": 30} if balanced else {}
    options = SMALL | {"ckpt_dir": str(checkpoint), "layers": o.layers, "num_emb_list": [o.k] * o.l, "lr": 3e-3, **sk}
    options["quant_loss_weight"] = 0.1
    rqvae.main(rqvae.Options(data_path=data, epochs=o.epochs, seed=o.seed, **options))
    return checkpoint


def make_plus(o: Options, data: str, folder: Path) -> Path:
    books = folder / "constrained.codebooks_constrained.npz"
    options = SMALL | {
        "ckpt_dir": str(folder / "plus"),
        "layers": o.layers,
        "pretrained_codebook_path": str(books),
        "lr": 1e-3,
    }
    rqkmeans_plus.main(rqkmeans_plus.Options(data_path=data, epochs=o.epochs, seed=o.seed, collision="none", **options))
    return folder / "plus"


CONSTRAINED = kmeans(rqkmeans_constrained, "constrained", "constrained")
QUANTIZERS = {
    "RQ-VAE": lambda *a: make_rqvae(*a, balanced=False),
    "RQ-VAE, Sinkhorn": lambda *a: make_rqvae(*a, balanced=True),
    "RQ-KMeans (faiss)": kmeans(rqkmeans_faiss, "faiss", "faiss"),
    "constrained RQ-KMeans, flow": lambda *a: CONSTRAINED(*a, solver="flow"),
    "constrained RQ-KMeans, transport": lambda *a: kmeans(rqkmeans_constrained, "constrained", "transport")(
        *a, solver="transport"
    ),
    "RQ-KMeans+": make_plus,
}
HEADER = "| quantizer | collisions | before | after | codes used | perplexity | rec. | rec. after | fitted | seconds |"


def row(name: str, mode: str, report: dict | None, seconds: float | None, error: str = "") -> str:
    if report is None:
        return f"| {name} | {mode} | refused: {error} |||||||{'' if seconds is None else f' {seconds:.1f} '}|"
    before, after = report["before"], report["after"]
    cells = [name, mode, f"{before['collision_rate']:.4f}", f"{after['collision_rate']:.4f}"]
    cells += [" ".join(map(str, before["codes_used"])), " ".join(f"{x:.0f}" for x in before["perplexity"])]
    cells += [f"{figure['reconstruction_error'][-1]:.4f}" for figure in (before, after)]
    cells += [f"{before['fitted_error'][-1]:.4f}", "-" if seconds is None else f"{seconds:.1f}"]
    return f"| {' | '.join(cells)} |"


def main(options: Options) -> None:
    start = time.perf_counter()
    for data in options.data_path:
        folder = Path(options.output_dir) / Path(data).name.split(".emb-")[0]
        print(f"\n{data}\n\n{HEADER}\n{'|---' * 10}|", flush=True)
        for name, make in QUANTIZERS.items():
            begin, said = time.perf_counter(), io.StringIO()
            with contextlib.redirect_stdout(said):
                checkpoint = make(options, data, folder)
            seconds = time.perf_counter() - begin
            seconds = None if "nothing to do" in said.getvalue() else seconds
            for mode in MODES:
                output = folder / f"{checkpoint.name.split('.')[0]}-{mode}.index.json"
                indexing = {"ckpt_path": str(checkpoint), "data_path": data, "output_file": str(output)}
                indexing |= {"collision": mode, "device": "cpu", "overwrite": True}
                report, error = None, ""
                try:
                    with contextlib.redirect_stdout(io.StringIO()):
                        generate_indices.main(generate_indices.Options(**indexing))
                    report = json.loads(output.with_suffix(".quality.json").read_text())
                except UserError as refused:
                    error = str(refused).split(";")[0]
                print(row(name, mode, report, seconds, error), flush=True)
    print(f"\n{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    run(main, Options)
