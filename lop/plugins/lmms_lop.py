"""LOP's models under lmms-eval: `--model lop --model_args pretrained=PATH`, dense or pruned.

lmms-eval finds this through its own entry points (group `lmms_eval.models`; see `lop.plugins.evaluate.manifest`).
"""

from collections.abc import Sequence

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from lop.model.adapter import load_model
from lop.model.find import find_model
from lop.model.generation import encode_prompts, generate
from lop.model.samples import as_seen

_NEW_TOKENS = 128


class LopQwenVL(lmms):
    """A Qwen2.5-VL checkpoint that answers as `lop compare` scores it: its own processor and chat template, greedily.

    Args:
        pretrained: 'tiny', a local folder (dense or pruned by LOP) or a hub id.
        batch_size: sequences that are generated together.
        device, dtype: as in LOP's config.

    Raises:
        LopError: there is no such checkpoint, or it is damaged.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 16,
        device: str = "auto",
        dtype: str = "auto",
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self._vl = load_model(find_model(pretrained), device=device, dtype=dtype)
        self._batch = int(batch_size)

    def clean(self) -> None:
        """Keeps the model, for the next tasks: lmms-eval's own would delete it."""

    @torch.inference_mode()
    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Greedy answers, in the order of the requests."""
        # Prompts of like length and settings go together: padding costs, and settings hold for a whole batch.
        settings = [repr(sorted(request.args[1].items())) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: (settings[i], len(requests[i].args[0])))
        answers: dict[int, str] = {}
        with tqdm(total=len(requests), desc="generate", unit="answer", leave=False) as bar:
            while order:
                same = [i for i in order[: self._batch] if settings[i] == settings[order[0]]]
                answers |= dict(zip(same, self._generate([requests[i] for i in same])))
                order = order[len(same) :]
                bar.update(len(same))
        return [GenerationResult(text=answers[i]) for i in range(len(requests))]

    @torch.inference_mode()
    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Each continuation's negative log-probability in nats, which lmms-eval minimises, and whether it is greedy."""
        return [GenerationResult(text=self._likelihood(request)) for request in requests]  # type: ignore[arg-type]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """No task of LOP's has more than one round."""
        raise NotImplementedError("LOP's adapter answers in one round only")

    def _generate(self, requests: Sequence[Instance]) -> list[str]:
        options = dict(requests[0].args[1])
        texts = generate(
            self._vl,
            [_prompt(request) for request in requests],
            [self._images(request) for request in requests],
            new_tokens=int(options.get("max_new_tokens", _NEW_TOKENS)),
        )
        until = options.get("until") or []
        return [_cut(text, [until] if isinstance(until, str) else until) for text in texts]

    def _likelihood(self, request: Instance) -> tuple[float, bool]:
        inputs = encode_prompts(self._vl, [_prompt(request)], [self._images(request)])
        ids = self._vl.processor.tokenizer(request.args[1], add_special_tokens=False, return_tensors="pt")["input_ids"]
        ids = ids.to(inputs["input_ids"].device)
        for name, more in (("input_ids", ids), ("attention_mask", 1), ("mm_token_type_ids", 0)):
            if name in inputs:
                tail = more if isinstance(more, torch.Tensor) else torch.full_like(ids, more)
                inputs[name] = torch.cat([inputs[name], tail], dim=1)
        logits = self._vl.model(**inputs).logits[0, -ids.shape[1] - 1 : -1].float()
        chosen = logits.log_softmax(-1).gather(1, ids[0][:, None])
        return -float(chosen.double().sum()), bool((logits.argmax(-1) == ids[0]).all())

    def _images(self, request: Instance) -> list[Image.Image]:
        doc_to_visual, doc_id, task, split = request.args[2:6]
        return [as_seen(image) for image in doc_to_visual(self.task_dict[task][split][doc_id]) or []]


def _prompt(request: Instance) -> str:
    # Where tasks say that the image stands, the chat template says so already.
    return str(request.args[0]).replace("<image>", "")


def _cut(text: str, until: Sequence[str]) -> str:
    # "\n\n" is lmms-eval's default and no end of an answer: Qwen writes paragraphs.
    for end in until:
        if end and end != "\n\n":
            text = text.split(end)[0]
    return text
