"""The tail exponents of the layers' spectra, which AlphaPruning alone reads: measured when it is first asked for."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from lop.model.adapter import place_and_dtype
from lop.model.tensors import ffn_layer, ffn_part
from lop.run.run import Run
from lop.storage.files import read_as, write_json


@dataclass(frozen=True)
class Spectra:
    """Of one model.

    Attributes:
        exponents: [L] float64, the mean of `tail_exponent` over each layer's three FFN matrices.
        seconds: that measuring them took, once for the model.
    """

    exponents: np.ndarray
    seconds: float


def layer_spectra(run: Run, *, progress: bool = True) -> Spectra:
    """The spectra of the run's dense model: read from the run's folder, or measured and written there.

    Memory: one FFN matrix, and its Gram matrix in float32, on the run's device.

    Raises:
        LopError: the checkpoint or the file is damaged.
    """
    path = run.spectra_file
    if path.exists():
        model, known = read_as(path, _parse)
        if model == run.model_fingerprint:
            return known
    start = time.perf_counter()
    exponents = _measure(run, progress=progress)
    spectra = Spectra(exponents, time.perf_counter() - start)
    write_json(path, {"model": run.model_fingerprint, "exponents": exponents.tolist(), "seconds": spectra.seconds})
    return spectra


def tail_exponent(weight: Tensor) -> float:
    """The exponent α of a power law fitted to the tail of a matrix's spectrum: smaller is heavier-tailed.

    Hill's estimator over the upper half of the n eigenvalues λ of `WᵀW` (or `WWᵀ`, the smaller), with k = n // 2:
    `α = 1 + k / Σ_{i ≤ k} ln(λ_(n−i+1) / λ_(n−k))` (PL_Alpha_Hill of AlphaPruning, Lu et al., NeurIPS 2024).

    Args:
        weight: [m, n] with min(m, n) > 1.
    """
    matrix = weight.float()
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    spectrum = torch.linalg.eigvalsh(gram).clamp_min(torch.finfo(torch.float32).tiny).double()
    half = len(spectrum) // 2
    return 1 + half / max(float((spectrum[-half:] / spectrum[-half - 1]).log().sum()), 1e-12)


def _parse(data: Any) -> tuple[str, Spectra]:
    return data["model"], Spectra(np.array(data["exponents"], np.float64), float(data["seconds"]))


def _measure(run: Run, *, progress: bool) -> np.ndarray:
    torch.set_num_threads(run.config.threads)
    device, _ = place_and_dtype(run.config.device, run.config.dtype, run.model_folder)
    matrices = {name: info for name, info in run.tensors.items() if ffn_part(name)}
    found: dict[int, list[float]] = {}
    for name, info in tqdm(matrices.items(), desc="spectra", unit="matrix", disable=not progress):
        with safe_open(info.file, framework="pt") as file:
            found.setdefault(ffn_layer(name), []).append(tail_exponent(file.get_tensor(name).to(device)))
    return np.array([np.mean(found[layer]) for layer in sorted(found)])
