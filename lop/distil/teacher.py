"""What the dense model says to the samples that a student learns from: written down once, and read in every step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lop.distil.loss import Likeliest, likeliest
from lop.model.backbone import Backbone, Group
from lop.model.encoding import Encoded, EncodedSample, by_length
from lop.search.scoring import Scoring
from lop.storage.files import atomic_file, disk_errors, read_json, write_json
from lop.storage.fingerprint import check_fingerprints, fingerprint

_ABOUT = "notes.json"
_TAILS = "reward.safetensors"
# Tokens whose logits are in memory together.
_LOGITS = 1024


@dataclass(frozen=True)
class Note:
    """What the dense model says to one sample.

    Attributes:
        likeliest: the next token's distributions at the P places that are no image's.
        states: [layers, P, H], after each layer that is matched, there.
    """

    likeliest: Likeliest
    states: Tensor


@dataclass(frozen=True)
class Notes:
    """Notes of samples in a folder.

    Attributes:
        made_from: fingerprints of all that they depend on; the folder's name follows from them.
    """

    folder: Path
    made_from: Mapping[str, str]

    @classmethod
    def below(cls, work: Path, made_from: Mapping[str, str]) -> "Notes":
        """Where notes of that origin are kept."""
        return cls(work / f"teacher-{fingerprint(dict(made_from))}", made_from)

    @property
    def are_there(self) -> bool:
        """Whether all are written.

        Raises:
            LopError: they are damaged, or were made from something else.
        """
        if not (self.folder / _ABOUT).exists():
            return False
        check_fingerprints(str(self.folder), read_json(self.folder / _ABOUT), self.made_from)
        return True

    def make(
        self,
        backbone: Backbone,
        samples: Sequence[EncodedSample],
        reward: Encoded,
        *,
        top_k: int,
        layers: Sequence[int],
        batch_tokens: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Writes what is not there yet, batch by batch; one that was interrupted is gone on with.

        Memory: one batch with its states, and the logits of 1,024 tokens.

        Args:
            backbone: the dense model's.
            reward: the samples that the student is judged by.
            top_k: how many tokens of each distribution are kept one by one.
            layers: after which the states are kept.
            batch_tokens: the most tokens of one batch.
            progress: told the tokens done and in all.
        """
        lengths = {index: sample.length for index, sample in enumerate(samples)}
        done, total = 0, sum(lengths.values())
        for number, batch in enumerate(by_length(lengths, batch_tokens)):
            file = self.folder / f"{number:06d}.safetensors"
            if not file.exists():
                _write(file, _notes(backbone, {index: samples[index] for index in batch}, top_k, layers))
            done += sum(lengths[index] for index in batch)
            progress(done, total)
        tails = Scoring(backbone, reward).all_tails()
        _write(self.folder / _TAILS, {f"{index}": tail for index, tail in enumerate(tails)})
        write_json(self.folder / _ABOUT, dict(self.made_from))

    def tails(self) -> list[Tensor]:
        """The dense model's normed last states [M, H] at the tails of each reward batch."""
        with safe_open(self.folder / _TAILS, framework="pt") as file:
            return [file.get_tensor(f"{index}") for index in range(len(file.keys()))]

    def reader(self) -> Callable[[int], Note]:
        """What finds a sample's note by its index; files stay open."""
        files = [safe_open(path, framework="pt") for path in sorted(self.folder.glob("[0-9]*.safetensors"))]
        places: dict[str, Any] = {name: file for file in files for name in file.keys()}  # noqa: SIM118

        def read(index: int) -> Note:
            def part(name: str) -> Tensor:
                return places[f"{index}.{name}"].get_tensor(f"{index}.{name}")

            found = Likeliest(part("log_probabilities"), part("tokens").long(), part("rest"))
            return Note(found, part("states"))

        return read


@torch.inference_mode()
def _notes(
    backbone: Backbone, samples: Mapping[int, EncodedSample], top_k: int, layers: Sequence[int]
) -> dict[str, Tensor]:
    device = backbone.norm.device
    embeddings, rotation = (
        torch.cat([getattr(sample, name) for sample in samples.values()]).to(device)
        for name in ("embeddings", "rotation")
    )
    groups = [Group(1, sample.length, sample.length) for sample in samples.values()]
    text = torch.cat([~sample.is_image for sample in samples.values()]).to(device)
    kept, x = {}, embeddings
    for layer, states in enumerate(backbone.hidden(embeddings, rotation, groups)):
        x = states
        if layer in layers:
            kept[layer] = x[text].cpu()  # Before the next layer adds to it.
    normed = backbone.normed(x[text])
    found = [likeliest(backbone.logits(part), top_k) for part in normed.split(_LOGITS)]
    parts = {
        "log_probabilities": torch.cat([part.log_probabilities for part in found]),
        "tokens": torch.cat([part.tokens for part in found]).int(),
        "rest": torch.cat([part.rest for part in found]),
    }
    counts = [int((~sample.is_image).sum()) for sample in samples.values()]
    states = torch.stack([kept[layer] for layer in layers], 1) if layers else normed.new_empty(len(normed), 0)
    split = {name: value.cpu().split(counts) for name, value in {**parts, "states": states}.items()}
    return {
        f"{index}.{name}": (values[number].transpose(0, 1) if name == "states" else values[number]).contiguous()
        for name, values in split.items()
        for number, index in enumerate(samples)
    }


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    with atomic_file(path) as temporary, disk_errors(path):
        save_file(tensors, temporary)
