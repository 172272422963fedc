"""Check and time every CUDA path, results against the CPU's, in one call of at most nine minutes.

    python -m experiments.gpu_check --out gpu_check   # on the machine with a GPU
    python -m experiments.gpu_check --out check --parts correctness --sizes tiny
    python -m experiments.gpu_check --out small --pack 8   # tokens to take along

Each part is a process with a time limit of its own; the next one starts whatever became of the
last. Writes OUT/gpu_check.json and OUT/gpu_check.md. A part that lacks a library, a file or CUDA
is skipped by name. Parts are in gpu_correctness.py, gpu_speed.py and gpu_qwen.py.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import subprocess
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from common import cli
from common.errors import UserError
from common.files import write_json
from experiments import gpu_bench
from qwenvl_dataloader import RealQwenVLDataset

# part → module, and its share of --time_limit in seconds of 540; what one leaves, the later get
PARTS = {
    "correctness": ("gpu_correctness", 90),
    "training": ("gpu_speed", 90),
    "svd": ("gpu_speed", 170),
    "extraction": ("gpu_qwen", 70),
    "language": ("gpu_qwen", 60),
    "codec": ("gpu_codec", 50),
}
STARTS_IN = 25  # seconds until torch and transformers are there: less is left to no part
PACKAGES = ("torch", "transformers", "numpy", "safetensors", "pyarrow", "constriction")


def get_args_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    what = parser.flags("what is run")
    what("--parts", PARTS, list(PARTS), ", ".join(PARTS), metavar="PART")
    sizes = ("auto", "full", "tiny")
    what("--sizes", sizes, "auto", "auto: those of the 3B model on CUDA, tiny ones elsewhere")
    what("--time_limit", cli.Number(float, 1), 540.0, "seconds of all parts together")
    what.switch("--in_process", "parts in this process, without limits of their own")
    where = parser.flags("files and device")
    where("--out", cli.folder, "gpu_check", "folder of the two files that are written")
    where("--device")
    where("--cache_dir", help="cache whose first images' tokens are used, if it exists")
    where("--tokens", cli.file, None, "what --pack wrote, instead of a cache")
    where("--pack", cli.Number(int, 1, 64))(
        "only write the tokens of the cache's first N images to OUT/tokens.safetensors"
    )
    return parser


def main(args: argparse.Namespace) -> int:
    out, device = Path(args.out), cli.pick_device(args.device)
    if args.tokens and not Path(args.tokens).is_file():
        raise UserError(f"--tokens {args.tokens} does not exist: write one with --pack")
    out.mkdir(parents=True, exist_ok=True)
    if args.pack:
        return pack(args, out)
    begun = time.perf_counter()
    tiny = args.sizes == "tiny" or (args.sizes == "auto" and device.type != "cuda")
    setting = gpu_bench.Setting(str(device), tiny, args.cache_dir, args.tokens)
    sizes = "tiny" if tiny else "full"
    report = {"environment": describe(device), "sizes": sizes, "parts": []}
    print(json.dumps(report["environment"]))
    for index, name in enumerate(args.parts):
        left = args.time_limit - (time.perf_counter() - begun)
        later = sum(PARTS[other][1] for other in args.parts[index:])
        limit = left * PARTS[name][1] / later
        print(f"{name}: at most {limit:.0f} s", flush=True)
        report["parts"].append(run_part(name, setting, out, limit, args.in_process))
        report["seconds"] = round(time.perf_counter() - begun, 1)
        # after every part: a call that is cut off leaves what it had
        write_json(out / "gpu_check.json", report)
        (out / "gpu_check.md").write_text(as_markdown(report))
    print((out / "gpu_check.md").read_text())
    rows = [row for part in report["parts"] for row in part["rows"]]
    wrong = [r for r in rows if r["status"] in ("failed", "differs")]
    broken = [p for p in report["parts"] if p["status"] != "done"]
    found = f"{len(rows)} rows, {len(wrong)} of them failed or differ, {len(broken)} parts not done"
    print(f"wrote {out}/gpu_check.json and gpu_check.md: {found}")
    return 1 if wrong or broken else 0


def pack(args: argparse.Namespace, out: Path) -> int:
    """Write a few images' tokens [n, T, D] as cached."""
    dataset = RealQwenVLDataset(args.cache_dir)
    rows = list(range(min(args.pack, len(dataset))))
    path = out / "tokens.safetensors"
    save_file({"features": dataset[rows].contiguous()}, path, {"data": dataset.label})
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB): type --tokens {path}")
    return 0


def describe(device: torch.device) -> dict:
    """Card, driver and versions."""
    found = dict(cli.environment(device)) | {"cuda": torch.version.cuda, "device_type": device.type}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["memory_gib"] = round(properties.total_memory / 2**30, 1)
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=20)
            found["driver"] = answer.stdout.split("\n")[0].strip() or answer.stderr.strip()[:100]
        except (OSError, subprocess.TimeoutExpired) as error:
            found["driver"] = f"not told: {error}"
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


# -------------------------------------------------------------------------------------- one part


def run_part(
    name: str, setting: gpu_bench.Setting, out: Path, limit: float, in_process: bool
) -> dict:
    """{"name", "status", "seconds", "error", "rows"} of one part; its rows reach us one by one, so
    that those measured before a crash or the limit are kept."""
    if limit < STARTS_IN and not in_process:
        return {"name": name, "status": "no time left", "seconds": 0.0, "rows": []}
    begun, path = time.perf_counter(), out / f"rows-{name}.jsonl"
    path.unlink(missing_ok=True)
    status = "done"
    if in_process:
        work(name, setting, path)
    else:
        # a CUDA process that met an illegal address is of no further use, and a fork of one neither
        process = multiprocessing.get_context("spawn").Process(
            target=work, args=(name, setting, path)
        )
        process.start()
        process.join(limit)
        if process.is_alive():
            process.kill()
            process.join()
            status = f"cut off at its limit of {limit:.0f} s"
        elif process.exitcode:
            status = f"its process ended with {process.exitcode}"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    path.unlink(missing_ok=True)
    seconds = round(time.perf_counter() - begun, 1)
    return {"name": name, "status": status, "seconds": seconds, "rows": rows}


def work(name: str, setting: gpu_bench.Setting, path: Path) -> None:
    """Run a part in this process, its rows into `path`, one JSON object a line."""
    with path.open("w") as file:
        for row in gpu_bench.rows_of(name, PARTS[name][0], setting):
            print(json.dumps(row), file=file, flush=True)


def as_markdown(report: dict) -> str:
    """One table of all rows, below the line of card, driver and versions."""
    lines = ["# One call on " + str(report["environment"]["device"]), ""]
    lines += [f"- {key}: {value}" for key, value in report["environment"].items()]
    lines += [f"- sizes: {report['sizes']}; {report['seconds']} s in all"]
    lines += [f"- part {p['name']}: {p['status']}, {p['seconds']} s" for p in report["parts"]]
    lines += ["", "| part | what | status | value | unit | note |", "| --- " * 6 + "|"]
    for part in report["parts"]:
        for row in part["rows"]:
            value = row["value"]
            shown = f"{value:.4g}" if isinstance(value, float) else "" if value is None else value
            note = str(row["note"]).replace("|", "/")
            cells = part["name"], row["what"], row["status"], shown, row["unit"], note
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    cli.run(main, get_args_parser())
