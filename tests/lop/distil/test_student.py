"""What learns, and what of it a checkpoint gets."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lop.checkpoint.export import export, read_manifest, rewrite
from lop.distil.plan import lesson
from lop.distil.student import Reader, Student
from lop.distil.teacher import Notes
from lop.errors import LopError
from lop.model.backbone import Group
from lop.model.encoding import Encoded, EncodedSample, encode, encode_each
from lop.model.find import assets
from lop.model.image_settings import ImageSettings
from lop.model.samples import SampleSets
from lop.run.settings import DistilSettings
from lop.search.scoring import Scoring
from lop.stages.distil import _stored
from lop.storage.headers import TensorInfo
from tests.groups import GROUPS, grouped_tiny
from tests.lop.checkpoint.test_heads import ALLOCATION, LAYERS, NEURONS


def student_of(folder: Path, **values: object) -> Student:
    manifest, settings = read_manifest(folder), DistilSettings.model_validate(values)
    return Student(folder, manifest["widths"], manifest.get("groups"), settings, device="cpu")


@pytest.fixture(scope="module")
def read(pruned: Path, samples: SampleSets) -> tuple[list[EncodedSample], Encoded]:
    """A few samples, one by one and side by side."""
    model, few = student_of(pruned).shipped, samples.reward[::120]
    return list(encode_each(model, few, ImageSettings())), encode(model, few, batch_tokens=700)


def end_to_end(samples: list[EncodedSample]) -> tuple[Tensor, Tensor, list[Group]]:
    """What a `Reader` is given."""
    embeddings, rotation = (torch.cat([getattr(s, name) for s in samples]) for name in ("embeddings", "rotation"))
    return embeddings, rotation, [Group(1, sample.length, sample.length) for sample in samples]


def answers(student: Student, read: list[EncodedSample]) -> Tensor:
    """What the backbone that learns says at the answers' places, [A, V]."""
    with torch.no_grad():
        (states,) = Reader(student, ())(*end_to_end(read))
    parts = states.split([sample.length for sample in read])
    found = [part[s.length - len(s.answer) :] for part, s in zip(parts, read, strict=True)]
    return torch.cat(found) @ student.head.T


def scored(student: Student, encoded: Encoded) -> Tensor:
    """The log-probabilities of the answers by the model that is judged."""
    return torch.from_numpy(Scoring(student.shipped.lean_backbone(), encoded).scores().log_probability)


def said(student: Student, read: list[EncodedSample]) -> Tensor:
    """The same by the backbone that learns."""
    logits = answers(student, read).log_softmax(1)
    tokens = torch.cat([sample.answer for sample in read])
    right = logits.gather(1, tokens[:, None])[:, 0]
    return torch.stack([part.sum() for part in right.split([len(sample.answer) for sample in read])]).double()


