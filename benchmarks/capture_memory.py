"""How much memory does a capture take? The peak with all Grams of a sentence encoder at once, and with half of them.

    python benchmarks/capture_memory.py --json capture_memory.json

Linux only; needs the extra `test`. all-MiniLM-L6-v2 is captured on newspaper articles, each time in a process of its
own: in one pass (case ``minilm_all``), and with ``memory=`` half of the bytes of its Grams (``minilm_half``). `peak_mb`
is the highest resident memory during the capture over the highest while the model only runs on the same batches, twice.
That depends on how much malloc keeps of the activations that the model has freed: `used_mb` is the same where malloc
gives back at once what is freed (MALLOC_MMAP_THRESHOLD_ of 1 MiB). `planned_mb` is what `comq_np.plan_calibration` says
of the largest pass beforehand, `peak_over_planned` and `used_over_planned` are the ones over the other, and `grams_mb`
is the size of all Grams. `bits` are those of the inputs: nothing is quantized. Both files must be the same to the bit.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import multiprocessing
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable

import torch

import comq_np
import comq_torch
import minilm
from comq_np.table import Figures
from memory import MB, RESET_PEAK, resident

BITS, TEXTS = 32, 32
#: Has malloc give back at once what is freed of so many bytes or more.
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}


@dataclasses.dataclass(frozen=True)
class Capture:
    """One capture, for a process of its own."""

    path: pathlib.Path
    texts: int
    memory: int | None = None

    def peak(self) -> int:
        """Bytes that it takes beyond those that running the model does."""
        model, tokenizer = minilm.load_model()
        batches = minilm.tokenize(tokenizer, minilm.load_texts().calibration[: self.texts])
        comq_torch.capture(torch.nn.Linear(384, 2), [torch.ones(2048, 384)], self.path)  # loads what it needs
        for parameter in model.parameters():
            parameter.sum()  # its file is mapped: only what was looked at is in memory
        running = self._highest(lambda: [minilm.embed(model, batches) for _ in range(2)])
        layers, select = minilm.linear_layers(model), minilm.tokens_that_count
        return (
            self._highest(
                lambda: comq_torch.capture(model, batches, self.path, layers, select=select, memory=self.memory)
            )
            - running
        )

    @staticmethod
    def _highest(work: Callable[[], object]) -> int:
        pathlib.Path("/proc/self/clear_refs").write_text(RESET_PEAK, encoding="ascii")
        work()
        return resident("VmHWM")


def measured(capture: Capture, **environment: str) -> int:
    """`peak` in a fresh process with these variables."""
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as process:
            return process.submit(capture.peak).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def planned(path: pathlib.Path, memory: int | None) -> comq_np.CalibrationPlan:
    """The plan for a captured model."""
    shared: dict[int, list[str]] = {}
    with comq_np.CalibrationFile(path) as file:
        rows = file.describe()
    for row in rows:
        shared.setdefault(row["gram"], []).append(row["layer"])
    shapes = {row["layer"]: (row["rows"], row["columns"]) for row in rows}
    return comq_np.plan_calibration(shapes, memory, shared=shared.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=TEXTS, help=f"texts to capture on (default: {TEXTS})")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args()
    if not sys.platform.startswith("linux"):
        raise SystemExit("capture_memory.py needs Linux, whose /proc tells the peak of a process")

    figures, files = Figures(), []
    with tempfile.TemporaryDirectory() as folder:
        memory, grams = None, 0
        for name in ("all", "half"):
            path = pathlib.Path(folder, f"{name}.h5")
            capture = Capture(path, options.texts, memory)
            peak, used = measured(capture), measured(capture, **GIVEN_BACK)
            plan = planned(path, memory)
            grams = grams or sum(part.gram_bytes for part in plan.passes)
            most = max(part.memory for part in plan.passes)
            figures.add(
                f"minilm_{name}",
                BITS,
                "capture",
                grams_mb=grams / MB,
                passes=len(plan.passes),
                planned_mb=most / MB,
                peak_mb=peak / MB,
                peak_over_planned=peak / most,
                used_mb=used / MB,
                used_over_planned=used / most,
            )
            files.append(path.read_bytes())
            memory = grams // 2
    if files[0] != files[1]:
        raise SystemExit("The file of several passes is not the same as that of one.")
    figures.show(options.json)


if __name__ == "__main__":
    main()