@pytest.fixture(params=["pruned", "padded", "heads", "padded heads"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of FFNs alone, and with attention pruned: in one layer it is gone, and in one nothing is left."""
    if "heads" not in request.param:
        found: Path = request.getfixturevalue(request.param)
        return found
    folder = tmp_path_factory.mktemp("heads")
    random = np.random.default_rng(5)
    order, groups = (random.permuted(np.tile(np.arange(n), (LAYERS, 1)), axis=1) for n in (NEURONS, GROUPS))
    form = "padded" if "padded" in request.param else "hf"
    export(grouped_tiny(folder), folder / "out", ALLOCATION, order, about={}, groups=groups, format=form)
    return folder / "out"


@pytest.mark.parametrize("rank", [0, 4])
def test_what_learns_says_what_ships(rank: int, checkpoint: Path, read: tuple[list[EncodedSample], Encoded]) -> None:
    student = student_of(checkpoint, lora_rank=rank, weights="backbone")
    assert all(parameter.numel() for parameter in student.parameters())
    one_by_one, together = read
    torch.testing.assert_close(said(student, one_by_one), scored(student, together), rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        for number, parameter in enumerate(student.parameters()):
            torch.manual_seed(number)
            parameter.add_((0.3 if rank else 0.06) * torch.randn_like(parameter))
    changed = said(student, one_by_one)
    assert (changed - scored(student, together)).abs().max() > 0.5
    student.ship(student.weights())
    # But for what a checkpoint's bfloat16 rounds.
    torch.testing.assert_close(changed, scored(student, together), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("rank", [0, 4])
def test_gradients_are_those_of_transformers(
    rank: int, checkpoint: Path, read: tuple[list[EncodedSample], Encoded]
) -> None:
    student = student_of(checkpoint, lora_rank=rank)
    with torch.no_grad():
        for number, parameter in enumerate(student.parameters()):
            torch.manual_seed(number)
            parameter.add_(0.1 * torch.randn_like(parameter))
    samples = read[0]
    weights = [torch.randn(3, sample.length, len(student.backbone.norm.weight)) for sample in samples]

    def gradients(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, student.parameters()))  # Each has one.

    found = torch.stack(Reader(student, [2, 7])(*end_to_end(samples)))
    loss = (found * torch.cat(weights, 1)).sum()
    # By transformers, one sample after the other; its last hidden state is the normed one.
    expected = torch.zeros(())
    for sample, weight in zip(samples, weights, strict=True):
        given = {"inputs_embeds": sample.embeddings[None], "position_ids": sample.positions[:, None]}
        out = student.backbone(**given, use_cache=False, output_hidden_states=True)
        states = torch.stack([out.hidden_states[place][0] for place in (-1, 3, 8)])
        expected = expected + (states * weight).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-2)
    for ours, theirs in zip(gradients(loss), gradients(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3 * float(theirs.abs().max()))


def test_adapters_merged_are_the_adapters(pruned: Path, read: tuple[list[EncodedSample], Encoded]) -> None:
    student = student_of(pruned, lora_rank=4)
    with torch.no_grad():
        for number, parameter in enumerate(student.parameters()):
            torch.manual_seed(number)
            parameter.add_(0.05 * torch.randn_like(parameter))
        with_adapters = answers(student, read[0])
        for name, value in dict(student._merged()).items():  # Unrounded.
            module = student.backbone.get_submodule(name.removesuffix(".weight"))
            module.base_layer.weight.copy_(value)
            for part in (*module.lora_A.values(), *module.lora_B.values()):
                part.weight.zero_()
        torch.testing.assert_close(answers(student, read[0]), with_adapters, rtol=1e-4, atol=1e-4)


def learning(student: Student) -> set[str]:
    return {name for name, parameter in student.backbone.named_parameters() if parameter.requires_grad}


def test_what_is_said_to_learn_learns_and_nothing_else(pruned: Path) -> None:
    ffns, backbone = (student_of(pruned, weights=weights) for weights in ("ffn", "backbone"))
    assert learning(ffns)
    assert all(".mlp." in name for name in learning(ffns))
    assert learning(ffns) < learning(backbone)
    assert {"norm.weight", "layers.0.self_attn.q_proj.bias"} < learning(backbone)
    assert set(ffns.weights()) == {name for name in load_file(pruned / "model.safetensors") if ".mlp." in name and "visual" not in name}  # fmt: skip  # noqa: E501
    adapted = student_of(pruned, weights="ffn", lora_rank=2)
    assert all("lora_" in name for name in learning(adapted))
    assert set(adapted.weights()) == set(ffns.weights())


def test_nothing_learnt_is_the_checkpoint_itself(checkpoint: Path, tmp_path: Path) -> None:
    student = student_of(checkpoint, weights="backbone")
    changed: dict[str, TensorInfo] = _stored(student.weights(), tmp_path)
    rewrite(checkpoint, tmp_path / "again", changed, dense=assets() / "model", about={"recovery": "none"})
    before, after = (load_file(place / "model.safetensors") for place in (checkpoint, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (checkpoint / "config.json").read_bytes() == (tmp_path / "again" / "config.json").read_bytes()


def test_a_tensor_that_does_not_fit_is_refused(pruned: Path, tmp_path: Path) -> None:
    student = student_of(pruned)
    name, value = next((name, value) for name, value in student.weights().items() if name.endswith("down_proj.weight"))
    wrong = _stored({name: value[:, 1:].contiguous()}, tmp_path)
    with pytest.raises(LopError, match=r"down_proj\.weight is \[.*\], and must be \["):
        rewrite(pruned, tmp_path / "out", wrong, dense=assets() / "model", about={})
    assert not (tmp_path / "out").exists()


def test_notes_are_what_the_teacher_says(
    read: tuple[list[EncodedSample], Encoded], shared_tiny: object, tmp_path: Path
) -> None:
    from lop.model.adapter import QwenVL

    assert isinstance(shared_tiny, QwenVL)
    one_by_one, together = read
    told: list[tuple[int, int]] = []
    notes = Notes.below(tmp_path, {"model": "tiny"})
    assert not notes.are_there
    make: Callable[..., None] = notes.make
    arguments = {"top_k": 5, "layers": [0, 7], "batch_tokens": 60}
    backbone = shared_tiny.lean_backbone()
    make(backbone, one_by_one, together, **arguments, progress=lambda *step: told.append(step))
    assert notes.are_there
    total = sum(sample.length for sample in one_by_one)
    assert told[-1] == (total, total)
    kept = {path: path.stat().st_mtime_ns for path in notes.folder.glob("0*")}
    assert len(kept) > 2
    make(backbone, one_by_one, together, **arguments)
    assert kept == {path: path.stat().st_mtime_ns for path in notes.folder.glob("0*")}
    with pytest.raises(LopError, match="made with another model"):
        _ = Notes(notes.folder, {"model": "other"}).are_there

    # By transformers, one sample after the other.
    teacher = shared_tiny.backbone
    for index, sample in enumerate(one_by_one):
        note = notes.reader()(index)
        with torch.no_grad():
            out = teacher(inputs_embeds=sample.embeddings[None], position_ids=sample.positions[:, None], output_hidden_states=True)  # fmt: skip  # noqa: E501
        text = ~sample.is_image
        logits = (out.last_hidden_state[0][text] @ shared_tiny.head.weight.T).log_softmax(1)
        torch.testing.assert_close(note.likeliest.log_probabilities, logits.gather(1, note.likeliest.tokens), rtol=1e-3, atol=1e-3)  # fmt: skip  # noqa: E501
        torch.testing.assert_close(note.likeliest.log_probabilities, logits.topk(5, 1).values, rtol=1e-3, atol=1e-3)
        for states, layer in zip(note.states, (0, 7), strict=True):
            torch.testing.assert_close(states, out.hidden_states[layer + 1][0][text], rtol=1e-3, atol=1e-3)
    taught = lesson(one_by_one, [notes.reader()(i) for i in range(len(one_by_one))], prompt=0.25)
    assert float((taught.weights == 1).sum()) == sum(len(sample.answer) for sample in one_by_one)
    assert len(taught.weights) == int(taught.text.sum()) == sum(int((~s.is_image).sum()) for s in one_by_one)
